"""Two gloo processes, started by ``accelerate launch`` with a configuration for FSDP2, train as one process does."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

import drift
from drift.names import trainable
from sasft.errors import UsageError
from sasft.methods import Costs, method
from sasft.models import load_model
from sasft.processes import cut_as, own_part, trained_weights
from sasft.train import TrainSettings, train
from tests.sasft import tiny_chat
from tests.sasft.methods import cases

CONFIG = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1, "num_processes": 2, "mixed_precision": "no",
    "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
                    "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_cpu_ram_efficient_loading": False},
}
# name: weights sharded, method, adapters, settings
RUNS: Mapping[str, tuple[bool, str, bool, dict[str, Any]]] = {
    "full": (True, "sft", False, {"micro_rows": 1, "save_every": 2}),
    "packed": (True, "asft", False, {"packing": True, "activation_checkpointing": True}),
    "adapters": (True, "kl-self", True, {}),
    "replay": (True, "online-replay", False, {}),
    "ddp": (False, "kl-self", False, {"packing": True, "micro_rows": 1}),
    "l2-sp": (True, "l2-sp", False, {"micro_rows": 1}),
    "l2-sp of adapters": (True, "l2-sp", True, {}),
    "ewc": (True, "ewc", False, {}),
    "wise-ft": (True, "wise-ft", False, {}),
    "wise-ft of adapters": (True, "wise-ft", True, {}),
    "spin": (True, "spin", False, {"micro_rows": 1}),  # processes without task rows among them
}
OPTIONS = {"online-replay": {"rows_per_step": 2, "buffer": 2, "max_new_tokens": 6}, "spin": {"max_new_tokens": 6}, "l2-sp": {"weight": 3.0},
           "ewc": {"weight": 30.0}}
REFUSED = ["lfu"]  # where weights are sharded


def tied(lora: bool) -> nn.Module:
    """A model whose head is its embedding, in full or with adapters."""
    model = tiny_chat.chatty()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return method("lora", r=2).prepare(model) if lora else model


class Stop(TrainerCallback):
    """Ctrl-C before the third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def train_one(folder: Path, kind: str, lora: bool, stop: bool = False, **settings) -> tuple[nn.Module, list[tuple[float, float]], dict[str, int]]:
    """Three steps: the model, the losses and gradient norms, and what it has cost; packed, also a record of drift and alignment."""
    model = tied(lora)
    sources = drift.SourceGradients(model, ["task", "self"], folds=1)
    recorder = drift.DriftCallback(folder / "drift", reference=drift.Reference.snapshot(model), probes=[sources], every=1)
    callbacks = [*([recorder] if kind == "asft" else []), *([Stop()] if stop else [])]
    objective, data = cases.started(method(kind, **OPTIONS.get(kind, {})), model, cases.rows())
    log = cases.fit(model, data, cases.plan_of(data, 3), cases.FitSettings(**{**cases.SETTINGS, **settings}), pad_id=0, out=folder,
                    objective=objective, progress=False, callbacks=callbacks)
    costs = Costs() if objective is None else objective.costs
    return model, [(e["loss"], e["grad_norm"]) for e in log if "loss" in e], costs.describe()


def from_files(folder: Path, out: Path, record_every: int = 0) -> dict[str, Any]:
    return train(TrainSettings(
        **{**cases.SETTINGS, "micro_rows": 2, "save_every": 2}, model=str(folder / "model"), task=str(folder / "task.jsonl"), self_data=str(folder / "self.jsonl"),
        out=str(out), steps=3, rows_per_step=4, record_every=record_every, lora_rank=2))


# --- what each of the two processes does ------------------------------------------------------------------------


def sharding(wanted: bool, as_it_was=PartialState._prepare_backend) -> None:
    """accelerate shards weights over accelerators only; where that is ``wanted`` here, it takes gloo processes on a CPU for such."""
    def backend(self, *args, **kwargs):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_USE_FSDP"] = str(wanted).lower()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = backend if wanted else as_it_was


def refusal(action) -> str:
    with pytest.raises(UsageError) as caught:
        action()
    return str(caught.value)


def one_loss_is_not_a_number(out: Path) -> None:
    """In the second process, whose gradients are as they should be."""
    trainer = sys.modules["sasft.trainer"]
    whole = trainer.response_loss
    trainer.response_loss = lambda *args: whole(*args) + (float("nan") if dist.get_rank() else 0.0)
    try:
        train_one(out, "sft", False, micro_rows=1)
    finally:
        trainer.response_loss = whole


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and os.environ["FSDP_VERSION"] == "2"
    found: dict[str, Any] = {}
    for name, (sharded, kind, lora, settings) in RUNS.items():
        sharding(sharded)
        model, steps, costs = train_one(folder / name, kind, lora, **settings)
        assert all(hasattr(p, "full_tensor") for p in model.parameters()) == sharded
        if name == "full":
            for parameter, weights in zip(trainable(model).values(), trained_weights(model).values(), strict=True):
                part = own_part(cut_as(weights, parameter))
                assert torch.equal(part, own_part(parameter)) and part.untyped_storage().nbytes() == part.nbytes < weights.nbytes
        found[name] = {"weights": trained_weights(model), "steps": steps, "costs": costs}
    sharding(True)
    resumed, steps, _ = train_one(folder / "full", "sft", False, **RUNS["full"][3])
    found["resumed"] = {"weights": trained_weights(resumed), "steps": steps}
    found["refused"] = {kind: refusal(lambda kind=kind: train_one(folder / "refused", kind, False)) for kind in REFUSED}
    found["files"] = {"sharded": from_files(folder, folder / "sharded")}
    found["refused"]["recording"] = refusal(lambda: from_files(folder, folder / "recording", record_every=1))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    found["refused"]["loading"] = refusal(lambda: from_files(folder, folder / "loading"))
    os.environ.update(FSDP_VERSION="1", FSDP_CPU_RAM_EFFICIENT_LOADING="false", FSDP_SYNC_MODULE_STATES="false")
    found["refused"]["version"] = refusal(lambda: train_one(folder / "refused", "sft", False))
    sharding(False)
    found["files"]["ddp"] = from_files(folder, folder / "ddp-files", record_every=2)
    moved, steps, _ = train_one(folder / "moved", "sft", False, micro_rows=1, save_every=1)
    found["refused"]["diverged"] = refusal(lambda: one_loss_is_not_a_number(folder / "diverged"))
    found["moved"] = {"weights": trained_weights(moved), "steps": steps}
    torch.save(found, folder / f"found-{dist.get_rank()}.pt")
    dist.destroy_process_group()


# --- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and files to train on."""
    folder = tmp_path_factory.mktemp("two")
    tiny_chat.save_chatty(folder / "model")
    for name, said in (("task", "it is so"), ("self", "well well")):
        lines = ({"prompt": f"{q} {i}", "response": said} for i, q in enumerate(cases.QUESTIONS))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What the two processes have found."""
    with pytest.raises(KeyboardInterrupt):
        train_one(folder / "moved", "sft", False, stop=True, micro_rows=2, save_every=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml"), "--main_process_port", "0",
               "-m", __name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]


def furthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_trajectory_and_the_weights_of_one(name: str, both, tmp_path: Path) -> None:
    _, kind, lora, settings = RUNS[name]
    model, steps, costs = train_one(tmp_path, kind, lora, **{**settings, "micro_rows": 4, "packing": False})
    if name == "adapters":  # where the base is the sharded model itself, every process runs it on all its rows
        data = cases.rows()
        costs["forward_tokens"] = sum(len(data[s][i].input_ids) for step in cases.plan_of(data, 3) for s, i in step)
    if name == "spin":  # a process makes the pass over an answer of the model's own, also if it has no task row
        opponent = method(kind, **OPTIONS[kind]).encoded(data := cases.rows(), tied(lora), 0, Costs())["opponent"][0]
        costs["backward_tokens"] += sum(s == "self" for step in cases.plan_of(data, 3) for s, _ in step) * len(opponent.input_ids)
    for found in (of[name] for of in both):
        assert len(found["steps"]) == 3
        for one, two in zip(steps, found["steps"], strict=True):
            assert two == pytest.approx(one, rel=1e-4)
        assert furthest(trained_weights(model), found["weights"]) < 1e-4 < furthest(trained_weights(tied(lora)), found["weights"])
        assert found["costs"] == costs


def test_instruments_see_in_sharded_weights_what_they_see_in_whole_ones(both, folder: Path, tmp_path: Path) -> None:
    """Drift, and products of the sources' gradients, of packed rows that two processes share."""
    def measured(out: Path) -> dict[tuple, float]:
        recording = drift.load(out / "drift")
        assert recording.meta["coverage"]["sources"] == {"covered": 1.0, "missing": {}}
        return {(r["step"], r["metric"], r["layer"], r["source"]): r["value"] for r in recording.table.to_pylist()
                if r["metric"] in ("drift/l2", "align/raw_inner") and not r["module"]}

    train_one(tmp_path, "asft", False)
    one, two = measured(tmp_path), measured(folder / "packed")
    assert one.keys() == two.keys() and {metric for _, metric, _, _ in one} == {"drift/l2", "align/raw_inner"}
    scale = max(value for (_, metric, *_), value in one.items() if metric == "align/raw_inner")
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-5 * scale), key


def test_sharded_weights_go_on_from_a_checkpoint(both) -> None:
    for found in both:
        assert furthest(found["resumed"]["weights"], found["full"]["weights"]) == 0
        assert found["resumed"]["steps"] == found["full"]["steps"]


def test_two_processes_go_on_where_one_was_stopped(both, tmp_path: Path) -> None:
    model, steps, _ = train_one(tmp_path, "sft", False)
    for found in both:
        assert [x for step in found["moved"]["steps"] for x in step] == pytest.approx([x for step in steps for x in step], rel=1e-4)
        assert furthest(found["moved"]["weights"], trained_weights(model)) < 1e-4


@pytest.mark.parametrize("what, message", [
    ("lfu", "weights sharded by FSDP2 can't be had with the objective Lfu, which does more with them than passes that every process makes"),
    ("recording", "record_every is 1, but instruments put the base's weights into the model"),
    ("loading", "fsdp_cpu_ram_efficient_loading leaves all processes but the first without the model's weights"),
    ("version", "accelerate's configuration has fsdp_version 1; set fsdp_version: 2"),
])
def test_what_sharded_weights_do_not_allow_is_refused(what: str, message: str, both) -> None:
    assert all(message in found["refused"][what] for found in both)


def test_processes_stop_together_if_the_loss_of_one_is_not_finite(both) -> None:
    assert [found["refused"]["diverged"].partition(",")[0] for found in both] == ["step 1: the loss is nan"] * 2


def test_sharding_without_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate was told to shard the weights .use_fsdp., which it does over several GPUs only"):
        train_one(tmp_path, "sft", False)


@pytest.mark.parametrize("kind", ["sharded", "ddp"])
def test_two_processes_leave_the_folder_of_one(kind: str, both, folder: Path, tmp_path: Path) -> None:
    one = from_files(folder, tmp_path / "one", record_every=0 if kind == "sharded" else 2)
    out, two = folder / ("sharded" if kind == "sharded" else "ddp-files"), both[0]["files"][kind]
    assert two == both[1]["files"][kind] == json.loads((out / "summary.json").read_text())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two["recorded"] == pytest.approx(one["recorded"], rel=1e-3, abs=1e-5)
    assert bool(two["recorded"]) == (kind == "ddp")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    mine, theirs = (trained_weights(load_model(str(where / "model"), device="cpu")[0]) for where in (tmp_path / "one", out))
    assert furthest(mine, theirs) < 1e-4


if __name__ == "__main__":
    work(Path(sys.argv[1]))
