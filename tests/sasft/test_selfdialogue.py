"""Self-dialogues: what a row holds, and that stopping and going on changes none."""

import json
from pathlib import Path

import pytest
import torch

from sasft.data import read_rows
from sasft.errors import UsageError
from sasft.sampling import Sampler
from sasft.selfdialogue import Writer, answer, answer_until, generate, quality
from tests.sasft import tiny_chat


def writer(seed: int = 0, batch_size: int = 4, **sampler) -> Writer:
    return Writer(model=tiny_chat.chatty(seed), chat=tiny_chat.chat(), precision="fp32", batch_size=batch_size,
                  provenance={"model": "chatty", "weights_sha256": f"hash{seed}"},
                  sampler=Sampler(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, **sampler}))


def make(out: Path, n: int = 20, seed: int = 0, **kwargs) -> list:
    return generate(writer(**kwargs), n, out, seed=seed, max_user_tokens=30, progress=False)


def test_a_row_says_where_it_comes_from(tmp_path: Path) -> None:
    make(tmp_path / "self.jsonl", n=12)
    lines = [json.loads(line) for line in (tmp_path / "self.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"]
        assert line["model"] == "chatty" and line["weights_sha256"] == "hash0" and line["seed"] == 0
        assert line["sampler"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}
        assert len(line["logprobs"]) == len(line["response_ids"]) + line["finished"]
        assert line["finished"] == (len(line["response_ids"]) < 12)
        assert line["messages"][0]["content"].strip()
    assert {line["finished"] for line in lines} == {True, False}  # cut answers are kept


def test_log_probabilities_are_those_of_the_base_in_its_template(tmp_path: Path) -> None:
    w = writer()
    for row in generate(w, 5, tmp_path / "self.jsonl", max_user_tokens=30, progress=False):
        prompt = w.chat.prompt_ids(row.prompt)
        said = [*row.response_ids, w.chat.end_of_turn] if row.finished else list(row.response_ids)
        with torch.no_grad():
            log_p = torch.log_softmax(w.model(torch.tensor([[*prompt, *said]])).logits[0], -1)
        expected = [log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(said)]
        assert row.meta["logprobs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("keep", [0, 1, 5, 8, 11, 19])
def test_a_stopped_run_goes_on_without_changing_a_row(tmp_path: Path, keep: int) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    make(whole)
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])  # torn in the middle of a write
    rows = make(parts)
    assert sorted(parts.read_text().splitlines(keepends=True)) == sorted(lines)
    assert [r.id for r in rows] == [r.id for r in read_rows(whole)] or len({r.id for r in rows}) == 20


def test_more_rows_go_on_where_fewer_ended(tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl", n=20)
    make(tmp_path / "b.jsonl", n=7)
    make(tmp_path / "b.jsonl", n=20)
    assert sorted((tmp_path / "a.jsonl").read_text().splitlines()) == sorted((tmp_path / "b.jsonl").read_text().splitlines())


def test_ctrl_c_leaves_whole_batches_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "self.jsonl", []
    original = Writer.sample

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Writer, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(out)
    monkeypatch.undo()
    left = read_rows(out)
    make(out)
    make(tmp_path / "whole.jsonl")
    assert 0 < len(left) < 20
    assert sorted(out.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_seeds_differ(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a.jsonl", seed=0), make(tmp_path / "b.jsonl", seed=1)
    assert not {r.prompt[-1]["content"] for r in a} & {r.prompt[-1]["content"] for r in b}


@pytest.mark.parametrize("other, named", [
    ({"temperature": 0.7}, "sampler is .*'temperature': 1.0.*now .*'temperature': 0.7"),
    ({"seed": 1}, "weights_sha256 is 'hash0', now 'hash1'"),
    ({"batch_size": 8}, "batch_size is 4, now 8"),
])
def test_rows_of_another_run_are_not_mixed_in(tmp_path: Path, other, named: str) -> None:
    out = tmp_path / "self.jsonl"
    make(out, n=4)
    with pytest.raises(UsageError, match=f"holds rows of another run .*{named}.*name another file"):
        generate(writer(**other), 8, out, progress=False)


def test_no_rows_is_no_request(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="n .* must be at least 1, got 0"):
        make(tmp_path / "self.jsonl", n=0)


PROMPTS = {"b": "Say something long.", "a": "Hi!", "c": "What now?"}


def test_answers_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    rows = answer(writer(), PROMPTS, tmp_path / "a.jsonl", source="own", progress=False)
    assert [r.id for r in rows] == ["b", "a", "c"] and [r.prompt[-1]["content"] for r in rows] == list(PROMPTS.values())
    again = answer(writer(), PROMPTS, tmp_path / "a.jsonl", source="own", progress=False)
    assert [r.response for r in again] == [r.response for r in rows]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


def test_answers_are_drawn_until_one_is_accepted(tmp_path: Path) -> None:
    out = tmp_path / "until.jsonl"
    shown = {key: (text, f"{text} Say it short.") for key, text in PROMPTS.items()}

    def short(key: str, row) -> bool:
        return row.finished and len(row.response_ids) < 6

    rows = answer_until(writer(), shown, short, out, source="new", tries=12, progress=False)
    assert rows and all(short("", r) for r in rows)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        key, kth = row.id.rsplit("/", 1)
        assert row.prompt[-1]["content"] == PROMPTS[key]  # the kept row answers the plain prompt
        assert row.meta["shown"][0]["content"] == shown[key][1]
        assert [w["id"] for w in written if w["id"].startswith(f"{key}/")] == [f"{key}/{k}" for k in range(int(kth) + 1)]
    again = answer_until(writer(), shown, short, out, source="new", tries=12, progress=False)
    assert [r.id for r in again] == [r.id for r in rows] and len(out.read_text().splitlines()) == len(written)


def test_what_is_never_accepted_is_missing(tmp_path: Path) -> None:
    shown = {key: (text, text) for key, text in PROMPTS.items()}
    assert answer_until(writer(), shown, lambda key, row: key == "a", tmp_path / "u.jsonl", source="x", tries=2,
                        progress=False)[0].id == "a/0"


def test_quality_counts(tmp_path: Path) -> None:
    rows = make(tmp_path / "self.jsonl", n=20)
    q = quality(rows)
    assert q["rows"] == 20 and q["finished"] == sum(r.finished for r in rows) / 20
    assert q["distinct_prompts"] == len({r.prompt[-1]["content"] for r in rows}) / 20
    logprobs = [lp for r in rows for lp in r.meta["logprobs"]]
    assert q["entropy_nats"] == pytest.approx(-sum(logprobs) / len(logprobs))
