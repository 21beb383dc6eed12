"""The lab's tables, made in units of work side by side."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, cat

from sasft.files import ensure_writable
from studies.lab import calibration, courses, sampled, sweeps
from studies.lab.courses import Rows
from studies.lab.experiment import Bases, Setup, main_arms, train
from studies.lab.units import Unit, kept, work
from studies.stats import short_hash


def make(setup: Setup, folder: Path, workers: int, *, quick: bool, repeats: Mapping[str, int]) -> dict[str, Rows]:
    """All tables, by name, from units that are kept in ``folder`` and found there again.

    ``repeats``: of each group of estimators (:data:`studies.lab.calibration.GROUPS`).
    """
    home = folder / short_hash(asdict(setup), _code("tree", "world", "model", "walk", "exact", "descent", "experiment", "start", "courses", "sweeps"))
    ensure_writable(home)
    conditions, seeds = list(sweeps.sweeps(setup, quick=quick)), range(setup.seeds)
    # Training first, since the parts of a seed read its weights; what takes a few seconds last, so that no worker waits long for another.
    kinds: dict[str, list[Unit]] = {
        "weights": [Unit(_weights_of(i), _trained, (home, setup, i)) for i in range(len(main_arms()))],
        "sweeps": [Unit(f"sweep-{short_hash(asdict(c.setup), c.name, c.value)}.json", _sweep, (home, setup, quick, i)) for i, c in enumerate(conditions)],
        "sampled": [Unit(f"sampled{s}-{_code('drawing', 'sampled')}.json", _sampled, (home, setup, s)) for s in seeds],
        "of a seed": [Unit(f"seed{s}.json", _seed, (home, setup, s)) for s in seeds],
        "arms": [Unit("arms.json", _arms, (home, setup))],
        "calibration": [Unit(f"calibration-{group}-{n}-{_code('drawing', 'place', 'calibration')}.json", _calibration, (home, setup, group, n))
                        for group, n in repeats.items()],
        "forces": [Unit("forces.json", _forces, (home, setup))]}
    results = iter(work([unit for units in kinds.values() for unit in units], home, workers, "lab"))
    found = {kind: [next(results) for _ in units] for kind, units in kinds.items()}
    tables = {kind: [row for rows in found[kind] for row in rows] for kind in kinds if kind not in ("weights", "of a seed")}
    for of_seed in found["of a seed"]:
        for name, rows in of_seed.items():
            tables.setdefault(name, []).extend(rows)
    return tables


def _code(*stems: str) -> str:
    """Hash of the source that makes the tables: those that other code has made are not used."""
    return short_hash(*((Path(__file__).parent / f"{stem}.py").read_text(encoding="utf-8") for stem in stems))


# --- units of work, each in a process of its own ---------------------------------------------------------------------------


def _bases(home: Path, setup: Setup) -> Bases:
    params = kept(home / f"bases-{short_hash(asdict(setup.pretraining))}.pt", lambda: dict(Bases.make(setup).params))
    return Bases.of(setup, params)


def _weights_of(arm: int) -> str:
    return f"weights{arm}.pt"


def _trained(home: Path, setup: Setup, number: int) -> Tensor:
    return train(_bases(home, setup), dict([list(main_arms().items())[number]]))


def _weights(home: Path, setup: Setup) -> Tensor:
    """Of all arms: those that another unit has still to finish are made here, too."""
    return cat([kept(home / _weights_of(i), lambda i=i: _trained(home, setup, i)) for i in range(len(main_arms()))])


def _arms(home: Path, setup: Setup) -> Rows:
    return courses.arms_table(_bases(home, setup), main_arms(), _weights(home, setup))


def _seed(home: Path, setup: Setup, seed: int) -> dict[str, Rows]:
    return courses.seed_tables(_bases(home, setup), seed, main_arms(), _weights(home, setup))


def _forces(home: Path, setup: Setup) -> Rows:
    return [row for seed in range(setup.seeds) for row in courses.forces(_bases(home, setup), seed)]


def _sweep(home: Path, setup: Setup, quick: bool, number: int) -> Rows:
    sweep = list(sweeps.sweeps(setup, quick=quick))[number]
    return sweeps.condition(sweep, _bases(home, sweep.setup))


def _calibration(home: Path, setup: Setup, group: str, repeats: int) -> Rows:
    return calibration.calibrate(_bases(home, setup), group, repeats)


def _sampled(home: Path, setup: Setup, seed: int) -> Rows:
    return sampled.sampled(_bases(home, setup), seed)
