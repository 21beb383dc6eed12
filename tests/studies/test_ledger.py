"""The ledger on real files: read, joined with the registry, judged again, written whole or not at all."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sasft.restyle import STYLES
from studies import __main__ as command
from studies import claims, ledger, two_by_two_predictions
from studies.claims import CLAIMS, Prediction, checked, registered
from studies.figures import new_figure, save
from studies.stats import Effect, verdict

ROOT = Path(__file__).parents[2]
STYLE = Prediction(id="C2/demo/style", claim="C2", statement="style | alone", predicted="+", sesoi=0.01, unit="nats/token", study="demo")
FORCE = Prediction(id="C1/demo/force", claim="C1", statement="no force", predicted="-", sesoi=-1e-8, unit="1", study="demo")
SHARE = Prediction(id="C3/demo/share", claim="C3", statement="the larger part", predicted="+", sesoi=0.5, unit="share", study="demo")
DEMO = checked([STYLE, FORCE, SHARE])


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "registered", lambda: DEMO)


def draw(folder: Path, *rows: dict, name: str = "demo_picture", **provenance) -> Path:
    """A figure as a study draws it; the path of its JSON."""
    figure, _ = new_figure(1, 1)
    return save(figure, folder, name, [{"x": 1.0}], rows, {"steps": 8, "versions": {"numpy": "2"}, **provenance})[3]


def style(low: float = 0.02, high: float = 0.04) -> dict:
    return verdict(STYLE, Effect(0.03, low, high), n=3, items=16)


def change(path: Path, **fields) -> None:
    """Edit the first verdict of a figure's JSON by hand."""
    content = json.loads(path.read_text())
    content["verdicts"][0].update(fields)
    path.write_text(json.dumps(content))


def refused(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What the ledger says when it refuses a folder, and writes nothing."""
    before = sorted(folder.glob("*"))
    assert ledger.main(["--figures", str(folder)]) == 2
    assert sorted(folder.glob("*")) == before
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_results_are_joined_with_the_registry(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = json.loads(draw(tmp_path, style(), {"claim": "none", "statement": "a note", "value": 1.0}).read_text())["config_sha256"]
    draw(tmp_path, verdict(FORCE, Effect(2e-9, 0.0, 3e-9), n=10), name="demo_other")
    assert ledger.main(["--figures", str(tmp_path)]) == 0
    said = capsys.readouterr().out

    force, found, missing = csv.DictReader((tmp_path / "ledger.csv").open())  # claims in their order
    assert (found["prediction"], found["verdict"], found["figure"], found["conditions"]) == (
        "C2/demo/style", "supported", "demo_picture.png", "items 16")
    assert (float(found["low"]), int(found["n"]), found["config_sha256"]) == (0.02, 3, config)
    assert force["verdict"] == "supported" and force["predicted"] == "-" and float(force["sesoi"]) == -1e-8
    assert (missing["prediction"], missing["verdict"], missing["value"], missing["figure"]) == ("C3/demo/share", "not tested yet", "", "")

    page = (tmp_path / "ledger.md").read_text()
    assert (f"| style \\| alone | > 0.01 | 0.03 [0.02, 0.04] | nats/token | 3 (items 16) | supported | `{config[:12]}` | "
            "[demo_picture](demo_picture.png) |") in page
    assert "| no force | < 1e-08 | 2e-09 [0, 3e-09] | 1 | 10 | supported |" in page
    assert f"| C2 | {CLAIMS['C2'].statement} | 1 | 0 | 0 | 0 |" in page and f"| C3 | {CLAIMS['C3'].statement} | 0 | 0 | 0 | 1 |" in page
    assert "Not tested yet: `C3/demo/share`." in page and "a note" not in page
    assert all(f"## {c.id}: {c.statement}\n\nWould be refuted by: {c.refuted_by}.\n" in page for c in CLAIMS.values())
    assert "1 supported, 0 contradicted, 0 inconclusive, 0 not tested yet" in page
    assert "No study has registered a prediction yet" in page

    assert "supported    0.03 [0.02, 0.04]" in said and str(tmp_path / "ledger.md") in said
    files = {name: (tmp_path / name).read_bytes() for name in ("ledger.md", "ledger.csv")}
    assert ledger.main(["--figures", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in files} == files and capsys.readouterr().out == said


@pytest.mark.parametrize("low, high, expected", [
    (0.02, 0.04, "supported"), (-0.01, 0.005, "contradicted"), (0.0, 0.04, "inconclusive"), (math.nan, math.nan, "inconclusive")])
def test_every_outcome(low: float, high: float, expected: str, tmp_path: Path) -> None:
    path = draw(tmp_path, style(low, high), weight=math.inf)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # JSON has no numbers that are not finite
    assert {e.prediction.id: e.outcome for e in ledger.read(tmp_path, DEMO)}["C2/demo/style"] == expected


def test_without_results_nothing_is_tested_yet(tmp_path: Path) -> None:
    assert ledger.main(["--figures", str(tmp_path)]) == 0
    assert {r["verdict"] for r in csv.DictReader((tmp_path / "ledger.csv").open())} == {"not tested yet"}


def test_a_verdict_made_by_hand_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = draw(tmp_path, style(0.0, 0.04))
    change(path, verdict="supported")
    assert refused(tmp_path, capsys) == (
        f"error: {path}, row 1 (C2/demo/style): verdict is 'supported' there; by rule 0.03 [0, 0.04], predicted > 0.01, is "
        "'inconclusive'; run `studies demo` again\n")


@pytest.mark.parametrize("field, value", [("sesoi", 0.001), ("predicted", "-"), ("statement", "reworded"), ("claim", "C3"), ("unit", "bits")])
def test_a_prediction_changed_after_the_result_is_found(field: str, value, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = draw(tmp_path, style())
    change(path, **{field: value})
    assert f"{path}, row 1 (C2/demo/style): {field} is {value!r} there and {style()[field]!r} in the registry" in refused(tmp_path, capsys)


@pytest.mark.parametrize("field, value, message", [
    ("value", "0.3", "value must be a number, got '0.3'"), ("level", None, "level must be a number, got None"),
    ("low", None, "verdict is 'supported' there; by rule 0.03 [nan, 0.04], predicted > 0.01, is 'inconclusive'"),
    ("low", 0.05, "low must not be above high, got 0.05 and 0.04"), ("n", 2.5, "n must be a whole number, got 2.5"),
    ("n", 0, "n must be at least 1, got 0"), ("level", 0.5, "level 0.95 or more, got 0.5"),
    ("conditions", None, "conditions must be an object, got None"), ("conditions", {"n": 4}, "multiple values"),
])
def test_numbers_that_are_none(field: str, value, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = draw(tmp_path, style())
    change(path, **{field: value})
    said = refused(tmp_path, capsys)
    assert f"{path}, row 1 (C2/demo/style): " in said and message in said


def test_a_prediction_that_nobody_registered(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = draw(tmp_path, verdict(replace(STYLE, id="C2/demo/afterthought"), Effect(1.0, 1.0, 1.0), n=3))
    assert f"{path}, row 1 (C2/demo/afterthought): no study has registered this prediction" in refused(tmp_path, capsys)


def test_two_results_of_one_prediction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw(tmp_path, style())
    second = draw(tmp_path, style(), name="demo_second")
    assert f"{second}, row 1 (C2/demo/style): demo_picture.png has a result of this prediction, too" in refused(tmp_path, capsys)


def test_a_configuration_that_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = draw(tmp_path, style())
    path.write_text(path.read_text().replace('"steps": 8', '"steps": 9'))
    said = refused(tmp_path, capsys)
    assert f"{path}: config_sha256 is" in said and "run `studies demo` again" in said


def test_the_older_format_names_the_study_to_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = {"verdicts": [{"claim": "C2", "statement": "style alone", "verdict": "supported"}], "provenance": {}}
    for name, study in (("demo_old", "`studies demo`"), ("unknown", "the study that drew it")):
        (tmp_path / f"{name}.json").write_text(json.dumps(old))
        said = refused(tmp_path, capsys)
        assert f"{tmp_path / name}.json is in an older format" in said and f"run {study} again" in said
        (tmp_path / f"{name}.json").unlink()
    old["verdicts"][0]["claim"] = "none"  # notes are none of the ledger's business
    (tmp_path / "demo_old.json").write_text(json.dumps(old))
    assert ledger.main(["--figures", str(tmp_path)]) == 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"verdicts": [1], "provenance": {}}', '{"verdicts": [], "provenance": 3}', "\x00"])
def test_json_that_no_study_wrote(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.json").write_text(text)
    assert f"{tmp_path / 'other.json'} is not what studies.figures.save writes" in refused(tmp_path, capsys)


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert ledger.main(["--figures", str(tmp_path / "none")]) == 2
    assert f"the figures' folder {tmp_path / 'none'} does not exist" in capsys.readouterr().err


def test_a_ledger_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture) -> None:
    assert ledger.main(["--figures", str(tmp_path)]) == 0
    old = (tmp_path / "ledger.csv").read_bytes()
    draw(tmp_path, style())
    capsys.readouterr()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "ledger.csv failed: No space left on device" in refused(tmp_path, capsys)
    assert (tmp_path / "ledger.csv").read_bytes() == old


def test_a_figure_takes_no_verdict_that_was_made_by_hand(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row about claim C2 must be made by studies.stats.verdict"):
        draw(tmp_path / "none", {"claim": "C2", "verdict": "supported"})
    assert not (tmp_path / "none").exists()


# --- the registry ---------------------------------------------------------------------------------------------


def test_what_the_studies_registered_is_sound() -> None:
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 12)]
    assert {p.study for p in registered().values()} <= command.COMMANDS.keys()
    assert tuple(STYLES) == two_by_two_predictions.STYLES
    for claim, parts in (("C2", (*STYLES, "mean_of_styles")), ("C3", (*STYLES, "mean_of_styles"))):
        for part in parts:
            assert all(f"{claim}/two_by_two/{part}/{probe}" in registered() for probe in ("self_exact", "human_chat", "self_paper"))


@pytest.mark.parametrize("fields, message", [
    ({"claim": "C12", "id": "C12/demo/style"}, "names claim 'C12'; there are C1, C2"),
    ({"id": "style"}, "must begin with its claim and study, C2/demo/"),
    ({"id": "C1/demo/style"}, "must begin with its claim and study, C2/demo/"),
    ({}, "is registered twice"),
    ({"id": "C2/demo/x", "predicted": "up"}, "has predicted 'up'; it must be '+' or '-'"),
    ({"id": "C2/demo/x", "sesoi": math.nan}, "has sesoi nan; it must be a finite number"),
])
def test_predictions_that_cannot_be_judged_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        checked([STYLE, replace(STYLE, **fields)])


def test_a_study_adds_its_predictions_by_naming_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "studies.demo_predictions", SimpleNamespace(PREDICTIONS=(STYLE,)))
    monkeypatch.setattr(claims, "MODULES", (*claims.MODULES, "studies.demo_predictions"))
    assert registered()["C2/demo/style"] is STYLE and len(registered()) > 1


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "studies", "ledger", "--figures", str(tmp_path)], cwd=ROOT, capture_output=True,
                         text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert ran.returncode == 0, ran.stderr
    assert "C11 the sampler matters" in ran.stdout and (tmp_path / "ledger.md").exists()


def test_the_ledger_does_not_wait_for_torch() -> None:
    code = ("import sys, studies.__main__, studies.ledger, studies.claims; studies.claims.registered(); "
            "print([m for m in ('torch', 'transformers', 'matplotlib', 'sasft', 'drift') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in command.COMMANDS)
    assert command.main([]) == 2 and "usage: studies COMMAND" in capsys.readouterr().err
    assert command.main(["leger"]) == 2 and "unknown command 'leger'" in capsys.readouterr().err


def test_commands_get_the_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["ledger", "--figures", str(tmp_path)]) == 0 and (tmp_path / "ledger.csv").exists()
    with pytest.raises(SystemExit, match="0"):
        command.main(["two_by_two", "--help"])
    assert "--profile" in capsys.readouterr().out
