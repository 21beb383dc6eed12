"""What estimates of the Fisher information keep of the rows' gradients (for :mod:`drift.fisher`).

Sums are kept in float32 at least: in bfloat16 they would stop growing after a few hundred terms.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drift.intercept import UseCollector
from drift.numerics import at_least_fp32
from drift.uses import Dense, Use, blocks


class Squares(UseCollector):
    """Sums of squares of the rows' gradients, or of single positions' where ``token``."""

    def __init__(self, shapes: Mapping[str, torch.Size], *, token: bool) -> None:
        super().__init__()
        self.shapes, self.token = shapes, token
        self.sums: dict[str, Tensor] = {}

    def process(self, name: str, uses: Sequence[Use]) -> None:
        if self.token:
            uses = [use.squared() for use in uses]
        for rows, parts in blocks(uses):
            squares = (at_least_fp32(parts) if self.token else at_least_fp32(parts).square()).sum(0)
            if name not in self.sums:
                self.sums[name] = squares.new_zeros(self.shapes[name])
            self.sums[name].view(len(self.sums[name]), -1)[rows] += squares


class Margins(UseCollector):
    """Row and column sums of the squares, float64."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def process(self, name: str, uses: Sequence[Use]) -> None:
        if name not in self.shapes:
            return
        for rows, parts in blocks(uses):
            squares = at_least_fp32(parts).square().sum(0).double()
            if name not in self.sums:
                m, n = self.shapes[name]
                self.sums[name] = squares.new_zeros(m), squares.new_zeros(n)
            self.sums[name][0][rows] += squares.sum(1)
            self.sums[name][1].add_(squares.sum(0))


class Factors(UseCollector):
    """Second moments of output gradients (sums over positions) and of inputs, and the number of positions."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.positions: dict[str, int] = {}

    def process(self, name: str, uses: Sequence[Use]) -> None:
        if name not in self.names or len(uses) > 1 or not isinstance(uses[0], Dense):
            return
        left = uses[0].left
        kept = left.any(1)  # positions that no label reaches, padding above all, say nothing of the inputs either
        left, right = at_least_fp32(left[kept]), at_least_fp32(uses[0].right[kept])
        s, a = left.T @ left, right.T @ right
        before = self.sums.get(name)
        self.sums[name] = (s, a) if before is None else (before[0] + s, before[1] + a)
        self.positions[name] = self.positions.get(name, 0) + len(left)
