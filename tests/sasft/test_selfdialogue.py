"""Self-dialogues: what a row holds, and that stopping and going on changes none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sasft.data import read_rows
from sasft.errors import UsageError
from sasft.sampling import Sampler
from sasft.selfdialogue import SINGLE_TURN, Dialogues, Writer, answer, answer_until, generated_tokens, write_dialogues
from tests.sasft import tiny_chat


def writer(seed: int = 0, batch_size: int = 4, backend: str = "padded", **sampler) -> Writer:
    return Writer(model=tiny_chat.chatty(seed), chat=tiny_chat.chat(), precision="fp32", batch_size=batch_size, backend=backend,
                  provenance={"model": "chatty", "weights_sha256": f"hash{seed}"},
                  sampler=Sampler(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, **sampler}))


def make(out: Path, n: int = 20, seed: int = 0, dialogues: Dialogues = SINGLE_TURN, shard=(0, 1), **kwargs) -> list:
    return write_dialogues(writer(**kwargs), n, out, seed=seed, max_user_tokens=30, dialogues=dialogues, shard=shard, progress=False)


def lines(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 dialogues that were written in one go."""
    make(out := tmp_path_factory.mktemp("whole") / "self.jsonl")
    return out


@pytest.mark.parametrize("turns", [1, 2])
def test_the_tokens_that_rows_took_are_counted(turns: int, tmp_path: Path) -> None:
    rows = make(tmp_path / "self.jsonl", n=8, dialogues=Dialogues(turns=turns))
    answers = sum(len(row.meta["logprobs"]) for row in rows)
    asked = sum(len(row.prompt[-1]["content"]) + 1 for row in rows)  # a token is a letter here
    assert generated_tokens(rows, tiny_chat.chat()) == answers + asked
    given = [replace(row, id=f"given-{i}") for i, row in enumerate(rows)]  # prompts that no model has written
    assert generated_tokens(given, tiny_chat.chat()) == answers
    assert generated_tokens([replace(row, response_ids=None) for row in given], tiny_chat.chat()) == answers


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
    for row in write_dialogues(w, 5, tmp_path / "self.jsonl", max_user_tokens=30, progress=False):
        prompt = w.chat.prompt_ids(row.prompt)
        said = [*row.response_ids, w.chat.end_of_turn] if row.finished else list(row.response_ids)
        with torch.no_grad():
            log_p = torch.log_softmax(w.model(torch.tensor([[*prompt, *said]])).logits[0], -1)
        expected = [log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(said)]
        assert row.meta["logprobs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("keep", [0, 1, 5, 8, 11, 19])
def test_a_stopped_run_goes_on_without_changing_a_row(whole: Path, tmp_path: Path, keep: int) -> None:
    parts = tmp_path / "parts.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])  # torn in the middle of a write
    rows = make(parts)
    assert sorted(parts.read_text().splitlines(keepends=True)) == sorted(lines)
    assert [r.id for r in rows] == [r.id for r in read_rows(whole)] or len({r.id for r in rows}) == 20


def test_more_rows_go_on_where_fewer_ended(whole: Path, tmp_path: Path) -> None:
    make(tmp_path / "b.jsonl", n=7)
    make(tmp_path / "b.jsonl", n=20)
    assert lines(whole) == lines(tmp_path / "b.jsonl")


def test_ctrl_c_leaves_whole_batches_behind(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert 0 < len(left) < 20
    assert lines(out) == lines(whole)


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
        write_dialogues(writer(**other), 8, out, progress=False)


def test_no_rows_is_no_request(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="n .* must be at least 1, got 0"):
        make(tmp_path / "self.jsonl", n=0)


@pytest.mark.parametrize("backend", ["padded", "refilled"])
def test_a_finished_file_is_in_the_order_of_candidates_and_not_of_lengths(tmp_path: Path, backend: str) -> None:
    """Short answers end first: the last rows of a file, which a mix holds out, must not be those of the longest answers."""
    rows = make(tmp_path / "self.jsonl", n=30, backend=backend)
    assert read_rows(tmp_path / "self.jsonl") == rows == sorted(rows, key=lambda row: row.id)
    lengths = [len(row.response_ids) for row in rows]
    assert lengths != sorted(lengths)
    assert make(tmp_path / "self.jsonl", n=40, backend=backend)[:30] == rows
    assert [row.id for row in read_rows(tmp_path / "self.jsonl")] == sorted(row.id for row in read_rows(tmp_path / "self.jsonl"))


def said(row) -> tuple:
    return row.id, row.prompt, row.response, row.response_ids, row.finished, row.meta["row_seed"]


def test_refilled_batches_give_the_rows_of_padded_ones(tmp_path: Path) -> None:
    padded, refilled = make(tmp_path / "a.jsonl", n=30), make(tmp_path / "b.jsonl", n=30, backend="refilled")
    assert [said(r) for r in padded] == [said(r) for r in refilled]
    assert {r.meta["backend"] for r in refilled} == {"refilled"} and "backend" not in padded[0].meta
    for out, other in (("a.jsonl", "refilled"), ("b.jsonl", "padded")):
        with pytest.raises(UsageError, match="holds rows of another run .*backend is"):
            make(tmp_path / out, n=31, backend=other)


@pytest.mark.parametrize("keep", [3, 17])
def test_a_stopped_refilled_run_goes_on_without_changing_a_row(tmp_path: Path, keep: int) -> None:
    make(tmp_path / "whole.jsonl", n=30, batch_size=2, backend="refilled")
    rows = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts.jsonl").write_text("".join(rows[:keep]))
    make(tmp_path / "parts.jsonl", n=30, batch_size=2, backend="refilled")
    assert lines(tmp_path / "parts.jsonl") == lines(tmp_path / "whole.jsonl")


def test_refilled_rows_are_on_file_before_their_call_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "self.jsonl", Writer.sample

    def stopped(self, prompts, seeds, *, on_done=None, **kwargs):
        done = []

        def on_done_then_stop(answers):
            on_done(answers)
            done.append(answers)
            if len(done) == 3:
                raise KeyboardInterrupt

        return original(self, prompts, seeds, on_done=on_done_then_stop if on_done else lambda done: None, **kwargs)

    monkeypatch.setattr(Writer, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(out, n=20, batch_size=2, backend="refilled")
    assert 3 <= len(read_rows(out)) < 16


THREE = Dialogues(turns=3, systems=("Be brief.", "Be long."), topics=("whales", "tea", "moss"))


@pytest.mark.parametrize("backend", ["padded", "refilled"])
def test_every_answer_of_a_dialogue_is_a_row(tmp_path: Path, backend: str) -> None:
    rows = make(tmp_path / "self.jsonl", n=20, dialogues=THREE, backend=backend)
    by_id = {r.id: r for r in rows}
    assert len(by_id) == len(rows) and sum("." not in r.id for r in rows) == 20
    turns = {r.id: int(r.id.partition(".")[2] or 1) for r in rows}
    assert set(turns.values()) == {1, 2, 3}
    for row in rows:
        turn = turns[row.id]
        assert [m["role"] for m in row.prompt] == ["system", *["user", "assistant"] * (turn - 1), "user"]
        assert row.prompt[0]["content"] in THREE.systems and row.prompt[-1]["content"].strip()
        if turn > 1:
            before = by_id[row.id.partition(".")[0] + (f".{turn - 1}" if turn > 2 else "")]
            assert before.finished  # a dialogue ends with an answer that is cut
            assert row.prompt[:-1] == (*before.prompt, {"role": "assistant", "content": before.response})
    assert any(not r.finished for r in rows if turns[r.id] == 1)
    assert {r.prompt[0]["content"] for r in rows} == set(THREE.systems)
    assert len({r.meta["row_seed"] for r in rows}) == len(rows)


def test_the_topic_is_named_to_the_user_s_side_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed, original, chat = [], Writer.sample, tiny_chat.chat()
    monkeypatch.setattr(Writer, "sample", lambda self, prompts, seeds, **kw: (
        fed.extend((chat.tokenizer.decode(p), "max_new_tokens" in kw) for p in prompts), original(self, prompts, seeds, **kw))[1])
    rows = make(tmp_path / "self.jsonl", n=12, dialogues=THREE)
    for text, user in fed:
        assert text.count("The user asks about") == user
        assert text.endswith("<|im_start|>user\n" if user else "<|im_end|>\n<|im_start|>assistant\n")
        assert text.startswith(("<|im_start|>system\nBe brief.", "<|im_start|>system\nBe long."))
    for row in rows:
        assert row.meta["topic"] == THREE.topics[int(row.id[7:13]) % 3]
        assert not any("The user asks about" in m["content"] for m in row.prompt)
        assert chat.encode(row.prompt, row.response_ids, finished=row.finished).response_ids == row.response_ids


def test_answers_to_later_turns_have_the_log_probabilities_of_their_rows(tmp_path: Path) -> None:
    w, compared = writer(), 0
    for row in write_dialogues(w, 6, tmp_path / "self.jsonl", max_user_tokens=30, dialogues=Dialogues(turns=2), progress=False):
        encoded = w.chat.encode(row.prompt, row.response_ids, finished=row.finished)
        with torch.no_grad():
            log_p = torch.log_softmax(w.model(torch.tensor([encoded.input_ids])).logits[0], -1)
        expected = [log_p[t - 1, label].item() for t, label in enumerate(encoded.labels) if label != -100]
        assert row.meta["logprobs"] == pytest.approx(expected, abs=1e-4)
        compared += "." in row.id
    assert compared


def test_the_default_is_a_single_turn_in_the_template_s_own_system_prompt(tmp_path: Path) -> None:
    plain, first = make(tmp_path / "a.jsonl", n=12), make(tmp_path / "b.jsonl", n=12, dialogues=Dialogues(turns=2))
    assert [said(r) for r in plain] == [said(r) for r in first if "." not in r.id]


@pytest.mark.parametrize("keep", [1, 21])
def test_a_stopped_run_of_several_turns_goes_on(tmp_path: Path, keep: int) -> None:
    make(tmp_path / "whole.jsonl", n=18, dialogues=THREE)
    rows = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts.jsonl").write_text("".join(rows[:keep]))
    again = make(tmp_path / "parts.jsonl", n=18, dialogues=THREE)
    assert keep < len(rows) and lines(tmp_path / "parts.jsonl") == sorted(map(str.rstrip, rows))
    assert [said(r) for r in again] == [said(r) for r in make(tmp_path / "whole.jsonl", n=18, dialogues=THREE)]


@pytest.mark.parametrize("other", [Dialogues(), Dialogues(turns=2), Dialogues(turns=3, systems=THREE.systems, topics=("tea",))])
def test_dialogues_of_another_kind_are_not_mixed_in(tmp_path: Path, other: Dialogues) -> None:
    make(tmp_path / "self.jsonl", n=4, dialogues=THREE)
    with pytest.raises(UsageError, match="holds rows of another run .*(turns|systems_sha256|topics_sha256) is"):
        make(tmp_path / "self.jsonl", n=4, dialogues=other)


def test_shards_write_the_rows_of_one_process_with_seeds_of_their_own(tmp_path: Path) -> None:
    whole = {r.id: said(r) for r in make(tmp_path / "whole.jsonl", n=40)}
    parts = [make(tmp_path / f"{i}.jsonl", n=20, shard=(i, 3)) for i in range(3)]
    assert [len(part) for part in parts] == [7, 7, 6]
    rows = [row for part in parts for row in part]
    assert len({r.meta["row_seed"] for r in rows}) == len({r.id for r in rows}) == 20
    assert [{int(r.id[-6:]) % 3 for r in part} for part in parts] == [{0}, {1}, {2}]
    assert sum(r.id in whole for r in rows) > 15 and all(whole.get(r.id, said(r)) == said(r) for r in rows)
    with pytest.raises(UsageError, match="shard is '1 of 3', now '2 of 3'"):
        make(tmp_path / "1.jsonl", n=20, shard=(2, 3))
    with pytest.raises(UsageError, match="shard is '1 of 3', now None"):
        make(tmp_path / "1.jsonl", n=20)


@pytest.mark.parametrize("call, message", [
    (lambda out: make(out, n=2, shard=(0, 3)), "n .* must be at least 3, got 2: each shard needs one"),
    (lambda out: make(out, shard=(3, 3)), r"shard must be \(i, N\) with 0 <= i < N, got \(3, 3\)"),
    (lambda out: Dialogues(turns=0), "turns must be at least 1, got 0"),
    (lambda out: Dialogues(topics="tea"), "topics must be a list of texts .* got 'tea'"),
    (lambda out: Dialogues(systems=("",)), "systems must be a list of texts that are not empty"),
    (lambda out: make(out, backend="vlm"), "backend must be one of padded, refilled, vllm, got 'vlm'"),
    (lambda out: make(out, batch_size=0), "batch_size must be at least 1, got 0"),
])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(tmp_path / "self.jsonl")
    assert not list(tmp_path.iterdir())


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
