"""Reading rows with exact errors, encoding them, and writing them so that nothing is lost."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from tests.sasft.tiny_chat import tokenizer

from sasft.chat import Chat
from sasft.data import (
    JsonlWriter,
    Row,
    encode_rows,
    ensure_writable,
    read_rows,
    sha256_file,
    write_json,
)
from sasft.errors import UsageError

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


def test_written_rows_are_read_back_and_appended_to(file):
    rows = [{"prompt": "Hi", "response": f"é\n{i}"} for i in range(3)]
    for part in (rows[:2], [], rows[2:]):
        with JsonlWriter(file) as sink:
            sink.write(part)
    assert [r.response for r in read_rows(file)] == ["é\n0", "é\n1", "é\n2"]
    assert not file.with_name("rows.jsonl.torn").exists()


@pytest.mark.parametrize("torn", [b'{"prompt": "Hi", "resp', b'{"prompt": "\xc3', b"{"])
def test_a_torn_last_line_is_set_aside_and_reported(file, caplog, torn):
    file.write_bytes(GOOD + torn)
    assert len(read_rows(file, torn_ok=True)) == 1
    with refused("line 2: "):
        read_rows(file)
    with JsonlWriter(file) as sink:
        sink.write([{"prompt": "Hi", "response": "2"}])
    assert [r.response for r in read_rows(file)] == ["Yo", "2"]
    assert file.with_name("rows.jsonl.torn").read_bytes() == torn + b"\n"
    assert f"torn line of {len(torn)} bytes" in caplog.text


def test_torn_ok_forgives_only_a_torn_last_line(file):
    file.write_bytes(b'{"prompt": "Hi"\n' + GOOD)
    with refused("line 1: not valid JSON"):
        read_rows(file, torn_ok=True)
    file.write_bytes(GOOD + b'{"question": "whole, but no row"}')
    with refused("line 2: fields 'question'"):
        read_rows(file, torn_ok=True)


def test_a_whole_last_line_without_its_line_end_is_kept(file, caplog):
    file.write_bytes(GOOD + GOOD.rstrip())
    assert len(read_rows(file, torn_ok=True)) == 2
    with JsonlWriter(file) as sink:
        sink.write([{"prompt": "Hi", "response": "3"}])
    assert file.read_bytes().startswith(GOOD * 2)
    assert len(read_rows(file)) == 3 and not caplog.records


class FullDisk:
    """A file whose disk takes ten more bytes."""

    def __init__(self, file):
        self.file, self.room = file, 10

    def write(self, data):
        taken = self.file.write(data[: self.room])
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_the_rows_before_whole(file):
    with JsonlWriter(file) as sink:
        sink.write([{"prompt": "Hi", "response": "1"}])
        sink._file = FullDisk(sink._file)
        with refused(r"rows\.jsonl failed: No space left on device; the rows before are whole and "
                     r"stay, so free some space and run it again"):
            sink.write([{"prompt": "Hi", "response": "2"}, {"prompt": "Hi", "response": "3"}])
    assert [r.response for r in read_rows(file)] == ["1"]


def test_places_that_cannot_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with refused(r"folder .*file/runs can't be written to: Not a directory; name another"):
        ensure_writable(blocker / "runs")
    with refused(r"folder .*file can't be written to"):
        JsonlWriter(blocker / "rows.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with refused(r"folder\.jsonl can't be written: Is a directory"):
        JsonlWriter(tmp_path / "folder.jsonl").__enter__()


def test_ensure_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_write_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}

    def full(self, *args, **kwargs):
        self.write_bytes(b'{"half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with refused(r"writing .*x\.json failed: No space left.*unchanged"):
        write_json(path, {"é": 2})
    assert json.loads(path.read_bytes()) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 10**5)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 10**5).hexdigest()
    with refused(r"y can't be read: No such file"):
        sha256_file(tmp_path / "y")
