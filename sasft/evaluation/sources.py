"""Where the rows of a benchmark come from: a file in a folder of data, or a set on the Hugging Face hub."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasft import sources
from sasft.errors import UsageError
from sasft.files import sha256_file

FOLDER_VARIABLE = "SASFT_SHARED_DATA"
"""The environment variable that names the folder of data where no setting does."""

Rows = list[dict[str, Any]]


class MissingSet(UsageError):
    """A benchmark is neither in the folder of data nor on a hub that can be reached."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A set on the hub: ``row`` turns its rows into the shape of the local file; those that ``keep`` refuses are left out.

    ``revision`` is a commit. Where it is None, the branch ``main`` is resolved to its commit first, which is what the
    provenance then names.

    >>> str(Hub(name="openai/gsm8k", config="main", revision="cc7b047"))
    'openai/gsm8k (configuration main, split test, revision cc7b047)'
    """

    name: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    row: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda row: row)
    keep: Callable[[dict[str, Any]], bool] | None = None

    def __str__(self) -> str:
        config = f"configuration {self.config}, " if self.config else ""
        return f"{self.name} ({config}split {self.split}, revision {self.revision or 'main'})"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of one split of a benchmark.

    ``file`` inside the folder of data, whose rows need the ``columns``, those of ``texts`` as text; the page ``home``
    of its authors, and the ``form`` in which the file is read; the set on the ``hub`` that stands in where there is no such file.
    """

    title: str
    file: str
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    home: str
    form: str = "one JSON object a line"
    hub: Hub | None = None

    def read(self, folder: Path | None) -> tuple[Rows, dict[str, Any]]:
        """The rows and their provenance: the file and its SHA-256, or the hub's name, split and commit.

        The file is read where it is there, else the hub is asked. Raises :class:`MissingSet` where neither has the set (and says
        where to get it, under which name and revision), :class:`UsageError` for an empty set, for rows without the columns
        needed, and for something else in them where text is needed.
        """
        path = None if folder is None else folder / self.file
        if path is not None and path.exists():
            rows, provenance = read_jsonl(path), {"file": self.file, "sha256": sha256_file(path)}
        else:
            rows, provenance = self._from_hub()
        where = f"{self.title} ({path if 'file' in provenance else provenance['hub']})"
        check_columns(rows, self.columns, where)
        check_texts(rows, self.texts, where)
        return rows, provenance

    def _from_hub(self) -> tuple[Rows, dict[str, Any]]:
        hub = self.hub
        if hub is None:
            raise self._missing("it is not on the hub in a shape that is known here")
        try:
            datasets = importlib.import_module("datasets")
        except ModuleNotFoundError:
            raise self._missing(f"reading {hub} from the hub needs a package: pip install datasets") from None
        try:
            revision = hub.revision or importlib.import_module("huggingface_hub").HfApi().dataset_info(hub.name).sha
            loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=revision)
            rows = [hub.row(dict(r)) for r in (loaded.filter(hub.keep) if hub.keep else loaded)]
        except Exception as error:  # the hub's client raises errors of many libraries, and all mean the same here
            said = (str(error).splitlines() or [""])[0][:200]
            raise self._missing(f"{hub} can't be read from the hub ({type(error).__name__}: {said})") from error
        return rows, {"hub": hub.name, "config": hub.config, "split": hub.split, "revision": revision}

    def _missing(self, why: str) -> MissingSet:
        return MissingSet(
            f"{self.title} is missing: there is no file {self.file} in a folder of data (which the setting data names, or the "
            f"environment variable {FOLDER_VARIABLE}), and {why}. Get it from {self.home} ({self.form}; the fields needed are "
            f"{', '.join(self.columns)})")


def data_folder(setting: str | None) -> Path | None:
    """The folder of data: the setting, else the environment variable, else none. Raises :class:`UsageError` if it is no
    folder."""
    name = setting or os.environ.get(FOLDER_VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(f"the folder of data {folder} (from {'the setting data' if setting else FOLDER_VARIABLE}) is not there")
    return folder


def read_jsonl(path: Path) -> Rows:
    """The objects of a JSONL file; :class:`UsageError` for a line that is none (its number)."""
    return [record.data for record in sources.Source(str(path)).records()]


def check_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> None:
    """Raise :class:`UsageError` if there is no row, or one that lacks a column (found and needed are named)."""
    if not rows:
        raise UsageError(f"{where} has no rows; rows with the fields {', '.join(columns)} are needed")
    for number, row in enumerate(rows, start=1):
        if missing := [c for c in columns if c not in row]:
            raise UsageError(f"{where}, row {number}: columns {', '.join(missing)} are missing; found "
                             f"{', '.join(row) or '(none)'}, needed {', '.join(columns)}")


def check_texts(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> None:
    """Raise :class:`UsageError` for a row with something else than text in one of these columns."""
    for number, row in enumerate(rows, start=1):
        if other := [c for c in columns if not isinstance(row[c], str)]:
            raise UsageError(f"{where}, row {number}: {other[0]} must be text, got {row[other[0]]!r}")
