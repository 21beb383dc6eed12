"""Sweeps: every combination of methods, tasks, seeds, rates or any other settings is trained and evaluated, into one table.

The plan is a YAML file::

    train:                     # settings of `sasft train`; one that is given a list is crossed with the others
      task: [sums.jsonl, letters.jsonl]
      self_data: self.jsonl
      seed: [0, 1, 2]
      lr: [1e-5, 2e-5]
    arms:                      # settings that go together, before those of train; may be left out
      - {name: task-only, lam: 0}
      - {name: sa-sft, lam: 0.5}
      - {name: l2-sp, lam: 0, method: l2-sp, method_options: [weight=0.1, weight=1]}
    evaluate:                  # settings of `sasft evaluate`, for every trained model and the untrained one; may be left out
      suites: text,task:sums

This one has 48 cells (2 tasks, 3 seeds, 2 rates, and 4 arms as the last has two), and one for the untrained model.
"""

import csv
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from sasft.errors import UsageError
from sasft.evaluation import EvaluateSettings
from sasft.evaluation import run as run_evaluation
from sasft.files import ensure_writable, sha256_file, write_json
from sasft.manifest import claim
from sasft.options import parse
from sasft.settings import option
from sasft.train import TrainSettings, read_material, train
from sasft.versions import versions
from sasft.workers import Ended, Job, in_processes, on_ray

_BASE = "base"  # the untrained model's arm
SCORE = {"suite": str, "metric": str, "value": float, "stderr": float, "n": int, "prompts_sha256": str}
"""The table's last columns. Of a training ``suite`` is "training", and its metrics are what it has recorded last, its last loss and costs."""


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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training with its evaluation, in a folder of its own; ``train`` and ``evaluate`` are the settings of both."""

    name: str
    arm: str
    folder: Path
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any] | None

    @property
    def trains(self) -> bool:
        """Whether there is a training; the untrained model is a cell as well."""
        return self.arm != _BASE

    @property
    def result(self) -> Path:
        """What a finished cell leaves."""
        return self.folder / "result.json"


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


# --- from a file to cells ---------------------------------------------------------------------------------------------


def read_cells(file: Path | str, out: Path | str) -> list[Cell]:
    """The cells of a plan, in its order, the untrained models' first. Raises :class:`UsageError` for what ``sasft train`` would refuse.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plan = Path(folder) / "plan.yaml"
    ...     _ = plan.write_text("train: {task: t.jsonl, lam: 0, seed: [0, 1]}\\narms: [{name: slow, lr: 1e-6}, {name: both, lr: [1e-5, 1e-4]}]")
    ...     [cell.name for cell in read_cells(plan, folder)]
    ['slow,seed=0', 'slow,seed=1', 'both,seed=0,lr=1e-5', 'both,seed=0,lr=1e-4', 'both,seed=1,lr=1e-5', 'both,seed=1,lr=1e-4']
    """
    plan = _read(Path(file))
    folder, evaluate, found = Path(out) / "cells", plan.get("evaluate"), []
    for arm in plan.get("arms", [{}]):
        given = {**plan["train"], **arm}
        arm_name = str(given.pop("name", given.get("method", TrainSettings.method)))
        if arm_name == _BASE:
            raise UsageError(f"{file}: an arm is named {_BASE!r}, which the untrained model is; give it another name")
        crossed = {name: values for name, values in given.items() if isinstance(values, list)}
        for values in itertools.product(*crossed.values()):
            chosen = dict(zip(crossed, values, strict=True))
            name = ",".join([_plain(arm_name), *(f"{k}={_short(value)}" for k, value in chosen.items())])
            settings = asdict(_settings(TrainSettings, {**given, **chosen}, f"{file}, {name}", folder / name / "run"))
            found.append(Cell(name=name, arm=arm_name, folder=folder / name, train=settings, evaluate=evaluate))
    if evaluate is not None:
        if own := {"model", "revision"} & evaluate.keys():
            raise UsageError(f"{file}, evaluate: {', '.join(own)} is given, but the sweep evaluates the models that it trains; leave it out")
        _settings(EvaluateSettings, evaluate, f"{file}, evaluate", folder)
        found = [*_bases(found, evaluate, folder), *found]
    _check_apart(found, file)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"file {file} can't be read: {error}") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("train"), dict) or not plan.keys() <= {"train", "arms", "evaluate"}:
        raise UsageError(f"file {file} must hold `train:` with settings below it, and may hold `arms:` (a list of settings) and `evaluate:`; "
                         f"it holds {', '.join(map(str, plan)) if isinstance(plan, dict) else type(plan).__name__}")
    arms = plan.get("arms", [{}])
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) for arm in arms):
        raise UsageError(f"arms in {file} must be a list of settings, one entry an arm, got {arms!r}")
    if not isinstance(plan.get("evaluate", {}), dict):
        raise UsageError(f"evaluate in {file} must be settings of `sasft evaluate`, got {plan['evaluate']!r}")
    for part in (plan["train"], *arms):
        if empty := [name for name, value in part.items() if value == []]:
            raise UsageError(f"{empty[0]} in {file} is an empty list, so there would be no cell; give a value, or a list of some")
    return plan


def _settings(kind: type, given: Mapping[str, Any], where: str, out: Path) -> Any:
    """Settings as the command line would take them; ``where`` says whose they are."""
    if "out" in given:
        raise UsageError(f"{where}: out is given, but the sweep makes a folder for every cell; leave it out")
    parts = [([f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]) for name, value in given.items() if value is not None]
    try:
        return parse(kind, [f"--out={out}", *itertools.chain(*parts)], prog=where)[0]
    except UsageError as error:
        raise UsageError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _short(value: Any) -> str:
    """A value as a part of a folder's name; of a path its last part, without its ending."""
    return _plain(Path(value).stem if isinstance(value, str) and ("/" in value or re.search(r"\.[A-Za-z]\w*$", value)) else str(value))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", text)


def _bases(cells: Iterable[Cell], evaluate: Mapping[str, Any], folder: Path) -> list[Cell]:
    """The untrained models, which drops are drops from."""
    models = list({(c.train["model"], c.train["revision"]): None for c in cells})
    names = [_BASE if len(models) == 1 else f"{_BASE},model={_short(m)}{f',revision={_short(r)}' if r else ''}" for m, r in models]
    return [Cell(name=name, arm=_BASE, folder=folder / name, train={"model": m, "revision": r}, evaluate=evaluate)
            for name, (m, r) in zip(names, models, strict=True)]


def _check_apart(cells: Sequence[Cell], file: Path | str) -> None:
    of: dict[Path, Cell] = {}
    for cell in cells:
        if (other := of.setdefault(cell.folder, cell)) is not cell:
            why = "they are the same" if other.train == cell.train else "give the arms different names, and the files different ones too"
            raise UsageError(f"{file}: two cells would be named {cell.name}; {why}")


def _check_files(cells: Sequence[Cell]) -> None:
    """Read what unfinished cells train on, each set of files once: what can't be read is told before the first of them begins."""
    read = set()
    for cell in cells:
        if cell.trains and not cell.result.exists():
            settings = TrainSettings(**cell.train)
            if (files := (settings.task, settings.self_data, settings.mix, settings.method_options)) not in read:
                try:
                    read_material(settings)
                except UsageError as error:
                    raise UsageError(f"cell {cell.name}: {error}") from None
                read.add(files)


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
        found = run_evaluation(_settings(EvaluateSettings, {**cell.evaluate, **tested}, cell.name, cell.folder / "evaluation"))
        hashes["weights"] = found["identity"]["weights_sha256"]
        scores += [{"suite": suite, "metric": metric, "value": s["score"], "stderr": s["stderr"], "n": s["n"], "prompts_sha256": part["prompts_sha256"]}
                   for suite, part in found["suites"].items() for metric, s in part["scores"].items()]
    write_json(cell.result, {"hashes": hashes, "versions": versions(), "scores": scores})
    if cell.trains and not cell.train["save_model"]:
        shutil.rmtree(run / "model", ignore_errors=True)  # it was there for the evaluation


def _of_training(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {"loss": summary["loss"][-1], **summary["recorded"], **{f"costs/{k}": v for k, v in summary["costs"].items()}}
    return [{"suite": "training", "metric": metric, "value": float(value)} for metric, value in found.items()]


# --- all of them ------------------------------------------------------------------------------------------------------


def sweep(settings: SweepSettings) -> Sweep:
    """Run every cell that is not finished; ``out/sweep.csv`` and ``.parquet`` have a row for every score of every finished cell.

    Columns: ``cell``, ``arm``, every setting of the training, the SHA-256 of its data and of the weights, versions, and :data:`SCORE`. Scores of the
    untrained model are in the arm ``base``. The table grows as cells end. A cell that fails stops no other; what went wrong is told at
    once and in the end, whole in ``out/cells/<cell>/log.txt``. The same call again goes on where it was stopped, and tries what has failed again.

    Raises :class:`UsageError` before any work for what a plan, a file or a folder lacks, and for cells that are there with other settings.
    """
    out = Path(settings.out)
    cells = read_cells(settings.file, out)
    _check_files(cells)
    ensure_writable(out)
    hashes: dict[str, str] = {}
    for cell in cells:
        cell.folder.mkdir(parents=True, exist_ok=True)
        if not cell.result.exists() and not any(cell.folder.glob("*/config.json")):  # it failed before any work, of a file perhaps that is mended now
            (cell.folder / "cell.json").unlink(missing_ok=True)
        claim(cell.folder / "cell.json", _identity(cell, hashes))
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
