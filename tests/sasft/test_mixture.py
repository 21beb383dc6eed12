"""A mix on disk is the mix in memory, and says where it comes from."""

import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import sha256_file
from sasft.mixing import mix
from sasft.mixture import MixSettings, load_chat, make_mixture, read_mixture
from tests.sasft import tiny_chat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    write(tmp_path / "task.jsonl", [{"prompt": f"Why {i}?", "response": "so " * (i % 4 + 1)} for i in range(9)])
    write(tmp_path / "own.jsonl", [{"prompt": f"Go {i}", "response": f"well, {i}", "finished": i % 2 == 0} for i in range(5)])
    write(tmp_path / "web.jsonl", [{"q": f"Who {i}?", "a": "somebody"} for i in range(4)])
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, **kwargs) -> MixSettings:
    return MixSettings(**{"sources": [f"task={folder}/task.jsonl", f"self={folder}/own.jsonl",
                                      f"web={folder}/web.jsonl:prompt=q,response=a"],
                          "shares": [2, 1, 1], "steps": 6, "rows_per_step": 8, "model": str(folder / "model"), "seed": 3,
                          "hold_out": 0, "out": str(folder / "mix"), **kwargs})


def test_what_is_written_is_what_was_planned(folder: Path) -> None:
    report = make_mixture(settings(folder))
    chat = load_chat(str(folder / "model"))
    tokens = {name: [e.loss_tokens for e in encode_rows(read_rows(source), chat, 1024)[0]]
              for name, source in settings(folder).named().items()}
    plan = mix(tokens, {"task": 2, "self": 1, "web": 1}, steps=6, rows_per_step=8, seed=3)
    lines = [json.loads(line) for line in (folder / "mix" / "rows.jsonl").read_text().splitlines()]
    assert [(row["step"], row["source"], row["row"]) for row in lines] == [(k, *key) for k, step in enumerate(plan, 1) for key in step]
    assert report["rows"] == {"task": 24, "self": 12, "web": 12} and report["most_reads"] == {"task": 3, "self": 3, "web": 3}
    assert report["loss_tokens"] == {s: sum(row["loss_tokens"] for row in lines if row["source"] == s) for s in tokens}
    assert {k: report[k] for k in plan.report()} == json.loads(json.dumps(plan.report()))
    assert report["identity"]["sources"]["self"] == {"from": f"{folder}/own.jsonl", "sha256": sha256_file(folder / "own.jsonl")}
    assert report["rows_sha256"] == sha256_file(folder / "mix" / "rows.jsonl")
    assert report == json.loads((folder / "mix" / "mix.json").read_text())


def test_a_mix_reads_back_as_the_same_rows_in_the_same_steps(folder: Path) -> None:
    report = make_mixture(settings(folder, by="loss"))
    mixture = read_mixture(folder / "mix")
    sources = {name: read_rows(source) for name, source in settings(folder).named().items()}
    lines = [json.loads(line) for line in (folder / "mix" / "rows.jsonl").read_text().splitlines()]
    expected = [(line["source"], sources[line["source"]][line["row"]]) for line in lines]
    read = [(source, mixture.rows[source][i]) for step in mixture.plan for source, i in step]
    assert [(s, r.prompt, r.response, r.finished, r.id) for s, r in read] == [(s, r.prompt, r.response, r.finished, r.id) for s, r in expected]
    again = mixture.plan.report()
    assert {k: again[k] for k in again if k != "epochs"} == {k: report[k] for k in again if k != "epochs"}
    assert mixture.plan.loss_weights["task"] == pytest.approx(1.5) and mixture.plan.by == "loss"


def test_the_same_call_again_returns_the_mix_and_another_is_refused(folder: Path) -> None:
    first = make_mixture(settings(folder))
    before = (folder / "mix" / "rows.jsonl").stat().st_mtime_ns
    assert make_mixture(settings(folder)) == first and (folder / "mix" / "rows.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds another mix \(settings.seed is 3, now 4\); name another folder"):
        make_mixture(settings(folder, seed=4))
    write(folder / "task.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UsageError, match="sources.task.sha256 is "):
        make_mixture(settings(folder))


def test_a_mix_that_was_edited_is_refused(folder: Path) -> None:
    make_mixture(settings(folder))
    with (folder / "mix" / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(UsageError, match="is not the file that mix.json describes"):
        read_mixture(folder / "mix")
    with pytest.raises(UsageError, match="holds no mix"):
        read_mixture(folder)


def test_the_task_repeated_in_the_steps_of_a_mix(folder: Path) -> None:
    mixed = make_mixture(settings(folder))
    alone = make_mixture(settings(folder, sources=[f"task={folder}/task.jsonl"], shares=[], steps=None, rows_per_step=None,
                                  like=str(folder / "mix"), out=str(folder / "repeated")))
    assert alone["steps"] == 6 and set(alone["rows"]) == {"task"}
    assert abs(sum(alone["loss_tokens"].values()) - sum(mixed["loss_tokens"].values())) <= 13 / 2  # half of the longest answer


def test_self_rows_shuffled(folder: Path) -> None:
    plain = make_mixture(settings(folder))
    shuffled = make_mixture(settings(folder, shuffle=["self"], out=str(folder / "shuffled")))
    assert shuffled["loss_tokens"] == plain["loss_tokens"]
    a, b = read_mixture(folder / "mix"), read_mixture(folder / "shuffled")
    assert a.rows["task"] == b.rows["task"] and [r.finished for r in a.rows["self"]] == [r.finished for r in b.rows["self"]]
    for before, after in zip(a.rows["self"], b.rows["self"], strict=True):
        assert sorted(before.response) == sorted(after.response) and before.prompt == after.prompt
    assert [r.response for r in a.rows["self"]] != [r.response for r in b.rows["self"]]
    encode_rows(b.rows["self"], load_chat(str(folder / "model")), 1024)  # the shuffled tokens spell what is written


def test_rows_that_are_too_long_leave_the_mix_and_keep_the_others_apart(folder: Path) -> None:
    longest = max(len(r.response) for r in read_rows(folder / "task.jsonl"))
    chat = load_chat(str(folder / "model"))
    limit = max(len(e.input_ids) for e in encode_rows(read_rows(folder / "task.jsonl"), chat, 1024)[0]) - 1
    report = make_mixture(settings(folder, max_tokens=limit, too_long="drop"))
    assert "2 dropped" in report["encoding"]["task"]
    assert max(len(r.response) for r in read_mixture(folder / "mix").rows["task"]) < longest


def test_rows_held_out_are_in_no_step(folder: Path) -> None:
    report = make_mixture(settings(folder, hold_out=2))
    mixture = read_mixture(folder / "mix")
    for name, source in settings(folder).named().items():
        read = read_rows(source)
        n = min(2, len(read) // 4)
        assert len(mixture.held_out[name]) == n
        assert not {r.id for r in mixture.held_out[name]} & {r.id for r in mixture.rows[name]}
        assert report["held_out"][name]["rows"] == n
    with (folder / "mix" / "held_out" / "task.jsonl").open("a") as file:
        file.write('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(UsageError, match="held_out/task.jsonl is not the file that mix.json describes"):
        read_mixture(folder / "mix")


def test_rows_held_out_of_a_sorted_file_are_of_every_kind(folder: Path) -> None:
    write(folder / "task.jsonl", [{"prompt": f"Which {i}?", "response": label * 9, "id": i} for i, label in enumerate(sorted("abcd" * 10))])
    make_mixture(settings(folder, hold_out=8))
    mixture = read_mixture(folder / "mix")
    assert [row.response[0] for row in mixture.held_out["task"]] == list("aabbccdd")
    assert [row.id for row in mixture.held_out["task"]] == [str(i) for i in range(2, 40, 5)]
    for row, tokens in zip(mixture.rows["task"], mixture.plan.tokens["task"], strict=True):  # the plan counts the rows that it reads
        assert tokens == len(row.response) + 1


def test_a_mix_whose_counts_were_edited_is_refused(folder: Path) -> None:
    report = make_mixture(settings(folder))
    report["loss_tokens"]["self"] += 1
    (folder / "mix" / "mix.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="mix.json counts loss_tokens .*, rows.jsonl has .*; write the mix again"):
        read_mixture(folder / "mix")


def test_the_sampler_of_self_rows_is_kept(folder: Path) -> None:
    own = [{"prompt": f"Go {i}", "response": "well", "sampler": {"temperature": 1.0}, "step": 99} for i in range(5)]
    write(folder / "own.jsonl", own)
    make_mixture(settings(folder))
    assert all(row.meta["sampler"] == {"temperature": 1.0} for row in read_mixture(folder / "mix").rows["self"])


def test_columns_of_any_type_stay_behind(folder: Path) -> None:
    table = pa.table({"prompt": [f"When {i}?" for i in range(8)], "response": ["now"] * 8, "seen": [datetime(2026, 1, 1)] * 8,
                      "image": [b"\xff"] * 8})
    pq.write_table(table, folder / "table.parquet")
    make_mixture(settings(folder, sources=[f"task={folder}/table.parquet"], shares=[], hold_out=2))
    mixture = read_mixture(folder / "mix")
    assert [r.prompt[0]["content"] for r in mixture.held_out["task"]] == ["When 2?", "When 6?"] and len(mixture.rows["task"]) == 6


@pytest.mark.parametrize("kwargs, message", [
    ({"hold_out": -1}, "hold_out must be at least 0, got -1"),
    ({"rows_per_step": 0}, "rows_per_step must be at least 1, got 0"),  # which would else be none, and so the default
    ({"steps": -3}, "steps must be at least 1, got -3"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"sources": []}, "sources are missing"),
    ({"out": ""}, "out is missing"),
    ({"shares": [1, 2]}, "shares must be one number a source: got 2 for 3 sources"),
    ({"tokens_per_step": 9}, "give either rows_per_step or tokens_per_step, got 8 and 9"),
    ({"like": "x"}, "like takes the number and the sizes of steps from another mix"),
    ({"like": "x", "steps": 0, "rows_per_step": None}, "like takes the number and the sizes of steps from another mix"),
    ({"equal": "rows"}, "equal=rows says in what a step is that of another mix, but like names none"),
    ({"shuffle": ["web", "elf"]}, "shuffle names 'elf', which is none of the sources task, self, web"),
    ({"sources": ["a/x.jsonl", "b/x.jsonl"], "shares": []}, "two sources have one name"),
])
def test_contradictory_settings_are_refused(folder: Path, kwargs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(folder, **kwargs)
