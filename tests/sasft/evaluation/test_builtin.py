"""The suites that need no benchmark: instructions that can be followed, problems that can be solved, texts cut into windows."""

import hashlib
import json
import pydoc_data.topics
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sasft.errors import UsageError
from sasft.evaluation.run import MeasureSettings, make_suite
from sasft.evaluation.suites import Suite
from tests.sasft import tiny_chat
from tests.sasft.evaluation import small_sets


def make(spec: str) -> Suite:
    return make_suite(spec, tiny_chat.chat(), MeasureSettings())


def test_every_instruction_can_be_followed_and_can_be_missed() -> None:
    suite = make("instructions")
    assert len(suite.items) == 240 and len({i.prompt[0]["content"] for i in suite.items}) == 240
    assert len({i.cluster for i in suite.items}) == 20 and len({i.cluster + i.id[3:] for i in suite.items}) == 240
    pool = ["it is, so it is", "IT IS SO.", " ".join(["word"] * 60) + ".", "- a\n- b\n- c", '"It is so. Is it?"',
            "It is so. That is all.",
            "<<So>>\nIt is, and so is that."]
    for item in suite.items:
        [(kind, options)] = item.gold
        named = [f"With {' and '.join(words)}." for words in options.values() if isinstance(words, list)]
        found = {answer: suite.check(item, answer)["prompt_strict"] for answer in [*pool, *named]}
        assert set(found.values()) == {0, 1}, (item.prompt, found)
    first = suite.items[6]
    assert first.prompt[0]["content"] == 'What do bees make? Use the words "honey" and "flower" in your answer.'
    assert first.gold == [("keywords:existence", {"keywords": ["honey", "flower"]})] and first.group == "keywords:existence"


def test_problems_are_right_by_their_own_truth() -> None:
    suite = make("task:sums")
    assert len(suite.items) == len({i.id for i in suite.items}) == 200 and make("task").items == suite.items
    for item in suite.items[:50]:
        truth = item.gold.answer
        assert suite.check(item, f"That makes {truth}.") == {"correct": 1.0}
        assert suite.check(item, f"That makes {int(truth) + 1}.") == {"correct": 0.0}


def test_a_text_in_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 256 + "y" * 256 + "z" * 10)
    suite = make(f"text:{path}")
    ids = tiny_chat.tokenizer()(path.read_text()).input_ids
    assert [i.gold.input_ids for i in suite.items] == [tuple(ids[:256]), tuple(ids[256:512]), tuple(ids[512:])]
    assert [i.gold.loss_tokens for i in suite.items] == [255, 255, 9]  # nothing predicts a window's first token
    assert suite.source == {"file": "text.txt", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * 256)
    assert [i.gold.input_ids for i in make(f"text:{path}").items] == [tuple(ids[:256])]  # a byte-order mark is no text
    path.write_text("x" * 257)
    assert len(make(f"text:{path}").items) == 1  # a window of one token has nothing to predict
    path.write_text("x")
    with pytest.raises(UsageError, match="fewer than two tokens"):
        make(f"text:{path}")


def test_turns_of_one_dialogue_are_not_independent(tmp_path: Path) -> None:
    def row(*said: str) -> dict:
        return {"messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=False)]}

    path = small_sets.jsonl(tmp_path / "rows.jsonl", [row("Hi!", "Yes?"), row("Hi!", "Yes?", "Why?", "So."), row("Who?", "Me.")])
    for suite in (make(f"rows:{path}"), make(f"answers:{path}")):
        first, second, other = (item.cluster for item in suite.items)
        assert first == second != "" and other == ""


def test_the_text_that_is_always_there() -> None:
    suite = make("text")
    whole = "\n\n".join(content for _, content in sorted(pydoc_data.topics.topics.items()))
    assert len(suite.items) == 64 and suite.source["sha256"] == hashlib.sha256(whole.encode()).hexdigest()
    places = [int(i.id) for i in suite.items]
    assert places == list(range(0, 64 * places[1],
                                places[1])) and places[-1] * 256 > 0.7 * len(whole.encode())  # spread over the text


def test_rows_and_their_answers(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Say yes.", "response": "yes"}, {"id": "a", "prompt": "Say much.", "response": "w" * 2000}]
    path = small_sets.jsonl(tmp_path / "rows.jsonl", rows)
    suite = make(f"rows:{path}")
    assert [i.id for i in suite.items] == ["0-a", "1-a"]  # ids that come twice are numbered
    assert suite.items[0].gold.loss_tokens == 4 and suite.items[0].gold.finished  # y, e, s and the end of turn
    assert suite.items[1].gold.loss_tokens == 1024 and not suite.items[1].gold.finished  # the end of an answer is cut off
    long = small_sets.jsonl(tmp_path / "long.jsonl", [{"prompt": "p" * 1500, "response": "yes"}])
    assert make(f"rows:{long}").items[0].gold.response_ids == suite.items[0].gold.response_ids  # however long what comes before
    written = make(f"answers:{path}")
    assert [(i.asked, i.gold) for i in written.items] == [("Say yes.", ["yes"]), ("Say much.", ["w" * 2000])]
    assert not any(item.cluster for item in (*suite.items, *written.items))
    pq.write_table(pa.table({"q": ["Say yes."], "a": ["yes"], "when": [datetime(2026, 1, 1)]}), tmp_path / "rows.parquet")
    table = make(f"answers:{tmp_path}/rows.parquet:prompt=q,response=a")
    assert table.items[0].gold == ["yes"] and table.source["file"] == "rows.parquet" and len(table.source["sha256"]) == 64
    assert written.check(written.items[0], "Yes!") == {"rouge_l": 1.0, "exact_match": 1.0}
    (tmp_path / "other.jsonl").write_text(json.dumps({"q": "?", "a": "!"}) + "\n")
    with pytest.raises(UsageError, match="'q', 'a'"):
        make(f"rows:{tmp_path / 'other.jsonl'}")
    with pytest.raises(UsageError, match="no worked examples"):
        make(f"answers:{path}@1")
