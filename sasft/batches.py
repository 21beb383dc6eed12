"""A plan cut into micro-batches: rows of similar length side by side, or rows of any length packed end to end."""

import heapq
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from sasft.chat import Encoded, collate
from sasft.errors import UsageError
from sasft.mixing import Key, Plan
from sasft.packing import pack


class RowsOfSources(Dataset):
    """The rows of all sources with their keys, addressed by (source, index)."""

    def __init__(self, rows: Mapping[str, Sequence[Encoded]]) -> None:
        self.rows = rows

    def __getitem__(self, key: Key) -> tuple[Key, Encoded]:
        return key, self.rows[key[0]][key[1]]

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))


class MicroBatches:
    """Every step of the plan cut into the same number of micro-batches, none empty.

    They hold ``micro_rows`` rows at most, of similar length, so that little is padding. With ``packing``, where nothing is, they
    hold about as many tokens each: as many micro-batches as ``micro_rows`` asks for, or as few as keep each within
    ``micro_tokens``. Of several ``processes`` each has as many, dealt out in turn, so that lengths, and with them times, are alike.

    Raises :class:`UsageError` if a row has more than ``micro_tokens`` tokens, or a step fewer rows than there are micro-batches.
    """

    def __init__(self, plan: Plan, rows: Mapping[str, Sequence[Encoded]], micro_rows: int, processes: int = 1, process: int = 0, *,
                 packing: bool = False, micro_tokens: int | None = None) -> None:
        self.plan, self.processes, self.process = plan, processes, process
        self.cut = balanced if packing else alike
        self.lengths = {source: [len(row.input_ids) for row in of] for source, of in rows.items()}
        if micro_tokens is None:
            asked, needed = f"micro_rows={micro_rows}", -(-max(map(len, plan)) // micro_rows)
        else:
            asked, needed = f"micro_tokens={micro_tokens}", max(self._parts_within(micro_tokens, step) for step in plan)
        self.a_process = -(-needed // processes)
        self.per_step = self.a_process * processes
        if self.per_step > min(map(len, plan)):
            raise UsageError(f"{asked} cuts the largest step into {self.per_step} micro-batches, more than the "
                             f"{min(map(len, plan))} rows of the smallest step; raise {asked.partition('=')[0]}"
                             + (f", or take fewer than {processes} processes" if processes > 1 else ""))

    def __iter__(self):
        for step in self.plan:
            parts = self.cut(self._lengths_of(step), self.per_step)
            for part in parts[self.process :: self.processes]:
                yield [step[k] for k in part]

    def __len__(self) -> int:
        return len(self.plan) * self.a_process

    def _lengths_of(self, step: Sequence[Key]) -> list[int]:
        return [self.lengths[source][index] for source, index in step]

    def _parts_within(self, tokens: int, step: Sequence[Key]) -> int:
        """The least number of balanced parts of a step that hold no more than ``tokens`` each (more parts never hold more)."""
        lengths = self._lengths_of(step)
        if max(lengths) > tokens:
            source, index = step[lengths.index(max(lengths))]
            raise UsageError(f"micro_tokens={tokens} is less than the {max(lengths)} tokens of row {index} of the source {source!r}; "
                             "raise it, or leave out rows so long")
        return next(n for n in count(-(-sum(lengths) // tokens))
                    if max(sum(lengths[k] for k in part) for part in balanced(lengths, n)) <= tokens)


def alike(lengths: Sequence[int], n: int) -> list[list[int]]:
    """Numbers of rows in ``n`` parts of about as many rows, those of similar length together.

    >>> alike([5, 2, 9, 3], 2)
    [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    bounds = [part * len(order) // n for part in range(n + 1)]
    return [order[begin:end] for begin, end in pairwise(bounds)]


def balanced(lengths: Sequence[int], n: int) -> list[list[int]]:
    """Numbers of rows in ``n`` parts of about as many tokens: longest rows first, each into the part that has fewest so far.

    The largest part is less than 4/3 of what it must be at least (R. L. Graham, SIAM Journal on Applied Mathematics 17, 1969).

    >>> balanced([5, 2, 9, 3], 2)
    [[2], [0, 3, 1]]
    """
    parts: list[list[int]] = [[] for _ in range(n)]
    filled = [(0, part) for part in range(n)]
    for k in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        tokens, part = filled[0]
        parts[part].append(k)
        heapq.heapreplace(filled, (tokens + lengths[k], part))
    return parts


def batch_of(items: Sequence[tuple[Key, Encoded]], pad_id: int, weights: Mapping[str, float], *, packing: bool = False) -> dict[str, Any]:
    """A micro-batch as :data:`sasft.methods.Batch` has it."""
    rows = [row for _, row in items]
    batch = pack(rows) if packing else collate(rows, pad_id)
    batch["source"], batch["index"] = [source for (source, _), _ in items], [index for (_, index), _ in items]
    if weights:
        batch["weight"] = torch.tensor([weights.get(source, 1.0) for source in batch["source"]])
    return batch


def check_reads(plan: Plan, rows: Mapping[str, Sequence[Encoded]]) -> None:
    """Raise :class:`UsageError` if the plan reads a row that there is not."""
    for k, step in enumerate(plan, start=1):
        for source, index in step:
            if index >= len(rows.get(source, ())):
                raise UsageError(f"step {k} of the plan reads row {index} of the source {source!r}, which has "
                                 f"{len(rows.get(source, ()))} rows; rows are given for {', '.join(rows)}: lay the plan out over "
                                 "these")
