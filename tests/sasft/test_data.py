"""Reading rows with exact errors, and encoding them."""

import json
from pathlib import Path

import pytest

from sasft.chat import Chat
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from tests.sasft.tiny_chat import tokenizer

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Hi"}
GOOD = b'{"prompt": "Hi", "response": "Yo"}\n'


def refused(message: str):
    return pytest.raises(UsageError, match=message)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_three_shapes_of_a_row(file):
    file.write_text("\n".join(map(json.dumps, [
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Yo"}]},
        {"prompt": "Hi", "response": "Yo", "id": 7, "source": "mine", "level": "easy"},
        {"instruction": "Add", "input": "2 + 2", "output": "4"},
        {"instruction": "Greet", "input": "", "output": "Yo"},
    ])))
    system, plain, full, short = read_rows(file)
    assert system == Row("rows-1", "rows", (SYSTEM, USER), "Yo")
    assert plain == Row("7", "mine", (USER,), "Yo", meta={"level": "easy"})
    assert full.prompt == ({"role": "user", "content": "Add\n\n2 + 2"},) and full.response == "4"
    assert short.prompt == ({"role": "user", "content": "Greet"},) and short.id == "rows-4"


def test_sampled_rows_keep_their_tokens_and_may_be_empty_or_cut(file):
    file.write_text(json.dumps({
        "messages": [USER, {"role": "assistant", "content": ""}], "response_ids": [],
        "finished": True, "logprobs": [-0.1]}) + "\n" + json.dumps({
        "prompt": "Hi", "response": "Y", "response_ids": [92], "finished": False}))
    empty, cut = read_rows(file)
    assert (empty.response_ids, empty.finished, empty.meta) == ((), True, {"logprobs": [-0.1]})
    assert (cut.response_ids, cut.finished) == ((92,), False)


def test_byte_order_mark_windows_line_ends_blank_lines_and_line_separators(file):
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n\n"
                     + '{"prompt": "Hi", "response": "a\u2028b"}'.encode())
    found = [(r.id, r.response) for r in read_rows(file)]
    assert found == [("rows-1", "Yo"), ("rows-4", "a\u2028b")]


@pytest.mark.parametrize(("line", "message"), [
    (b'{"prompt": "Hi", "resp',
     r"rows\.jsonl, line 2: not valid JSON \(Unterminated string.*column 18\)\. "
     r"""The line starts with '{"prompt": "Hi", "resp'"""),
    (b"[1, 2]", r"line 2: a row must be a JSON object, got a list"),
    (b'{"prompt": "\xff"}', r"line 2: not UTF-8 \(invalid start byte at byte 12\)"),
    (b'{"prompt": "Hi", "response": "\\ud83d"}', r"line 2: an escape .* half a character"),
    (b'{"question": "Hi", "answer": "Yo"}',
     r"""fields 'question', 'answer' make none of the known shapes: \{"messages".*"output"""),
    (b"{}", r"line 2: fields \(none\) make none"),
    (b'{"prompt": ["Hi"], "response": "Yo"}', r'line 2: "prompt" must be text, got \["Hi"\]'),
    (b'{"response": "Yo"}', r'line 2: "prompt" must be text, got null'),
    (b'{"prompt": "Hi", "response": 4}', r'line 2: "response" must be text, got 4'),
    (b'{"messages": []}', r'line 2: "messages" must be a list of .*got \[\]'),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
     r'"messages" must be a list of'),
    (b'{"messages": [{"role": "assistant", "content": "Yo"}]}', r"there is no message before"),
    (GOOD.replace(b"}\n", b', "finished": "false"}'), r"""must be true or false, got 'false'"""),
    (GOOD.replace(b"}\n", b', "response_ids": [1, 2.5]}'), r"list of integers, got \[1, 2\.5\]"),
    (GOOD.replace(b"}\n", b', "response_ids": [true]}'), r"list of integers, got \[true\]"),
])
def test_a_malformed_line_is_named_with_its_fault(file, line, message):
    file.write_bytes(GOOD + line + b"\n" + GOOD)
    with refused(message):
        read_rows(file)


def test_rows_without_an_answer_are_counted_and_listed(file):
    without = [b'{"prompt": "Hi"}\n', b'{"prompt": "Hi", "response": " "}\n',
               b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
               b'{"instruction": "Hi", "output": null}\n']
    file.write_bytes(GOOD + b"".join(without) + GOOD)
    with refused(r"4 of 6 rows have no answer \(lines 2, 3, 4, 5\); add the answers"):
        read_rows(file)
    file.write_bytes(without[0] * 12)
    with refused(r"12 of 12 rows have no answer \(lines 1, 2, .*, 10, \.\.\.\)"):
        read_rows(file)


def test_files_without_rows(file):
    with refused(r"rows\.jsonl can't be read: No such file"):
        read_rows(file)
    for content in (b"", b"\xef\xbb\xbf\n  \n"):
        file.write_bytes(content)
        with refused(r"rows\.jsonl has no rows; it should have one JSON object a line"):
            read_rows(file)
        assert read_rows(file, torn_ok=True) == []


def rows_of(*responses: str) -> list[Row]:
    return [Row(f"r{i}", "t", (USER,), text) for i, text in enumerate(responses)]


def test_encode_rows_in_order_with_a_report():
    chat = Chat(tokenizer())
    encoded, report = encode_rows(rows_of("Yes", "No"), chat, max_tokens=200)
    assert encoded == [chat.encode((USER,), "Yes"), chat.encode((USER,), "No")]
    longest = len(encoded[0].input_ids)
    assert str(report) == ("2 of 2 rows, 7 tokens in the loss (0 rows truncated, 0 dropped as too "
                           f"long; longest {longest} tokens)")
    assert encode_rows([], chat, max_tokens=8)[0] == []


def test_rows_longer_than_allowed():
    chat = Chat(tokenizer())
    rows = rows_of("No", "Yes, indeed", "Yes!")
    limit = len(chat.prompt_ids((USER,))) + 5  # "Yes!" fits to the token, with its end of turn
    with refused(rf"1 of 3 rows have more than max_tokens={limit} tokens \(the longest has "
                 rf"{limit + 7}; the first is row r1\).*truncate.*drop"):
        encode_rows(rows, chat, limit)
    cut, report = encode_rows(rows, chat, limit, "truncate")
    assert (report.kept, report.truncated, report.dropped, report.longest) == (3, 1, 0, limit + 7)
    assert chat.tokenizer.decode(cut[1].response_ids) == "Yes, " and not cut[1].finished
    assert cut[2] == chat.encode((USER,), "Yes!") and cut[2].finished
    kept, report = encode_rows(rows, chat, limit, "drop")
    assert (report.kept, report.truncated, report.dropped) == (2, 0, 1)
    assert kept == [cut[0], cut[2]]
    assert report.loss_tokens == 3 + 5


def test_lengths_that_leave_nothing():
    chat = Chat(tokenizer())
    prompt = len(chat.prompt_ids((USER,)))
    with refused(rf"prompts of 2 of 2 rows fill max_tokens={prompt} .*row r0"):
        encode_rows(rows_of("a", "b"), chat, prompt, "truncate")
    with refused(r"all 2 rows have more than max_tokens=5 tokens, so dropping"):
        encode_rows(rows_of("a", "b"), chat, 5, "drop")
    with refused(r"too_long must be error, truncate or drop, got 'cut'"):
        encode_rows(rows_of("a"), chat, 5, "cut")


def test_encoding_errors_name_the_row():
    chat = Chat(tokenizer())
    with refused(r"row r1: the response itself holds the end-of-turn token"):
        encode_rows(rows_of("a", "b<|im_end|>"), chat, 200)


def test_sampled_ids_must_spell_the_answer():
    chat = Chat(tokenizer())
    ids = tuple(chat.tokenizer("Yes", add_special_tokens=False).input_ids)
    encoded, _ = encode_rows([Row("r", "s", (USER,), "Yes", ids, finished=False)], chat, 200)
    assert encoded == [chat.encode((USER,), ids, finished=False)]
    with refused(r"row r: its response_ids do not spell its answer.*remove response_ids"):
        encode_rows([Row("r", "s", (USER,), "Yes.", ids)], chat, 200)


def test_torn_ok_forgives_only_a_torn_last_line(file):
    file.write_bytes(b'{"prompt": "Hi"\n' + GOOD)
    with refused("line 1: not valid JSON"):
        read_rows(file, torn_ok=True)
    file.write_bytes(GOOD + b'{"question": "whole, but no row"}')
    with refused("line 2: fields 'question'"):
        read_rows(file, torn_ok=True)
