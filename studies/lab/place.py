"""What the calibration's cases share: one base of the lab with a drift from it, sources of rows, and the rows of all repeats."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from drift.forward import logits_of, summed_nll
from sasft.chat import collate
from studies.lab.descent import descend
from studies.lab.drawing import PAD, draw, encoded, module
from studies.lab.exact import Expected
from studies.lab.experiment import ALL, OTHERS, Bases, cell, external_rows, rows_of_cell, self_rows
from studies.lab.model import flat, unflat
from studies.lab.tree import flow

Batch = Mapping[str, object]
Found = tuple[float, float, float]  # an estimate, and the ends of its interval (nan without one)


@dataclass(frozen=True)
class Case:
    """One estimator. ``exact``: what it estimates; ``find(k)``: what it finds in repeat k; ``seconds``: of one call on ``rows`` rows;
    ``of_pass``: in units of a forward and a backward pass over them (nan where no model is run)."""

    quantity: str
    estimator: str
    rows: int
    exact: float
    find: Callable[[int], Found]
    seconds: float = math.nan
    of_pass: float = math.nan


def within(value: float, error: float, units: int) -> Found:
    """An estimate with the 95 % interval that its standard error over so many independent units gives: ± t · error."""
    reach = student.ppf(0.975, units - 1) * error
    return value, value - reach, value + reach


def bare(value: float) -> Found:
    """An estimate that comes without an interval."""
    return value, math.nan, math.nan


def seconds(call: Callable[[], object]) -> float:
    """Time of one call: the median of five, after one to warm up."""
    call()
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))


class Place:
    """One base of the lab, a drift from it, and sources of rows: what all cases share."""

    def __init__(self, bases: Bases, seed: int = 0) -> None:
        self.bases, self.seed = bases, seed
        self.base = module(bases.one(seed), bases.setup.width)
        self.sources = {"self": self_rows(bases, seed), "kept": self_rows(bases, seed, prompts=OTHERS),
                        "external": external_rows(1.0)(bases, seed), "foreign": rows_of_cell(bases, seed, "foreign", "old", ALL)}

    @cached_property
    def drift(self) -> Tensor:
        """δ [P] after ten steps of training on the task."""
        task = cell("foreign", "new")(self.bases, self.seed)
        start = {n: p[self.seed : self.seed + 1] for n, p in self.bases.params.items()}
        weights = descend(self.bases.model, start, task[None], lr=self.bases.setup.lr, record=(0, 10))
        return weights[1, 0] - weights[0, 0]

    @cached_property
    def weights(self) -> Tensor:
        """θ₀ + δ [P]."""
        return flat(self.bases.one(self.seed)) + self.drift

    @cached_property
    def drifted(self) -> torch.nn.Module:
        """The model at θ₀ + δ."""
        return module(self.by_name(self.weights), self.bases.setup.width)

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [P] by parameter."""
        return unflat(vector, self.bases.one(self.seed))

    def expected(self, source: str) -> Tensor:
        """The exact gradient [P] of a source at θ₀."""
        return Expected(self.bases.model, flow(self.sources[source])).gradient(self.bases.one(self.seed))

    def batch(self, numbers: Tensor) -> dict:
        """Drawn rows as a batch."""
        return collate(encoded(numbers), PAD)

    def cost(self, batch: Batch, call: Callable[[], object]) -> dict[str, float]:
        """``seconds`` and ``of_pass`` of a call on a batch."""
        def plain() -> None:
            summed_nll(self.base, batch, logits_of).backward()
            self.base.zero_grad()

        spent = seconds(call)
        return {"seconds": spent, "of_pass": spent / seconds(plain)}


class Pool:
    """The rows of all repeats, [K, n] numbers a source, and the different ones among them."""

    def __init__(self, place: Place, sources: Sequence[str], repeats: int, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.stack([draw(place.sources[s], repeats * n, generator).view(repeats, n) for s in sources])
        self.unique, places = drawn.unique(return_inverse=True)
        self.drawn = dict(zip(sources, drawn, strict=True))
        self.places = {s: p.numpy() for s, p in zip(sources, places, strict=True)}
