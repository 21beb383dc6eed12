"""What is recorded, when, and that nothing of it stays behind in the model."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import drift
from drift.table import Row, Table
from tests.drift import zoo


class Counter:
    """A probe that reports how often it was asked."""

    def __init__(self, name: str = "counter", every=None) -> None:
        self.name, self.every, self.prepared, self.calls = name, every, 0, 0

    def prepare(self, model, reference) -> None:
        self.prepared += 1

    def rows(self, model, step: int) -> list[Row]:
        self.calls += 1
        return [Row(step=step, metric="calls", source=self.name, value=float(self.calls))]


def walk(model: nn.Module, recorder: drift.Recorder, steps: int, size: float = 0.1) -> list[dict[str, float]]:
    """Move every weight by ``size`` a step."""
    logged = []
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(size)
        logged.append(recorder.step())
    return logged


def values(table, metric: str, **where) -> dict[int, float]:
    return {r["step"]: r["value"] for r in table.to_pylist()
            if r["metric"] == metric and all(r[k] == v for k, v in where.items())}


def test_drift_of_every_part_and_of_the_whole(tmp_path: Path) -> None:
    model = zoo.llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with drift.record(model, tmp_path) as rec:
        walk(model, rec, 2)
    table = drift.load(tmp_path).table
    delta = {n: (p - before[n]).double() for n, p in model.named_parameters()}
    for name, d in delta.items():
        assert values(table, "drift/l2", module=name)[2] == pytest.approx(d.norm().item(), rel=1e-6)
        assert values(table, "drift/rel", module=name)[2] == pytest.approx(
            (d.norm() / before[name].double().norm()).item(), rel=1e-6)
    whole = math.sqrt(sum(d.square().sum().item() for d in delta.values()))
    assert values(table, "drift/l2", module="", layer=None)[2] == pytest.approx(whole, rel=1e-6)
    block = [d for n, d in delta.items() if n.startswith("model.layers.1.")]
    assert values(table, "drift/l2", module="", layer=1)[2] == pytest.approx(
        math.sqrt(sum(d.square().sum().item() for d in block)), rel=1e-6)
    assert values(table, "drift/l2", module="", layer=None)[0] == 0


def test_schedule_includes_the_first_and_the_last_step(tmp_path: Path) -> None:
    model, probe, rare = nn.Linear(2, 2), Counter(), Counter("rare", every=4)
    with drift.record(model, tmp_path, every=2, probes=[probe, rare]) as rec:
        logged = walk(model, rec, 5)
    table = drift.load(tmp_path).table
    assert sorted(values(table, "calls", source="counter")) == [0, 2, 4, 5]
    assert sorted(values(table, "calls", source="rare")) == [0, 4, 5]
    assert [bool(x) for x in logged] == [False, True, False, True, False]
    assert logged[1] == {"drift/l2": pytest.approx(0.2 * math.sqrt(6)), "drift/rel": logged[1]["drift/rel"], "calls/counter": 2.0}
    assert probe.prepared == 1 and rec.recordings == 4 and rec.overhead > 0


def test_a_schedule_may_be_any_function_of_the_step() -> None:
    model = nn.Linear(1, 1)
    with drift.record(model, every=lambda step: step in (1, 4)) as rec:
        walk(model, rec, 6)
    assert sorted(values(rec.table(), "drift/l2", module="", layer=None)) == [0, 1, 4, 6]


def test_the_table_is_readable_while_training_runs_and_after_an_error(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="boom"), drift.record(model, tmp_path) as rec:
        walk(model, rec, 1)
        assert set(values(drift.load(tmp_path).table, "drift/l2", module="weight")) == {0, 1}
        raise RuntimeError("boom")
    assert set(values(drift.load(tmp_path).table, "drift/l2", module="weight")) == {0, 1}
    assert json.loads((tmp_path / "drift" / "meta.json").read_text())["last_step"] == 1


def test_meta_says_how_it_came_about(tmp_path: Path) -> None:
    model = zoo.make(zoo.Frozen)
    probe = drift.AlignmentProbe("a", {"x": [zoo.batch(seed=1)], "y": [zoo.batch(seed=2)]}, forward=zoo.forward)
    with drift.record(model, tmp_path, probes=[probe], run="mine", config={"lr": 0.1}):
        pass
    meta = json.loads((tmp_path / "drift" / "meta.json").read_text())
    assert meta["run"] == "mine" and meta["config"] == {"lr": 0.1} and meta["versions"]["torch"]
    assert meta["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert meta["coverage"] == {"a": {"covered": 1.0, "missing": []}} and meta["overhead_seconds"] >= 0
    assert pq.read_schema(next((tmp_path / "drift").glob("*.parquet"))).names == [
        "run", "step", "metric", "layer", "module", "source", "value", "stderr", "n_tokens"]


def test_meta_is_strict_json_whatever_the_config_holds(tmp_path: Path) -> None:
    """Other readers than Python's know no NaN; a run that goes on is still the same one."""
    model, config = nn.Linear(1, 1), {"tau": math.inf, "rates": [0.5, math.nan]}
    base = drift.Reference.snapshot(model)
    with drift.record(model, tmp_path, config=config, reference=base) as rec:
        walk(model, rec, 1)

    def refused(word: str) -> None:
        raise AssertionError(word)

    meta = json.loads((tmp_path / "drift" / "meta.json").read_text(), parse_constant=refused)
    assert meta["config"] == {"tau": None, "rates": [0.5, None]}
    with drift.record(model, tmp_path, config=config, reference=base, start_step=1):
        pass


def test_a_resumed_recording_drops_what_came_later_and_keeps_the_rest(tmp_path: Path) -> None:
    def train(steps: int, start: int, model, reference) -> None:
        with drift.record(model, tmp_path, reference=reference, start_step=start) as rec:
            walk(model, rec, steps)

    model = nn.Linear(2, 2)
    reference = drift.Reference.snapshot(model)
    train(3, 0, model, reference)
    with torch.no_grad():  # back to where a checkpoint of step 1 was
        for p in model.parameters():
            p.sub_(0.2)
    train(3, 1, model, reference)
    measured = values(drift.load(tmp_path).table, "drift/l2", module="bias")
    assert sorted(measured) == [0, 1, 2, 3, 4]
    for step, value in measured.items():
        assert value == pytest.approx(0.1 * step * math.sqrt(2), rel=1e-5)


def test_resuming_without_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match="reference is missing: at start_step=3 the model has left"):
        drift.record(nn.Linear(1, 1), start_step=3)


def test_a_former_runs_recordings_are_not_lost_by_accident(tmp_path: Path) -> None:
    def run(steps: int, **settings) -> None:
        model = nn.Linear(1, 1)
        with drift.record(model, tmp_path, **settings) as rec:
            walk(model, rec, steps)

    run(4)
    with pytest.raises(FileExistsError, match=r"holds 5 recordings of a former run \(the last of step 4\).*overwrite=True"):
        run(1)
    assert sorted(values(drift.load(tmp_path).table, "drift/l2", module="bias")) == [0, 1, 2, 3, 4]
    run(1, overwrite=True)
    assert sorted(values(drift.load(tmp_path).table, "drift/l2", module="bias")) == [0, 1]


def test_going_on_with_another_run_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    reference = drift.Reference.snapshot(model)
    with drift.record(model, tmp_path, reference=reference, run="mine", config={"lr": 0.1}) as rec:
        walk(model, rec, 2)
    with pytest.raises(ValueError, match=r"holds the recordings of another run \(config is {'lr': 0.1}, now {'lr': 0.2}\)"), \
            drift.record(model, tmp_path, reference=reference, run="mine", config={"lr": 0.2}, start_step=1):
        pass
    assert sorted(values(drift.load(tmp_path).table, "drift/l2", module="bias")) == [0, 1, 2]


def test_going_on_from_another_base_or_with_another_model_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    reference = drift.Reference.snapshot(model)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, tmp_path / "base.safetensors")
    with drift.record(model, tmp_path) as rec:
        walk(model, rec, 2)
    spent = rec.overhead
    with pytest.raises(ValueError, match=r"holds the recordings of another run \(reference is .*sha256"), \
            drift.record(model, tmp_path, reference=drift.Reference.snapshot(model), start_step=2):
        pass
    other = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"another run \(trainable_parameters is 6, now 9"), \
            drift.record(other, tmp_path, reference=drift.Reference.snapshot(other), start_step=2):
        pass
    for start, base in ((2, reference), (3, tmp_path / "base.safetensors")):  # the same θ₀, wherever it is kept
        with drift.record(model, tmp_path, reference=base, start_step=start) as rec:
            walk(model, rec, 1)
    meta = drift.load(tmp_path).meta
    assert meta["recordings"] == 5 and meta["overhead_seconds"] >= round(spent, 3), "what came before counts"
    assert sorted(values(drift.load(tmp_path).table, "drift/l2", module="bias")) == [0, 1, 2, 3, 4]


def test_any_base_is_a_reference_but_the_model_itself(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for base in (copy.deepcopy(model), drift.Reference.snapshot(model)):
        with drift.record(model, reference=base) as rec:
            assert rec.latest()["drift/l2"] == 0
    with pytest.raises(ValueError, match="reference is the model that is trained"):
        drift.record(model, reference=model)


def test_misuse_is_explained(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    rec = drift.record(model)
    for ask in (rec.step, rec.latest):
        with pytest.raises(RuntimeError, match="use it in a with block"):
            ask()
    with rec:
        walk(model, rec, 2)
        for step in (2, -1):
            with pytest.raises(ValueError, match=f"step must be above the last, 2, got {step}"):
                rec.step(step)
        rec.step(7)
    with pytest.raises(RuntimeError, match="has recorded a run"), rec:
        pass
    assert sorted(values(rec.table(), "drift/l2", module="bias")) == [0, 1, 2, 7]
    with pytest.raises(TypeError, match="probes must be a list of probes, got Counter"):
        drift.record(model, probes=Counter())
    with pytest.raises(TypeError, match="probes holds 'kl', which is no probe: it must have name"):
        drift.record(model, probes=[Counter(), "kl"])
    with pytest.raises(ValueError, match="start_step must be 0 or .* got -1"):
        drift.record(model, start_step=-1)
    sources = drift.SourceGradients(model, ["a", "b"])
    with drift.record(model, probes=[sources]) as rec, pytest.raises(ValueError, match="'sources' watches every training step, so step must be 1 after 0, got 10"):
        rec.step(10)


def test_an_error_while_attaching_leaves_nothing_behind() -> None:
    model = zoo.llama()
    one, two = drift.SourceGradients(model, ["a", "b"]), drift.SourceGradients(model, ["c", "d"])
    two.name = "two"
    with pytest.raises(RuntimeError, match="attached to this model already"), drift.record(model, probes=[one, two]):
        pass
    assert not model._forward_pre_hooks


def test_the_error_that_ends_a_training_is_not_hidden_by_a_lost_folder(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="mine"), drift.record(model, tmp_path / "run") as rec:
        walk(model, rec, 1)
        shutil.rmtree(tmp_path / "run")
        raise KeyError("mine")


def test_meta_is_there_while_the_run_goes_on(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with drift.record(model, tmp_path) as rec:
        walk(model, rec, 1)
        assert drift.load(tmp_path).meta["recordings"] == 2


def test_every_metric_of_parts_kinds_and_the_whole() -> None:
    model = zoo.llama(tied=False)
    before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    with drift.record(model, metrics=("l2", "rel", "max", "cos", "spectral", "update")) as rec:
        torch.manual_seed(0)
        for _ in range(2):
            with torch.no_grad():
                last = {n: p.detach().clone().double() for n, p in model.named_parameters()}
                for p in model.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            rec.step()
    now = {n: p.detach().double() for n, p in model.named_parameters()}
    table = rec.table()

    def joined(of: dict[str, torch.Tensor], has: str) -> torch.Tensor:
        return torch.cat([x.flatten() for n, x in of.items() if has in n])

    for where, has in (({"module": "", "layer": None}, ""), ({"module": "", "layer": 1}, "layers.1."),
                       ({"module": "*.mlp.up_proj.weight", "layer": None}, "up_proj")):
        x, y, z = joined(now, has), joined(before, has), joined(last, has)
        expected = {"l2": (x - y).norm(), "rel": (x - y).norm() / y.norm(), "max": (x - y).abs().max(),
                    "cos": x @ y / x.norm() / y.norm(), "update": (x - z).norm()}
        for metric, value in expected.items():
            assert values(table, f"drift/{metric}", **where)[2] == pytest.approx(value.item(), rel=1e-5), metric
    name = "model.layers.0.mlp.up_proj.weight"
    assert values(table, "drift/spectral", module=name)[2] == pytest.approx(torch.linalg.svdvals(now[name] - before[name])[0].item(), rel=1e-5)
    assert not values(table, "drift/spectral", module="model.norm.weight")
    with pytest.raises(ValueError, match=r"metrics holds \['l3'\]; there are l2, .*update"):
        drift.record(model, metrics=["l3"])


def test_series_are_found_or_what_there_is_is_named(tmp_path: Path) -> None:
    model = zoo.llama()
    with drift.record(model, tmp_path) as rec:
        walk(model, rec, 3)
    recording = drift.load(tmp_path)
    series = recording.series("drift/l2", layer=1)
    assert series.steps.tolist() == [0, 1, 2, 3] and series.values[0] == 0 and (np.diff(series.values) > 0).all()
    assert np.isnan(series.stderr).all() and recording.metrics() == ["drift/l2", "drift/rel"]
    assert len(recording.series("drift/rel", module="model.norm.weight").values) == 4
    with pytest.raises(ValueError, match="there is no metric 'kl'; there are drift/l2, drift/rel"):
        recording.series("kl")
    with pytest.raises(ValueError, match="drift/l2 has no rows of layer=7"):
        recording.series("drift/l2", layer=7)


def test_recording_changes_no_weight_and_no_random_number() -> None:
    def train(recorded: bool) -> torch.Tensor:
        model, other = zoo.make(zoo.Dropout).train(), nn.Linear(1, 1)
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        probes = [drift.DivergenceProbe("kl", [zoo.batch()], forward=zoo.forward),
                  drift.AlignmentProbe("a", {"x": [zoo.batch(seed=1)], "y": [zoo.batch(seed=2)]}, forward=zoo.forward)]
        with drift.record(model, probes=probes) if recorded else drift.record(other) as rec:
            for _ in range(3):
                zoo.forward(model, zoo.batch()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                rec.step()
        return model.head.weight.detach()

    assert torch.equal(train(True), train(False))


@pytest.mark.parametrize("every", [0, -1, 2.5])
def test_an_impossible_schedule_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"every must be a whole number of steps, at least 1, .* got {every}"):
        drift.record(nn.Linear(1, 1), every=every)


def test_probes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="probes must have different names"):
        drift.record(nn.Linear(1, 1), probes=[Counter(), Counter()])


def test_two_probes_of_one_series_are_refused_when_the_second_has_it() -> None:
    """Else a curve would have two values a step, here of a step's gradients and of fixed rows' ones."""
    model, batch = zoo.llama(), zoo.batch(rows=4, vocabulary=32)
    fixed = drift.AlignmentProbe("fixed", {"task": [batch], "self": [batch]}, every=100)
    sources = drift.SourceGradients(model, ["task", "self"])
    with pytest.raises(ValueError, match=r"probes 'fixed' and 'sources' both record align/raw_cos of source 'task\|self'; give their sources"), \
            drift.record(model, probes=[sources, fixed]) as recorder:
        sources.tag([0, 1, 0, 1])
        model(**batch).loss.backward()
        recorder.step()
    assert not model._forward_pre_hooks


def test_a_reference_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"), drift.record(nn.Linear(2, 2), reference=drift.Reference.snapshot(nn.Linear(2, 3))):
        pass


def test_an_unwritable_folder_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't record to .*file.*choose another out"):
        drift.record(nn.Linear(1, 1), tmp_path / "file")


def test_a_full_disk_leaves_the_earlier_recordings_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path, "run")
    table.add(0, [Row(step=0, metric="m", value=1.0)])

    def full(*args) -> None:
        Path(args[1]).write_bytes(b"PAR1 half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drift.table.pq.write_table", full)
    with pytest.raises(OSError, match="recording step 1 .*No space left on device.*before it are whole and readable"):
        table.add(1, [Row(step=1, metric="m", value=2.0)])
    assert values(drift.load(tmp_path).table, "m") == {0: 1.0}
    assert [p.name for p in (tmp_path / "drift").iterdir()] == ["part-000000000.parquet"]


def test_reading_a_folder_without_a_recording_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is recorded under"):
        drift.load(tmp_path)


def test_importing_drift_does_not_import_transformers() -> None:
    code = ("import sys, drift; heavy = {'transformers', 'peft', 'trl', 'sklearn', 'matplotlib', 'sasft'} & set(sys.modules); "
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
