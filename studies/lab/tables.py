"""The lab's tables, made in units of work side by side."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from sasft.files import ensure_writable
from studies.lab import calibration, courses, sampled, sweeps
from studies.lab.courses import Rows
from studies.lab.descent import TOGETHER
from studies.lab.experiment import Bases, Setup, main_arms, train
from studies.lab.units import Unit, kept, load, work


def make(setup: Setup, folder: Path, workers: int, *, quick: bool, repeats: Mapping[str, int]) -> dict[str, Rows]:
    """All tables, by name, from units that are kept in ``folder`` and found there again. Training comes first: other units need its weights.

    ``repeats``: of each group of estimators (:data:`studies.lab.calibration.GROUPS`).
    """
    home = folder / _key(asdict(setup), _code("tree", "world", "model", "walk", "exact", "descent", "experiment", "start", "courses", "sweeps"))
    ensure_writable(home)
    parts = _parts(list(main_arms()), max(1, TOGETHER // setup.seeds))
    work([Unit(f"weights{i}.pt", _trained, (home, setup, names)) for i, names in enumerate(parts)], home, workers, "training")
    conditions = list(sweeps.sweeps(setup, quick=quick))
    drawn, seeds = _code("place", "calibration", "drawing", "sampled"), range(setup.seeds)
    kinds: dict[str, list[Unit]] = {  # the longest first, so that no worker is left with one at the end
        "of a seed": [Unit(f"seed{s}.json", _seed, (home, setup, len(parts), s)) for s in seeds],
        "sweeps": [Unit(f"sweep-{_key(asdict(c.setup), c.name, c.value)}.json", _sweep, (home, setup, quick, i)) for i, c in enumerate(conditions)],
        "calibration": [Unit(f"calibration-{group}-{n}-{drawn}.json", _calibration, (home, setup, group, n)) for group, n in repeats.items()],
        "sampled": [Unit(f"sampled{s}-{drawn}.json", _sampled, (home, setup, s)) for s in seeds],
        "arms": [Unit("arms.json", _arms, (home, setup, len(parts)))],
        "forces": [Unit("forces.json", _forces, (home, setup))]}
    results = iter(work([unit for units in kinds.values() for unit in units], home, workers, "measuring"))
    found = {kind: [next(results) for _ in units] for kind, units in kinds.items()}
    tables = {kind: [row for rows in found[kind] for row in rows] for kind in kinds if kind != "of a seed"}
    for of_seed in found["of a seed"]:
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


def _sampled(home: Path, setup: Setup, seed: int) -> Rows:
    return sampled.sampled(_bases(home, setup), seed)
