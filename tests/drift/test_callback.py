"""The callback in transformers' Trainer and in TRL's SFTTrainer, unchanged."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
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


class Reporter(TrainerCallback):
    """As W&B's and TensorBoard's: asked before the callbacks that a Trainer is given."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logged.append(dict(logs))


@pytest.mark.parametrize("given", [True, False])
def test_in_front_of_the_reporters_its_figures_reach_them(tmp_path: Path, given: bool) -> None:
    reporter, callback = Reporter(), drift.DriftCallback(every=2)
    t = trainer(tmp_path, reporter, *[callback] * given)
    assert callback.add_to(t) is callback
    t.train()
    measured = drifts(tmp_path)
    assert [e["drift/l2"] for e in reporter.logged if "loss" in e] == [measured[s] for s in (2, 4, 6)]


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


class Sourced:
    """A collator that adds whose each row is: even rows the task's."""

    def __init__(self, collate=None) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict:
        own = [row.pop("source") for row in rows]
        batch = self.collate(rows) if self.collate else {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        return {**batch, "source": torch.tensor(own)}


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_of_sources_in_a_trainer(tmp_path: Path, passes: int) -> None:
    """The products are those of a plain loop over the same batches, and the training is what it was."""
    batch = zoo.batch(rows=8, vocabulary=32)
    rows = Dataset.from_dict({**{k: v.tolist() for k, v in batch.items()}, "source": [0, 1] * 4}).with_format("torch")

    def made(out: Path, model, *callbacks, **columns) -> Trainer:
        return Trainer(model=model, train_dataset=rows.remove_columns([c for c in ["source"] if not callbacks]), callbacks=list(callbacks),
                       data_collator=Sourced() if callbacks else None,
                       args=TrainingArguments(str(out), **{**COMMON, "max_steps": 2, "per_device_train_batch_size": 8 // passes, "logging_steps": 1},
                                              gradient_accumulation_steps=passes, remove_unused_columns=not callbacks))

    model = zoo.llama()
    sources = drift.SourceGradients(model, ["task", "self"], key="source", folds=1, accumulate=passes > 1)
    watched, plain = made(tmp_path / "a", model, drift.DriftCallback(probes=[sources])), made(tmp_path / "b", zoo.llama())
    watched.train(), plain.train()
    for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    recording = drift.load(tmp_path / "a")
    assert recording.meta["coverage"]["sources"]["covered"] == 1.0
    start = zoo.llama().train()
    loss = torch.nn.functional.cross_entropy(start(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    counted = (batch["labels"][:, 1:] != -100).sum()
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss.view(8, -1)[s::2].sum() / counted, list(start.parameters()), retain_graph=True)])
                 for s in (0, 1)]
    measured = recording.series("align/raw_inner", source="task|self")
    assert list(measured.steps) == [1, 2]
    assert measured.values[0] == pytest.approx(float(gradients[0].double() @ gradients[1].double()), rel=1e-3)


def test_a_training_that_crashes_leaves_a_model_that_can_be_released(tmp_path: Path) -> None:
    model = zoo.llama()
    batch = zoo.batch(rows=8, vocabulary=32)
    sources = drift.SourceGradients(model, ["task", "self"], key="source")

    def broken(rows: list[dict]) -> dict:
        raise OSError("the data are gone")

    rows = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    t = Trainer(model=model, train_dataset=rows, data_collator=broken, callbacks=[drift.DriftCallback(probes=[sources])],
                args=TrainingArguments(str(tmp_path), **COMMON))
    with pytest.raises(OSError, match="the data are gone"):
        t.train()
    again = drift.SourceGradients(model, ["task", "self"])
    with pytest.raises(RuntimeError, match=r"attached to this model already.*drift\.release"):
        again.__enter__()
    drift.release(model)
    with again:
        again.tag([0, 1] * 4)
        model(**batch).loss.backward()
        assert again.step().coverage == 1.0
    assert not model._forward_pre_hooks


def test_in_trl(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "x" * i}], "source": i % 2}
                              for i in range(1, 9)])
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True))
    sources = drift.SourceGradients(model, ["task", "self"], key="source")
    t = SFTTrainer(model=model, train_dataset=rows, processing_class=tokenizer(), callbacks=[drift.DriftCallback(every=3, probes=[sources])],
                   args=SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=128, remove_unused_columns=False, **COMMON))
    t.data_collator = Sourced(t.data_collator)
    t.train()
    assert sorted(drifts(tmp_path)) == [0, 3, 6] and drifts(tmp_path)[6] > drifts(tmp_path)[3] > 0
    recording = drift.load(tmp_path)
    assert list(recording.series("align/raw_cos", source="task|self").steps) == [3, 6]
    coverage = recording.meta["coverage"]["sources"]  # TRL's fused head computes the head's gradient in a function of its own
    assert list(coverage["missing"]) == ["model.embed_tokens.weight"] and "fused" in coverage["missing"]["model.embed_tokens.weight"]
    numel = {n: p.numel() for n, p in drift.names.parameters(model).items()}
    assert coverage["covered"] == pytest.approx(1 - numel["model.embed_tokens.weight"] / sum(numel.values()))
