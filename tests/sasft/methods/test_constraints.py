"""What is trained, how fast, and what is kept of it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods import Costs, Workshop, method
from sasft.mixing import SELF, TASK
from tests.sasft import tiny_chat
from tests.sasft.methods import cases


def twelve(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2,
                                        num_key_value_heads=1, tie_word_embeddings=tied))


def frozen(model) -> set[str]:
    return {n for n, p in model.named_parameters() if not p.requires_grad}


# --- freezing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, indices", [("0-1", {0, 1}), ("1", {1}), ("0-5,11", {0, 1, 2, 3, 4, 5, 11})])
def test_layers_are_frozen_by_number_and_not_by_parts_of_names(layers: str, indices: set[int]) -> None:
    model = method("freeze", layers=layers).prepare(twelve())
    assert {int(n.split(".")[2]) for n in frozen(model)} == indices
    assert all(not p.requires_grad for i in indices for p in model.model.layers[i].parameters())


def test_parameters_are_frozen_by_whole_name_or_pattern(capsys: pytest.CaptureFixture) -> None:
    assert frozen(method("freeze", parameters="model.norm.weight").prepare(twelve())) == {"model.norm.weight"}
    assert "frozen: 1 of 111 parameters" in capsys.readouterr().err
    assert frozen(method("freeze", parameters="*.mlp.up_proj.weight, lm_head.*").prepare(twelve())) == {
        "lm_head.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(12))}
    assert frozen(method("freeze", embeddings=True).prepare(twelve())) == {"model.embed_tokens.weight"}
    assert not method("freeze", embeddings=True).prepare(twelve(tied=True)).lm_head.weight.requires_grad  # one tensor


@pytest.mark.parametrize("options, message", [
    ({"layers": "12"}, "layers names 12, but the model's layers are 0 to 11"),
    ({"parameters": "norm.weight"}, "the pattern 'norm.weight' in parameters matches none of the model's 111 parameters, such as model.embed"),
    ({"layers": "0", "parameters": "model.layer.*"}, "the pattern 'model.layer.*' in parameters matches none"),
    ({"parameters": "*"}, "nothing would be left to train"),
])
def test_what_matches_nothing_or_everything_is_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        method("freeze", **options).prepare(twelve())


def test_adapters_are_frozen_with_their_layer(tmp_path: Path) -> None:
    model = method("freeze", layers="0").prepare(cases.tiny(tmp_path, lora=True))
    assert {n.split("layers.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"1"}
    with pytest.raises(UsageError, match="none of what is to be frozen would be trained anyway"):
        method("freeze", embeddings=True).prepare(cases.tiny(tmp_path / "again", lora=True))


def test_what_is_frozen_stays_to_the_bit_under_weight_decay(tmp_path: Path) -> None:
    model = cases.tiny()
    before = cases.weights(model)
    cases.run(method("freeze", layers="0", embeddings=True), model, tmp_path, steps=10, weight_decay=0.1)
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert same == {n for n in before if ".layers.0." in n or "embed_tokens" in n}


# --- adapters, rates, interpolation -------------------------------------------------------------------------------


def test_lora_begins_as_the_base_and_keeps_its_rank(tmp_path: Path) -> None:
    base = cases.tiny()
    ids = torch.tensor([cases.rows()[TASK][0].input_ids])
    model = method("lora", r=2, alpha=4.0).prepare(cases.tiny(), seed=3)
    assert torch.equal(model(ids).logits, base(ids).logits)
    again = method("lora", r=2, alpha=4.0).prepare(cases.tiny(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    trained = cases.run(method("lora", r=2, alpha=4.0), cases.tiny(), tmp_path)
    unmerged = trained(ids).logits
    merged = trained.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, unmerged, rtol=1e-4, atol=1e-5)
    for name, p in base.named_parameters():
        moved = (merged.get_parameter(name) - p).detach().double()
        if ".layers." in name and p.dim() == 2:
            assert moved.any() and torch.linalg.svdvals(moved)[2:].max() < 1e-6
        else:
            assert not moved.any()
    with pytest.raises(UsageError, match="the model has adapters already"):
        method("lora").prepare(model)


def test_a_low_rate_is_the_rate_times_a_factor(tmp_path: Path) -> None:
    low = cases.run(method("low-lr", factor=0.3), cases.tiny(), tmp_path / "a", lr=1e-2)
    plain = cases.run(method("sft"), cases.tiny(), tmp_path / "b", lr=0.3 * 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(low.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_wise_ft_lies_between_base_and_fine_tuned(alpha: float, tmp_path: Path) -> None:
    base, tuned = cases.tiny(), cases.run(method("sft"), cases.tiny(), tmp_path / "a")
    between = cases.run(method("wise-ft", alpha=alpha), cases.tiny(), tmp_path / "b")
    for start, end, p in zip(base.parameters(), tuned.parameters(), between.parameters(), strict=True):
        torch.testing.assert_close(p, (1 - alpha) * start + alpha * end, rtol=1e-6, atol=1e-7)
    if alpha == 0:
        ids = torch.tensor([cases.rows()[TASK][0].input_ids])
        assert torch.equal(between(ids).logits, base(ids).logits)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_wise_ft_scales_the_product_of_adapters(alpha: float, tmp_path: Path) -> None:
    base = cases.tiny()
    tuned = cases.run(method("lora", r=2), cases.tiny(), tmp_path / "a").merge_and_unload()
    between = cases.run(method("wise-ft", alpha=alpha), method("lora", r=2).prepare(cases.tiny()), tmp_path / "b")
    ids = torch.tensor([cases.rows()[TASK][0].input_ids])
    if alpha == 0:
        assert torch.equal(between(ids).logits, base(ids).logits)
    between = between.merge_and_unload()
    for (name, p), end in zip(between.named_parameters(), tuned.parameters(), strict=True):
        start = base.get_parameter(name)
        torch.testing.assert_close(p, start + alpha * (end - start), rtol=1e-4, atol=1e-7)


def test_adapters_that_have_an_effect_already_are_not_interpolated(tmp_path: Path) -> None:
    model = cases.wander(cases.tiny(tmp_path, lora=True))
    with pytest.raises(UsageError, match="wise-ft interpolates adapters that start at B = 0, but that of model.layers.0"):
        method("wise-ft").objective(model, cases.rows(), 0, Costs())


# --- self rows ----------------------------------------------------------------------------------------------------


def self_rows(**sampler) -> dict[str, list[Row]]:
    meta = {"sampler": {"max_new_tokens": 9, **sampler}} if sampler else {}
    return {TASK: [], SELF: [Row("self-1", "self", ({"role": "user", "content": "Why?"},), "well", meta=meta)]}


def test_self_rows_come_from_the_sampler_asked_for(tmp_path: Path) -> None:
    workshop = Workshop(chat=tiny_chat.chat(), folder=tmp_path)
    exact, paper = self_rows(temperature=1.0, top_p=1.0), self_rows(temperature=0.7, top_p=0.9)
    assert method("sa-sft", sampler="exact").rows(exact, workshop) == exact
    assert method("sa-sft", sampler="paper").rows(paper, workshop) == paper
    assert method("sa-sft").rows(self_rows(), workshop) == self_rows()
    with pytest.raises(UsageError, match="self row self-1 was sampled with .*0.7.* and sampler=exact needs temperature 1.0 and top_p 1.0"):
        method("sa-sft", sampler="exact").rows(paper, workshop)
    with pytest.raises(UsageError, match="a sampler that it does not name"):
        method("sa-sft", sampler="paper").rows(self_rows(), workshop)
    with pytest.raises(UsageError, match="sa-sft mixes in self rows, but there are none"):
        method("sa-sft").rows({TASK: [], SELF: []}, workshop)
