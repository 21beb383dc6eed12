"""Two gloo processes train as one does, whatever the method."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sasft.methods import method
from tests.processes import in_two_processes
from tests.sasft.methods import cases

METHODS = {
    "sft": {}, "kl-self": {}, "l2-sp": {"weight": 3.0}, "online-replay": {"rows_per_step": 2, "buffer": 2, "max_new_tokens": 6},
    "spin": {"max_new_tokens": 6}, "lfu": {"variant": "steering"}, "wise-ft": {}, "grads": {"lr": 1e-2},
}


def _train(folder: Path, name: str, lora: bool) -> None:
    """Three steps, the losses and the weights left in ``folder``."""
    out = folder / f"{name}-{lora}"
    out.mkdir(parents=True, exist_ok=True)
    chosen, model, data = method(name, **METHODS[name]), cases.tiny(), cases.rows()
    if lora:
        model = method("lora", r=2).prepare(model)
    objective, data = cases.started(chosen, model, data)
    log = cases.fit(model, data, cases.plan_of(data, 3), cases.FitSettings(**{**cases.SETTINGS, "micro_rows": 2}), pad_id=0,
                    out=out / "run", objective=objective, progress=False)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(cases.weights(model), out / "weights.pt")
        (out / "losses.json").write_text(json.dumps([[e["loss"], e["grad_norm"]] for e in log if "loss" in e]))


def _work(rank: int, folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for name in METHODS:
        _train(folder, name, False)
    _train(folder, "kl-self", True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(_work, folder)
    return folder


@pytest.mark.parametrize("name, lora", [*((name, False) for name in METHODS), ("kl-self", True)])
def test_two_processes_give_the_losses_and_weights_of_one(name: str, lora: bool, two: Path, tmp_path: Path) -> None:
    _train(tmp_path, name, lora)
    ours, theirs = tmp_path / f"{name}-{lora}", two / f"{name}-{lora}"
    one, both = (json.loads((folder / "losses.json").read_text()) for folder in (ours, theirs))
    assert len(one) == 3
    for (loss, norm), (other_loss, other_norm) in zip(one, both, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3) and other_norm == pytest.approx(norm, rel=1e-3)
    alone, shared = torch.load(ours / "weights.pt"), torch.load(theirs / "weights.pt")
    assert max(float((shared[n] - p).abs().max()) for n, p in alone.items()) < 2e-4
