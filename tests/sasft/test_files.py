"""Writing files so that nothing is lost, on torn files and full disks too."""

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from sasft.data import read_rows
from sasft.errors import UsageError
from sasft.files import JsonlWriter, ensure_writable, sha256_file, write_json

GOOD = b'{"prompt": "Hi", "response": "Yo"}\n'


def refused(message: str):
    return pytest.raises(UsageError, match=message)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


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


def test_numbers_that_json_lacks_are_null(tmp_path):
    write_json(tmp_path / "x.json", {"NaN": [1.5, math.nan], "of": (math.inf, {"it": -math.inf}), 3: "Infinity"})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"NaN": [1.5, None], "of": [None, {"it": None}], "3": "Infinity"}


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 10**5)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 10**5).hexdigest()
    with refused(r"y can't be read: No such file"):
        sha256_file(tmp_path / "y")
