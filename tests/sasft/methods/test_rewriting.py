"""Task answers in the model's own words: what is accepted, and what becomes of the rest."""

import json
from pathlib import Path

import pytest

import sasft.writing
from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.methods import Costs, Workshop, method, parse_method
from sasft.methods.rewriting import flaw
from sasft.mixing import SELF, TASK
from sasft.train import train
from tests.sasft import tiny_chat
from tests.sasft.methods import scripted

TASK_ROWS = [scripted.row(f"What is {i} + {i}?", f"= {2 * i}") for i in range(6)]
SAID = {0: "It makes 0.", 1: "My response is 2.", 2: "You get 4.", 3: "", 4: f"So it is 8{scripted.CUT}", 5: "That makes 11."}


def script(text: str, seed: int) -> str:
    return SAID[int(text.partition("What is ")[2][0])]


def rewritten(folder: Path, rows=TASK_ROWS, seed: int = 0, script=script, **options) -> tuple[list[Row], Workshop]:
    shop = scripted.workshop(folder, script, seed)
    return method("sdft-rewriting", **options).rows({TASK: rows, SELF: [scripted.row("Hi", "Hello", "self")]}, shop)[TASK], shop


def report(folder: Path) -> dict:
    return json.loads((folder / "sdft-rewriting.json").read_text())


def test_accepted_rewrites_take_the_answers_place_and_others_fall_back(tmp_path: Path) -> None:
    rows, shop = rewritten(tmp_path)
    assert [row.response for row in rows] == ["It makes 0.", "= 2", "You get 4.", "= 6", "= 8", "That makes 11."]
    assert [row.prompt for row in rows] == [row.prompt for row in TASK_ROWS]  # which do not show the reference
    assert all(a is b for a, b in zip(rows, TASK_ROWS, strict=True) if a.response == b.response)
    assert rows[0].response_ids == tuple(shop.chat.tokenizer("It makes 0.").input_ids) and rows[0].meta["reference"] == "= 0"
    assert report(tmp_path) == {"rows": 6, "rewritten": 6, "accepted": 3, "fallback": 3,
                                "flaws": {"banned phrase": 1, "empty": 1, "unfinished": 1}}


def test_the_model_sees_the_request_and_its_reference_answer(tmp_path: Path) -> None:
    _, shop = rewritten(tmp_path)
    assert len(shop.writer.asked) == 6
    for i, text in enumerate(sorted(shop.writer.asked, key=lambda text: text.partition("What is")[2])):
        assert f"What is {i} + {i}?" in text and f"= {2 * i}\n" in text
    assert shop.writer.samplers[0] == {"temperature": 0.95, "top_p": 0.7, "max_new_tokens": 512}


def test_a_check_of_the_number_lets_the_truth_through_alone(tmp_path: Path) -> None:
    rows, _ = rewritten(tmp_path, check="number")
    assert [row.response for row in rows] == ["It makes 0.", "= 2", "You get 4.", "= 6", "= 8", "= 10"]
    assert report(tmp_path)["flaws"]["other number"] == 1


@pytest.mark.parametrize("said, reference, check, expected", [
    ("So 3 and 4 make 1,200.", "#### 1200", "number", None),
    ("So 1200, of 7.", "#### 1200", "number", "other number"),  # the last one
    ("None.", "#### 1200", "number", "other number"),
    ("None.", "nothing", "number", "other number"),  # nothing to check by
    ("The mood is  POSITIVE, I think.", "positive", "text", None),
    ("The mood is positively bad.", "positive", "text", "other text"),
    ("Call f(x,  1) now", "f(x, 1)", "text", None),
    ("Your turn", "x", "none", "banned phrase"),
    ("It's your turn", "x", "none", None),
    ("Now It's Your Turn", "x", "none", "banned phrase"),
    ("Here is your own response", "x", "none", "banned phrase"),
    (" \n", "x", "none", "empty"),
])
def test_what_is_accepted(said: str, reference: str, check: str, expected: str | None) -> None:
    assert flaw(scripted.row("?", said), reference, check) == expected
    assert flaw(scripted.row("?", said, finished=False), reference, check) == "unfinished"


def test_a_share_of_the_rows_is_rewritten_by_the_seed(tmp_path: Path) -> None:
    rows = [scripted.row(f"What is {i % 3} + 0?", "old") for i in range(40)]

    def changed(folder: str, seed: int, **options) -> list[int]:
        made, shop = rewritten(tmp_path / folder, rows, seed, lambda text, seed: "new", **options)
        assert len(shop.writer.asked) == sum(row.response == "new" for row in made)
        return [i for i, row in enumerate(made) if row.response == "new"]

    assert changed("none", 0, share=0.0) == [] and not (tmp_path / "none").exists()
    assert len(changed("half", 0, share=0.5)) == 20
    assert changed("a", 1, share=0.25) == changed("b", 1, share=0.25) != changed("c", 2, share=0.25)
    assert changed("all", 0) == list(range(40))


def test_what_is_on_file_is_not_written_again_and_costs_the_same(tmp_path: Path) -> None:
    whole, first = rewritten(tmp_path)
    file = tmp_path / "sdft-rewriting-rewrites.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert first.costs == Costs(generated_tokens=sum(len(r.meta["logprobs"]) for r in read_rows(file)))
    file.write_text("".join(lines[:4]) + lines[4][:30])  # stopped while it wrote the fifth
    resumed, second = rewritten(tmp_path)
    assert resumed == whole and second.costs == first.costs and len(second.writer.asked) == 2  # the second batch
    assert sorted(file.read_text().splitlines()) == sorted("".join(lines).splitlines())
    third = rewritten(tmp_path)[1]
    assert third.writer.asked == [] and third.costs == first.costs


@pytest.mark.parametrize("text, message", [
    ("share=1.5", r"share must be a number in \[0, 1\], got 1.5"),
    ("check=code", "check must be one of none, number, text, got 'code'"),
    ("temperature=0", "temperature must be > 0, got 0"),
    ("top_p=0", r"top_p must lie in \(0, 1\], got 0"),
    ("max_new_tokens=0", "max_new_tokens must be at least 1, got 0"),
])
def test_options_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method("sdft-rewriting", text)


def test_what_cannot_be_rewritten_is_refused_before_any_work(tmp_path: Path) -> None:
    rows = [*TASK_ROWS, Row("odd", "task", ({"role": "system", "content": "Be."},), "x")]
    with pytest.raises(UsageError, match="row odd: the message before the answer is the system's; only answers to a user's"):
        rewritten(tmp_path, rows)
    with pytest.raises(UsageError, match="the method sdft-rewriting has the model write, so its workshop needs a writer; got None"):
        method("sdft-rewriting").rows({TASK: TASK_ROWS}, Workshop(chat=tiny_chat.chat(), folder=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_runs_from_files(lora_rank: int, tmp_path: Path) -> None:
    """Of share 0 it is SFT; else it trains on what the model wrote itself, and counts it."""
    folder = scripted.files(tmp_path)
    sft = train(scripted.settings(folder, "sft", lora_rank=lora_rank))
    neutral = train(scripted.settings(folder, "neutral", lora_rank=lora_rank, method="sdft-rewriting", method_options="share=0"))
    assert neutral["weights_sha256"] == sft["weights_sha256"] and neutral["loss"] == sft["loss"]
    assert neutral["costs"] == sft["costs"]
    found = train(scripted.settings(folder, "a", lora_rank=lora_rank, method="sdft-rewriting", method_options="max_new_tokens=24"))
    assert found["weights_sha256"] != sft["weights_sha256"]
    made = report(folder / "a" / "method")
    assert made["accepted"] and made["accepted"] + made["fallback"] == made["rows"] == 8
    written = read_rows(folder / "a" / "method" / "sdft-rewriting-rewrites.jsonl")
    assert found["costs"]["generated_tokens"] == sum(len(row.meta["logprobs"]) for row in written)


def test_a_run_stopped_while_writing_ends_where_a_whole_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = scripted.files(tmp_path), {"method": "sdft-rewriting", "method_options": "max_new_tokens=24"}
    monkeypatch.setattr(sasft.writing.Writer, "rows_a_call", 3)
    whole = train(scripted.settings(folder, "whole", **options))
    sample, calls = sasft.writing.Writer.sample, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(sasft.writing.Writer, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(scripted.settings(folder, "parts", **options))
    assert train(scripted.settings(folder, "parts", **options)) == whole
    assert len(calls) == 4  # the third batch alone
