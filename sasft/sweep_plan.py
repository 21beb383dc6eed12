"""The plan of a sweep, a YAML file, and the cells that it comes to.

It holds::

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

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sasft.errors import UsageError
from sasft.evaluation import EvaluateSettings
from sasft.options import parse
from sasft.train import TrainSettings

BASE = "base"  # the untrained model's arm


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
        return self.arm != BASE

    @property
    def result(self) -> Path:
        """What a finished cell leaves."""
        return self.folder / "result.json"


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
        if arm_name == BASE:
            raise UsageError(f"{file}: an arm is named {BASE!r}, which the untrained model is; give it another name")
        crossed = {name: values for name, values in given.items() if isinstance(values, list)}
        for values in itertools.product(*crossed.values()):
            chosen = dict(zip(crossed, values, strict=True))
            name = ",".join([_plain(arm_name), *(f"{k}={_short(value)}" for k, value in chosen.items())])
            settings = asdict(settings_of(TrainSettings, {**given, **chosen}, f"{file}, {name}", folder / name / "run"))
            found.append(Cell(name=name, arm=arm_name, folder=folder / name, train=settings, evaluate=evaluate))
    if evaluate is not None:
        if own := {"model", "revision"} & evaluate.keys():
            raise UsageError(f"{file}, evaluate: {', '.join(own)} is given, but the sweep evaluates the models that it trains; leave it out")
        settings_of(EvaluateSettings, evaluate, f"{file}, evaluate", folder)
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


def settings_of(kind: type, given: Mapping[str, Any], where: str, out: Path) -> Any:
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
    names = [BASE if len(models) == 1 else f"{BASE},model={_short(m)}{f',revision={_short(r)}' if r else ''}" for m, r in models]
    return [Cell(name=name, arm=BASE, folder=folder / name, train={"model": m, "revision": r}, evaluate=evaluate)
            for name, (m, r) in zip(names, models, strict=True)]


def _check_apart(cells: Sequence[Cell], file: Path | str) -> None:
    of: dict[Path, Cell] = {}
    for cell in cells:
        if (other := of.setdefault(cell.folder, cell)) is not cell:
            why = "they are the same" if other.train == cell.train else "give the arms different names, and the files different ones too"
            raise UsageError(f"{file}: two cells would be named {cell.name}; {why}")
