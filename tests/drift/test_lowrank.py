"""LoRA norms and spectra from factors, against the materialised product and PEFT's own."""

import pytest
import torch

from drift import lowrank
from drift.adapters import adapters
from drift.deltas import factors_of
from drift.spectra import principal_angles
from tests.drift import zoo


def stacked(model):
    """Base weight → factors of all its active adapters together."""
    found = {}
    for adapter in adapters(model):
        found.setdefault(adapter.base, []).append(adapter)
    return {name: factors_of(parts) for name, parts in found.items()}


@pytest.mark.parametrize("shape", [(5, 7, 2), (7, 5, 3), (3, 4, 6), (1, 9, 1)])
@pytest.mark.parametrize("start", [False, True])
def test_norm_and_spectrum_equal_the_product(shape, start):
    m, n, r = shape
    torch.manual_seed(0)
    a, b = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    a0, b0 = (torch.randn(r + 1, n).double(), torch.randn(m, r + 1).double()) if start else (None, None)
    product = 0.7 * (b @ a - (b0 @ a0 if start else 0))
    assert lowrank.norm(a, b, 0.7, a0, b0).item() == pytest.approx(product.norm().item(), rel=1e-12)
    values = torch.linalg.svdvals(product)
    spectrum = lowrank.spectrum(a, b, 0.7, a0, b0)
    torch.testing.assert_close(spectrum[: len(values)], values[: len(spectrum)], rtol=1e-10, atol=1e-12)
    assert spectrum[len(values) :].abs().max().item() < 1e-12 if len(spectrum) > len(values) else True


def test_a_difference_that_cancels_does_not_lose_its_digits():
    torch.manual_seed(0)
    a, b = torch.randn(4, 50).double(), torch.randn(60, 4).double()
    step = 1e-9 * torch.randn(60, 4).double()
    assert lowrank.norm(a, b + step, a0=a, b0=b).item() == pytest.approx((step @ a).norm().item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens"]}])
def test_factors_give_pefts_own_delta_weight(settings):
    model = zoo.lora(zoo.llama(tied=False), **settings)
    found = stacked(model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    assert len(found) == len(layers) > 0
    for path, layer in layers.items():
        name = path.removeprefix("base_model.model.") + ".weight"
        delta = layer.get_delta_weight("default")
        assert lowrank.norm(*found[name]).item() == pytest.approx(delta.norm().item(), rel=1e-5)


def test_two_active_adapters_stand_as_their_sum():
    from peft import LoraConfig

    model = zoo.lora(zoo.llama())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_()
    model.base_model.set_adapter(["default", "second"])
    for name, factors in stacked(model).items():
        layer = model.get_submodule("base_model.model." + name.removesuffix(".weight"))
        both = layer.get_delta_weight("default") + layer.get_delta_weight("second")
        assert lowrank.norm(*factors).item() == pytest.approx(both.norm().item(), rel=1e-5)


def test_products_directions_and_angles_equal_the_materialised_ones():
    torch.manual_seed(0)
    (a1, b1), (a2, b2) = ((torch.randn(r, 9).double(), torch.randn(7, r).double()) for r in (2, 3))
    one, two, dense = b1 @ a1, b2 @ a2, torch.randn(7, 9).double()
    assert lowrank.inner(a1, b1, a2, b2).item() == pytest.approx((one * two).sum().item(), rel=1e-12)
    assert lowrank.inner_with_dense(dense, a1, b1).item() == pytest.approx((one * dense).sum().item(), rel=1e-12)
    left, values, right = lowrank.directions(a2, b2, 3)
    torch.testing.assert_close(left @ values.diag() @ right.T, two)
    u1, u2 = (torch.linalg.svd(x)[0][:, :2] for x in (one, two))
    expected = torch.linalg.svdvals(u1.T @ u2).clamp(max=1).acos()
    torch.testing.assert_close(lowrank.angles(a1, b1, a2, b2, 2), expected, rtol=1e-9, atol=1e-9)


def test_small_angles_keep_their_digits():
    x = torch.eye(5, dtype=torch.float64)[:, :2]
    turned = x.clone()
    turned[3, 1] = 1e-9
    assert principal_angles(x, turned)[-1].item() == pytest.approx(1e-9, rel=1e-6)


def test_induced_products_equal_those_of_materialised_steps():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6).double(), torch.randn(5, 2).double()
    d_a, d_b = torch.randn(3, 2, 6).double(), torch.randn(3, 5, 2).double()
    for used_a, used_b in ((d_a, d_b), (d_a, None), (None, d_b)):
        steps = torch.stack([0.5 * ((0 if used_b is None else d_b[i] @ a) + (0 if used_a is None else b @ d_a[i])).flatten() for i in range(3)])
        torch.testing.assert_close(lowrank.induced_gram(a, b, used_a, used_b, 0.5), steps @ steps.T)
    with pytest.raises(ValueError, match="both None"):
        lowrank.induced_gram(a, b, None, None)


def test_norms_in_float32_agree_with_float64_dense_within_1e_7():
    torch.manual_seed(0)
    a, b = torch.randn(16, 512), torch.randn(768, 16)
    assert lowrank.norm(a, b).item() == pytest.approx((b.double() @ a.double()).norm().item(), rel=1e-7)


def test_wrong_factors_are_refused():
    merged = zoo.lora(zoo.llama())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="are merged into its weight"):
        list(adapters(merged))
    with pytest.raises(ValueError, match="must share r"):
        lowrank.norm(torch.zeros(2, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="both a0 and b0"):
        lowrank.norm(torch.zeros(2, 3), torch.zeros(4, 2), a0=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one shape, got"):
        lowrank.inner(torch.zeros(1, 3), torch.zeros(4, 1), torch.zeros(1, 3), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="at most the rank 1, got 2"):
        lowrank.directions(torch.zeros(1, 3), torch.zeros(4, 1), 2)
