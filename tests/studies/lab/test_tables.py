"""Tables are put together from units that are kept under the name of what made them."""

from dataclasses import replace
from pathlib import Path

import pytest

from studies.lab import tables as module
from studies.lab.experiment import Bases, Setup, cell, train
from studies.lab.sweeps import Sweep
from studies.lab.tables import make
from studies.lab.units import kept

SETUP = Setup(seeds=2, width=4, pretrain_steps=3, record=(0, 2), lr=0.02)
ARMS = {f"{style}/{content}": cell(style, content) for style, content in (("foreign", "new"), ("own", "new"))} | {"half": lambda b, s: cell("foreign", "new")(b, s) / 2}


def conditions(base: Setup, *, quick: bool) -> list[Sweep]:
    """Two of three, if quick."""
    settings = [("share", 1 / 3, replace(base, share=1 / 3)), ("lr", 0.1, replace(base, lr=0.1)), ("phase", 1.0, replace(base, coupling=1.0))]
    return [Sweep(name, value, setup, {"foreign/new": cell("foreign", "new")}) for name, value, setup in settings[: 2 if quick else 3]]


def repeats(n: int) -> dict[str, int]:
    """Of two groups of estimators."""
    return {"norms": n, "divergences": n}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units run here, what is dear put by a stub; the names of those that were not on disk."""
    names: list[str] = []

    def here(units: list, folder: Path, workers: int, what: str) -> list:
        names.extend(u.name for u in units if not (folder / u.name).exists())
        return [kept(folder / u.name, lambda u=u: u.function(*u.arguments)) for u in units]

    monkeypatch.setattr(module, "work", here)
    monkeypatch.setattr(module, "main_arms", lambda: ARMS)
    monkeypatch.setattr(module.sweeps, "sweeps", conditions)
    monkeypatch.setattr(module.sampled, "sampled", lambda bases, seed: [{"arm": "drawn", "seed": seed}])
    monkeypatch.setattr(module.calibration, "calibrate", lambda bases, group, repeats: [{"quantity": group, "repeats": repeats}])
    monkeypatch.setattr(module.courses, "forces", lambda bases, seed: [{"source": "exact", "seed": seed}])
    monkeypatch.setattr(module.courses, "seed_tables", lambda bases, seed, arms, weights: {
        "accounts": [{"arm": a, "seed": seed, "l2": (weights[k, -1, seed] - weights[k, 0, seed]).norm().item()} for k, a in enumerate(arms)], "start": [{"seed": seed}]})
    return names


def test_every_table_has_the_rows_of_its_units_in_order(asked: list[str], tmp_path: Path) -> None:
    found = make(SETUP, tmp_path, 1, quick=False, repeats=repeats(7))
    assert set(found) == {"calibration", "sampled", "forces", "arms", "sweeps", "accounts", "start"}
    assert found["calibration"] == [{"quantity": "norms", "repeats": 7}, {"quantity": "divergences", "repeats": 7}]
    assert found["forces"] == [{"source": "exact", "seed": s} for s in range(2)] and found["start"] == [{"seed": s} for s in range(2)]
    assert found["sampled"] == [{"arm": "drawn", "seed": s} for s in range(2)]
    assert [(r["sweep"], r["value"], r["step"], r["seed"]) for r in found["sweeps"]] == [
        (name, value, k, s) for name, value in (("share", 1 / 3), ("lr", 0.1), ("phase", 1.0)) for k in (0, 2) for s in range(2)]
    # The arms' weights are each arm's own, whichever part they were trained in.
    bases = Bases.make(SETUP)
    weights = train(bases, ARMS)
    drift = (weights[:, -1] - weights[:, 0]).norm(dim=-1)
    assert [(r["arm"], r["step"], r["seed"]) for r in found["arms"]] == [(a, k, s) for a in ARMS for k in (0, 2) for s in range(2)]
    assert [r["drift"] for r in found["arms"] if r["step"] == 2] == pytest.approx(drift.flatten().tolist())
    assert [r["l2"] for r in found["accounts"]] == pytest.approx(drift.T.flatten().tolist()) and drift.min() > 0
    faster = train(Bases.of(replace(SETUP, lr=0.1), bases.params), {"foreign/new": ARMS["foreign/new"]})[0]
    assert [r["drift"] for r in found["sweeps"] if r["sweep"] == "lr" and r["step"] == 2] == pytest.approx((faster[1] - faster[0]).norm(dim=-1).tolist())


def test_what_is_on_disk_is_not_made_again_unless_it_would_differ(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(setup: Setup = SETUP, *, quick: bool = True, n: int = 7) -> set[str]:
        asked.clear()
        make(setup, tmp_path, 1, quick=quick, repeats=repeats(n))
        return {name.split("-")[0].split(".")[0].rstrip("0123456789") for name in asked}

    everything = {"weights", "calibration", "sampled", "forces", "arms", "seed", "sweep"}
    assert made() == everything and made() == set()
    assert made(quick=False) == {"sweep"} and len(asked) == 1  # the one more
    assert made(n=8) == {"calibration"}
    assert made(replace(SETUP, lr=0.01)) == everything and made() == set()
    monkeypatch.delattr(Bases, "make")  # bases are on disk, too
    assert made(replace(SETUP, lr=0.01), n=9) == {"calibration"}


def test_other_code_makes_other_tables(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(SETUP, tmp_path, 1, quick=True, repeats=repeats(7))
    before, code = len(asked), module._code
    monkeypatch.setattr(module, "_code", lambda *stems: code(*stems) + "changed")
    make(SETUP, tmp_path, 1, quick=True, repeats=repeats(7))
    assert len(asked) == 2 * before and len(list(tmp_path.iterdir())) == 2
    stems = {p.stem for p in Path(module.__file__).parent.glob("*.py")} - {
        "__init__", "__main__", "units", "tables", "effects", "figures", "predictions", "place", "calibration", "drawing", "sampled"}  # these make no tables, or their own
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "_code", lambda *named: seen.append(named) or code(*named))
    make(SETUP, tmp_path, 1, quick=True, repeats=repeats(7))
    assert set(seen[0]) == stems
