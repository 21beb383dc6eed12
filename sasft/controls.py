"""Controls: what a mixed run must be compared with, so that what is mixed in is told from more data, more steps or more text.

A run on task and self rows takes more tokens, and other steps, than the task alone. :func:`match` lays out sources so that
every step agrees with a given plan in rows or in loss tokens; :func:`task_repeated` fills a plan's steps with the task alone;
:func:`shuffle_tokens` keeps the self rows' tokens and takes away their order.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np

from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.mixing import TASK, By, Plan, lay


def match(
    plan: Plan,
    tokens: Mapping[str, Sequence[int]],
    shares: Mapping[str, float],
    *,
    equal: Literal["tokens", "rows"] = "tokens",
    by: By = "rows",
    seed: int = 0,
) -> Plan:
    """Other sources in the steps of ``plan``: as many of them, each as large.

    ``equal`` says in what: ``rows`` gives every step the plan's number of rows, ``tokens`` its loss tokens, on running totals
    that are never off by more than half a row. ``tokens``, ``shares`` and ``by`` are those of :func:`sasft.mixing.mix`;
    with the plan's own ``seed``, each source is read in the plan's order.

    Raises :class:`UsageError` as :func:`sasft.mixing.mix` does.

    >>> from sasft.mixing import make_plan
    >>> mixed = make_plan([4] * 8, [10] * 8, steps=3, lam=0.5, rows_per_step=4)
    >>> alone = match(mixed, {"task": [4] * 8}, {"task": 1})
    >>> mixed.loss_tokens(), alone.loss_tokens(), match(mixed, {"task": [4] * 8}, {"task": 1}, equal="rows").loss_tokens()
    ([28, 28, 28], [28, 28, 28], [16, 16, 16])
    """
    if equal not in ("tokens", "rows"):
        raise UsageError(f"equal must be tokens or rows, got {equal!r}")
    sizes = plan.loss_tokens() if equal == "tokens" else [len(step) for step in plan]
    return lay(tokens, shares, by=by, limits=accumulate(sizes), counted=equal, seed=seed)


def task_repeated(plan: Plan, *, equal: Literal["tokens", "rows"] = "tokens", source: str = TASK, seed: int = 0) -> Plan:
    """The control that repeats the task instead of mixing: the plan's steps, filled from ``source`` alone (see :func:`match`)."""
    if source not in plan.tokens:
        raise UsageError(f"source must be one of the plan's ({', '.join(plan.tokens)}), got {source!r}")
    return match(plan, {source: plan.tokens[source]}, {source: 1}, equal=equal, seed=seed)


def shuffle_tokens(rows: Sequence[Encoded], *, seed: int = 0) -> list[Encoded]:
    """The control that keeps the self rows' prompts, lengths and tokens and loses what they say.

    Each response's tokens are put in a random order; its end-of-turn token stays the last one. Plans that hold for the rows
    hold for the result. (Shuffling within each row, not across rows, is our choice: prompts keep their own words.)

    >>> shuffle_tokens([Encoded((1, 5, 6, 7, 2), (-100, 5, 6, 7, 2))], seed=3)[0].input_ids
    (1, 7, 6, 5, 2)
    """
    def order(n: int, k: int) -> list[int]:
        return np.random.default_rng([seed, k]).permutation(n).tolist()

    return [row.with_response([row.response_ids[i] for i in order(len(row.response_ids), k)]) for k, row in enumerate(rows)]
