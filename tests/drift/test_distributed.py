"""Two gloo processes give the numbers of one: DDP, FSDP2 and Accelerate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import drift
from drift import source_collector
from drift.names import parameters
from tests.drift import families, zoo
from tests.processes import in_two_processes

TAGS = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0])
STEPS = 2
KINDS = ("ddp", "fsdp2", "accelerate", "ddp-at-once", "ddp-accumulated")


def _batch() -> dict[str, torch.Tensor]:
    batch = zoo.batch(rows=8, vocabulary=families.V)
    batch["attention_mask"][:] = 1  # equal token counts: a mean of the processes' means is the mean of all
    batch["labels"][:, 2:] = batch["input_ids"][:, 2:]
    return batch


def _train(model: nn.Module, batch: dict[str, torch.Tensor], tags: torch.Tensor, out: Path, *, accumulate: bool,
           accelerator: Accelerator | None = None) -> None:
    """Two steps of SGD with a recorder and the sources' gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = torch.Tensor.backward
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    sources = drift.SourceGradients(model, ["task", "self"], accumulate=accumulate)
    halves = [slice(0, len(tags) // 2), slice(len(tags) // 2, None)] if accumulate else [slice(None)]
    with drift.record(model, out, probes=[sources], metrics=("l2", "rel", "max", "cos", "update")) as recorder:
        for _ in range(STEPS):
            for part in halves:
                sources.tag(tags[part])
                backward(model(**{k: v[part] for k, v in batch.items()}).loss / len(halves))
            optimizer.step(), optimizer.zero_grad()
            recorder.step()


def _work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    batch, tags = {k: v[mine] for k, v in _batch().items()}, TAGS[mine]
    for kind in KINDS:
        source_collector.SMALL = 0 if kind == "ddp-at-once" else 2**16
        model = families.make("llama", torch.float32)
        if kind == "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        elif kind != "accelerate":
            model = DistributedDataParallel(model)
        _train(model, batch, tags, folder / kind, accumulate=kind.endswith("accumulated"),
               accelerator=Accelerator(cpu=True) if kind == "accelerate" else None)
    _half_seen(tags, folder / f"half-seen-{rank}.json")
    dist.destroy_process_group()


def _half_seen(tags: torch.Tensor, out: Path) -> None:
    """A sharded model of which one weight is used outside its module, too: what is said of it, step by step."""
    model = zoo.make(zoo.Functional)
    fully_shard(model.body), fully_shard(model)
    ids, missing = zoo.batch(rows=len(tags))["input_ids"], []
    with drift.SourceGradients(model, ["task", "self"]) as sources:
        for _ in range(2):
            sources.tag(tags)
            model(ids).square().mean().backward()
            missing.append(dict(sources.step().missing))
    out.write_text(json.dumps(missing))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    # Each process deals its own rows to folds; with these tags one process deals all of them alike.
    _train(families.make("llama", torch.float32), _batch(), TAGS, folder / "one", accumulate=False)
    in_two_processes(_work, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_numbers_of_one(runs: Path, kind: str) -> None:
    def keyed(out: Path) -> dict[tuple, float]:
        return {(r["step"], r["metric"], r["layer"], r["module"], r["source"]): r["value"] for r in drift.load(out).table.to_pylist()}

    one, two = keyed(runs / "one"), keyed(runs / kind)
    assert one.keys() == two.keys()
    names = set(parameters(families.make("llama")))
    assert {m for _, _, _, m, _ in two} >= names
    scale = {metric: max(abs(v) for (_, m, *_), v in one.items() if m == metric and np.isfinite(v)) for metric in {k[1] for k in one}}
    for key, value in one.items():
        if "cos" in key[1] and key[1].startswith("align/"):
            continue  # ratios of small numbers: their parts are compared
        assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-4 * scale[key[1]], nan_ok=True), key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_half_seen_gradient_of_a_sharded_weight_is_named(runs: Path, rank: int) -> None:
    for missing in json.loads((runs / f"half-seen-{rank}.json").read_text()):
        assert list(missing) == ["head.weight"] and "part of its gradient comes from outside its module" in missing["head.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_process_alone_writes(runs: Path, kind: str) -> None:
    meta = drift.load(runs / kind).meta
    assert meta["recordings"] == STEPS + 1 and meta["coverage"]["sources"] == {"covered": 1.0, "missing": {}}
