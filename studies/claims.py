"""The claims under test, and the predictions that studies registered about them.

A study writes its predictions into a module of its own, before its first full run, as ``PREDICTIONS``; ``MODULES`` names that
module here. Such modules import no torch, so that the ledger is printed at once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

MODULES = (
    "studies.two_by_two_predictions",
    "studies.lab.predictions",
    "studies.forces_predictions",
)


@dataclass(frozen=True)
class Claim:
    """One statement of the theory (docs/theory.md), and what found in a study would refute it."""

    id: str
    statement: str
    refuted_by: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One concrete test of a claim, said before the result is known.

    ``id``: claim/study/what is tested. ``predicted`` "+": the effect lies above ``sesoi``, the smallest effect of interest; "-": it
    lies below ``-sesoi``. A negative ``sesoi`` is allowed, so "-" with -1e-8 says that the effect is less than 1e-8. ``study``: the
    command that makes the result, as in ``studies two_by_two``.
    """

    id: str
    claim: str
    statement: str
    predicted: Literal["+", "-"]
    sesoi: float
    unit: str
    study: str


CLAIMS = {claim.id: claim for claim in (
    Claim("C1", "self-data sampled exactly from the base exert no force at the start; self-data that break a rule of F2 do",
          "a force of exact self-data beyond its error, or none of self-data that break a rule"),
    Claim("C2", "style alone makes a model forget: its own answers in a foreign style cost more than as it wrote them",
          "as little forgotten over own answers in a foreign style as over the same ones untouched"),
    Claim("C3", "style makes up the larger part of what is forgotten",
          "a style-induced share below one half"),
    Claim("C4", "the force of style points the same way in every row and every task, more than that of content does",
          "style gradients no more coherent than content gradients, or shared no more than permuted ones"),
    Claim("C5", "forgetting follows the length of the drift in the Fisher metric, not its plain length",
          "runs ranked as well by the plain length of their drift"),
    Claim("C6", "self-data push a model that has drifted back to where it was",
          "a force of the wrong sign, or of another size than the Fisher form's"),
    Claim("C7", "the push removes more of style's drift than of content's, as curvatures at the start foretell",
          "drift of style and of content shrunk alike"),
    Claim("C8", "data from elsewhere carry a style force of their own, the stronger the further their style is from the model's",
          "as little forgotten with external data as with self-data, or in no order of style distance"),
    Claim("C9", "self-data protect what they do not talk about",
          "a topic left out of the self-data forgotten as if there were none"),
    Claim("C10", "SA-SFT learns the task and forgets less than training on the task does",
          "as much forgotten with SA-SFT as without"),
    Claim("C11", "the sampler matters: exact self-data keep the model's entropy, sharpened ones lower it",
          "the same entropy after either sampler's data"),
)}


def registered() -> dict[str, Prediction]:
    """The predictions of all studies by id, in the order of their registration."""
    return checked(prediction for module in MODULES for prediction in import_module(module).PREDICTIONS)


def checked(predictions: Iterable[Prediction]) -> dict[str, Prediction]:
    """``predictions`` by id; a :class:`ValueError` for one that cannot be judged or told from another.

    >>> checked([Prediction(id="C2/demo/a", claim="C2", statement="…", predicted="+", sesoi=0.1, unit="nats", study="demo")]).keys()
    dict_keys(['C2/demo/a'])
    """
    by_id: dict[str, Prediction] = {}
    for p in predictions:
        if p.claim not in CLAIMS:
            raise ValueError(f"prediction {p.id!r} names claim {p.claim!r}; there are {', '.join(CLAIMS)}")
        if not p.id.startswith(f"{p.claim}/{p.study}/"):
            raise ValueError(f"prediction {p.id!r} must begin with its claim and study, {p.claim}/{p.study}/")
        if p.id in by_id:
            raise ValueError(f"prediction {p.id!r} is registered twice; give each an id of its own")
        if p.predicted not in ("+", "-"):
            raise ValueError(f"prediction {p.id!r} has predicted {p.predicted!r}; it must be '+' or '-'")
        if not math.isfinite(p.sesoi):
            raise ValueError(f"prediction {p.id!r} has sesoi {p.sesoi}; it must be a finite number")
        by_id[p.id] = p
    return by_id
