"""Where rows come from: JSONL files, Parquet files and datasets on the hub, all named by one string each."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Self

from sasft.errors import UsageError
from sasft.files import is_torn, sha256_file

FIELDS = ("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output", "id", "source")
_GRAMMAR = re.compile(
    r"(?P<where>[^:@#]+)(:(?P<config>[^:@#=]+))?(@(?P<revision>[^:@#]+))?(#(?P<split>[^:\[#]+(\[[^\]]*\])?))?(:(?P<columns>\w+=.+))?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ARRAY = " (is this one JSON array? put each of its objects on a line)"
_FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst")


class Record(NamedTuple):
    """A row as it was found: its number from 1, its fields, and how its text starts."""

    number: int
    data: dict[str, Any]
    start: str


@dataclass(frozen=True)
class Source:
    """A file of rows or a dataset on the hub, and which of its columns are what.

    As a string, ``FILE[:field=column,...]`` or ``ORG/NAME[:config][@revision][#split][:field=column,...]``. A file whose name
    ends in ``.parquet`` is read as Parquet, any other as JSONL; a name of that form that is no file is looked for on the hub.
    ``split`` is as the datasets library takes it (``train[:1000]``), ``train`` by default. ``columns`` maps the fields of
    a row (see :meth:`sasft.data.Row.from_json`) to columns of other names.

    Raises :class:`UsageError` for a string that is neither, and for a field that rows do not have.

    >>> Source.parse("openai/gsm8k:main@e53f048#train[:100]:prompt=question,response=answer")  # doctest: +ELLIPSIS
    Source(where='openai/gsm8k', config='main', revision='e53f048', split='train[:100]', columns={'prompt': 'question', 'res...
    >>> Source.parse("my_task.jsonl").name
    'my_task'
    """

    where: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := self.columns.keys() - set(FIELDS):
            raise UsageError(f"columns of {self.where} name the field {min(unknown)!r}, which rows do not have; there are: "
                             f"{', '.join(FIELDS)}")
        if self.is_file and (extra := [n for n in ("config", "revision", "split") if getattr(self, n) is not None]):
            raise UsageError(f"{extra[0]} is for datasets on the hub, but {self.where} is taken for a file; leave it out")

    @classmethod
    def parse(cls, text: "Source | Path | str") -> Self:
        """The source that a string names; a file that exists under the whole string is that file."""
        if isinstance(text, Source):
            return text
        text = str(text)
        found = None if Path(text).exists() else _GRAMMAR.fullmatch(text)
        if found is None:
            return cls(text)
        parts = found.groupdict()
        pairs = [pair.partition("=") for pair in (parts.pop("columns") or "").split(",") if pair]
        if bare := [name for name, equals, column in pairs if not (equals and column)]:
            raise UsageError(f"columns are given as field=column, got {bare[0]!r} in {text!r}")
        return cls(**parts, columns={name.strip(): column.strip() for name, _, column in pairs})

    @property
    def is_file(self) -> bool:
        return Path(self.where).exists() or self.where.endswith(_FILE_TYPES) or not _HUB_ID.fullmatch(self.where)

    @property
    def name(self) -> str:
        """What the rows are called after, unless they say otherwise."""
        return Path(self.where).stem if self.is_file else self.where.partition("/")[2]

    @property
    def unit(self) -> str:
        return "line" if self.is_file and not self._is_parquet else "row"

    def __str__(self) -> str:
        return self.where

    def records(self, *, torn_ok: bool = False) -> Iterator[Record]:
        """The rows one after the other, with columns renamed to fields. ``torn_ok``: see :func:`sasft.data.read_rows`."""
        if not self.is_file:
            found = self._from_hub()
        elif self._is_parquet:
            found = self._from_parquet()
        else:
            found = self._from_jsonl(torn_ok)
        if self.columns:
            found = map(self._renamed, found)
        return found if self.unit == "line" else map(_without_gaps, found)

    def sha256(self) -> str:
        """The file's SHA-256; of a dataset on the hub, that of its rows, one JSON object a line with sorted keys, in which dates, times
        and decimals are their text and bytes their hexadecimal digits. Raises :class:`UsageError` for what has no text (images).
        """
        if self.is_file:
            return sha256_file(self.where)
        total = hashlib.sha256()
        for record in self._from_hub():
            try:
                line = json.dumps(record.data, sort_keys=True, ensure_ascii=False, default=_as_text)
            except TypeError as error:
                raise UsageError(f"{self}, row {record.number}: no hash can be made of {error}; save the columns that are needed as a "
                                 "JSONL or Parquet file, and name that") from None
            total.update(line.encode() + b"\n")
        return total.hexdigest()

    @property
    def _is_parquet(self) -> bool:
        return self.where.endswith(".parquet")

    def _renamed(self, record: Record) -> Record:
        if missing := [(f, c) for f, c in self.columns.items() if c not in record.data]:
            needed = ", ".join(f"{column!r} (as {field})" for field, column in missing)
            raise UsageError(f"{self}, {self.unit} {record.number}: columns needed: {needed}; columns found: {listed(record.data)}")
        used = set(self.columns.values())
        rest = {name: value for name, value in record.data.items() if name not in used}
        return record._replace(data={**rest, **{f: record.data[c] for f, c in self.columns.items()}})

    def _from_jsonl(self, torn_ok: bool) -> Iterator[Record]:
        try:
            lines = Path(self.where).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise UsageError(f"{self} can't be read: {error.strerror}; it should be a JSONL file, one row a line, a Parquet "
                             "file, or a dataset on the hub (org/name)") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (torn_ok and number == len(lines) and is_torn(line)):
                continue
            start = line[:60].decode("utf-8", "replace")
            try:
                yield Record(number, _parse(line), start)
            except UsageError as error:
                raise UsageError(f"{self}, line {number}: {error}. The line starts with {start!r}") from None

    def _from_parquet(self) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.where) as file:
                rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
                yield from self._numbered(rows)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{self} can't be read as Parquet: {error}") from None

    def _from_hub(self) -> Iterator[Record]:
        try:
            import datasets
        except ImportError:
            raise UsageError(f"{self} is no file, and datasets on the hub need the datasets package: pip install datasets; or "
                             "name a JSONL or Parquet file") from None
        try:
            found = datasets.load_dataset(self.where, self.config, revision=self.revision, split=self.split or "train")
        except ConnectionError as error:
            raise UsageError(f"{self} is no file, is not in the local cache of datasets, and the hub cannot be reached ({error}); "
                             "connect, or name a JSONL or Parquet file") from None
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # no such name, config, revision or split
            raise UsageError(f"{self} is no file, and as a dataset on the hub it can't be loaded: {error}") from None
        yield from self._numbered(found)

    def _numbered(self, rows: Any) -> Iterator[Record]:
        for number, row in enumerate(rows, start=1):
            yield Record(number, dict(row), json.dumps(row, ensure_ascii=False, default=str)[:60])


def _as_text(value: Any) -> str:
    if isinstance(value, (date, time, timedelta, Decimal)):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a value of type {type(value).__name__}")


def _without_gaps(record: Record) -> Record:
    """A table has every column in every row: those without a value are no fields of the row."""
    return record._replace(data={name: value for name, value in record.data.items() if value is not None})


def listed(names: Mapping[str, Any]) -> str:
    """Names for a message.

    >>> listed({"q": 1, "a": 2}), listed({})
    ("'q', 'a'", '(none)')
    """
    return ", ".join(map(repr, names)) or "(none)"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode())
        json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        array = _ARRAY if line.lstrip().startswith(b"[") else ""
        raise UsageError(f"not valid JSON ({error.msg}, column {error.colno}){array}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError:
        raise UsageError("an escape such as \\ud83d is half a character (a cut emoji?)") from None
    if not isinstance(data, dict):
        raise UsageError(f"a row must be a JSON object, got a {type(data).__name__}{_ARRAY if isinstance(data, list) else ''}")
    return data
