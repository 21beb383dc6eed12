"""From tables to effects, figures and the ledger, by the commands themselves."""

import csv
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from studies import ledger
from studies.lab import __main__ as command
from studies.lab import effects, figures
from studies.lab.predictions import PREDICTIONS
from studies.stats import Effect, judge, over_seeds
from tests.studies.lab import hand


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Tables by hand in place of the long work, and what was asked for; few draws, no pixels."""
    asked: list[tuple] = []

    def make(setup: object, folder: Path, workers: int, **kwargs: object) -> dict:
        asked.append((setup, folder, workers, kwargs))
        return hand.tables()

    monkeypatch.setattr(command, "make", make)
    profile = command.PROFILES["quick"]
    monkeypatch.setitem(command.PROFILES, "quick", command.Profile(setup=command.Setup(seeds=hand.N), quick=True, repeats=profile.repeats, slow_repeats=profile.slow_repeats))
    for module in (effects, figures):
        monkeypatch.setattr(module, "over_seeds", lambda statistic, n, draws=0: over_seeds(statistic, n, draws=30))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: path.write_text("drawn"))
    return asked


def test_the_ledger_says_what_the_lab_found(made: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "figures"
    options = ["--runs", str(tmp_path / "runs"), "--figures", str(folder), "--workers", "1"]
    assert command.main(options) == 0
    assert [m[:3] for m in made] == [(command.PROFILES["quick"].setup, tmp_path / "runs" / "lab", 1)]
    assert made[0][3]["quick"] is True and made[0][3]["repeats"]["gradients"] == 500 and made[0][3]["repeats"]["fishers"] == 50
    shown = capsys.readouterr().out
    assert ledger.main(["--figures", str(folder)]) == 0  # each effect is judged again there
    with (folder / "ledger.csv").open(newline="") as file:
        rows = {row["prediction"]: row for row in csv.DictReader(file) if "/lab/" in row["prediction"]}
    assert set(rows) == {p.id for p in PREDICTIONS}
    found = effects.effects(hand.tables(), hand.N)
    for p in PREDICTIONS:
        row = rows[p.id]
        effect = Effect(*(float(row[name]) for name in ("value", "low", "high", "level")))
        assert effect == found[p.id] and row["n"] == str(hand.N)
        assert row["verdict"] == judge(effect, sesoi=p.sesoi, predicted=p.predicted)
        assert any(line.startswith(f"{p.claim:<4}{row['verdict']}") and line.endswith(p.statement) for line in shown.splitlines())
        assert (folder / row["figure"]).read_text() == "drawn" and row["figure"].startswith("lab_")
    assert {row["verdict"] for row in rows.values()} == {"supported", "contradicted"}

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command.main(options) == 0 and ledger.main(["--figures", str(folder)]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hashes = {json.loads(text)["config_sha256"] for name, text in before.items() if name.endswith(".json")}
    assert len(hashes) == 1
    for name in (n for n in before if n.endswith(".json")):  # each picture has the table that it is drawn from
        assert {name.replace(".json", end) for end in (".csv", ".png", ".svg")} <= set(before)
        with (folder / name.replace(".json", ".csv")).open(newline="") as file:
            assert len(list(csv.DictReader(file))) > 1


def test_the_quick_lab_leaves_the_full_ones_figures_alone(made: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["--workers", "1"]) == 0
    assert not Path("figures").exists() and Path("runs/lab/figures/lab_cells.png").exists()


def test_a_verdict_changed_by_hand_is_found_out(made: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "figures"
    assert command.main(["--figures", str(folder), "--runs", str(tmp_path)]) == 0
    path = folder / "lab_cells.json"
    path.write_text(path.read_text().replace('"contradicted"', '"supported"', 1))
    assert ledger.main(["--figures", str(folder)]) == 2
    assert "C3/lab/content" in (error := capsys.readouterr().err) and "by rule" in error


@pytest.mark.parametrize("raised, code, shown", [(KeyboardInterrupt(), 130, "goes on from here"), (OSError("disk full"), 2, "error: disk full")])
def test_what_stops_the_work_ends_the_command(
        made: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, shown: str) -> None:
    def make(*args: object, **kwargs: object) -> dict:
        raise raised

    monkeypatch.setattr(command, "make", make)
    assert command.main(["--figures", str(tmp_path / "figures"), "--runs", str(tmp_path)]) == code
    assert shown in capsys.readouterr().err and not list((tmp_path / "figures").iterdir())


def test_wrong_options_are_refused_before_any_work(made: list[tuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--workers", "0", "--figures", str(tmp_path)]) == 2
    assert "workers must be at least 1, got 0" in capsys.readouterr().err
    assert command.main(["--figures", str(tmp_path / "file")]) == 2
    assert "can't be written to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--profile", "huge"])
    assert made == []
