"""Dry runs: what they say is what would be, and they leave nothing behind."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from sasft import costing
from sasft.batches import MicroBatches, batch_of
from sasft.cli import main
from sasft.costing import cache_bytes, measure_reading, measure_training, measure_writing, weight_bytes
from sasft.dryrun import DRY_RUNS, of_run, of_talk, of_training, reckon
from sasft.errors import UsageError
from sasft.mixing import SELF, TASK, make_plan
from sasft.mixture import MixSettings, make_mixture
from sasft.models import weights_hash
from sasft.pipeline import RunSettings, mix_table
from sasft.talk import TalkSettings
from sasft.train import TrainSettings
from sasft.trainer import FitSettings
from tests.sasft import tiny_chat

FP32 = {"precision": "fp32", "save_every": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat.save_chatty(tmp_path / "model")
    for name in ("task", "self"):
        lines = [{"prompt": f"What is {i}?", "response": f"It is {i} {'indeed ' * (i % 4)}"} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def rows_and_plan():
    chat = tiny_chat.chat()
    rows = {s: [chat.encode(({"role": "user", "content": f"{s} {'so ' * (i % 5)}"},), "well " * (i % 3 + 1)) for i in range(9)]
            for s in (TASK, SELF)}
    tokens = {s: [e.loss_tokens for e in of] for s, of in rows.items()}
    return rows, make_plan(tokens[TASK], tokens[SELF], steps=3, lam=0.5, rows_per_step=8)


@pytest.mark.parametrize("kwargs", [
    {}, {"packing": True}, {"packing": True, "micro_tokens": 300}, {"activation_checkpointing": True}])
def test_the_cost_of_training_counts_what_is_trained_on_and_moves_nothing(kwargs) -> None:
    rows, plan = rows_and_plan()
    model, settings = tiny_chat.chatty(), FitSettings(**FP32, micro_rows=3, **kwargs)
    before = weights_hash(model)
    cost = measure_training(model, plan, rows, settings, pad_id=0)
    parts = MicroBatches(plan, rows, 3, packing=settings.packing, micro_tokens=settings.micro_tokens)
    batches = [batch_of([((s, i), rows[s][i]) for s, i in part], 0, {}, packing=settings.packing) for part in parts]
    assert cost.tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert cost.seconds == pytest.approx(cost.tokens * cost.seconds_per_token + 3 * cost.optimizer_seconds)
    assert cost.weight_bytes == 4 * sum(p.numel() for p in model.parameters()) and cost.state_bytes == 3 * cost.weight_bytes
    assert weights_hash(model) == before and all(p.grad is None for p in model.parameters()) and not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_activations_are_what_autograd_keeps() -> None:
    """A layer of known size: its input is kept once for the weight's gradient, the weight itself is not counted."""
    layer = torch.nn.Linear(8, 8, bias=False)
    kept = costing._Kept({layer.weight.untyped_storage().data_ptr()})
    kept.begin()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        layer(layer(torch.randn(5, 8, requires_grad=True))).sum()
    assert kept.bytes == 2 * 5 * 8 * 4


def test_checkpointing_and_frozen_weights_take_less() -> None:
    rows, plan = rows_and_plan()
    whole = measure_training(tiny_chat.chatty(), plan, rows, FitSettings(**FP32), pad_id=0)
    less = measure_training(tiny_chat.chatty(), plan, rows, FitSettings(**FP32, activation_checkpointing=True), pad_id=0)
    assert 0 < less.activation_bytes < whole.activation_bytes
    model = tiny_chat.chatty()
    model.model.requires_grad_(False)
    assert measure_training(model, plan, rows, FitSettings(**FP32), pad_id=0).state_bytes == 3 * 4 * model.lm_head.weight.numel()


def test_a_micro_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(costing, "response_loss", full)
    rows, plan = rows_and_plan()
    with pytest.raises(UsageError, match=r"a micro-batch of \d rows \(\d+ tokens with padding\) does not fit .* lower micro_rows"):
        measure_training(tiny_chat.chatty(), plan, rows, FitSettings(**FP32), pad_id=0)


def test_keys_and_values_of_a_token_by_the_configuration_are_those_of_the_cache() -> None:
    model = tiny_chat.chatty()
    cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert 3 * cache_bytes(model.config, "fp32") == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert 2 * cache_bytes(model.config, "bf16") == cache_bytes(model.config, "fp32")
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())


def test_rates_are_positive_and_leave_the_model_as_it_was() -> None:
    model = tiny_chat.chatty().train()
    assert measure_reading(model, [5, 6, 7], 2, "fp32") > 0
    reading, step = measure_writing(model, [5, 6, 7], 2, "fp32", 0)
    assert reading > 0 and step >= 0 and model.training


def arguments(folder: Path) -> dict[str, list[str]]:
    task, own, model = folder / "task.jsonl", folder / "self.jsonl", ["--model", str(folder / "model")]
    return {
        "talk": [*model, "--out", f"{folder}/new.jsonl", "--n", "8", "--batch_size", "4"],
        "mix": [*model, "--sources", f"task={task}", f"self={own}", "--steps", "3", "--out", f"{folder}/mix"],
        "train": [*model, "--task", str(task), "--self_data", str(own), "--steps", "3", "--out", f"{folder}/run"],
        "evaluate": [*model, "--suites", f"instructions,answers:{task},rows:{own}", "--limit", "4", "--out", f"{folder}/scores"],
        "run": [*model, "--task", str(task), "--talk_n", "16", "--mix_steps", "3", "--evaluate_suites", "instructions,text",
                "--evaluate_limit", "4", "--out", f"{folder}/whole"],
    }


@pytest.mark.parametrize("command", DRY_RUNS)
def test_a_dry_run_says_rows_tokens_steps_time_and_memory_and_leaves_nothing(command: str, folder: Path,
                                                                             capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([command, *arguments(folder)[command], "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "tokens" in said and "memory: " in said and re.search(r"time( on \w+)?: ", said) and "nothing was done" in said
    if command in ("mix", "train", "run"):
        assert "3 steps of" in said and "of 24 rows" in said


def test_a_dry_run_of_training_foresees_the_mix(folder: Path) -> None:
    settings = TrainSettings(model=str(folder / "model"), task=str(folder / "task.jsonl"), self_data=str(folder / "self.jsonl"),
                             steps=3, rows_per_step=4, lam=0.25, out=str(folder / "run"), lora_rank=2, **FP32)
    said = of_training(settings).text
    assert "3 steps of" in said and "task    0.750  0.750" in said and re.search(r"parameters are trained \(\d+\.\d+%\)", said)
    assert "without what the method" not in said
    settings.method = "kl-self"
    assert "and without what the method kl-self adds" in of_training(settings).text


def test_recordings_are_part_of_the_time(folder: Path) -> None:
    """At θ₀, after each tenth of the run, and at its end."""
    given = {"model": str(folder / "model"), "task": str(folder / "task.jsonl"), "self_data": str(folder / "self.jsonl"), "steps": 25,
             "rows_per_step": 2, "out": str(folder / "run"), **FP32}
    found = [reckon(TrainSettings(**given, record_every=every)) for every in (None, 20, 0)]
    assert [f.recordings for f in found] == [10, 3, 0]  # at 0, 3, ... 24, 25; at 0, 20, 25
    for f in found:
        assert f.seconds == f.training.seconds + f.recordings * f.recording_seconds and (f.recording_seconds > 0) == (f.recordings > 0)
    assert "with 10 recordings of about" in of_training(TrainSettings(**given)).text
    assert "without recordings, without checkpoints" in of_training(TrainSettings(**given, record_every=0)).text


def test_self_dialogues_to_come_count_at_their_caps(folder: Path) -> None:
    settings = TalkSettings(model=str(folder / "model"), out=str(folder / "new.jsonl"), n=10, turns=2, max_user_tokens=7,
                            max_new_tokens=9, batch_size=4, precision="fp32")
    assert "up to 140 tokens of user turns and 180 of answers" in of_talk(settings).text
    (folder / "new.jsonl").write_text("{}\n" * 20)
    assert "20 rows are there already" in of_talk(settings).text and of_talk(settings).seconds == 0


def test_a_run_adds_its_parts_up(folder: Path) -> None:
    given = {"task": str(folder / "task.jsonl"), "model": str(folder / "model"), "out": str(folder / "whole"),
             "precision": "fp32", "mix_steps": 2, "evaluate_suites": "text", "evaluate_limit": 2}
    forecast = of_run(RunSettings(**given, talk_n=8, talk_max_new_tokens=9))
    assert math.isfinite(forecast.seconds) and "all in all" in forecast.text
    assert "self: rows to be written, counted as 6 of the longest that can be" in forecast.text  # a quarter is held out
    assert "self-dialogues" not in of_run(RunSettings(**given, lam=0.0)).text


def test_the_mix_of_a_dry_run_is_the_mix(folder: Path) -> None:
    settings = MixSettings(sources=[f"task={folder}/task.jsonl", f"self={folder}/self.jsonl"], model=str(folder / "model"),
                           steps=3, out=str(folder / "mix"))
    foreseen = DRY_RUNS["mix"](settings).text
    assert mix_table(make_mixture(settings)) in foreseen
