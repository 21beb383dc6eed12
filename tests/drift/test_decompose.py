"""Sketches keep inner products; effects, subspaces and shares against populations where they are known."""

import math

import numpy as np
import pytest
import torch

import drift
from drift.decompose import decompose, explained_share, leading_subspace, shared_directions
from drift.groups import Split
from drift.names import parameters
from drift.sketch import Sketch, _Projections
from drift.uses import Dense
from tests.drift import families, zoo


def row_gradients(model, batch) -> dict[str, torch.Tensor]:
    found = {n: [] for n in parameters(model)}
    for row in range(len(batch["labels"])):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        loss = drift.forward.summed_nll(model, one, drift.forward.logits_of)
        for name, g in zip(found, torch.autograd.grad(loss, list(parameters(model).values()), allow_unused=True), strict=True):
            found[name].append(torch.zeros_like(parameters(model)[name]) if g is None else g)
    return {n: torch.stack(g) for n, g in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sketches_are_projections_of_the_rows_gradients(family: str) -> None:
    model, batch = families.make(family).eval(), zoo.batch(rows=3, vocabulary=families.V)
    sketch = Sketch(3, 4, seed=5)
    found = sketch.gradients(model, batch)
    assert not found.missing and set(found.columns) == set(parameters(model))
    for name, g in row_gradients(model, batch).items():
        expected = np.stack([sketch.project(name, x).flatten().numpy() for x in g])
        np.testing.assert_allclose(found.of(module=name), expected, rtol=1e-5, atol=1e-8 * np.abs(expected).max() + 1e-12, err_msg=name)


def test_bfloat16_gradients_are_projected_in_float32() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(6, 9).to(torch.bfloat16), torch.randn(6, 11).to(torch.bfloat16)
    sketch, split = Sketch(3, 5), Split(None, (0, 2, 6))
    found = _Projections(sketch, {"w": torch.Size((9, 11))})._projected("w", Dense(left, right, split))
    for part, (low, high) in zip(found, ((0, 2), (2, 6)), strict=True):
        torch.testing.assert_close(part.double(), sketch.project("w", left[low:high].double().T @ right[low:high].double()), rtol=1e-5, atol=1e-5)


def test_a_sketch_longer_than_the_sides_is_exact() -> None:
    model, batch = zoo.llama(), zoo.batch(vocabulary=32)
    found = Sketch(10_000, 10_000).gradients(model, batch)
    np.testing.assert_allclose(found.values @ found.values.T, drift.gradient_gram(model, batch).total(), rtol=1e-4)
    np.testing.assert_allclose(found.of(layer=1) @ found.of(layer=1).T, drift.gradient_gram(model, batch).by_layer()[1], rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 5])
def test_products_of_sketches_are_unbiased_within_the_stated_error(rank: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, rank).double() @ torch.randn(rank, 50).double()
    y = x + 0.5 * torch.randn(40, 50).double()
    products = []
    for seed in range(800):
        sketch = Sketch(8, 12, seed=seed)
        products.append(float((sketch.project("w", x) * sketch.project("w", y)).sum()))
    scale = float(x.norm() * y.norm())
    spread = np.std(products)
    assert abs(np.mean(products) - float((x * y).sum())) < 4 * spread / math.sqrt(800)
    assert spread < 1.05 * Sketch(8, 12).error() * scale
    if rank == 1:
        assert spread > 0.6 * Sketch(8, 12).error() * scale, "the bound is nearly reached"


def test_the_sketch_of_a_drift_compares_with_those_of_gradients() -> None:
    model = zoo.llama()
    before = {n: p.detach().clone() for n, p in parameters(model).items()}
    reference = drift.Reference.snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    sketch = Sketch(4, 4)
    found = sketch.change(model, reference)
    for name, p in parameters(model).items():
        np.testing.assert_allclose(found.of(module=name)[0], sketch.project(name, p.detach().double() - before[name].double()).flatten(), rtol=1e-6)
    wrapped = zoo.lora(zoo.llama())
    base = drift.Reference.snapshot(wrapped)
    base.adapters.clear()
    for adapter in drift.adapters.adapters(wrapped):
        formed = adapter.scaling * (adapter.b.double() @ adapter.a.double())
        np.testing.assert_allclose(sketch.change(wrapped, base).of(module=adapter.base)[0], sketch.project(adapter.base, formed).flatten(), rtol=1e-5)


def population(n: int, rng: np.random.Generator, *, style: float, content: float, noise: float = 1.0, size: int = 30):
    own = rng.normal(size=(n, size))
    s = style * (np.eye(size)[0] + noise * rng.normal(size=(n, size)) / math.sqrt(size))
    c = content * (np.eye(size)[1] + noise * rng.normal(size=(n, size)) / math.sqrt(size))
    return own, own + s, own + c, own + s + c


def test_effects_are_unbiased_and_their_errors_honest() -> None:
    rng = np.random.default_rng(0)
    found = [decompose(*population(12, rng, style=2.0, content=1.0, noise=2.0), resamples=0) for _ in range(400)]
    for name, truth in (("style", 4.0), ("content", 1.0), ("total", 5.0), ("interaction", 0.0)):
        values = np.array([getattr(d, name).norm2 for d in found])
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 20 + 1e-9), name
        if truth:
            errors = np.array([getattr(d, name).stderr for d in found])
            assert 0.9 < math.sqrt((errors**2).mean()) / values.std() < 1.35, "a jackknife is conservative for few prompts"
    coherences = np.array([d.style.coherence for d in found])
    assert coherences.mean() == pytest.approx(1 / 5, abs=0.03)  # ‖E‖² / (‖E‖² + noise² ‖E‖²)
    assert np.nanmean([d.cos for d in found]) == pytest.approx(0, abs=0.1)


def test_the_shares_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for seed in range(150):
        share = decompose(*population(24, rng, style=2.0, content=1.0), resamples=300, seed=seed).style_share
        covered.append(share.low <= 0.8 <= share.high)
        assert share.low < share.value < share.high
    assert np.mean(covered) > 0.88


def test_the_share_and_its_interval_are_those_of_sums_over_pairs() -> None:
    oo, fo, on, fn = cells = population(9, np.random.default_rng(4), style=2.0, content=1.0)
    style, total = ((fo - oo) + (fn - on)) / 2, fn - oo

    def share(kept) -> float:
        pairs = [(i, j) for i in kept for j in kept if i != j]  # a prompt drawn twice is no pair with itself
        return sum(style[i] @ total[j] for i, j in pairs) / sum(total[i] @ total[j] for i, j in pairs)

    rng = np.random.default_rng(7)
    draws = [share(rng.integers(0, 9, 9)) for _ in range(40)]
    found = decompose(*cells, resamples=40, seed=7).style_share
    np.testing.assert_allclose([found.value, found.low, found.high], [share(range(9)), *np.percentile(draws, [2.5, 97.5])], rtol=1e-9)
    none = decompose(*cells, resamples=0).style_share
    assert none.value == found.value and math.isnan(none.low) and math.isnan(none.high)


def test_cells_must_pair() -> None:
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"one shape with n >= 4, got \[\(5, 3\), \(5, 3\), \(4, 3\), \(5, 3\)\]"):
        decompose(x, x, x[:4], x)
    with pytest.raises(ValueError, match="n >= 4"):
        decompose(x[:3], x[:3], x[:3], x[:3])


def test_shared_directions_are_found_and_others_are_not() -> None:
    rng = np.random.default_rng(2)
    direction = rng.normal(size=60)

    def task(shared: float) -> np.ndarray:
        return shared * rng.normal(1, 0.2, size=(20, 1)) * direction / 8 + rng.normal(size=(20, 60)) / 4

    same = shared_directions(task(4.0), task(4.0), 2, permutations=300)
    assert same.cosines[0] > 0.9 and same.p_value == pytest.approx(1 / 301) and same.null[0] < 0.5
    p_values = [shared_directions(task(0.0), task(0.0), 2, permutations=100, seed=s).p_value for s in range(120)]
    assert 0.35 < np.mean(p_values) < 0.65 and np.mean(np.array(p_values) < 0.05) < 0.12


def test_columns_are_shuffled_within_their_blocks() -> None:
    x = np.concatenate([np.random.default_rng(0).normal(size=(10, 4)), np.zeros((10, 16))], axis=1)
    split = shared_directions(x, x, 2, permutations=50, blocks=[slice(0, 4), slice(4, 20)])
    assert split.null[0] > 0.6 > shared_directions(x, x, 2, permutations=50).null[0]


def test_the_explained_share_of_a_drift() -> None:
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(80, 3)))[0]
    vectors = rng.normal(size=(40, 3)) @ basis.T * 5 + 0.1 * rng.normal(size=(40, 80))
    inside, outside = basis @ rng.normal(size=3), rng.normal(size=80)
    outside -= basis @ (basis.T @ outside)
    change = inside / np.linalg.norm(inside) * 0.8 + outside / np.linalg.norm(outside) * 0.6
    found = explained_share(change, vectors, 3, resamples=100, permutations=200)
    assert found.share.value == pytest.approx(0.64, abs=0.03) and found.share.low < 0.64 < found.share.high + 0.03
    assert found.p_value == pytest.approx(1 / 201) and found.null == pytest.approx(3 / 80, abs=0.02)
    with pytest.raises(ValueError, match="change has 79 numbers and vectors 80 columns"):
        explained_share(change[:79], vectors)
    with pytest.raises(ValueError, match="change is 0 throughout"):
        explained_share(0 * change, vectors)
    with pytest.raises(ValueError, match="k must be at least 1 and at most 40, got 41"):
        leading_subspace(vectors, 41)


def test_numbers_that_are_none_have_no_p_value() -> None:
    rng = np.random.default_rng(0)
    x, bad = rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
    bad[3, 2] = np.nan
    asked = [lambda: decompose(x, x, bad, x), lambda: shared_directions(x, bad, 2), lambda: explained_share(bad[3], x, 2), lambda: leading_subspace(bad, 1)]
    for ask, message in zip(asked, ["own_new must be finite; 1 of 8 rows are not, the first of them row 3", "y must be finite", "change must be finite",
                                    "vectors must be finite"], strict=True):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match="vectors are 0 throughout"):
        explained_share(x[0], 0 * x, 2)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        explained_share(x[0], x, 2, permutations=0)
    with pytest.raises(ValueError, match=r"x must be \[n, K\], got \(5,\)"):
        shared_directions(x[0], x, 2)
    one = np.zeros((4, 5))
    one[0, 0] = 1.0  # many resamples hold nothing but 0
    assert explained_share(np.array([3.0, 4.0, 0, 0, 0]), one, 1, resamples=50, permutations=9).share.value == pytest.approx(0.36)


def test_gradients_and_drift_are_cut_to_what_both_have() -> None:
    model, sketch, batch = zoo.make(zoo.Frozen), Sketch(3, 3), zoo.batch()
    reference = drift.Reference.snapshot(model)
    gradients = sketch.gradients(model, batch, forward=zoo.forward)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    change = sketch.change(model, reference)
    one, other = gradients.common(change)
    assert list(one.columns.items()) == list(other.columns.items()) and one.values.shape[1] == other.values.shape[1]
    for name in one.columns:
        np.testing.assert_array_equal(one.of(module=name), gradients.of(module=name))
        np.testing.assert_array_equal(other.of(module=name), change.of(module=name))
    cut = drift.Sketches(change.values[:, change.columns["head.weight"]], {"head.weight": slice(0, 9)})
    assert list(cut.common(gradients)[1].columns) == ["head.weight"]
    with pytest.raises(ValueError, match="change has 9 numbers .*same parameters"):
        explained_share(cut.values, gradients.values, 1)
    with pytest.raises(ValueError, match="head.weight has 9 columns here and 4 there: they are by different Sketches"):
        cut.common(Sketch(2, 2).change(model, reference))
    with pytest.raises(ValueError, match="no parameter in common"):
        cut.common(drift.Sketches(cut.values, {"else": slice(0, 9)}))
