"""The callback in transformers' Trainer and in TRL's SFTTrainer, unchanged."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import drift
from tests.drift import zoo
from tests.sasft.tiny_chat import tokenizer

COMMON = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "logging_steps": 2,
          "save_steps": 3, "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}


def trainer(out: Path, *callbacks, max_steps: int = 6) -> Trainer:
    batch = zoo.batch(rows=8, vocabulary=32)
    rows = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    return Trainer(model=zoo.llama(), train_dataset=rows, callbacks=list(callbacks),
                   args=TrainingArguments(output_dir=str(out), **{**COMMON, "max_steps": max_steps}))


def drifts(out: Path) -> dict[int, float]:
    return {r["step"]: r["value"] for r in drift.load(out).table.to_pylist()
            if r["metric"] == "drift/l2" and r["layer"] is None and not r["module"]}


def test_in_a_trainer(tmp_path: Path) -> None:
    callback = drift.DriftCallback(every=2, probes=[drift.DivergenceProbe("held-out", [zoo.batch(vocabulary=32, seed=9)])])
    t = trainer(tmp_path, callback)
    t.train()
    measured = drifts(tmp_path)
    assert sorted(measured) == [0, 2, 4, 6] and measured[0] == 0
    expected = sum((a - b).double().square().sum() for a, b in
                   zip(t.model.cpu().parameters(), zoo.llama().parameters(), strict=True)).sqrt().item()
    assert measured[6] == pytest.approx(expected, rel=1e-6)
    logged = [e for e in t.state.log_history if "loss" in e]
    assert [e["drift/l2"] for e in logged] == [measured[s] for s in (2, 4, 6)]
    assert all(e["kl/base_model/held-out"] > 0 for e in logged)


def test_a_resumed_training_goes_on_in_the_same_table(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, drift.DriftCallback()).train()
    reference = drift.Reference.snapshot(zoo.llama())
    trainer(parts, drift.DriftCallback(reference=reference), max_steps=4).train()
    trainer(parts, drift.DriftCallback(reference=reference)).train(resume_from_checkpoint=str(parts / "checkpoint-3"))
    assert sorted(drifts(parts)) == list(range(7))
    for step, value in drifts(whole).items():
        assert drifts(parts)[step] == pytest.approx(value, rel=1e-6)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    with_callback, without = trainer(tmp_path / "a", drift.DriftCallback()), trainer(tmp_path / "b")
    with_callback.train()
    without.train()
    for a, b in zip(with_callback.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_in_trl(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "x" * i}]}
                              for i in range(1, 9)])
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True))
    t = SFTTrainer(model=model, train_dataset=rows, processing_class=tokenizer(), callbacks=[drift.DriftCallback(every=3)],
                   args=SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=128, **COMMON))
    t.train()
    assert sorted(drifts(tmp_path)) == [0, 3, 6] and drifts(tmp_path)[6] > drifts(tmp_path)[3] > 0
