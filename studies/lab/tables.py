"""The lab's tables, made in units of work side by side."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from sasft.files import ensure_writable
from studies.lab import calibration, courses, sweeps
from studies.lab.courses import Rows
from studies.lab.descent import TOGETHER
from studies.lab.experiment import Bases, Setup, main_arms, train
from studies.lab.units import Unit, kept, load, work


def make(setup: Setup, folder: Path, workers: int, *, quick: bool, repeats: int) -> dict[str, Rows]:
    """All tables, by name, from units that are kept in ``folder`` and found there again. Training comes first: other units need its weights."""
    home = folder / _key(asdict(setup), _code("tree", "world", "model", "walk", "exact", "descent", "experiment", "start", "courses", "sweeps"))
    ensure_writable(home)
    parts = _parts(list(main_arms()), max(1, TOGETHER // setup.seeds))
    work([Unit(f"weights{i}.pt", _trained, (home, setup, names)) for i, names in enumerate(parts)], home, workers, "training")
    conditions = list(sweeps.sweeps(setup, quick=quick))
    units = [
        *(Unit(f"calibration-{group}-{repeats}-{_code('calibration', 'drawing')}.json", _calibration, (home, setup, group, repeats)) for group in calibration.GROUPS),
        Unit("forces.json", _forces, (home, setup)), Unit("arms.json", _arms, (home, setup, len(parts))), *(Unit(f"seed{s}.json", _seed, (home, setup, len(parts), s)) for s in range(setup.seeds)),
        *(Unit(f"sweep-{_key(asdict(c.setup), c.name, c.value)}.json", _sweep, (home, setup, quick, i)) for i, c in enumerate(conditions))]
    found = work(units, home, workers, "measuring")
    calibrated, (forces, arms, *rest) = found[: len(calibration.GROUPS)], found[len(calibration.GROUPS) :]
    tables: dict[str, Rows] = {"calibration": [row for rows in calibrated for row in rows], "forces": forces, "arms": arms, "sweeps": [row for rows in rest[setup.seeds:] for row in rows]}
    for of_seed in rest[:setup.seeds]:
        for name, rows in of_seed.items():
            tables.setdefault(name, []).extend(rows)
    return tables


def _key(*identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _code(*stems: str) -> str:
    """Hash of the source that makes the tables: those that other code has made are not used."""
    return _key(*((Path(__file__).parent / f"{stem}.py").read_text(encoding="utf-8") for stem in stems))


def _parts(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(names[i : i + size]) for i in range(0, len(names), size)]


# --- units of work, each in a process of its own ---------------------------------------------------------------------------


def _bases(home: Path, setup: Setup) -> Bases:
    params = kept(home / f"bases-{_key(asdict(setup.pretraining))}.pt", lambda: dict(Bases.make(setup).params))
    return Bases.of(setup, params)


def _trained(home: Path, setup: Setup, names: Sequence[str]) -> Tensor:
    arms = main_arms()
    return train(_bases(home, setup), {name: arms[name] for name in names})


def _weights(home: Path, parts: int) -> Tensor:
    return cat([load(home / f"weights{i}.pt") for i in range(parts)])


def _arms(home: Path, setup: Setup, parts: int) -> Rows:
    return courses.arms_table(_bases(home, setup), main_arms(), _weights(home, parts))


def _seed(home: Path, setup: Setup, parts: int, seed: int) -> dict[str, Rows]:
    return courses.seed_tables(_bases(home, setup), seed, main_arms(), _weights(home, parts))


def _forces(home: Path, setup: Setup) -> Rows:
    return [row for seed in range(setup.seeds) for row in courses.forces(_bases(home, setup), seed)]


def _sweep(home: Path, setup: Setup, quick: bool, number: int) -> Rows:
    sweep = list(sweeps.sweeps(setup, quick=quick))[number]
    return sweeps.condition(sweep, _bases(home, sweep.setup))


def _calibration(home: Path, setup: Setup, group: str, repeats: int) -> Rows:
    return calibration.calibrate(_bases(home, setup), group, repeats)
