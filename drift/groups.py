"""Which group every token of a batch belongs to, for tensors of whatever shape a layer makes of that batch."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A flat list of N vectors in G groups: ``order`` [N] sorts them by group (None: they are sorted), ``bounds`` [G + 1].

    ``run``: so many vectors always follow each other (those of a row, where whole rows are in a group).
    """

    order: Tensor | None
    bounds: tuple[int, ...]
    run: int = 1
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def sort(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` [N, ...] with every group's vectors side by side, in ``out`` if they have to be moved."""
        return x if self.order is None else torch.index_select(x, 0, self._order(x.device), out=out)

    def _order(self, device: torch.device) -> Tensor:
        if device not in self._on_device:  # a copy makes the host wait for the device
            self._on_device[device] = self.order.to(device)
        return self._on_device[device]

    def sums(self, x: Tensor) -> Tensor:
        """Sum of ``x`` [N, n] over each group, [G, n], in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.run > 1:
            x = x.reshape(-1, self.run, x.shape[-1]).sum(1, dtype=dtype)
        if self.order is not None:
            x = x.index_select(0, self._order(x.device)[:: self.run] // self.run)
        return torch.stack([x[low // self.run : high // self.run].sum(0, dtype=dtype) for low, high in pairwise(self.bounds)])


class Groups:
    """Group of every row [B] or every token [B, T] of a batch, int64 in [0, ``n``).

    ``tokens`` = (B, T) is the shape of the batch where it is known; rows alone do not tell it.

    >>> groups = Groups(torch.tensor([1, 0]), 2, tokens=(2, 3))
    >>> groups.split((2, 3)).bounds, groups.split((6,)).order.tolist(), groups.split((4, 3))
    ((0, 3, 6), [3, 4, 5, 0, 1, 2], None)
    """

    def __init__(self, index: Tensor, n: int, tokens: tuple[int, int] | None = None) -> None:
        self.index, self.n, self.tokens = index.cpu(), n, tokens
        self._by_row = index.dim() == 1 or bool((index == index[:, :1]).all())
        self._splits: dict[tuple[int, ...], Split | None] = {}

    def split(self, lead: tuple[int, ...]) -> Split | None:
        """The split of a layer's vectors with leading dimensions ``lead``; None where it can't be told whose they are."""
        lead = tuple(lead)
        if lead not in self._splits:
            flat = self._flat(lead)
            self._splits[lead] = None if flat is None else self._sorted(flat, len(flat) // len(self.index) if self._by_row else 1)
        return self._splits[lead]

    def _sorted(self, flat: Tensor, run: int) -> Split:
        counts = torch.bincount(flat, minlength=self.n)
        order = None if bool((flat[1:] >= flat[:-1]).all()) else flat.argsort(stable=True)
        return Split(order, tuple([0, *counts.cumsum(0).tolist()]), run)

    def _flat(self, lead: tuple[int, ...]) -> Tensor | None:
        """Group of each of ``prod(lead)`` vectors. Batches are taken to be batch-first, as everywhere in transformers."""
        rows = len(self.index)
        n = torch.Size(lead).numel()
        if self.tokens is not None and lead == (self.tokens[0] * self.tokens[1],) and lead != (rows,):
            lead = self.tokens  # mixtures of experts see tokens without their rows
        if self._by_row:
            row_groups = self.index if self.index.dim() == 1 else self.index[:, 0]
            square = self.tokens is not None and self.tokens[0] == self.tokens[1] > 1
            if not lead or lead[0] != rows or (len(lead) == 1 and square):
                return None
            return row_groups.repeat_interleave(n // rows)
        tokens = self.index.shape[1]
        if lead[:2] == (rows, tokens) and tokens not in lead[2:]:
            return self.index.flatten().repeat_interleave(n // self.index.numel())
        if len(lead) == 3 and lead[::2] == (rows, tokens) and lead[1] != tokens:  # heads before tokens
            return self.index.unsqueeze(1).expand(lead).flatten()
        return None
