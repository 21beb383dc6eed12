"""The recorded numbers: one long table in Parquet, and a JSON file that says how it came about."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema([
    ("run", pa.string()), ("step", pa.int64()), ("metric", pa.string()), ("layer", pa.int64()), ("module", pa.string()),
    ("source", pa.string()), ("value", pa.float64()), ("stderr", pa.float64()), ("n_tokens", pa.int64()),
])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number: which metric, at which step, of which part of the model, on which data.

    ``layer``: block index, None outside the blocks or for the whole model. ``module``: canonical parameter name, "" for a
    sum over several. ``source``: the probe or pair of sources, "" if none. ``stderr`` and ``n_tokens``: None where they do
    not apply.
    """

    run: str = ""
    step: int
    metric: str
    layer: int | None = None
    module: str = ""
    source: str = ""
    value: float
    stderr: float | None = None
    n_tokens: int | None = None


class Table:
    """Rows in memory, and on disk as they come: ``<out>/drift/part-<step>.parquet``, one file a recording.

    Each part is written beside its place and renamed into it, so that what has been flushed stays whole and readable
    whatever happens later. With ``out=None`` rows stay in memory.
    """

    def __init__(self, out: Path | str | None, run: str) -> None:
        self.out, self.run = None if out is None else Path(out), run
        self.rows: list[Row] = []
        if self.out is not None:
            try:
                (self.out / "drift").mkdir(parents=True, exist_ok=True)
                probe = self.out / "drift" / f".write-test-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise OSError(error.errno, f"can't record to {self.out / 'drift'} ({error.strerror}); choose another out") from None

    def resume(self, step: int) -> None:
        """Forget what was recorded after ``step``, and read the rest back (for a run that goes on from there)."""
        self.rows = []
        for part in self._parts():
            if _step_of(part) > step:
                part.unlink()
        if any(self._parts()):
            self.rows = [Row(**r) for r in read_table(self.out).to_pylist()]

    def clear(self) -> None:
        """Remove every part of a former run in the same folder."""
        for part in self._parts():
            part.unlink()

    def add(self, step: int, rows: list[Row]) -> None:
        """Keep the rows of one recording, and write them if there is a folder."""
        rows = [replace(r, run=self.run) for r in rows]
        self.rows += rows
        if self.out is None:
            return
        path = self.out / "drift" / f"part-{step:09d}.parquet"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            pq.write_table(_arrow(rows), temporary)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"recording step {step} to {path} failed ({error.strerror}); "
                                       "the recordings before it are whole and readable") from error

    def arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        return _arrow(self.rows)

    def _parts(self) -> list[Path]:
        return [] if self.out is None else sorted((self.out / "drift").glob("part-*.parquet"))


def _step_of(part: Path) -> int:
    return int(part.stem.split("-")[1])


def _arrow(rows: list[Row]) -> pa.Table:
    return pa.table({f.name: [getattr(r, f.name) for r in rows] for f in fields(Row)}, schema=SCHEMA)


def read_table(out: Path | str) -> pa.Table:
    """The table that a run recorded under ``out``, as an Arrow table (``.to_pandas()`` for a data frame).

    Columns: run, step, metric, layer, module, source, value, stderr, n_tokens (see :class:`Row`).
    """
    parts = sorted((Path(out) / "drift").glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"nothing is recorded under {Path(out) / 'drift'} (no part-*.parquet there)")
    return pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts])


def write_meta(out: Path, meta: Mapping[str, Any]) -> None:
    """Write ``<out>/drift/meta.json`` through a temporary file, with the versions of what is in use."""
    packages = [p for p in ("torch", "numpy", "pyarrow", "safetensors", "transformers", "peft", "trl") if p in sys.modules]
    content = {"python": platform.python_version(), "versions": {p: _version(p) for p in packages}, **meta}
    path = out / "drift" / "meta.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path
        return "unknown"
