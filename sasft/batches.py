"""A plan cut into micro-batches of rows of similar length."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset

from sasft.chat import Encoded, collate
from sasft.errors import UsageError
from sasft.mixing import Key, Plan


class RowsOfSources(Dataset):
    """The rows of all sources with their keys, addressed by (source, index)."""

    def __init__(self, rows: Mapping[str, Sequence[Encoded]]) -> None:
        self.rows = rows

    def __getitem__(self, key: Key) -> tuple[Key, Encoded]:
        return key, self.rows[key[0]][key[1]]

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))


class MicroBatches:
    """Every step of the plan cut into the same number of micro-batches, rows of similar length together, none empty.

    Of several ``processes`` each has as many of them, dealt out in turn, so that lengths, and with them times, are alike.
    """

    def __init__(self, plan: Plan, rows: Mapping[str, Sequence[Encoded]], micro_rows: int, processes: int = 1,
                 process: int = 0) -> None:
        self.plan, self.rows, self.processes, self.process = plan, rows, processes, process
        self.a_process = -(-max(map(len, plan)) // (micro_rows * processes))
        self.per_step = self.a_process * processes
        if self.per_step > min(map(len, plan)):
            raise UsageError(f"micro_rows={micro_rows} cuts the largest step into {self.per_step} micro-batches, more "
                             f"than the {min(map(len, plan))} rows of the smallest step; raise micro_rows"
                             + (f", or take fewer than {processes} processes" if processes > 1 else ""))

    def __iter__(self):
        for step in self.plan:
            ordered = sorted(step, key=lambda key: len(self.rows[key[0]][key[1]].input_ids))
            bounds = [part * len(ordered) // self.per_step for part in range(self.per_step + 1)]
            for begin, end in list(pairwise(bounds))[self.process :: self.processes]:
                yield ordered[begin:end]

    def __len__(self) -> int:
        return len(self.plan) * self.a_process


def batch_of(items: Sequence[tuple[Key, Encoded]], pad_id: int, weights: Mapping[str, float]) -> dict[str, Any]:
    """A micro-batch as :data:`sasft.methods.Batch` has it."""
    batch = collate([row for _, row in items], pad_id)
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
