"""Shards: one file each, merged if they are what they say."""

import json
import logging
from pathlib import Path

import pytest
import torch.distributed as dist

from sasft.data import read_rows
from sasft.errors import UsageError
from sasft.sampling import EXACT
from sasft.selfdialogue import Dialogues, write_dialogues
from sasft.shards import merge_shards, shard_path, write_in_parallel
from sasft.writing import Writer
from tests.processes import in_two_processes
from tests.sasft import tiny_chat

TWO_TURNS = Dialogues(turns=2)


def writer(**kwargs) -> Writer:
    return Writer(model=tiny_chat.chatty(), chat=tiny_chat.chat(), precision="fp32", batch_size=4, provenance={"model": "chatty"},
                  **{"sampler": EXACT, **kwargs})


def write(folder: Path, shards: int = 2, n: int = 8, seed: int = 0) -> Path:
    for index in range(shards):
        write_dialogues(writer(), n, shard_path(folder / "self.jsonl", index, shards), seed=seed, max_user_tokens=30,
                        shard=(index, shards), progress=False)
    return folder / "self.jsonl"


def edit(path: Path, **fields) -> None:
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**first, **fields}, *others)))


def test_merged_shards_are_all_rows_in_order(tmp_path: Path) -> None:
    out = write(tmp_path, shards=3)
    merge_shards(out, 3)
    parts = [row for i in range(3) for row in read_rows(shard_path(out, i, 3))]
    assert read_rows(out) == sorted(parts, key=lambda row: row.id) and len(parts) == 8


def test_a_line_separator_in_a_text_does_not_end_a_row(tmp_path: Path) -> None:
    out = write(tmp_path)
    path = shard_path(out, 1, 2)
    first, *others = path.read_text().split("\n")
    data = json.loads(first)
    data["messages"][0]["content"] = "One line\u2028and another\x85one"
    path.write_text("\n".join([json.dumps(data, ensure_ascii=False), *others]))
    merge_shards(out, 2)
    assert [row for row in read_rows(out) if row.id == data["id"]][0].prompt[0]["content"] == data["messages"][0]["content"]


def test_what_is_no_whole_run_is_not_merged(tmp_path: Path) -> None:
    out = write(tmp_path)
    first, second = (shard_path(out, i, 2) for i in range(2))
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(UsageError, match="self.1-of-2.jsonl is missing: shard 1 of 2 has not been written"):
        merge_shards(out, 2)
    second.write_bytes(kept)
    edit(second, seed=1)
    with pytest.raises(UsageError, match="come from 2 different runs"):
        merge_shards(out, 2)
    second.write_bytes(kept)
    edit(second, row_seed=read_rows(first)[0].meta["row_seed"])
    with pytest.raises(UsageError, match="hold 2 rows of row_seed .*give every process a shard of its own"):
        merge_shards(out, 2)
    second.write_bytes(first.read_bytes())
    with pytest.raises(UsageError, match="hold 2 rows of id self-0-"):
        merge_shards(out, 2)
    assert not out.exists()


def test_rows_that_say_the_same_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = write(tmp_path)
    first = read_rows(shard_path(out, 0, 2))[0]
    edit(shard_path(out, 1, 2), messages=[*first.prompt, {"role": "assistant", "content": first.response}])
    with caplog.at_level(logging.WARNING):
        merge_shards(out, 2)
    assert "1 of 8 rows repeat another one word for word" in caplog.text and len(read_rows(out)) == 8


def _work(rank: int, folder: Path) -> None:
    rows = write_in_parallel(writer(), 10, folder / "self.jsonl", max_user_tokens=30, dialogues=TWO_TURNS,
                                progress=False)
    (folder / f"{rank}.json").write_text(json.dumps([row.id for row in rows]))
    dist.destroy_process_group()


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    in_two_processes(_work, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [row.id for row in read_rows(tmp_path / "self.jsonl")]
    rows = {row.id: row for row in read_rows(tmp_path / "self.jsonl")}
    assert sum("." not in key for key in rows) == 10 and any("." in key for key in rows)
    alone = {row.id: row for row in write_dialogues(writer(), 20, tmp_path / "alone.jsonl", max_user_tokens=30, dialogues=TWO_TURNS,
                                             progress=False)}
    assert all(row.response_ids == alone[key].response_ids for key, row in rows.items())


def test_one_process_needs_no_shards(tmp_path: Path) -> None:
    rows = write_in_parallel(writer(), 6, tmp_path / "self.jsonl", max_user_tokens=30, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["self.jsonl"]
    assert rows == sorted(read_rows(tmp_path / "self.jsonl"), key=lambda row: row.id) and len(rows) == 6
