"""LoRA norms and spectra from factors, against the materialised product and PEFT's own."""

import pytest
import torch

from drift.lowrank import adapted_weights, lora_norm, lora_spectrum
from tests.drift import zoo


@pytest.mark.parametrize("shape", [(5, 7, 2), (7, 5, 3), (3, 4, 6), (1, 9, 1)])
@pytest.mark.parametrize("start", [False, True])
def test_norm_and_spectrum_equal_the_product(shape, start):
    m, n, r = shape
    torch.manual_seed(0)
    a, b = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    a0, b0 = (torch.randn(r + 1, n).double(), torch.randn(m, r + 1).double()) if start else (None, None)
    product = 0.7 * (b @ a - (b0 @ a0 if start else 0))
    assert lora_norm(a, b, 0.7, a0, b0).item() == pytest.approx(product.norm().item(), rel=1e-12)
    values = torch.linalg.svdvals(product)
    spectrum = lora_spectrum(a, b, 0.7, a0, b0)
    torch.testing.assert_close(spectrum[: len(values)], values[: len(spectrum)], rtol=1e-10, atol=1e-12)
    assert spectrum[len(values) :].abs().max().item() < 1e-12 if len(spectrum) > len(values) else True


def test_a_difference_that_cancels_does_not_lose_its_digits():
    torch.manual_seed(0)
    a, b = torch.randn(4, 50).double(), torch.randn(60, 4).double()
    step = 1e-9 * torch.randn(60, 4).double()
    assert lora_norm(a, b + step, a0=a, b0=b).item() == pytest.approx((step @ a).norm().item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens"]}])
def test_factors_give_pefts_own_delta_weight(settings):
    model = zoo.lora(zoo.llama(tied=False), **settings)
    found = dict(adapted_weights(model))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    assert len(found) == len(layers) > 0
    for path, layer in layers.items():
        name = path.removeprefix("base_model.model.") + ".weight"
        delta = layer.get_delta_weight("default")
        assert lora_norm(found[name].a, found[name].b).item() == pytest.approx(delta.norm().item(), rel=1e-5)


def test_two_active_adapters_stand_as_their_sum():
    from peft import LoraConfig

    model = zoo.lora(zoo.llama())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_()
    model.base_model.set_adapter(["default", "second"])
    for name, factors in adapted_weights(model):
        layer = model.get_submodule("base_model.model." + name.removesuffix(".weight"))
        both = layer.get_delta_weight("default") + layer.get_delta_weight("second")
        assert lora_norm(factors.a, factors.b).item() == pytest.approx(both.norm().item(), rel=1e-5)


def test_what_two_factors_do_not_describe_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"layers\.0.*q_proj uses DoRA"):
        list(adapted_weights(zoo.lora(zoo.llama(), use_dora=True)))
    merged = zoo.lora(zoo.llama())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="are merged into its weight"):
        list(adapted_weights(merged))
    with pytest.raises(ValueError, match="must share r"):
        lora_norm(torch.zeros(2, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="both a0 and b0"):
        lora_norm(torch.zeros(2, 3), torch.zeros(4, 2), a0=torch.zeros(2, 3))
