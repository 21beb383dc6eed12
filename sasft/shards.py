"""Self-dialogues written by several processes: one file a shard, merged when all are done."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.files import write_jsonl
from sasft.selfdialogue import SINGLE_TURN, Dialogues, place, write_dialogues
from sasft.sources import Source
from sasft.writing import Writer

logger = logging.getLogger(__name__)


def shard_path(out: Path, index: int, shards: int) -> Path:
    """The file of shard ``index`` of ``shards``.

    >>> shard_path(Path("runs/self.jsonl"), 1, 4).name
    'self.1-of-4.jsonl'
    """
    return out.with_name(f"{out.stem}.{index}-of-{shards}{out.suffix}")


def write_in_parallel(writer: Writer, n: int, out: Path, *, seed: int = 0, max_user_tokens: int = 64,
                      dialogues: Dialogues = SINGLE_TURN, progress: bool = True) -> list[Row]:
    """:func:`sasft.selfdialogue.write_dialogues` over the processes of ``accelerate launch``; all of them return all rows.

    Process i of N writes shard i to a file of its own, which a stopped run goes on with; when all are done, the main process
    merges them into ``out``. One process alone writes ``out`` itself. Candidates, and so seeds, are dealt out by number: every
    row is the one that a single process would have written, though each shard finds its share of ``n`` among its own candidates.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # which does not find out by itself that there are processes
    index, shards = state.process_index, state.num_processes
    own = out if shards == 1 else shard_path(out, index, shards)
    rows = write_dialogues(writer, n, own, seed=seed, max_user_tokens=max_user_tokens, dialogues=dialogues,
                           shard=(index, shards), progress=progress and state.is_main_process)
    if shards == 1:
        return rows
    state.wait_for_everyone()
    if state.is_main_process:
        merge_shards(out, shards)
    state.wait_for_everyone()
    return read_rows(out)


def merge_shards(out: Path, shards: int) -> Path:
    """Merge the files of all shards into ``out``, in the order of candidates; returns ``out``.

    Raises :class:`UsageError`, and writes nothing, if a shard's file is missing, if shards come from different runs, or if rows
    share an id or a seed: equal seeds give equal rows, which no file then shows to be copies. Rows that are equal though their
    seeds differ (a model may say the same thing twice) stay, and the log tells how many there are.
    """
    rows: list[dict[str, Any]] = []
    for index in range(shards):
        path = shard_path(out, index, shards)
        if not path.exists():
            raise UsageError(f"{path} is missing: shard {index} of {shards} has not been written")
        read_rows(path)  # names what is wrong with a line
        rows += [record.data for record in Source(str(path)).records()]
    runs = {_run(row) for row in rows}
    if len(runs) > 1:
        raise UsageError(f"the shards of {out} come from {len(runs)} different runs, such as {' and '.join(sorted(runs)[:2])}; "
                         "write them with the same model, sampler, seed and kind of dialogue")
    for name in ("id", "row_seed"):
        (value, count), = Counter(row[name] for row in rows).most_common(1)
        if count > 1:
            raise UsageError(f"the shards of {out} hold {count} rows of {name} {value}; give every process a shard of its own")
    twins = len(rows) - len({json.dumps(row["messages"]) for row in rows})
    if twins:
        logger.warning("%s: %d of %d rows repeat another one word for word, from a seed of their own", out, twins, len(rows))
    rows.sort(key=lambda row: place(row["id"]))
    write_jsonl(out, rows)
    return out


def _run(row: Mapping[str, Any]) -> str:
    """What all rows of a run share, as text."""
    own = {"id", "messages", "response_ids", "finished", "logprobs", "row_seed", "shard", "topic"}
    return json.dumps({name: value for name, value in row.items() if name not in own}, sort_keys=True)
