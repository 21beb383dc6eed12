"""The recorded numbers: one long table in Parquet, and a JSON file that says how it came about."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from numpy.typing import NDArray

SCHEMA = pa.schema([
    ("run", pa.string()), ("step", pa.int64()), ("metric", pa.string()), ("layer", pa.int64()), ("module", pa.string()),
    ("source", pa.string()), ("value", pa.float64()), ("stderr", pa.float64()), ("n_tokens", pa.int64()),
])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number: which metric, at which step, of which part of the model, on which data.

    ``layer``: block index, None outside the blocks or for the whole model. ``module``: canonical parameter name, ``*.<name>`` for
    one kind of parameter over all blocks, "" for a block or the whole model. ``source``: the probe or pair of sources, "" if none. ``stderr`` and ``n_tokens``: None where they do
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
        self.out, self.run = None if out is None or not main_process() else Path(out), run
        self.rows: list[Row] = []
        if self.out is not None:
            try:
                (self.out / "drift").mkdir(parents=True, exist_ok=True)
                probe = self.out / "drift" / f".write-test-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise OSError(error.errno, f"can't record to {self.out / 'drift'} ({error.strerror}); choose another out") from None

    def resume(self, step: int, now: Mapping[str, Any]) -> Mapping[str, Any]:
        """Forget what was recorded after ``step``, and read the rest back (for a run that goes on from there); what meta.json held.

        Raises ``ValueError`` if the folder holds another run: one of another name, or other values under the keys of ``now``.
        """
        self.rows = []
        if not self._parts():
            return {}
        before = load(self.out).meta
        now = as_json({"run": self.run, **now}, default=str)
        differing = [f"{key} is {before.get(key)!r}, now {now[key]!r}" for key in now if key in before and not _same(before[key], now[key])]
        if differing:
            raise ValueError(f"out {self.out} holds the recordings of another run ({'; '.join(differing)}); choose another folder")
        for part in self._parts():
            if _step_of(part) > step:
                part.unlink()
        if self._parts():
            self.rows = [Row(**r) for r in load(self.out).table.to_pylist()]
        return before

    def begin(self, *, overwrite: bool) -> None:
        """Start with no recordings. Raises ``FileExistsError`` if there are some, unless ``overwrite``: then they are removed."""
        parts = self._parts()
        if parts and not overwrite:
            raise FileExistsError(f"out {self.out} holds {len(parts)} recordings of a former run (the last of step {_step_of(parts[-1])}); choose "
                                  "another folder, give overwrite=True, or start_step to go on with it")
        for part in parts:
            part.unlink()

    def add(self, step: int, rows: list[Row]) -> None:
        """Keep the rows of one recording, and write them if there is a folder."""
        rows = [replace(r, run=self.run) for r in rows]
        self.rows += rows
        if self.out is None:
            return
        path = self.out / "drift" / f"part-{step:09d}.parquet"
        try:
            with written_whole(path) as temporary:
                pq.write_table(_arrow(rows), temporary)
        except OSError as error:
            raise OSError(error.errno, f"recording step {step} to {path} failed ({error.strerror}); "
                                       "the recordings before it are whole and readable") from error

    def arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        return _arrow(self.rows)

    def _parts(self) -> list[Path]:
        return [] if self.out is None else sorted((self.out / "drift").glob("part-*.parquet"))


def main_process() -> bool:
    """Whether this process is the one that writes: the first of several, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _step_of(part: Path) -> int:
    return int(part.stem.split("-")[1])


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, dict) and "sha256" in before:  # one content, wherever it was read from
        return before["sha256"] == now["sha256"]
    return before == now


def _arrow(rows: list[Row]) -> pa.Table:
    return pa.table({f.name: [getattr(r, f.name) for r in rows] for f in fields(Row)}, schema=SCHEMA)


@dataclass(frozen=True)
class Recording:
    """What a run has recorded: ``table``, one row a number (columns as in :class:`Row`), and ``meta``, how it came about."""

    table: pa.Table
    meta: Mapping[str, Any]

    def metrics(self) -> list[str]:
        """The names of all metrics, sorted."""
        return sorted(set(self.table["metric"].to_pylist()))

    def series(self, metric: str, *, layer: int | None = None, module: str = "", source: str = "") -> "Series":
        """One metric of one part of the model over the steps; by default of the whole model.

        Raises ``ValueError`` naming what there is if nothing matches.
        """
        if metric not in self.metrics():
            raise ValueError(f"there is no metric {metric!r}; there are {', '.join(self.metrics())}")
        of_metric = [r for r in self.table.to_pylist() if r["metric"] == metric]
        rows = [r for r in of_metric if r["module"] == module and r["source"] == source and (module or r["layer"] == layer)]
        if not rows:
            there = sorted({(r["layer"], r["module"], r["source"]) for r in of_metric}, key=str)[:4]
            raise ValueError(f"{metric} has no rows of layer={layer}, module={module!r}, source={source!r}; it has such as {there}")
        rows.sort(key=lambda r: r["step"])
        return Series(np.array([r["step"] for r in rows]), np.array([r["value"] for r in rows]),
                      np.array([np.nan if r["stderr"] is None else r["stderr"] for r in rows]))


@dataclass(frozen=True)
class Series:
    """``steps``, ``values`` and standard errors ``stderr`` (nan where there is none), each [n]."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]


def load(out: Path | str) -> Recording:
    """What a run recorded under ``out``, also while it is still running.

    Raises ``FileNotFoundError`` if nothing is recorded there.

    >>> import tempfile, torch, drift
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with drift.record(torch.nn.Linear(2, 1), folder) as recorder:
    ...         _ = recorder.step()
    ...     recording = load(folder)
    >>> recording.series("drift/l2").steps.tolist(), recording.meta["recordings"]
    ([0, 1], 2)
    """
    parts = sorted((Path(out) / "drift").glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"nothing is recorded under {Path(out) / 'drift'} (no part-*.parquet there)")
    meta = Path(out) / "drift" / "meta.json"
    return Recording(pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts]),
                     json.loads(meta.read_text(encoding="utf-8")) if meta.exists() else {})


def write_meta(out: Path, meta: Mapping[str, Any]) -> None:
    """Write ``<out>/drift/meta.json`` through a temporary file, with the versions of what is in use."""
    packages = [p for p in ("torch", "numpy", "pyarrow", "safetensors", "transformers", "peft", "trl") if p in sys.modules]
    content = {"python": platform.python_version(), "versions": {p: _version(p) for p in packages}, **meta}
    with written_whole(out / "drift" / "meta.json") as temporary:
        temporary.write_text(json.dumps(as_json(content, default=str), indent=1) + "\n", encoding="utf-8")


def as_json(data: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """The data as they are when JSON is read back: tuples are lists, keys texts, and numbers that are not finite, which JSON lacks, None.

    >>> as_json({"drift": (0.5, float("nan")), 3: float("inf")})
    {'drift': [0.5, None], '3': None}
    """
    return json.loads(json.dumps(data, default=default), parse_constant=lambda name: None)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it is renamed into its place at the end of the block, and removed if that is left by an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path
        return "unknown"
