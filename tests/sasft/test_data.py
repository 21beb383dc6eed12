"""Reading rows with exact errors, and encoding them."""

import builtins
import hashlib
import json
import warnings
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sasft.chat import Chat
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import sha256_file
from sasft.filters import BreaksScoreIdentity
from sasft.sources import Source
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
        {"instruction": "Greet", "input": "", "output": "Yo", "id": None, "source": None},
    ])))
    system, plain, full, short = read_rows(file)
    assert system == Row("rows-1", "rows", (SYSTEM, USER), "Yo")
    assert plain == Row("7", "mine", (USER,), "Yo", meta={"level": "easy"})
    assert full.prompt == ({"role": "user", "content": "Add\n\n2 + 2"},) and full.response == "4"
    assert short.prompt == ({"role": "user", "content": "Greet"},) and (short.id, short.source) == ("rows-4", "rows")


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
    (b"[" + GOOD.strip() + b"]", r"line 2: a row must be a JSON object, got a list \(is this one JSON array\? put each of its objects on"),
    (b"1", r"line 2: a row must be a JSON object, got a int\. The line"),
    (b'{"prompt": "\xff"}', r"line 2: not UTF-8 \(invalid start byte at byte 12\)"),
    (b'{"prompt": "Hi", "response": "\\ud83d"}', r"line 2: an escape .* half a character"),
    (b'{"question": "Hi", "answer": "Yo"}',
     r"""columns found, 'question', 'answer', make none of the shapes needed: \{"messages".*"output.*prompt=question"""),
    (b"{}", r"line 2: the columns found, \(none\), make none"),
    (b'[{"prompt": "Hi",', r"not valid JSON .*is this one JSON array\? put each of its objects on a line"),
    (b'{"conversations": [{"from": "human"}]}', r'"messages" must be a list of .*, got \[\{"role": "user", "content": null'),
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rows that nobody has sampled may be chosen in any way
        kept, report = encode_rows(rows, chat, limit, "drop")
    assert (report.kept, report.truncated, report.dropped) == (2, 0, 1)
    sampled = [replace(row, response_ids=tuple(chat.tokenizer(row.response).input_ids)) for row in rows]
    with pytest.warns(BreaksScoreIdentity, match=f"max_tokens={limit} with too_long=drop looked at answers and dropped 1 rows"):
        assert encode_rows(sampled, chat, limit, "drop")[0] == kept
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
    with refused("line 2: the columns found, 'question'"):
        read_rows(file, torn_ok=True)


def test_all_turns_in_the_loss():
    chat = Chat(tokenizer())
    talk = Row("r", "s", (USER, {"role": "assistant", "content": "Yo"}, USER), "Yes")
    (every,), report = encode_rows([talk], chat, 500, turns="all")
    assert every == chat.encode(talk.prompt, "Yes", turns="all") and report.loss_tokens == 3 + 4


# --- other shapes, other places -------------------------------------------------------------------------------


def test_shapes_of_other_libraries(file):
    assistant = {"role": "assistant", "content": "Yo"}
    file.write_text("\n".join(map(json.dumps, [
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": [SYSTEM, USER], "completion": [assistant]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ])))
    plain, chat, share = read_rows(file)
    assert plain.prompt == (USER,) and chat.prompt == share.prompt == (SYSTEM, USER)
    assert {row.response for row in (plain, chat, share)} == {"Yo"} and not any(row.meta for row in (plain, chat, share))


def test_columns_of_other_names(file):
    file.write_text('{"question": "Hi", "answer": "Yo", "level": 3}\n')
    (row,) = read_rows(f"{file}:prompt=question,response=answer")
    assert row == Row("rows-1", "rows", (USER,), "Yo", meta={"level": 3})
    assert read_rows(Source(str(file), columns={"prompt": "question", "response": "answer"})) == [row]
    with refused(r"rows\.jsonl, line 1: columns needed: 'query' \(as prompt\); columns found: 'question', 'answer', 'level'"):
        read_rows(f"{file}:prompt=query,response=answer")
    with refused("name the field 'query', which rows do not have; there are: messages, .*, prompt"):
        read_rows(f"{file}:query=question")
    with refused("columns are given as field=column, got 'answer'"):
        read_rows(f"{file}:prompt=question,answer")


def test_a_name_with_marks_in_it_is_a_file_if_there_is_one(tmp_path):
    odd = tmp_path / "a:b@c#d.jsonl"
    odd.write_bytes(GOOD)
    assert read_rows(odd)[0].source == "a:b@c#d"


def parquet(path: Path, rows: list[dict]) -> Path:
    names = {name for row in rows for name in row}
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in sorted(names)}), path)
    return path


def test_parquet_reads_as_the_same_rows_in_jsonl_do(tmp_path, file):
    rows = [{"messages": [SYSTEM, USER, {"role": "assistant", "content": "Yo"}]},
            {"prompt": "Hi", "response": "Y", "response_ids": [92], "finished": False, "level": 2}]
    file.write_text("\n".join(map(json.dumps, rows)))
    table = parquet(tmp_path / "rows.parquet", rows)  # a table: each row has all columns, those of the other one empty
    assert read_rows(table) == read_rows(file)
    assert Source.parse(table).sha256() == sha256_file(table)
    named = parquet(tmp_path / "named.parquet", [{"q": "Hi", "a": "Yo"}])
    assert read_rows(f"{named}:prompt=q,response=a")[0].response == "Yo"
    with refused(r"named\.parquet, row 1: the columns found, 'a', 'q', make none of the shapes needed.*The row starts with '\{\"a"):
        read_rows(named)
    gaps = parquet(tmp_path / "gaps.parquet", [{"q": "a", "response": r} for r in ("b", None, " ")])
    for columns in ("prompt=q", "prompt=q,response=response"):
        with refused(r"2 of 3 rows have no answer \(rows 2, 3\)"):
            read_rows(f"{gaps}:{columns}")


def test_files_that_are_no_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(GOOD)
    with refused(r"rows\.parquet can't be read as Parquet"):
        read_rows(tmp_path / "rows.parquet")
    with refused(r"none\.parquet can't be read as Parquet"):
        read_rows(tmp_path / "none.parquet")


@pytest.mark.parametrize("text, expected", [
    ("org/set", ("org/set", None, None, None)),
    ("org/set:main", ("org/set", "main", None, None)),
    ("org/set@v1.0", ("org/set", None, "v1.0", None)),
    ("org/set#test", ("org/set", None, None, "test")),
    ("org/a-b.c:cfg-2@abc#train[:10%]:prompt=q", ("org/a-b.c", "cfg-2", "abc", "train[:10%]")),
])
def test_names_of_datasets_on_the_hub(text, expected):
    source = Source.parse(text)
    assert (source.where, source.config, source.revision, source.split) == expected and not source.is_file
    assert source.columns == ({"prompt": "q"} if "=" in text else {})


def test_a_hub_dataset_is_loaded_as_it_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "Hi", "answer": "Yo"}, {"question": "Why?", "answer": "So"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source.parse("org/set:main@abc#test:prompt=question,response=answer")
    rows = read_rows(source)
    assert [(r.id, r.source, r.response) for r in rows] == [("set-1", "set", "Yo"), ("set-2", "set", "So")]
    assert asked == [(("org/set", "main"), {"revision": "abc", "split": "test"})]
    assert source.sha256() == Source.parse("org/set").sha256() and asked[-1][1]["split"] == "train"
    with refused("org/set, row 1: the columns found, 'question', 'answer', make none"):
        read_rows("org/set")


def test_hub_datasets_of_any_columns_have_a_hash(monkeypatch):
    datasets = pytest.importorskip("datasets")
    row = {"prompt": "Hi", "response": "Yo", "day": date(2026, 2, 1), "at": datetime(2026, 2, 1, 12, 30), "took": timedelta(seconds=3),
           "price": Decimal("1.50"), "raw": b"\x00\xff"}

    def sha256(**changed) -> str:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{**row, **changed}]))
        assert read_rows("org/set")[0].response == "Yo"
        return Source.parse("org/set").sha256()

    written = {**row, "day": "2026-02-01", "at": "2026-02-01 12:30:00", "took": "0:00:03", "price": "1.50", "raw": "00ff"}
    assert sha256() == hashlib.sha256(json.dumps(written, sort_keys=True).encode() + b"\n").hexdigest()
    others = [{"day": date(2026, 2, 2)}, {"at": datetime(2026, 2, 1, 12, 31)}, {"took": timedelta(0)}, {"price": Decimal("1.51")}, {"raw": b"\x01"}]
    assert len({sha256(), *(sha256(**other) for other in others)}) == 6
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{**row, "picture": object()}])
    with refused("org/set, row 1: no hash can be made of a value of type object; save the columns that are needed"):
        Source.parse("org/set").sha256()


def test_hub_datasets_out_of_reach(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused("no-such-org/none is no file, is not in the local cache of datasets, and the hub cannot be reached.*name a JSONL"):
        read_rows("no-such-org/none")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ValueError('Unknown split "x".')))
    with refused("as a dataset on the hub it can't be loaded: Unknown split"):
        read_rows("org/set#x")
    with refused("data/my_task.jsonl can't be read: No such file"):  # a missing file is not looked for on the hub
        read_rows("data/my_task.jsonl")
    (tmp_path / "t.jsonl").write_bytes(GOOD)
    with refused("split is for datasets on the hub, but .*t.jsonl is taken for a file"):
        read_rows(f"{tmp_path}/t.jsonl#test")


def test_without_the_datasets_package(monkeypatch):
    original = builtins.__import__

    def lacking(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with refused("need the datasets package: pip install datasets"):
        read_rows("org/set")
