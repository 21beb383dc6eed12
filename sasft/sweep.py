"""Sweeps: every combination of methods, tasks, seeds, rates or any other settings is trained and evaluated, into one table.

:mod:`sasft.sweep_plan` says what a plan looks like.
"""

import csv
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sasft.errors import UsageError
from sasft.evaluation import EvaluateSettings
from sasft.evaluation import run as run_evaluation
from sasft.evaluation.request import taken_apart
from sasft.evaluation.run import make_suites
from sasft.files import ensure_writable, sha256_file, write_json
from sasft.manifest import claim
from sasft.mixture import load_chat
from sasft.settings import option
from sasft.sweep_plan import Cell, read_cells, settings_of
from sasft.train import TrainSettings, read_material, train
from sasft.versions import versions
from sasft.workers import Ended, Job, in_processes, on_ray

SCORE = {"suite": str, "metric": str, "value": float, "stderr": float, "low": float, "high": float, "n": int, "prompts_sha256": str}
"""The table's last columns; what isn't known is left empty (``low`` and ``high`` are of shares of items alone). Of a training ``suite`` is "training", and its metrics are what it has recorded last, its last loss and costs."""

# Settings that say what a cell reads.
_READ = ("task", "self_data", "mix", "general_text", "method", "method_options", "record_every", "probe_rows")


@dataclass(kw_only=True)
class SweepSettings:
    """Train and evaluate every combination of the settings in a YAML file, side by side, into one table."""

    file: str = option("", "YAML file: train (settings of `sasft train`; lists are crossed), arms (a list of settings that go together), "
                           "evaluate (settings of `sasft evaluate`)")
    out: str = option("", "folder of the sweep; finished cells are kept, stopped ones go on, failed ones are tried again")
    workers: int = option(1, "cells at once on this machine; its GPUs are dealt out to them in turn")
    cpus: int = option(0, "CPU cores of a cell; 0 for this machine's divided by workers")
    ray: str | None = option(None, "run on Ray, as many cells at once as it has cores and GPUs for: `local`, or the address of a cluster "
                                   "whose machines see the same files")
    gpus: float = option(0.0, "GPUs of a cell on Ray; may be a part of one")

    def __post_init__(self) -> None:
        for name in ("file", "out"):
            if not getattr(self, name):
                raise UsageError(f"{name} is missing: {type(self).__dataclass_fields__[name].metadata['help']}")
        for name, least in (("workers", 1), ("cpus", 0), ("gpus", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.ray is None and self.gpus:
            raise UsageError(f"gpus is {self.gpus}, but it is an option of Ray; processes of this machine share its GPUs. Leave it out, or give ray")
        if self.ray is not None and self.workers > 1:
            raise UsageError(f"workers is {self.workers}, but on Ray the cores and GPUs of a cell say how many run at once; leave workers out")

    def cores(self) -> int:
        """CPU cores of a cell."""
        return self.cpus or max(1, (os.cpu_count() or 1) // self.workers)


@dataclass(frozen=True)
class Sweep:
    """What a sweep has left: the ``table`` (CSV; the same in Parquet beside it), how many ``cells`` it has, and which have ``failed`` of what."""

    table: Path
    cells: int
    failed: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.cells - len(self.failed)} of {self.cells} cells done: {self.table} ({self.table.with_suffix('.parquet').name} beside it)"

    def check(self) -> None:
        """Raise :class:`UsageError` with what went wrong, if anything did."""
        if self.failed:
            told = "".join(f"\n  {name}: {error}" for name, error in self.failed.items())
            raise UsageError(f"{len(self.failed)} of {self.cells} cells failed; the same command tries them again, and what they printed is in "
                             f"{self.table.parent}/cells/<cell>/log.txt:{told}")


# --- beforehand -------------------------------------------------------------------------------------------------------


def checked(settings: SweepSettings) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells with what the results of each hang on; nothing is written.

    Raises :class:`UsageError` for what a plan, a file or a folder lacks, and for cells that are there with other settings.
    """
    cells, hashes = read_cells(settings.file, settings.out), {}
    _check_files([cell for cell in cells if not cell.result.exists()])
    found = [(cell, _identity(cell, hashes)) for cell in cells]
    for cell, identity in found:
        # One that failed before any work is not held to its settings: a file is mended perhaps.
        if begun(cell) and (path := cell.folder / "cell.json").exists():
            claim(path, identity)
    return found


def _check_files(cells: Sequence[Cell]) -> None:
    """Read what the cells will read, each set of files once: what can't be read is told before the first of them begins."""
    read = set()
    for cell in cells:
        if cell.trains:
            settings = TrainSettings(**cell.train)
            files = tuple(cell.train[name] for name in _READ)
            if files not in read:
                try:
                    read_material(settings)
                    if settings.general_text:
                        sha256_file(settings.general_text)
                except UsageError as error:
                    raise UsageError(f"cell {cell.name}: {error}") from None
                read.add(files)
    for evaluated in evaluations(cells).values():
        try:
            make_suites(taken_apart(evaluated.suites), load_chat(evaluated.model, evaluated.revision), evaluated)
        except UsageError as error:
            raise UsageError(f"evaluate: {error}") from None


def evaluations(cells: Sequence[Cell]) -> dict[tuple[str, str | None], EvaluateSettings]:
    """The evaluation of each untrained model, by its name and revision."""
    models = {(c.train["model"], c.train["revision"]): c for c in cells if c.evaluate is not None}
    return {(model, revision): settings_of(EvaluateSettings, {**cell.evaluate, "model": model, "revision": revision}, cell.name, cell.folder)
            for (model, revision), cell in models.items()}


def begun(cell: Cell) -> bool:
    """Whether there is work of an earlier call in its folder."""
    return cell.result.exists() or any(cell.folder.glob("*/config.json"))


# --- one cell ---------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> None:
    """Train, evaluate, and leave ``result.json``; what a stopped call has done is not done again."""
    hashes, scores, tested = {}, [], {"model": cell.train["model"], "revision": cell.train["revision"]}
    if cell.trains:
        run = cell.folder / "run"
        summary = train(TrainSettings(**{**cell.train, "out": str(run), "save_model": cell.train["save_model"] or cell.evaluate is not None}))
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        hashes = {**config["identity"]["data_sha256"], "weights": summary["weights_sha256"]}
        scores, tested = _of_training(summary), {"model": str(run / "model")}
    if cell.evaluate is not None:
        found = run_evaluation(settings_of(EvaluateSettings, {**cell.evaluate, **tested}, cell.name, cell.folder / "evaluation"))
        hashes["weights"] = found["identity"]["weights_sha256"]
        scores += [{"suite": suite, "metric": metric, "value": s["score"], **{name: s.get(name) for name in ("stderr", "low", "high", "n")},
                    "prompts_sha256": part["prompts_sha256"]}
                   for suite, part in found["suites"].items() for metric, s in part["scores"].items()]
    write_json(cell.result, {"hashes": hashes, "versions": versions(), "scores": scores})
    if cell.trains and not cell.train["save_model"]:
        shutil.rmtree(run / "model", ignore_errors=True)  # it was there for the evaluation


def _of_training(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {"loss": summary["loss"][-1], **summary["recorded"], **{f"costs/{k}": v for k, v in summary["costs"].items()}}
    return [{"suite": "training", "metric": metric, "value": None if value is None else float(value)} for metric, value in found.items()]


# --- all of them ------------------------------------------------------------------------------------------------------


def sweep(settings: SweepSettings) -> Sweep:
    """Run every cell that is not finished; ``out/sweep.csv`` and ``.parquet`` have a row for every score of every finished cell.

    Columns: ``cell``, ``arm``, every setting of the training, the SHA-256 of its data and of the weights, versions, and :data:`SCORE`. Scores of the
    untrained model are in the arm ``base``. The table grows as cells end. A cell that fails stops no other; what went wrong is told at
    once and in the end, whole in ``out/cells/<cell>/log.txt``. The same call again goes on where it was stopped, and tries what has failed again.

    Raises :class:`UsageError` before any work for what a plan, a file or a folder lacks, and for cells that are there with other settings.
    """
    out, found = Path(settings.out), checked(settings)
    ensure_writable(out)
    cells = [cell for cell, _ in found]
    for cell, identity in found:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_json(cell.folder / "cell.json", identity)
    todo = [Job(run_cell, (cell,), cell.folder / "log.txt") for cell in cells if not cell.result.exists()]
    failed: dict[str, str] = {}
    with (closing(_run(todo, settings)) as ended,  # what runs is ended whatever happens here
          tqdm(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell", dynamic_ncols=True) as bar):
        for job, error in ended:
            [cell] = job.arguments
            if error is not None:
                failed[cell.name] = error
                bar.write(f"{cell.name} failed: {error} ({job.log})", file=sys.stderr)
            _write_table(out, cells)
            bar.set_postfix_str(f"{cell.name}{f'; {len(failed)} failed' if failed else ''}")
            bar.update()
    return Sweep(_write_table(out, cells), len(cells), failed)


def _run(jobs: Sequence[Job], settings: SweepSettings) -> Ended:
    if settings.ray is not None and jobs:
        return on_ray(jobs, settings.ray, cpus=settings.cores(), gpus=settings.gpus)
    return in_processes(jobs, settings.workers, settings.cores())


def _identity(cell: Cell, hashes: dict[str, str]) -> dict[str, Any]:
    """What a cell's results hang on: of files the contents, not where they lie. ``hashes``: of the files that have been read."""
    files = {name: value for name, value in cell.train.items() if isinstance(value, str) and name != "model" and Path(value).is_file()}
    for path in files.values():
        hashes[path] = hashes.get(path) or sha256_file(path)
    settings = {name: value for name, value in cell.train.items() if name not in (*files, "out")}
    return {"train": settings, "files": {name: hashes[path] for name, path in files.items()}, "evaluate": cell.evaluate}


def _write_table(out: Path, cells: Sequence[Cell]) -> Path:
    """Every finished cell's scores with all that they hang on, as CSV and as Parquet."""
    rows = []
    for cell in cells:
        if cell.result.exists():
            result = json.loads(cell.result.read_text(encoding="utf-8"))
            about = {"cell": cell.name, "arm": cell.arm, **{k: v for k, v in cell.train.items() if k != "out"},
                     **{f"{name}_sha256": digest for name, digest in result["hashes"].items()},
                     "versions": ", ".join(f"{package} {number}" for package, number in result["versions"].items())}
            rows += [{**about, **score} for score in result["scores"]]
    hints = get_type_hints(TrainSettings)
    settings = {f.name: hints[f.name] for f in fields(TrainSettings) if f.name != "out"}
    kinds = {"cell": str, "arm": str, **settings, **{name: str for row in rows for name in row if name not in settings and name not in SCORE}, **SCORE}
    table, parts = out / "sweep.csv", [out / f".sweep.{end}.{os.getpid()}" for end in ("csv", "parquet")]
    with parts[0].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(kinds))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(name, _arrow(kind)) for name, kind in kinds.items()])), parts[1])
    for part, end in zip(parts, ("csv", "parquet"), strict=True):
        part.replace(table.with_suffix(f".{end}"))
    return table


def _arrow(hint: Any) -> pa.DataType:
    """A column's type from that of its setting, which may be optional."""
    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return next((types[kind] for kind in (hint, *get_args(hint)) if kind in types), pa.string())
