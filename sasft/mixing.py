"""The mix of task rows and self rows, laid out step by step before training starts.

A :class:`Plan` names every row of every optimiser step. That makes the mix exact (never off by more than one
row from λ at any step), the same for the same seed, inspectable on disk, and resumable by position.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from sasft.errors import UsageError

TASK, SELF = "task", "self"


@dataclass(frozen=True)
class Plan:
    """Which rows each optimiser step reads: ``steps[k]`` is a tuple of (source, row index) pairs.

    ``tokens`` holds the number of loss tokens of every row by source, so that the plan can report itself.
    """

    steps: tuple[tuple[tuple[str, int], ...], ...]
    tokens: dict[str, tuple[int, ...]]
    lam: float

    def __iter__(self) -> Iterator[tuple[tuple[str, int], ...]]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def loss_tokens(self, source: str | None = None) -> list[int]:
        """Loss tokens of each step, of one source or of all."""
        return [sum(self.tokens[s][i] for s, i in step if source in (None, s)) for step in self.steps]

    def report(self) -> dict[str, float | int | dict]:
        """What the mix really is: λ asked for, λ realised in rows and in loss tokens, and how often rows repeat."""
        rows = {s: sum(src == s for step in self.steps for src, _ in step) for s in (TASK, SELF)}
        tokens = {s: sum(self.loss_tokens(s)) for s in (TASK, SELF)}
        epochs = {s: rows[s] / len(self.tokens[s]) for s in self.tokens if self.tokens[s]}
        return {
            "lambda_asked": self.lam,
            "lambda_rows": rows[SELF] / (rows[TASK] + rows[SELF]),
            "lambda_tokens": tokens[SELF] / (tokens[TASK] + tokens[SELF]),
            "steps": len(self.steps),
            "rows": rows,
            "loss_tokens": tokens,
            "epochs": epochs,
            "loss_tokens_per_step": {"min": min(self.loss_tokens()), "max": max(self.loss_tokens())},
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
                         "write some with `sasft generate`, or set lam to 0")
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
    task = _endless(len(task_tokens), seed, TASK)
    own = _endless(len(self_tokens), seed, SELF)
    laid: list[tuple[tuple[str, int], ...]] = []
    n_task = n_self = spent = 0
    waiting: int | None = None
    for k in range(1, steps + 1):
        step: list[tuple[str, int]] = []
        if rows_per_step is not None:
            want = round(k * rows_per_step * (1 - share))
            while n_task < want:
                step.append((TASK, next(task)))
                n_task += 1
            want_self = k * rows_per_step - want
        else:
            while True:
                waiting = next(task) if waiting is None else waiting
                # A row joins if that brings the running total nearer to the budget than leaving it would.
                if spent + task_tokens[waiting] / 2 > k * tokens_per_step:
                    break
                spent += task_tokens[waiting]
                step.append((TASK, waiting))
                n_task, waiting = n_task + 1, None
            want_self = round(n_task * share / (1 - share))
        while n_self < want_self:
            step.append((SELF, next(own)))
            n_self += 1
        laid.append(tuple(step))
    return Plan(tuple(laid), {TASK: tuple(task_tokens), SELF: tuple(self_tokens)}, float(lam))


def _endless(n: int, seed: int, source: str) -> Iterator[int]:
    """Row indices in seeded random order, epoch after epoch; one source's order ignores the other source."""
    rng = np.random.default_rng([seed, int.from_bytes(source.encode(), "little")])
    while n:
        yield from rng.permutation(n).tolist()
