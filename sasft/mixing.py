"""The mix of sources, laid out step by step before training starts.

A :class:`Plan` names every row of every optimiser step. That makes the mix exact (never off by more than one
row from what was asked at any step), the same for the same seed, inspectable on disk, and resumable by position.
:func:`make_plan` mixes a task and self rows at a ratio λ of rows; :func:`mix` takes any number of sources, by rows, by
loss tokens, or by weights in the loss. Plans that serve as controls of others are in :mod:`sasft.controls`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sasft.errors import UsageError

TASK, SELF = "task", "self"
Key = tuple[str, int]
By = Literal["rows", "tokens", "loss"]


@dataclass(frozen=True)
class Plan:
    """Which rows each optimiser step reads: ``steps[k]`` is a tuple of (source, row index) pairs.

    ``tokens`` holds the number of loss tokens of every row by source, so that the plan can report itself; ``lam`` is the
    share of self rows that was asked for. ``shares``: what was asked for, by source, in the measure ``by``.
    ``loss_weights``: by what the loss of a source's rows is multiplied (1 for a source that is not named).
    """

    steps: tuple[tuple[Key, ...], ...]
    tokens: dict[str, tuple[int, ...]]
    lam: float
    by: By = "rows"
    shares: Mapping[str, float] = field(default_factory=dict)
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Key, ...]]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def loss_tokens(self, source: str | None = None) -> list[int]:
        """Loss tokens of each step, of one source or of all."""
        return [sum(self.tokens[s][i] for s, i in step if source in (None, s)) for step in self.steps]

    def weighted_tokens(self) -> list[float]:
        """Loss tokens of each step, times their sources' loss weights."""
        return [sum(self.loss_weights.get(s, 1.0) * self.tokens[s][i] for s, i in step) for step in self.steps]

    @property
    def divisor(self) -> float:
        """The constant that summed losses are divided by: the mean weighted number of loss tokens a step."""
        return sum(self.weighted_tokens()) / len(self.steps)

    def report(self) -> dict[str, Any]:
        """What the mix really is: λ asked for, λ realised in rows and in loss tokens, and how often rows repeat.

        ``shares``, by source: of the rows and of the loss tokens, as they are and times their loss weights, beside what was
        ``asked`` in the measure ``by``. ``epochs``: rows read over rows there are; ``most_reads``: of any one row.
        """
        reads = {s: Counter(i for step in self.steps for src, i in step if src == s) for s in self.tokens}
        rows = {s: reads[s].total() for s in self.tokens}
        tokens = {s: sum(self.loss_tokens(s)) for s in self.tokens}
        weights = {s: self.loss_weights.get(s, 1.0) for s in self.tokens}
        shares = {"rows": _normalised(rows), "tokens": _normalised(tokens),
                  "weighted_rows": _normalised({s: rows[s] * weights[s] for s in rows}),
                  "weighted_tokens": _normalised({s: tokens[s] * weights[s] for s in rows})}
        a_step = self.loss_tokens()
        return {
            "lambda_asked": self.lam,
            "lambda_rows": shares["rows"].get(SELF, 0.0),
            "lambda_tokens": shares["tokens"].get(SELF, 0.0),
            "by": self.by,
            "shares": {s: {"asked": self.shares.get(s), **{what: of[s] for what, of in shares.items()}} for s in self.tokens},
            "loss_weights": weights,
            "steps": len(self.steps),
            "rows": rows,
            "loss_tokens": tokens,
            "epochs": {s: rows[s] / len(self.tokens[s]) for s in self.tokens if self.tokens[s]},
            "most_reads": {s: max(reads[s].values(), default=0) for s in self.tokens},
            "loss_tokens_per_step": {"min": min(a_step), "max": max(a_step)},
        }

    def save(self, path: Path) -> None:
        """Write the plan, one JSON object a step."""
        lines = (json.dumps({"step": k, "rows": step}) for k, step in enumerate(self.steps, start=1))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_plan(
    task_tokens: Sequence[int],
    self_tokens: Sequence[int] = (),
    *,
    steps: int,
    lam: float = 0.0,
    rows_per_step: int | None = None,
    tokens_per_step: int | None = None,
    seed: int = 0,
) -> Plan:
    r"""Lay out ``steps`` optimiser steps over task rows and self rows.

    ``task_tokens`` and ``self_tokens`` are the loss tokens of every row. The *task* part of a step is given either
    in rows (``rows_per_step``, all sources together: a share :math:`1-\lambda` of them are task rows) or as a budget
    of task loss tokens (``tokens_per_step``), which gives arms whose answers differ in length equal steps and equal
    tokens. Self rows join in the ratio :math:`\lambda : 1-\lambda` of rows. All counts are rounded on their running
    totals, so that the realised figure is never off by more than one row (or one row's tokens) at any step.

    Rows are read in seeded random order; a source that runs out starts again in a new order.

    Raises :class:`UsageError` if λ lies outside [0, 1), if λ > 0 finds no self rows, or a source is empty.

    >>> plan = make_plan([5] * 10, [3] * 10, steps=4, lam=0.25, rows_per_step=4)
    >>> [sum(source == "self" for source, _ in step) for step in plan]
    [1, 1, 1, 1]
    >>> plan.report()["lambda_rows"], round(plan.report()["lambda_tokens"], 3)
    (0.25, 0.167)
    """
    if not 0 <= lam < 1:
        raise UsageError(f"lam (the share of self rows) must lie in [0, 1), got {lam}; 0 trains on the task alone, "
                         "and 1 would train on no task row at all")
    if lam > 0 and not self_tokens:
        raise UsageError(f"lam is {lam}, so self rows are needed, but there are none; "
                         "write some with `sasft talk`, or set lam to 0")
    if not task_tokens:
        raise UsageError("there are no task rows to train on")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if (rows_per_step is None) == (tokens_per_step is None):
        raise UsageError(f"give either rows_per_step or tokens_per_step, got {rows_per_step} and {tokens_per_step}")
    share = Fraction(lam).limit_denominator(10**6)
    if rows_per_step is not None and rows_per_step * (1 - share) < 1:
        raise UsageError(f"rows_per_step={rows_per_step} at lam={lam} leaves steps without a task row; "
                         f"use at least {math.ceil(1 / (1 - share))} rows a step")
    if tokens_per_step is not None and tokens_per_step < max(task_tokens):
        raise UsageError(f"tokens_per_step={tokens_per_step} is less than the longest task answer "
                         f"({max(task_tokens)} loss tokens); raise it, or shorten the answers")
    task, own = _Stream(TASK, task_tokens, seed), _Stream(SELF, self_tokens, seed)
    laid: list[tuple[Key, ...]] = []
    for k in range(1, steps + 1):
        if rows_per_step is not None:
            want = round(k * rows_per_step * (1 - share))
            step = [*task.up_to_rows(want), *own.up_to_rows(k * rows_per_step - want)]
        else:
            step = [*task.up_to_tokens(k * tokens_per_step)]
            step += own.up_to_rows(round(task.rows * share / (1 - share)))
        laid.append(tuple(step))
    return Plan(tuple(laid), {TASK: tuple(task_tokens), SELF: tuple(self_tokens)}, float(lam),
                shares={TASK: 1 - float(lam), SELF: float(lam)})


def mix(
    tokens: Mapping[str, Sequence[int]],
    shares: Mapping[str, float],
    *,
    by: By = "rows",
    steps: int,
    rows_per_step: int | None = None,
    tokens_per_step: int | None = None,
    read: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Plan:
    r"""Lay out ``steps`` optimiser steps over any number of sources.

    ``tokens``: the loss tokens of every row, by source. ``shares``: positive weights, scaled to a sum of 1, of which
    ``by`` says what they are shares of, for source s with share :math:`\lambda_s`:

    - ``rows``: of the rows read; after every row the count of each source is less than one row from its share
      (Tijdeman's schedule for the chairman assignment problem, Discrete Mathematics 32, 1980: at most
      :math:`1 - 1/(2k-2)` for k sources);
    - ``tokens``: of the loss tokens; after every row, any two sources' tokens over shares differ by at most half of the
      longest row of each over its share;
    - ``loss``: of the rows' weight in the loss. Rows are read in the proportions ``read`` (equal ones by default) and weigh
      :math:`\lambda_s / \mathrm{read}_s` each, so that in expectation the gradient is that of ``by="rows"`` with the
      same shares, whatever ``read`` is; only its variance differs.

    A step has ``rows_per_step`` rows, or about ``tokens_per_step`` loss tokens, of all sources together (on running
    totals, never off by more than half a row). Sources are read as in :func:`make_plan`: in one seeded order each that
    no other source changes.

    Raises :class:`UsageError` if sources and shares do not go together, a source has no rows, a share is not a
    positive number, or a step would be empty.

    >>> plan = mix({"task": [5] * 9, "self": [3] * 9, "web": [8] * 9}, {"task": 2, "self": 1, "web": 1}, steps=3, rows_per_step=4)
    >>> plan.report()["rows"]
    {'task': 6, 'self': 3, 'web': 3}
    """
    if by not in ("rows", "tokens", "loss"):
        raise UsageError(f"by must be rows, tokens or loss, got {by!r}")
    if read is not None and by != "loss":
        raise UsageError(f"read is for by='loss', where it says how often rows are read; with by={by!r} the shares say it")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if (rows_per_step is None) == (tokens_per_step is None):
        raise UsageError(f"give either rows_per_step or tokens_per_step, got {rows_per_step} and {tokens_per_step}")
    size = rows_per_step if tokens_per_step is None else tokens_per_step
    if size < 1:
        raise UsageError(f"{'rows' if tokens_per_step is None else 'tokens'}_per_step must be at least 1, got {size}")
    limits = [size * k for k in range(1, steps + 1)]
    return lay(tokens, shares, by=by, limits=limits, counted="rows" if tokens_per_step is None else "tokens", read=read, seed=seed)


def lay(
    tokens: Mapping[str, Sequence[int]],
    shares: Mapping[str, float],
    *,
    by: By,
    limits: Iterable[int],
    counted: Literal["rows", "tokens"],
    read: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Plan:
    """As :func:`mix`, with steps that end where the running total of rows or loss tokens reaches ``limits``."""
    asked = _checked_shares("shares", shares, tokens)
    reading = asked if by != "loss" else _checked_shares("read", read or dict.fromkeys(tokens, 1), tokens)
    streams = {s: _Stream(s, tokens[s], seed) for s in tokens}
    turns = _by_tokens(streams, reading) if by == "tokens" else _by_rows(reading)
    laid: list[tuple[Key, ...]] = []
    total, source = 0, next(turns)
    for k, limit in enumerate(limits, start=1):
        step: list[Key] = []
        while total + (cost := 1 if counted == "rows" else streams[source].next_tokens) / 2 <= limit:
            total += cost
            step.append(streams[source].take())
            source = next(turns)
        if not step:
            raise UsageError(f"step {k} would be empty: its share of {counted} is less than half of the next row, of "
                             f"{streams[source].next_tokens} loss tokens; allow more {counted} a step, or shorten the answers")
        laid.append(tuple(step))
    weights = {s: float(asked[s] / reading[s]) for s in tokens} if by == "loss" else {}
    return Plan(tuple(laid), {s: tuple(t) for s, t in tokens.items()}, float(asked.get(SELF, 0)), by,
                {s: float(share) for s, share in asked.items()}, weights)


def _by_rows(shares: Mapping[str, Fraction]) -> Iterator[str]:
    """Tijdeman's schedule: among the sources that may be next, the one that must be next soonest."""
    slack = 1 - Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else Fraction(0)
    may = {s: (1 - slack) / share for s, share in shares.items()}
    must = {s: slack / share for s, share in shares.items()}
    for at in count(1):
        source = min((s for s in shares if may[s] <= at), key=must.__getitem__)
        may[source] += 1 / shares[source]
        must[source] += 1 / shares[source]
        yield source


def _by_tokens(streams: "Mapping[str, _Stream]", shares: Mapping[str, Fraction]) -> Iterator[str]:
    """The source whose next row, counted by half, keeps it furthest behind its share."""
    while True:
        yield min(streams, key=lambda s: (streams[s].spent + Fraction(streams[s].next_tokens, 2)) / shares[s])


def _checked_shares(name: str, given: Mapping[str, float], tokens: Mapping[str, Sequence[int]]) -> dict[str, Fraction]:
    if given.keys() != tokens.keys():
        raise UsageError(f"{name} must name every source once: they name {', '.join(given) or 'none'}, the sources are "
                         f"{', '.join(tokens) or 'none'}")
    for source, share in given.items():
        if not 0 < share < math.inf:
            raise UsageError(f"{name} of {source} must be a number > 0, got {share}; leave out a source that is not wanted")
        if not len(tokens[source]):
            raise UsageError(f"the source {source} has no rows; leave it out, or add rows")
    parts = {s: Fraction(share).limit_denominator(10**6) for s, share in given.items()}
    return {s: part / sum(parts.values()) for s, part in parts.items()}


def _normalised(counts: Mapping[str, float]) -> dict[str, float]:
    return {s: n / sum(counts.values()) for s, n in counts.items()}


class _Stream:
    """One source's rows in seeded random order, epoch after epoch, whatever is read of the others."""

    def __init__(self, source: str, tokens: Sequence[int], seed: int) -> None:
        self.source, self.tokens = source, tokens
        self.rows = self.spent = 0
        self._rng = np.random.default_rng([seed, int.from_bytes(source.encode(), "little")])
        self._ahead: list[int] = []

    @property
    def next_tokens(self) -> int:
        return self.tokens[self._next()]

    def take(self) -> Key:
        index = self._next()
        self._ahead.pop()
        self.rows += 1
        self.spent += self.tokens[index]
        return self.source, index

    def up_to_rows(self, total: int) -> Iterator[Key]:
        while self.rows < total:
            yield self.take()

    def up_to_tokens(self, total: int) -> Iterator[Key]:
        """A row joins if that brings the running total nearer to the budget than leaving it would."""
        while self.spent + self.next_tokens / 2 <= total:
            yield self.take()

    def _next(self) -> int:
        if not self._ahead:
            self._ahead = self._rng.permutation(len(self.tokens)).tolist()[::-1]
        return self._ahead[-1]
