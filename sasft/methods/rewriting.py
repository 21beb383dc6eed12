"""Task answers in the model's own words."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Method, Workshop
from sasft.methods.checks import check_weights
from sasft.methods.written import writing
from sasft.mixing import TASK
from sasft.sampling import Sampler, row_seed
from sasft.settings import option
from sasft.stated import numbers
from sasft.writing import Job, Messages

Check = Literal["none", "number", "text"]
BANNED = ("reference answer", "your response", "my response", "your own response", "now it's your turn")
"""Phrases, in any case, of an answer that talks about the prompt it was shown."""

_SHOWN = """{prompt}

Reference answer:
{answer}

Using the reference answer, write your own answer to the request."""


@dataclass(frozen=True, kw_only=True)
class Rewriting(Method):
    r"""SDFT as rewriting: the model says each task answer in its own words, and is trained on that where it passes.

    .. math:: L=\mathbb E\,[-\log p_\theta(\hat y\mid x)],\qquad\tilde y\sim p_{\theta_0}(\cdot\mid t(x,y)),\qquad
       \hat y=\tilde y\text{ if it is accepted, else }y.

    t(x, y) shows the request with its reference answer. Answers are replaced, none is added. Source: arXiv 2402.13669. A rewrite
    is accepted by :func:`flaw`: no phrase that gives the prompt away (the paper's list), and, by ``check``, the truth in it:
    ``number``, the last number is the reference's last one (the paper's check of mathematics, of integers there); ``text``, the
    reference stands in it word for word, for labels and function calls (our choice; the paper judges code by its form).

    Our choices: the wording of t; an answer that the length cap has cut, or an empty one, is not accepted (the paper's list
    passes them); ``share`` rewrites some rows only, drawn by the run's seed. The sampler is what the paper's framework defaults
    to, its own setting being unknown. Keeping by a look at the answer breaks the score identity (docs/theory.md F2c).
    Cost: one generation a row. ``sdft-rewriting.json`` says how many were accepted, and why the others were not.
    """

    name: ClassVar[str] = "sdft-rewriting"
    paper: ClassVar[str] = "arXiv 2402.13669"
    writes: ClassVar[bool] = True

    share: float = option(1.0, "share of the task rows that are rewritten, in [0, 1]; 0 is SFT")
    check: Check = option("none", "what an accepted rewrite must have of the reference: none, number (the last one) or text")
    temperature: float = option(0.95, "temperature of the rewrites")
    top_p: float = option(0.7, "nucleus of the rewrites")
    max_new_tokens: int = option(512, "length cap of the rewrites")

    def __post_init__(self) -> None:
        check_weights(0, 1, share=self.share)
        if self.check not in get_args(Check):
            raise UsageError(f"check must be one of {', '.join(get_args(Check))}, got {self.check!r}")
        self._sampler()

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        task = found[TASK]
        chosen = sorted(np.random.default_rng(workshop.seed).permutation(len(task))[: round(self.share * len(task))].tolist())
        if not chosen:
            return found
        jobs = [Job(f"rewrite-{i:06d}", tuple(task[i].prompt), row_seed(workshop.seed, "rewriting", i), shown=_shown(task[i]))
                for i in chosen]
        with writing(workshop, self.name, "rewrites", self._sampler(), len(jobs)) as write:
            rewrites = write(jobs)
        flaws: Counter[str] = Counter()
        for i, rewrite in zip(chosen, rewrites, strict=True):
            if found_flaw := flaw(rewrite, task[i].response, self.check):
                flaws[found_flaw] += 1
            else:
                task[i] = replace(task[i], response=rewrite.response, response_ids=rewrite.response_ids, finished=True,
                                  meta={**task[i].meta, "reference": task[i].response})
        accepted = len(chosen) - flaws.total()
        why = "".join(f", {count} {name}" for name, count in flaws.most_common())
        workshop.report(self.name, f"{accepted} of {len(chosen)} rewrites accepted{why}", rows=len(task), rewritten=len(chosen),
                        accepted=accepted, fallback=len(task) - accepted, flaws=dict(flaws))
        return found

    def _sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


def flaw(rewrite: Row, reference: str, check: Check = "none") -> str | None:
    """Why a rewrite is not accepted, the first reason; None if it is.

    >>> said = Row("1", "task", (), "You get 1,200 in all.")
    >>> flaw(said, "1000 + 200 = 1200", "number"), flaw(said, "= 1300", "number")
    (None, 'other number')
    >>> flaw(Row("1", "task", (), "As the Reference Answer says, 4."), "4")
    'banned phrase'
    """
    said = rewrite.response.strip()
    if not rewrite.finished:
        return "unfinished"
    if not said:
        return "empty"
    if said.startswith("Your turn") or any(phrase in said.lower() for phrase in BANNED):
        return "banned phrase"
    if check == "number" and not (numbers(reference) and numbers(said)[-1:] == numbers(reference)[-1:]):
        return "other number"
    if check == "text" and not _contains(said, reference):
        return "other text"
    return None


def _contains(said: str, reference: str) -> bool:
    """Whether the reference stands in it as whole words, white space and case aside."""
    words = r"\s+".join(map(re.escape, reference.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", said, re.IGNORECASE) is not None


def _shown(row: Row) -> Messages:
    *before, last = row.prompt
    if last["role"] != "user":
        raise UsageError(f"row {row.id}: the message before the answer is the {last['role']}'s; only answers to a user's can be "
                         "rewritten")
    return (*before, {"role": "user", "content": _SHOWN.format(prompt=last["content"], answer=row.response)})
