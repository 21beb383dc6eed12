"""Methods that choose rows: what the model can't answer yet, what moves it most, the best of its own answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sasft.data import Row
from sasft.errors import UsageError
from sasft.evaluation.scoring import exact_match, rouge_l
from sasft.filters import prompt_text
from sasft.methods.base import Method, Workshop
from sasft.methods.checks import check_counts
from sasft.methods.judging import against_reference, grades, on_its_own
from sasft.methods.written import greedy, writing
from sasft.mixing import SELF, TASK
from sasft.sampling import Sampler, row_seed
from sasft.settings import option
from sasft.stated import numbers
from sasft.text_checks import stands_in
from sasft.writing import Job

GRADERS = ("exact", "contains", "number", "rouge", "self")


@dataclass(frozen=True, kw_only=True)
class SLearnLlm(Method):
    r"""SLearnLLM: SFT on the task rows that the model answers wrongly.

    .. math:: S=\{i: r(\hat y_i,y_i)<m\},\qquad\hat y_i=\text{greedy answer of }\theta_0\text{ to }x_i,

    with a grade r in [0, 1]. Source: arXiv 2505.17470, where the model grades itself by a chain of thought. Its prompt,
    threshold and decoding are not known; our choices: greedy answers; rules where they will do (``exact``: the same words;
    ``contains``: the reference's words among others; ``number``: the same last number; ``rouge``: ROUGE-L F1), and with ``self``
    the model's own grade (:func:`sasft.methods.judging.grades`, after at most ``think_tokens`` of reasoning); the mark m. A small
    model is no judge: the report says how often the grader agrees with the rule ``exact``. The method keeps the rows of highest
    loss, for efficiency; it claims nothing about forgetting. Where the model answers nothing rightly it is SFT, as it is for
    m > 1. Which rows are chosen does not depend on their order.

    Cost: an answer to every task row, and with ``self`` a reasoning and a forward pass on it. ``slearnllm.json`` has the grades.
    """

    name: ClassVar[str] = "slearnllm"
    paper: ClassVar[str] = "arXiv 2505.17470"
    writes: ClassVar[bool] = True

    grader: Literal["exact", "contains", "number", "rouge", "self"] = option(
        "exact", f"who says what is right: {', '.join(GRADERS)}")
    pass_mark: float = option(0.5, "grade from which an answer is right, > 0; above 1 none is, which is SFT")
    max_new_tokens: int = option(256, "length cap of the answers that are graded")
    think_tokens: int = option(128, "length cap of the reasoning before a grade of the grader self; 0 for none")

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise UsageError(f"grader must be one of {', '.join(GRADERS)}, got {self.grader!r}")
        if not self.pass_mark > 0:
            raise UsageError(f"pass_mark must be a number > 0, got {self.pass_mark}; at 0 every answer would be right")
        check_counts(max_new_tokens=self.max_new_tokens)
        check_counts(0, think_tokens=self.think_tokens)

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        if self.pass_mark > 1:
            return found
        task = found[TASK]
        if self.grader == "number" and (without := next((row for row in task if not numbers(row.response)), None)):
            raise UsageError(f"grader=number compares last numbers, but the answer of row {without.id} has none; take another "
                             "grader")
        keys = [_key(row) for row in task]
        jobs = {key: Job(key, tuple(row.prompt), row_seed(workshop.seed, self.name, key))
                for key, row in zip(keys, task, strict=True)}
        with writing(workshop, self.name, "answers", greedy(self.max_new_tokens), len(jobs)) as write:
            answers = {row.id: row.response for row in write(list(jobs.values()))}
        graded = self._grades(workshop, task, [answers[key] for key in keys])
        exact = [exact_match(answers[key], [row.response]) for key, row in zip(keys, task, strict=True)]
        kept = [row for row, grade in zip(task, graded, strict=True) if grade < self.pass_mark]
        agreement = sum((grade >= self.pass_mark) == bool(same) for grade, same in zip(graded, exact, strict=True)) / len(task)
        workshop.report(
            self.name, f"the model answers {len(task) - len(kept)} of {len(task)} task rows rightly and trains on the others; "
            f"{self.grader} agrees with exact match on {agreement:.0%}",
            rows=len(task), kept=len(kept), grader=self.grader, agreement_with_exact=agreement,
            grades={row.id: grade for row, grade in zip(task, graded, strict=True)})
        if not kept:
            raise UsageError(f"the model answers all {len(task)} task rows rightly by grader={self.grader} at pass_mark="
                             f"{self.pass_mark:g}, so there is nothing to train on; raise pass_mark, or take another grader")
        return {**found, TASK: kept}

    def _grades(self, workshop: Workshop, task: Sequence[Row], answers: Sequence[str]) -> list[float]:
        pairs = list(zip(task, answers, strict=True))
        if self.grader == "exact":
            return [exact_match(answer, [row.response]) for row, answer in pairs]
        if self.grader == "contains":
            return [float(stands_in(answer, row.response)) for row, answer in pairs]
        if self.grader == "number":
            return [float(numbers(answer)[-1:] == numbers(row.response)[-1:]) for row, answer in pairs]
        if self.grader == "rouge":
            return [rouge_l(answer, [row.response]) for row, answer in pairs]
        asked = [against_reference(prompt_text(row), row.response, answer, think=self.think_tokens > 0) for row, answer in pairs]
        names = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in asked]
        found = grades(workshop, self.name, dict(zip(names, asked, strict=True)), think_tokens=self.think_tokens)
        return [found[name] for name in names]


def _key(row: Row) -> str:
    """A name for what the row asks, so that neither order nor equal ids matter."""
    return hashlib.sha256(json.dumps([dict(message) for message in row.prompt], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Improved(Method):
    r"""Improved SFT, its single-model rung: self rows whose answer is the best of several, by the model's own grade.

    .. math:: y^*=\arg\max_{y\in\{y_1,\dots,y_n\}}s(u,y),\qquad y_j\sim p_{\theta_0}(\cdot\mid u)

    for every self row with prompt u. Source: arXiv 2506.09428, whose method has three models write three candidates each and a
    committee grade them; with the model to be trained as the only writer and judge it is the paper's own ablation, "single
    model, best of n", and no distillation. A strong committee would be one.

    Instructions are the prompts of the self rows, which ``sasft talk`` has the model write after its template's opening, as the
    paper does; y₁ is the answer they have already, the others are drawn with the sampler that the rows name. Grades are those of
    :func:`sasft.methods.judging.grades` without reasoning, and the first of equal ones wins (our choices; prompts and tie rule of
    the paper are not known). ``samples=1`` is SA-SFT. Keeping by a look at the answer breaks the score identity
    (docs/theory.md F2c), and a small model is no judge.

    Cost: n − 1 answers a self row, and a forward pass on each of the n. ``improved.json`` says which were taken.
    """

    name: ClassVar[str] = "improved"
    paper: ClassVar[str] = "arXiv 2506.09428 (single model)"
    writes: ClassVar[bool] = True

    samples: int = option(3, "n, candidates for each answer, the self row's own one included; 1 is SA-SFT")

    def __post_init__(self) -> None:
        check_counts(samples=self.samples)

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        if self.samples == 1:
            return found
        own = found.get(SELF, [])
        sampler = _sampler_of(own, workshop)
        jobs = [Job(f"{row.id}/{k}", tuple(row.prompt), row_seed(workshop.seed, self.name, row.id, k))
                for row in own for k in range(1, self.samples)]
        with writing(workshop, self.name, "candidates", sampler, len(jobs)) as write:
            drawn = iter(write(jobs))
        candidates = [[row, *(next(drawn) for _ in range(1, self.samples))] for row in own]
        graded = grades(workshop, self.name, {
            f"{row.id}/{k}": on_its_own(prompt_text(row), candidate.response)
            for row, of_row in zip(own, candidates, strict=True) for k, candidate in enumerate(of_row)})
        taken: list[int] = []
        for i, row in enumerate(own):
            marks = [graded[f"{row.id}/{k}"] for k in range(self.samples)]
            taken.append(marks.index(max(marks)))
            best = candidates[i][taken[-1]]
            own[i] = replace(best, id=row.id, source=row.source)
        workshop.report(self.name, f"{sum(map(bool, taken))} of {len(own)} self rows were given another answer", rows=len(own),
                        samples=self.samples, taken={row.id: k for row, k in zip(own, taken, strict=True)})
        return found


def _sampler_of(rows: Sequence[Row], workshop: Workshop) -> Sampler:
    """The sampler that self rows name; checks that they are this model's, and that there are some."""
    if not rows:
        raise UsageError("improved chooses among answers to the prompts of self rows, but there are none; write some with "
                         "`sasft talk`")
    named = [row.meta.get("sampler") for row in rows]
    if None in named:
        raise UsageError(f"self row {rows[named.index(None)].id} names no sampler, and improved draws its other candidates with "
                         "the one that wrote the first; take rows as `sasft talk` writes them")
    if other := next((row for row, sampler in zip(rows, named, strict=True) if sampler != named[0]), None):
        raise UsageError(f"self rows {rows[0].id} and {other.id} name different samplers, {named[0]} and "
                         f"{other.meta['sampler']}; improved needs rows of one sampler")
    mine = workshop.writer.provenance.get("weights_sha256") if workshop.writer else None
    if other := next((row for row in rows if row.meta.get("weights_sha256") not in (None, mine)), None):
        raise UsageError(f"self row {other.id} was written by another model (its weights_sha256 differs); improved needs answers "
                         "of the model that is trained")
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise UsageError(f"two self rows have the id {next(i for i in ids if ids.count(i) > 1)}; give each one of its own")
    return Sampler(**named[0])
