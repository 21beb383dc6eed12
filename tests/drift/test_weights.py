"""Parameter drift against brute force in float64, and references that restore to the bit."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import drift
from drift.names import canonical_name, layer_index, parameters, tied
from drift.weights import inner, squared_distance, squared_norm
from tests.drift import zoo


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 65536, 65536 * 3 + 17])
def test_inner_products_equal_float64_sums(dtype, n):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    assert inner(x, y).item() == pytest.approx((x.double() * y.double()).sum().item(), abs=1e-6 * n**0.5)
    assert squared_norm(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)
    assert squared_distance(x, y).item() == pytest.approx((x.double() - y.double()).square().sum().item(), rel=1e-6)


def test_the_norm_of_many_numbers_keeps_its_digits():
    x = torch.full((20_000_000,), 0.1)
    exact = 20_000_000 * float(x[0].double()) ** 2
    assert squared_norm(x).item() == pytest.approx(exact, rel=1e-6)


def test_bfloat16_differences_are_widened_first():
    base = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    moved = base + torch.tensor(2**-7, dtype=torch.bfloat16)
    assert squared_distance(moved, base).item() == 4096 * 2.0**-14


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        inner(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("kind", zoo.ZOO, ids=lambda k: k.__name__)
def test_drift_of_every_parameter_equals_brute_force(kind):
    model = zoo.make(kind)
    reference = drift.Reference.snapshot(model)
    assert all(p.l2 == 0 for p in drift.parameter_drift(model, reference))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    found = {p.name: p for p in drift.parameter_drift(model, reference)}
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].l2 == pytest.approx((parameter - before[name]).norm().item(), rel=1e-12)
        norm = before[name].norm().item()
        assert found[name].rel == pytest.approx(found[name].l2 / norm, rel=1e-12) if norm else math.isnan(found[name].rel)


def test_lora_drift_is_that_of_the_materialised_weight():
    model = zoo.llama()
    before = {canonical_name(n): p.detach().clone() for n, p in model.named_parameters()}
    wrapped = zoo.lora(model, nonzero=False)
    reference = drift.Reference.snapshot(wrapped)
    assert all(p.l2 == 0 for p in drift.parameter_drift(wrapped, reference))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    found = {p.name: p for p in drift.parameter_drift(wrapped, reference)}
    merged = {canonical_name(n): p for n, p in wrapped.merge_and_unload().named_parameters()}
    adapted = [n for n in before if "q_proj" in n or "down_proj" in n]
    assert sorted(found) == sorted(adapted)
    for name in adapted:
        assert found[name].l2 == pytest.approx((merged[name] - before[name]).norm().item(), rel=1e-5)


def test_lora_drift_from_a_start_that_is_not_zero():
    wrapped = zoo.lora(zoo.llama(), nonzero=True)
    reference = drift.Reference.snapshot(wrapped)
    assert all(p.l2 == pytest.approx(0, abs=1e-7) for p in drift.parameter_drift(wrapped, reference))


def test_a_reference_from_files_agrees_with_a_snapshot(tmp_path):
    model = zoo.make(zoo.Tied)
    file = tmp_path / "model.safetensors"
    save_file({n: p.detach() for n, p in model.named_parameters()}, file)
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    stored = {p.name: p.l2 for p in drift.parameter_drift(model, drift.Reference.from_safetensors(file))}
    assert stored["embed.weight"] == pytest.approx((zoo.V * zoo.D) ** 0.5)
    assert stored["body.0.weight"] == 0
    assert drift.Reference.from_safetensors(tmp_path).names() == set(parameters(model))
    with pytest.raises(FileNotFoundError, match="holds none"):
        drift.Reference.from_safetensors(tmp_path / "nothing")


def test_swapping_restores_every_bit_also_after_an_error():
    for model in (zoo.llama(), zoo.lora(zoo.llama(), nonzero=False)):
        reference = drift.Reference.snapshot(model)
        ids = {"input_ids": torch.arange(8).unsqueeze(0)}
        at_start = model(**ids).logits
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        moved = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(KeyError), reference.swapped_into(model):
            assert torch.equal(model(**ids).logits, at_start)
            raise KeyError
        assert all(torch.equal(p, moved[n]) for n, p in model.named_parameters())


def test_a_base_checkpoint_serves_a_lora_model_by_switching_its_adapters_off(tmp_path):
    model = zoo.llama()
    ids = {"input_ids": torch.arange(8).unsqueeze(0)}
    at_start = model(**ids).logits
    model.save_pretrained(tmp_path)
    wrapped = zoo.lora(model)
    assert not torch.equal(wrapped(**ids).logits, at_start)
    with drift.Reference.from_safetensors(tmp_path).swapped_into(wrapped):
        assert torch.equal(wrapped(**ids).logits, at_start)


def test_a_reference_of_another_model_is_refused_by_name():
    reference = drift.Reference.snapshot(zoo.make(zoo.Base))
    with pytest.raises(ValueError, match=r"lacks 4 of the model's 8.*body\.0\.bias|lacks .* of the model's"):
        reference.check(zoo.make(zoo.Norms))
    other = zoo.make(zoo.Base)
    other.head = nn.Linear(zoo.D, zoo.V + 1, bias=False).double()
    with pytest.raises(ValueError, match=r"head.weight is \(14, 6\), reference \(13, 6\)"):
        reference.check(other)


def test_nothing_trainable_is_an_error():
    model = zoo.make(zoo.Base).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        drift.parameter_drift(model, drift.Reference.snapshot(model))


def test_names_are_those_of_the_unwrapped_model():
    assert canonical_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight") == "model.layers.0.q_proj.lora_A.default.weight"
    assert canonical_name("module._orig_mod.layers.1._checkpoint_wrapped_module.weight") == "_orig_mod.layers.1.weight".removeprefix("_orig_mod.")
    assert layer_index("transformer.h.3.attn.c_attn.weight") == 3
    assert tied(zoo.make(zoo.Tied)) == {"head.weight": "embed.weight"}
    assert list(parameters(torch.compile(zoo.make(zoo.Base), backend="eager"))) == list(parameters(zoo.make(zoo.Base)))
