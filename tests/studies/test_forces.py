"""The study of forces: estimates against values made by hand, and the whole of it on a tiny model."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from studies import forces, ledger
from studies.forces import EXACT_SELF, PAPER_SELF, RESTYLED, SHUFFLED, TASK, judged, main, measure
from tests.sasft import tiny_chat

NAMES = (TASK, EXACT_SELF, PAPER_SELF, RESTYLED, SHUFFLED)


def drawn(n: int, seed: int, **means: float) -> dict[str, np.ndarray]:
    """Gradients of n rows of every kind, noise of unit variance in 50 dimensions about a mean of so many times (1, 0, ... 0)."""
    rng = np.random.default_rng(seed)
    found = {name: rng.standard_normal((n, 50)) for name in NAMES}
    for name, x in found.items():
        x[:, 0] += means.get(name, 0.0)
    return {name: x.astype(np.float32) for name, x in found.items()}


def test_a_force_is_told_from_noise() -> None:
    """Truth: 0, 1/16, 1 of the task's 16; the squared mean of 40 rows has 50/40 on top, a twelfth of the task's."""
    found = [measure(drawn(40, seed, **{TASK: 4.0, PAPER_SELF: 1.0, RESTYLED: 4.0, SHUFFLED: 8.0})) for seed in range(60)]

    def mean(name: str, what: str) -> tuple[float, float]:
        values = np.array([f[name][what] for f in found])
        return float(values.mean()), float(values.std(ddof=1) / len(found) ** 0.5)

    for name, truth in ((EXACT_SELF, 0.0), (PAPER_SELF, 1 / 16), (RESTYLED, 1.0), (SHUFFLED, 4.0)):
        value, error = mean(name, "share")
        assert abs(value - truth) < 3 * error + 0.003 * truth, name  # a ratio has a bias of the order of 1/n
        wide = 2**0.5 if name == EXACT_SELF else 1.0  # a jackknife of pairs without a mean counts their variance twice
        assert np.array([f[name]["share_error"] for f in found]).mean() == pytest.approx(wide * error * len(found) ** 0.5, rel=0.35), name
    assert mean(EXACT_SELF, "uncorrected")[0] == pytest.approx(50 / 40 / 16, rel=0.1)
    value, error = mean(PAPER_SELF, "inner_task")
    assert abs(value - 4) < 3 * error and error < 0.2


def test_verdicts_follow_the_shares() -> None:
    table = measure(drawn(200, 0, **{TASK: 4.0, PAPER_SELF: 1.0, RESTYLED: 4.0, SHUFFLED: 8.0}))
    assert {v["prediction"]: v["verdict"] for v in judged(table)} == {
        f"C1/forces/{name}": "supported" for name in ("exact", "paper", "paper below task", "foreign style", "shuffled")}
    table = measure(drawn(200, 0, **{TASK: 4.0, EXACT_SELF: 4.0, PAPER_SELF: 8.0}))
    found = {v["prediction"].split("/")[2]: v["verdict"] for v in judged(table)}
    assert found == {"exact": "contradicted", "paper": "supported", "paper below task": "contradicted", "foreign style": "contradicted", "shuffled": "contradicted"}


def test_from_the_command_to_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = tiny_chat.save_chatty(tmp_path / "model")
    argv = ["--model", str(model), "--rows", "6", "--runs", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    with (tmp_path / "figures" / "forces.csv").open(encoding="utf-8") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(NAMES) and float(rows[TASK]["share"]) == 1
    assert {p.suffix for p in (tmp_path / "figures").iterdir()} == {".png", ".svg", ".csv", ".json"}
    verdicts = json.loads((tmp_path / "figures" / "forces.json").read_text(encoding="utf-8"))["verdicts"]
    assert [v["verdict"] in shown and 3 <= v["n"] <= 6 and v["conditions"] == {"resampled": "rows"} for v in verdicts] == [True] * 5
    assert ledger.main(["--figures", str(tmp_path / "figures")]) == 0

    def again(*args: object) -> None:
        raise AssertionError("what is kept is not made again")

    monkeypatch.setattr(forces, "sketches", again)
    before = (tmp_path / "figures" / "forces.csv").read_bytes()
    assert main(argv) == 0 and (tmp_path / "figures" / "forces.csv").read_bytes() == before


def test_wrong_options_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--rows", "2", "--figures", str(tmp_path)]) == 2
    assert "rows must be at least 3" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "none"), "--figures", str(tmp_path)]) == 2
    assert "none" in capsys.readouterr().err
