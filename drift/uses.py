r"""The gradient of one parameter, group of tokens by group, from the pieces that its layer holds when autograd passes.

A weight used as :math:`y_t = W x_t` has the gradient :math:`\sum_t e_t x_t^\top` with :math:`e_t=\partial L/\partial y_t`: summing over the
tokens of one group at a time costs what the plain product costs. Groups' gradients are formed for a few rows of the
weight at a time, so that they never take more than a few megabytes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from drift.groups import Split
from drift.numerics import at_least_fp32

BLOCK = 2**22  # numbers of all groups' gradients that are in memory at once


class Scratch:
    """Memory that is used over and over again: fresh memory is slow, because the system hands it out page by page."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous tensor with whatever was left in it; valid until the next call for the same ``purpose``."""
        key, numel = (purpose, like.dtype, like.device), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < numel:
            held = self._held[key] = like.new_empty(numel)
        return held[:numel].view(shape)


@dataclass(frozen=True)
class Dense:
    """Gradient :math:`l^T r` of ``left`` [N, m] and ``right`` [N, n], as their layer has them; ``split`` sorts them."""

    left: Tensor
    right: Tensor
    split: Split

    @property
    def bounds(self) -> tuple[int, ...]:
        return self.split.bounds

    def add_to(self, out: Tensor, start: int, scratch: Scratch, *, fresh: bool) -> None:
        """Add rows ``start`` on of every group's gradient to ``out`` [G, rows, n] (``fresh``: write, not add)."""
        columns = self.left[:, start : start + out.shape[1]]
        columns = self.split.sort(columns, scratch.take("left", columns.shape, columns))
        for group, (low, high) in enumerate(pairwise(self.bounds)):
            if fresh:
                torch.mm(columns[low:high].T, self.right[low:high], out=out[group])
            else:
                out[group].addmm_(columns[low:high].T, self.right[low:high])

    def sorted(self, scratch: Scratch, purpose: str) -> "Dense":
        """The same with ``right`` sorted by group, as :meth:`add_to` needs it."""
        return replace(self, right=self.split.sort(self.right, scratch.take(purpose, self.right.shape, self.right)))

    def squared(self) -> "Dense":
        """The same of squared entries: sums over single tokens' squared gradients."""
        return Dense(at_least_fp32(self.left).square(), at_least_fp32(self.right).square(), self.split)


@dataclass(frozen=True)
class Sparse:
    """Gradient of an embedding: ``right`` [N, n] goes to the weight's rows ``ids`` [N]; sorted by group, group g is ``bounds[g]:bounds[g + 1]``."""

    ids: Tensor
    right: Tensor
    bounds: tuple[int, ...]

    def groups(self) -> Tensor:
        """Group of each token, [N]."""
        counts = torch.tensor([high - low for low, high in pairwise(self.bounds)], device=self.ids.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=self.ids.device), counts)

    def add_to(self, out: Tensor, start: int, scratch: Scratch, *, fresh: bool) -> None:
        """As :meth:`Dense.add_to`."""
        if fresh:
            out.zero_()
        rows = out.shape[1]
        here = (self.ids >= start) & (self.ids < start + rows)
        places = self.groups()[here] * rows + self.ids[here] - start
        out.view(-1, out.shape[2]).index_add_(0, places, self.right[here].to(out.dtype))

    def squared(self) -> "Sparse":
        """As :meth:`Dense.squared`."""
        return Sparse(self.ids, at_least_fp32(self.right).square(), self.bounds)

    def at(self, rows: Tensor) -> Tensor:
        """Every group's gradient at the weight's ``rows`` [R] (sorted, all ids among them), [G, R, n]."""
        out = self.right.new_zeros(len(self.bounds) - 1, len(rows), self.right.shape[1])
        places = self.groups() * len(rows) + torch.searchsorted(rows, self.ids)
        out.view(-1, out.shape[2]).index_add_(0, places, self.right)
        return out


@dataclass(frozen=True)
class Formed:
    """Every group's gradient as it is, ``parts`` [G, *shape]: vectors, and weights whose layers were run group by group."""

    parts: Tensor

    def squared(self) -> "Formed":
        """Squares of the groups' gradients: those of single tokens are not known here."""
        return Formed(self.parts.square())


Use = Dense | Sparse | Formed


def blocks(uses: Sequence[Use], scratch: Scratch | None = None) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(rows of the weight, every group's gradient there [G, rows, n]) block by block; each tensor is valid until the next.

    Rows are a slice, or a tensor of row numbers for embeddings (rows that no token uses are left out: 0). ``uses`` are all the
    uses of one parameter; their gradients are added before anything is yielded. ``scratch``: memory to form them in.
    """
    formed = [use.parts for use in uses if isinstance(use, Formed)]
    if formed:
        if len(formed) < len(uses):
            raise NotImplementedError("a weight is used both by a layer that is run group by group and by another")
        total = torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]
        yield slice(0, total.shape[1]), total.reshape(len(total), total.shape[1], -1)
        return
    dense = [use for use in uses if isinstance(use, Dense)]
    n_groups, n = len(uses[0].bounds) - 1, uses[0].right.shape[1]
    step = max(1, BLOCK // (n_groups * n))
    if not dense:
        ids = torch.cat([use.ids for use in uses])
        for chunk in ids.unique().split(step):
            kept = [(use, (use.ids >= chunk[0]) & (use.ids <= chunk[-1])) for use in uses]
            yield chunk, sum(_part(use, here).at(chunk) for use, here in kept)
        return
    scratch = Scratch() if scratch is None else scratch
    ordered = [*(use.sorted(scratch, f"right {i}") for i, use in enumerate(dense)), *(use for use in uses if isinstance(use, Sparse))]
    m = dense[0].left.shape[1]
    for start in range(0, m, step):
        rows = min(step, m - start)
        out = scratch.take("parts", (n_groups, rows, n), dense[0].left)
        for use in ordered:
            use.add_to(out, start, scratch, fresh=use is ordered[0])
        yield slice(start, start + rows), out


def _part(use: Sparse, here: Tensor) -> Sparse:
    kept = torch.cat([here.new_zeros(1, dtype=torch.int64), here.cumsum(0)])
    return Sparse(use.ids[here], use.right[here], tuple(kept[list(use.bounds)].tolist()))


def gram(parts: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Inner products :math:`\sum_p w_p\,x_{ip}x_{jp}` of ``parts`` [G, ...], a [G, G] float64 tensor.

    Products and sums of up to ``BLOCK`` numbers run in float32 (float64 stays float64), sums beyond in float64.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 0.5]))
    tensor([[3., 3.],
            [3., 9.]], dtype=torch.float64)
    """
    flat = at_least_fp32(parts.reshape(len(parts), -1))
    if weights is not None:
        weights = weights.reshape(-1).to(flat.dtype)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    step = max(1, BLOCK // len(flat))
    for start in range(0, flat.shape[1], step):
        piece = flat[:, start : start + step]
        other = piece if weights is None else piece * weights[start : start + step]
        total += (other @ piece.T).double()
    return total
