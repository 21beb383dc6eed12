"""Every combination of settings trained and evaluated into one table, cell by cell, whatever becomes of the others."""

import csv
import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import sasft.sweep
import sasft.sweep_dryrun
import sasft.sweep_plan
from sasft.cli import main
from sasft.costing import TrainingCost
from sasft.dryrun import Forecast, Reckoned, of_training
from sasft.errors import UsageError
from sasft.evaluation import EvaluateSettings
from sasft.evaluation import run as evaluation
from sasft.evaluation.sources import FOLDER_VARIABLE
from sasft.files import sha256_file
from sasft.models import load_model, weights_hash
from sasft.sweep import SweepSettings, sweep
from sasft.sweep_dryrun import of_sweep
from sasft.sweep_plan import read_cells
from sasft.train import TrainSettings, train
from sasft.workers import call
from tests.sasft import tiny_chat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat.save_chatty(tmp_path / "model")
    for name in ("one", "two", "self"):
        rows = [{"prompt": f"Say {name} {i}", "response": f"well, {name}"} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


TOO_LONG = json.dumps({"prompt": "Say", "response": "it " * 2000}) + "\n"  # can be read, but not trained on


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run in this process, one after the other; their names as they begin."""
    begun = []

    def run(jobs, workers, threads):
        for job in jobs:
            begun.append(job.arguments[0].name)
            yield job, call(job, 1)

    monkeypatch.setattr(sasft.sweep, "in_processes", run)
    return begun


def plan(folder: Path, *, arms=None, evaluate=None, **changed) -> SweepSettings:
    settings = {"model": str(folder / "model"), "task": str(folder / "one.jsonl"), "self_data": str(folder / "self.jsonl"), "steps": 2, "rows_per_step": 2,
                "precision": "fp32", "record_every": 2, "probe_rows": 1, "lr": "1e-3", **changed}
    parts = {"train": settings, **({"arms": arms} if arms else {}), **({"evaluate": evaluate} if evaluate else {})}
    (folder / "plan.yaml").write_text(yaml.safe_dump(parts, sort_keys=False))
    return SweepSettings(file=str(folder / "plan.yaml"), out=str(folder / "sweep"))


def rows_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "sweep" / "sweep.parquet").to_pylist()


def test_one_table_of_every_cell_with_what_it_hangs_on(folder: Path, here: list[str]) -> None:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    arms = [{"name": "task only", "task": str(folder / "one.jsonl")}, {"name": "l2", "method": "l2-sp", "method_options": ["weight=1"]}]
    settings = plan(folder, lam=0, arms=arms, evaluate={"suites": f"text:{text}"}, task=[str(folder / "one.jsonl"), str(folder / "two.jsonl")])
    done = sweep(settings)
    assert done.cells == 4 and not done.failed and done.table == folder / "sweep" / "sweep.csv"
    assert here == ["base", "task_only", "l2,task=one,method_options=weight=1", "l2,task=two,method_options=weight=1"]
    rows = rows_of(folder)
    one = {r["metric"]: r for r in rows if r["cell"] == "l2,task=two,method_options=weight=1" and r["suite"] == "training"}
    assert {"loss", "drift/l2", "costs/forward_tokens"} <= set(one)
    loss = one["loss"]
    assert (loss["arm"], loss["method"], loss["method_options"], loss["lr"], loss["steps"], loss["lam"]) == ("l2", "l2-sp", "weight=1", 1e-3, 2, 0.0)
    assert loss["task_sha256"] == sha256_file(folder / "two.jsonl") and loss["self_sha256"] == sha256_file(folder / "self.jsonl")
    assert "torch" in loss["versions"] and loss["general_text"] is None
    with done.table.open(newline="") as file:
        assert [(r["cell"], r["metric"], r["value"]) for r in csv.DictReader(file)] == [
            (r["cell"], r["metric"], "" if r["value"] is None else str(r["value"])) for r in rows]
    assert None in [r["value"] for r in rows]  # a squared norm that so few rows do not give

    given = {f: loss[f] for f in ("model", "task", "self_data", "steps", "rows_per_step", "precision", "record_every", "probe_rows", "lr", "lam", "method",
                                  "method_options")}
    alone = train(TrainSettings(**given, out=str(folder / "alone")))
    assert loss["value"] == alone["loss"][-1] and one["drift/l2"]["value"] == alone["recorded"]["drift/l2"]
    for cell, model in (("base", folder / "model"), (loss["cell"], folder / "alone" / "model")):
        expected = evaluation(EvaluateSettings(model=str(model), suites=f"text:{text}", out=str(folder / f"evaluated-{cell}")))
        [nll] = [r for r in rows if r["cell"] == cell and r["metric"] == "nll/model"]
        assert nll["suite"] == f"text:{text}" and nll["value"] == expected["suites"][nll["suite"]]["scores"]["nll/model"]["score"]
        assert nll["weights_sha256"] == weights_hash(load_model(str(model))[0]) and nll["n"] == 1
    assert {r["arm"] for r in rows} == {"base", "task only", "l2"} and all(r["steps"] is None for r in rows if r["arm"] == "base")


def test_what_fails_stops_no_other_and_is_tried_again(folder: Path, here: list[str], capsys: pytest.CaptureFixture) -> None:
    (folder / "bad.jsonl").write_text(TOO_LONG)
    settings = plan(folder, lam=0, task=[str(folder / "bad.jsonl"), str(folder / "one.jsonl")])
    done = sweep(settings)
    assert list(done.failed) == ["sft,task=bad"] and "max_tokens" in done.failed["sft,task=bad"]
    assert {r["cell"] for r in rows_of(folder)} == {"sft,task=one"} and "sft,task=bad failed: UsageError" in capsys.readouterr().err
    assert "Traceback" in (folder / "sweep" / "cells" / "sft,task=bad" / "log.txt").read_text()
    with pytest.raises(UsageError, match=r"1 of 2 cells failed; the same command tries them again, .*\n  sft,task=bad: UsageError: .*max_tokens"):
        done.check()
    here.clear()
    assert list(sweep(settings).failed) == here == ["sft,task=bad"], "what is done is not done again"


@pytest.mark.parametrize(("changed", "message"), [
    ({"task": ["one.jsonl", "none.jsonl"]}, r"cell sft,task=none: .*none.jsonl can't be read"),
    ({"general_text": ["model/config.json", "none.txt"]}, r"cell sft,general_text=none: .*none.txt can't be read"),
    ({"evaluate": {"suites": "text, rows:none.jsonl"}}, r"evaluate: none.jsonl can't be read"),
    ({"evaluate": {"suites": "gsm8k, piqa"}}, r"evaluate: GSM8K \(test\) is missing: .*\nPIQA .*is missing: "),
])
def test_files_that_cannot_be_read_are_told_before_any_cell_begins(folder: Path, here: list[str], monkeypatch, changed: dict, message: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # no hub
    settings = plan(folder, **{"task": "one.jsonl", **changed})
    for action in (sweep, of_sweep):
        with pytest.raises(UsageError, match=message):
            action(settings)
    assert not here and not (folder / "sweep").exists()


def test_suites_of_a_sweep_may_name_columns(folder: Path, here: list[str]) -> None:
    (folder / "test.jsonl").write_text('{"q": "Say", "a": "well"}\n')
    settings = plan(folder, lam=0, evaluate={"suites": f"answers:{folder}/test.jsonl:prompt=q,response=a,instructions", "limit": 1, "max_new_tokens": 2})
    assert "answers:" in of_sweep(settings).text and not sweep(settings).failed
    rows = rows_of(folder)
    assert {"instructions", f"answers:{folder}/test.jsonl:prompt=q,response=a"} <= {row["suite"] for row in rows}
    assert all((row["low"] is None) == (row["suite"] == "training") for row in rows)  # one item each, right or wrong


def test_the_table_has_room_for_what_is_not_known(folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded figure that isn't a number is null in a finished training's summary."""
    trained = {"loss": [1.0], "recorded": {"kl/base_model/self": None}, "costs": {}, "weights_sha256": ""}

    def finished(settings: TrainSettings) -> dict:
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "config.json").write_text('{"identity": {"data_sha256": {}}}')
        return trained

    monkeypatch.setattr(sasft.sweep, "train", finished)
    done = sweep(plan(folder, lam=0))
    assert not done.failed and [(row["metric"], row["value"]) for row in rows_of(folder)] == [("loss", 1.0), ("kl/base_model/self", None)]
    with done.table.open(newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["1.0", ""]


def test_cells_that_never_began_are_not_held_to_their_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasft.sweep, "in_processes", lambda *_: (_ for _ in ()))
    for steps in (2, 3):
        sweep(plan(folder, lam=0, steps=steps))
        assert json.loads((folder / "sweep" / "cells" / "sft" / "cell.json").read_text())["train"]["steps"] == steps


def test_a_stopped_cell_goes_on_and_cells_may_join(folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(settings):
        raise KeyboardInterrupt

    settings = plan(folder, lam=0, evaluate={"suites": "text"}, save_model=False)
    with monkeypatch.context() as patch:
        patch.setattr(sasft.sweep, "run_evaluation", stop)
        patch.setattr(sasft.sweep_plan, "_bases", lambda *_: [])
        with pytest.raises(KeyboardInterrupt):
            sweep(settings)
    model = folder / "sweep" / "cells" / "sft" / "run" / "model"
    assert model.exists() and not (folder / "sweep" / "cells" / "sft" / "result.json").exists()
    monkeypatch.setattr(sasft.sweep, "run_evaluation", lambda s: {"identity": {"weights_sha256": Path(s.model).name}, "suites": {}})
    before = (folder / "sweep" / "cells" / "sft" / "run" / "summary.json").stat().st_mtime_ns
    assert not sweep(settings).failed
    assert (folder / "sweep" / "cells" / "sft" / "run" / "summary.json").stat().st_mtime_ns == before, "the training is not run again"
    assert not model.exists(), "save_model is false: it was there for the evaluation"
    here.clear()
    assert not sweep(plan(folder, evaluate={"suites": "text"}, save_model=False, arms=[{"lam": 0}, {"name": "slow", "lam": 0, "lr": 1e-6}])).failed
    assert here == ["slow"]


def test_cells_that_are_there_with_other_settings_or_data_are_refused(folder: Path, here: list[str]) -> None:
    sweep(plan(folder, lam=0))
    with pytest.raises(UsageError, match=r"cells/sft holds another run \(train.steps is 2, now 3\)"):
        sweep(plan(folder, lam=0, steps=3))
    with pytest.raises(UsageError, match=r"cells/sft holds another run \(train.steps is 2, now 3\)"):
        of_sweep(plan(folder, lam=0, steps=3))
    (folder / "one.jsonl").write_text('{"prompt": "Other", "response": "data"}\n')
    with pytest.raises(UsageError, match=r"files.task is '.*', now '"):
        sweep(plan(folder, lam=0))
    assert len(here) == 1


@pytest.mark.parametrize(("changed", "message"), [
    ({"lr": [1e-3, -1]}, r"plan.yaml, sft,lr=-1: lr must be > 0.*, got -1.0"),
    ({"lr": "fast"}, r"plan.yaml, sft: argument --lr: invalid float value: 'fast'"),
    ({"steps": 2.5}, "argument --steps: invalid int value: '2.5'"),
    ({"save_model": "perhaps"}, "argument --save_model.*: .* got perhaps"),
    ({"out": "x"}, "plan.yaml, sft: out is given, but the sweep makes a folder for every cell"),
    ({"sped": 9}, "plan.yaml, sft has no option --sped"),
    ({"seed": []}, "seed in .*plan.yaml is an empty list"),
    ({"arms": [{"lam": 0}, {"lam": 0.1}]}, "two cells would be named sft; give the arms different names"),
    ({"arms": [{"name": "base"}]}, "an arm is named 'base', which the untrained model is"),
    ({"seed": [1, 1]}, "two cells would be named sft,seed=1; they are the same"),
    ({"arms": "all"}, "arms in .* must be a list of settings, one entry an arm, got 'all'"),
    ({"method_options": "weight=1"}, "the method sft has no option 'weight'; it is an option of .*l2-sp"),
    ({"method": "sftt"}, "there is no method 'sftt'. Did you mean sft"),
    ({"evaluate": {"suites": "text", "model": "m"}}, "plan.yaml, evaluate: model is given, but the sweep evaluates the models that it trains"),
    ({"evaluate": {"limit": -1}}, "plan.yaml, evaluate: limit must be at least 0, got -1"),
])
def test_a_plan_that_cannot_be_is_refused_before_any_work(folder: Path, here: list[str], changed: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(plan(folder, **{"lam": 0, **changed}))
    assert not here


@pytest.mark.parametrize(("text", "message"), [
    ("- a", "must hold `train:`"), ("train: 3", "must hold `train:`"), ("{train: {}, fun: 1}", "it holds train, fun"), ("train: [", "can't be read")])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_cells(tmp_path / "plan.yaml", tmp_path)


@pytest.mark.parametrize(("given", "message"), [
    ({"file": ""}, "file is missing: YAML file"), ({"workers": 0}, "workers must be at least 1, got 0"),
    ({"gpus": 0.5}, "gpus is 0.5, but it is an option of Ray"), ({"ray": "local", "workers": 4}, "workers is 4, but on Ray")])
def test_settings_that_contradict_each_other(given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SweepSettings(**{"file": "plan.yaml", "out": "sweep", **given})


def test_on_ray_cells_say_what_they_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sasft.sweep, "on_ray", lambda jobs, address, **needs: asked.append((len(jobs), address, needs)) or (_ for _ in ()))
    settings = plan(folder, lam=0, seed=[0, 1])
    sweep(SweepSettings(file=settings.file, out=settings.out, ray="auto", cpus=3, gpus=0.5))
    assert asked == [(2, "auto", {"cpus": 3, "gpus": 0.5})]


def test_from_the_command_line(folder: Path, here: list[str], capsys: pytest.CaptureFixture) -> None:
    (folder / "bad.jsonl").write_text(TOO_LONG)
    settings = plan(folder, lam=0, task=[str(folder / "bad.jsonl"), str(folder / "one.jsonl")])
    assert main(["sweep", "--file", settings.file, "--out", settings.out]) == 2
    said = capsys.readouterr()
    assert said.out.endswith(f"1 of 2 cells done: {folder / 'sweep' / 'sweep.csv'} (sweep.parquet beside it)\n") and "1 of 2 cells failed" in said.err
    plan(folder, lam=0, task=[str(folder / "one.jsonl")])
    assert main(["sweep", "--file", settings.file, "--out", settings.out]) == 0
    assert here == ["sft,task=bad", "sft,task=one"] and "1 of 1 cells done" in capsys.readouterr().out


def test_a_dry_run_says_what_there_is_to_do_and_what_is_done_and_leaves_nothing(folder: Path, here: list[str], capsys: pytest.CaptureFixture) -> None:
    (folder / "text.txt").write_text("the quick brown fox")
    arms = [{"name": "task only", "seed": 0}, {"method": "l2-sp", "method_options": ["weight=1", "weight=2"]}, {"name": "sa-sft", "lam": 0.5, "lora_rank": 2}]
    settings = plan(folder, lam=0, seed=[0, 1], lr=[1e-3, 1e-2], arms=arms, evaluate={"suites": f"text:{folder / 'text.txt'}"})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["sweep", "--file", settings.file, "--out", settings.out, "--workers", "2", "--dry_run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before and not here
    said = capsys.readouterr().out
    assert said.startswith("15 cells: 14 trained, 1 untrained to compare with\n  base: 1\n  task only (method sft): 2 = 2 lr\n"
                           "  l2-sp: 8 = 2 lr × 2 seed × 2 method_options\n  sa-sft (method sft): 4 = 2 lr × 2 seed\n0 of 15 cells are finished, 0 were begun")
    alone = {lora: of_training(TrainSettings(model=str(folder / "model"), task=str(folder / "one.jsonl"), self_data=str(folder / "self.jsonl"), steps=2,
                                             rows_per_step=2, probe_rows=1, lam=0.5 if lora else 0, lora_rank=lora, out="x")).text for lora in (0, 2)}
    kinds = [line.split() for line in said.splitlines() if line.startswith(("  10  ", "  4  "))]
    assert [(kind[0], kind[-7:-4]) for kind in kinds] == [
        (n, ["4", "2", re.search(r"([\d,]+) tokens through the model", alone[lora])[1]]) for n, lora in (("10", 0), ("4", 2))]
    assert re.search(r"evaluation of .*model and each model trained from it:\n  text:.*: 1 items", said)
    assert re.search(r"time: up to about .* for one cell, about .* for all 15 left, on 2 workers\nmemory: at least .* MiB for the 2 largest trainings", said)
    assert "nothing was done" in said


def test_what_a_dry_run_reckons(folder: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers take jobs in their order; memory is that of the largest trainings that may meet."""
    measured = []

    def measure(train: TrainSettings):
        measured.append(train.method)
        long = train.method == "freeze"
        cost = TrainingCost(tokens=1, seconds_per_token=1.0, optimizer_seconds=1.0, seconds=580.0 if long else 40.0, weight_bytes=2**30 if long else 0,
                            state_bytes=2**30 if long else 0, activation_bytes=0)
        return Reckoned(model=torch.nn.Identity(), plan=[()], reports=(), training=cost, recordings=2, recording_seconds=10.0, snapshot_bytes=2**30)

    monkeypatch.setattr(sasft.sweep_dryrun, "reckon", measure)
    monkeypatch.setattr(sasft.sweep_dryrun, "of_evaluation", lambda evaluation: Forecast("scores", 30.0))
    given = {"lam": 0, "arms": [{"method": "freeze", "method_options": "layers=0"}, {"method": "l2-sp"}, {"seed": [1, 2]}], "evaluate": {"suites": "text"}}
    plan(folder, **given)
    on_two = SweepSettings(file=str(folder / "plan.yaml"), out=str(folder / "sweep"), workers=2)
    forecast = of_sweep(on_two)
    assert measured == ["freeze", "l2-sp"], "one of each kind"
    assert forecast.seconds == max(630, 30 + 3 * 90), "the base (30 s) and three trainings beside the long one"
    assert "up to about 10.5 minutes for one cell, about 10.5 minutes for all 5" in forecast.text
    assert "at least 4.00 GiB for the 2 largest trainings side by side" in forecast.text
    assert of_sweep(SweepSettings(file=on_two.file, out=on_two.out, ray="local", cpus=1)).seconds == 630 + 30 + 3 * 90
    for cell in read_cells(on_two.file, on_two.out)[:2]:
        cell.folder.mkdir(parents=True)
        cell.result.write_text("{}")
    forecast = of_sweep(on_two)
    assert forecast.seconds == 180 and "2 of 5 cells are finished, 0 were begun" in forecast.text and "2.00 GiB for the 2 largest" in forecast.text
    for cell in read_cells(on_two.file, on_two.out)[2:]:
        (cell.folder / "run").mkdir(parents=True)
        (cell.folder / "run" / "summary.json").write_text("{}")
    assert of_sweep(on_two).seconds == 60, "trainings that are done are only evaluated"
    for cell in read_cells(on_two.file, on_two.out)[2:]:
        cell.result.write_text("{}")
    assert of_sweep(on_two).seconds == 0 and not here


def test_in_processes_of_their_own(folder: Path) -> None:
    settings = plan(folder, lam=0, record_every=0, save_model=False)
    done = sweep(SweepSettings(file=settings.file, out=settings.out, cpus=1))
    done.check()
    assert str(done) == f"1 of 1 cells done: {done.table} (sweep.parquet beside it)" and {r["cell"] for r in rows_of(folder)} == {"sft"}
