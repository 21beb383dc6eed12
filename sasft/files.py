"""Writing files so that nothing written is lost, and hashing what is read."""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from drift.table import as_json, written_whole
from sasft.errors import UsageError

logger = logging.getLogger(__name__)


class JsonlWriter:
    """A context manager that appends JSON objects to a file, one batch on the disk after another.

    Opening a file mends what a killed writer left: a torn last line is moved to ``<file>.torn``
    (with a warning in the log), so that every line of the file is a row. If a write fails, on a
    full disk say, the file is cut back to its last whole batch and :class:`UsageError` is raised.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with JsonlWriter(Path(folder) / "rows.jsonl") as sink:
    ...         sink.write([{"prompt": "2 + 2?", "response": "4"}])
    ...     (Path(folder) / "rows.jsonl").read_text()
    '{"prompt": "2 + 2?", "response": "4"}\\n'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        ensure_writable(self.path.parent)

    def __enter__(self) -> Self:
        try:
            # Unbuffered: what did not reach the disk must not be tried again by close().
            self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise UsageError(f"{self.path} can't be written: {error.strerror}; name another "
                             "file") from None
        self._mend()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a batch of rows: all of them, or none."""
        self._append(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(before)
            fix = "free some space" if error.errno == errno.ENOSPC else "mend that"
            raise UsageError(f"writing to {self.path} failed: {error.strerror}; the rows before "
                             f"are whole and stay, so {fix} and run it again to go on") from error

    def _mend(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if is_torn(data[whole:]):
            torn = self.path.with_name(self.path.name + ".torn")
            with torn.open("ab") as file:
                file.write(data[whole:] + b"\n")
            self._file.truncate(whole)
            logger.warning("%s ended in a torn line of %d bytes, left by a writer that was "
                           "stopped; it was moved to %s", self.path, len(data) - whole, torn)
        elif whole < len(data):
            self._append(b"\n")


def ensure_writable(folder: Path | str) -> None:
    """Make ``folder``, and a file in it for a moment, so that a run fails before its long work."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}-{threading.get_ident()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"the folder {folder} can't be written to: {error.strerror}; name another "
                         "one") from None


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Around what writes model files to ``folder``: whatever error their writers have for a full disk is a :class:`UsageError`, and
    what was begun of ``folder`` is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise UsageError(f"{what} can't be written to {folder} ({str(error).splitlines()[0]}), where {free:,.0f} MiB are free now; make room, "
                         "and the same command goes on") from error


def write_json(path: Path | str, data: Any) -> None:
    """Write :func:`as_json` by way of a temporary file: ``path`` holds its old content or all of the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        text = json.dumps(as_json(data), indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"writing {path} failed: {error.strerror}; what was there before is "
                         "unchanged") from error


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects, one a line: ``path`` holds its old content or all of the new."""
    with written_whole(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}; check the path") from None


def is_torn(last_line: bytes) -> bool:
    """Whether a last line lacks its end: no beginning of a JSON object is itself valid JSON."""
    try:
        json.loads(last_line or b"{}")
    except ValueError:
        return True
    return False
