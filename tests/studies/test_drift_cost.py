"""The cost study on its two smallest models, from the command line to the files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from studies.drift_cost import main, slope


def test_slope_is_the_exponent_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([1e7, 3e7, 1e8, 1e9])
    found = slope(sizes, 2e-9 * sizes[:, None] ** 0.8 * np.exp(0.1 * rng.standard_normal((4, 9))))
    assert found.low < 0.8 < found.high and found.high - found.low < 0.2


def test_it_writes_the_figure_its_table_and_its_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--up_to", "4e7", "--repeats", "3", "--figures", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"drift_cost.{e}" for e in ("png", "svg", "csv", "json")}
    with (tmp_path / "drift_cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 and all(float(r["seconds"]) > 0 for r in rows)
    verdicts = json.loads((tmp_path / "drift_cost.json").read_text())["verdicts"]
    assert {v["verdict"] for v in verdicts} <= {"supported", "contradicted", "inconclusive"} and len(verdicts) == 2
    assert "slope of log time" in capsys.readouterr().out


@pytest.mark.parametrize("argument", [["--up_to", "1e7"], ["--repeats", "2"]])
def test_what_cannot_be_measured_is_refused(argument: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*argument, "--figures", str(tmp_path / "none")])
    assert argument[0] in capsys.readouterr().err and not (tmp_path / "none").exists()
