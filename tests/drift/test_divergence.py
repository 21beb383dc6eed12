"""KL, entropy and NLL against float64 sums written out, and the facts that tie them to the weights."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import drift
from drift.divergence import METRICS, Projected, token_divergences
from drift.divergence_probe import DivergenceProbe, store_base
from drift.forward import logits_of
from tests.drift import families, zoo


def brute(base: Tensor, model: Tensor, target: int) -> dict[str, float]:
    """Every divergence at one position by plain Python sums."""
    def log_probs(logits: Tensor) -> list[float]:
        values = logits.double().tolist()
        top = max(values)
        normaliser = top + math.log(sum(math.exp(v - top) for v in values))
        return [v - normaliser for v in values]

    p, q = log_probs(base), log_probs(model)
    return {
        "kl_base_model": sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)),
        "kl_model_base": sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True)),
        "entropy_base": -sum(math.exp(a) * a for a in p), "entropy_model": -sum(math.exp(b) * b for b in q),
        "nll_base": -p[target], "nll_model": -q[target]}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_every_divergence_is_the_sum_over_the_vocabulary(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    base, model = (3 * torch.randn(600, 11)).to(dtype), (3 * torch.randn(600, 11)).to(dtype)
    targets = torch.randint(0, 11, (600,))
    measured = token_divergences(base, model, targets)  # more rows than one chunk
    for row in (0, 255, 256, 599):
        for name, value in brute(base[row], model[row], int(targets[row])).items():
            assert getattr(measured, name)[row].item() == pytest.approx(value, abs=tolerance), name


def test_equal_predictions_have_no_divergence_and_no_negative_one() -> None:
    logits = torch.randn(50, 1000)
    same = token_divergences(logits, logits.clone(), torch.zeros(50, dtype=torch.long))
    assert torch.equal(same.kl_base_model, torch.zeros(50)) and torch.equal(same.kl_model_base, torch.zeros(50))
    near = token_divergences(logits, logits + 1e-7 * torch.randn_like(logits), torch.zeros(50, dtype=torch.long))
    assert (near.kl_base_model >= 0).all() and (near.kl_model_base >= 0).all()


def test_an_excluded_token_costs_nothing_where_it_has_no_weight_and_everything_where_it_has() -> None:
    whole, cut = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -math.inf]])
    d = token_divergences(whole, cut, torch.tensor([0]))
    assert d.kl_base_model.item() == math.inf
    assert d.kl_model_base.item() == pytest.approx(math.log(3 / 2))
    assert d.entropy_model.item() == pytest.approx(math.log(2))
    rare = torch.tensor([[0.0, 0.0, -80.0]])  # however little weight it has
    assert token_divergences(rare, cut, torch.tensor([0])).kl_base_model.item() == math.inf


@pytest.mark.parametrize("base, model, targets", [((3, 4), (3, 5), 3), ((3, 4), (3, 4), 2), ((2, 3, 4), (2, 3, 4), 2)])
def test_shapes_that_do_not_fit_are_named(base, model, targets) -> None:
    with pytest.raises(ValueError, match=r"base and model must be \[N, V\] and targets \[N\], got"):
        token_divergences(torch.zeros(base), torch.zeros(model), torch.zeros(targets, dtype=torch.long))


def probe_on(model, batches) -> DivergenceProbe:
    probe = DivergenceProbe("p", batches)
    probe.prepare(model, drift.Reference.snapshot(model))
    return probe


def test_at_the_base_the_divergence_is_nought_and_the_weights_are_left_alone() -> None:
    model = zoo.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = probe_on(model, [zoo.batch(vocabulary=32)]).per_row(model)
    assert rows.kl_base_model.abs().max() == 0 and torch.equal(rows.nll_base, rows.nll_model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_base_is_the_reference_even_when_the_model_has_moved() -> None:
    model = zoo.llama().double()
    reference = drift.Reference.snapshot(model)
    early = probe_on(model, [zoo.batch(vocabulary=32)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    late = DivergenceProbe("late", [zoo.batch(vocabulary=32)])
    late.prepare(model, reference)
    assert torch.equal(early.per_row(model).kl_base_model, late.per_row(model).kl_base_model)
    assert late.per_row(model).kl_base_model.sum() > 0


def test_rows_sum_their_own_tokens() -> None:
    model = zoo.llama().double()
    batch = zoo.batch(vocabulary=32)
    rows = probe_on(model, [batch]).per_row(model)
    log_p = torch.log_softmax(logits_of(model, batch), -1)
    for i in range(5):
        positions = [t for t in range(1, 7) if batch["labels"][i, t] != -100]
        assert rows.tokens[i] == len(positions)
        expected = -sum(log_p[i, t - 1, batch["labels"][i, t]].item() for t in positions)
        assert rows.nll_model[i].item() == pytest.approx(expected, abs=1e-9)


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padding moved to the left."""
    moved = {k: v.clone() for k, v in batch.items()}
    for i, keep in enumerate(batch["attention_mask"].sum(1).tolist()):
        for k, v in batch.items():
            moved[k][i] = v[i].roll(v.shape[1] - keep)
    return moved


def test_neither_padding_side_nor_batch_size_matters() -> None:
    model = zoo.llama()  # float32: transformers' eager attention makes nan of left padding in float64
    batch = zoo.batch(vocabulary=32)
    forms = [[batch], [left_padded(batch)], [{k: v[i : i + 1] for k, v in batch.items()} for i in range(5)]]
    probes = [probe_on(model, form) for form in forms]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    first, *others = (probe.per_row(model).kl_base_model for probe in probes)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-7)


def test_a_prediction_that_is_not_a_number_is_not_hidden() -> None:
    broken = torch.tensor([[0.0, math.nan]])
    d = token_divergences(torch.zeros(1, 2), broken, torch.tensor([0]))
    assert math.isnan(d.kl_base_model) and math.isnan(d.kl_model_base) and math.isnan(d.entropy_model)


def test_the_mean_is_per_token_with_an_error_clustered_by_row() -> None:
    n, s = torch.tensor([2, 4]), torch.tensor([1.0, 5.0])
    rows = drift.RowDivergences(*[s] * 6, n)
    value, error = rows.mean("nll_model")
    assert value == 1.0
    assert error == pytest.approx(math.sqrt(2 / 1 * (1 + 1)) / 6)


def test_the_clustered_error_is_the_spread_of_the_mean() -> None:
    """Over repeats of rows with dependent tokens, the reported error matches the scatter of the means."""
    torch.manual_seed(0)
    values, errors = [], []
    for _ in range(2000):
        tokens = torch.randint(5, 20, (40,))
        sums = tokens * torch.randn(40)  # all tokens of a row alike
        value, error = drift.RowDivergences(*[sums] * 6, tokens).mean("nll_model")
        values.append(value)
        errors.append(error)
    assert sum(errors) / len(errors) == pytest.approx(torch.tensor(values).std().item(), rel=0.06)


def test_kl_is_the_fisher_form_of_small_drift() -> None:
    """KL(p0 ‖ pθ) = ½ δᵀFδ + O(‖δ‖³): halving δ divides what is left over by about 8 (docs/theory.md, F4)."""
    model, batch = zoo.make(zoo.Norms), zoo.batch()
    probe = DivergenceProbe("p", [batch], forward=zoo.forward)
    probe.prepare(model, drift.Reference.snapshot(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    torch.manual_seed(3)
    direction = [torch.randn_like(p) for p in parameters]

    def counted(x: Tensor) -> Tensor:
        return x[:, :-1][batch["labels"][:, 1:] != -100]

    # Fδ·δ = Σ_positions Var_{v ~ p0}(⟨∇ log p(v), δ⟩): exact, from the logits' directional derivative.
    def logits_at(scale: float) -> Tensor:
        with torch.no_grad():
            for p, s, d in zip(parameters, start, direction, strict=True):
                p.copy_(s + scale * d)
            return counted(zoo.forward(model, batch))

    h = 1e-5
    slope = (logits_at(h) - logits_at(-h)) / (2 * h)
    p0 = torch.softmax(logits_at(0.0), -1)
    curvature = ((p0 * slope.square()).sum(-1) - (p0 * slope).sum(-1).square()).sum().item()

    def leftover(scale: float) -> float:
        logits_at(scale)
        return abs(probe.per_row(model).kl_base_model.sum().item() - 0.5 * scale**2 * curvature)

    assert leftover(2e-3) < 0.05 * 0.5 * 4e-6 * curvature
    assert 6 < leftover(2e-3) / leftover(1e-3) < 10


def test_a_probe_without_positions_or_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="probe 'p': batches is empty"):
        DivergenceProbe("p", [])
    hidden = zoo.batch() | {"labels": torch.full((5, 7), -100)}
    with pytest.raises(ValueError, match="probe 'p', batch 0: no label differs from -100"):
        DivergenceProbe("p", [hidden])
    with pytest.raises(RuntimeError, match="probe 'p' is not prepared; call prepare"):
        DivergenceProbe("p", [zoo.batch()]).per_row(zoo.llama())


def test_measuring_leaves_modes_and_random_state_alone() -> None:
    model = zoo.make(zoo.Dropout)
    model.train()
    model.body[1].eval()
    probe = DivergenceProbe("p", [zoo.batch()], forward=zoo.forward)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe.prepare(model, drift.Reference.snapshot(model))
    assert probe.per_row(model).kl_base_model.max() == 0  # dropout is off, or it would not be
    assert torch.equal(torch.rand(3), expected)
    assert model.training and model.body[2].training and not model.body[1].training


@pytest.mark.parametrize("size, tolerance", [(1.0, 1e-4), (1e-2, 1e-3), (1e-3, 1e-2)])
def test_a_small_kl_keeps_its_digits_in_float32(size: float, tolerance: float) -> None:
    torch.manual_seed(0)
    base = 3 * torch.randn(8, 49_152)
    model = base + size * torch.randn_like(base)
    targets = torch.zeros(8, dtype=torch.long)
    measured, exact = token_divergences(base, model, targets), token_divergences(base.double(), model.double(), targets)
    for name in ("kl_base_model", "kl_model_base"):
        torch.testing.assert_close(getattr(measured, name).double(), getattr(exact, name), rtol=tolerance, atol=0)


# --- where the base comes from ----------------------------------------------------------------------------------


def _moved(model, seed: int = 4) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def _same(a: drift.RowDivergences, b: drift.RowDivergences, rtol: float = 1e-5) -> None:
    for metric in METRICS:
        torch.testing.assert_close(getattr(a, metric), getattr(b, metric), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_states_and_head_give_the_numbers_of_logits(tied: bool) -> None:
    model, batches = zoo.llama(tied=tied), [zoo.batch(vocabulary=32), zoo.batch(rows=3, vocabulary=32, seed=2)]
    reference = drift.Reference.snapshot(model)
    states = drift.DivergenceProbe("s", batches)
    logits = drift.DivergenceProbe("l", batches, forward=lambda m, b: logits_of(m, b))
    for probe in (states, logits):
        probe.prepare(model, reference)
    assert isinstance(states._kept[0], Projected) and isinstance(logits._kept[0], torch.Tensor)
    _moved(model)
    _same(states.per_row(model), logits.per_row(model))
    assert float(states.per_row(model).kl_base_model.sum()) > 1e-3
    assert "forward" not in model.lm_head.__dict__


def test_a_capped_head_falls_back_to_logits() -> None:
    model = families.make("gemma3", torch.float32)
    model.config.final_logit_softcapping = 3.0
    probe = drift.DivergenceProbe("s", [zoo.batch(vocabulary=families.V)])
    probe.prepare(model, drift.Reference.snapshot(model))
    assert isinstance(probe._kept[0], torch.Tensor)
    assert float(probe.per_row(model).kl_base_model.abs().max()) == 0


def test_a_second_model_stored_log_probabilities_and_files_give_the_same(tmp_path) -> None:
    model, batches = zoo.llama(), [zoo.batch(vocabulary=32), zoo.batch(rows=3, vocabulary=32, seed=2)]
    base = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "base")
    store_base(tmp_path / "base.safetensors", base, batches)
    reference = drift.Reference.snapshot(model)
    _moved(model)
    expected = drift.DivergenceProbe("θ₀", batches)
    expected.prepare(model, reference)
    for probe in (drift.DivergenceProbe("second", batches, base=base), drift.DivergenceProbe("stored", batches, base=tmp_path / "base.safetensors")):
        probe.prepare(model)
        _same(probe.per_row(model), expected.per_row(model))
    files = drift.DivergenceProbe("files", batches)
    files.prepare(model, drift.Reference.open(tmp_path / "base"))
    _same(files.per_row(model), expected.per_row(model))
    for given in (tmp_path / "base", str(tmp_path / "base" / "model.safetensors"), reference):
        probe = drift.DivergenceProbe("its own", batches, base=given)
        probe.prepare(model)
        _same(probe.per_row(model), expected.per_row(model))


def test_the_model_without_its_adapters_is_a_base() -> None:
    plain = zoo.llama()
    base = copy.deepcopy(plain)
    model, batches = zoo.lora(plain), [zoo.batch(vocabulary=32)]
    off, second = drift.DivergenceProbe("off", batches, base="without adapters"), drift.DivergenceProbe("second", batches, base=base)
    for probe in (off, second):
        probe.prepare(model)
    _same(off.per_row(model), second.per_row(model))
    assert float(off.per_row(model).kl_base_model.sum()) > 0
    with pytest.raises(ValueError, match="probe 'off': base is 'without adapters', but the model has none"):
        drift.DivergenceProbe("off", batches, base="without adapters").prepare(base)


def test_stored_log_probabilities_of_other_batches_are_refused(tmp_path) -> None:
    batches = [zoo.batch(vocabulary=32)]
    store_base(tmp_path / "base.safetensors", zoo.llama(), batches)
    with pytest.raises(ValueError, match="probe 'p': base .* was stored for other batches"):
        drift.DivergenceProbe("p", [zoo.batch(vocabulary=32, seed=9)], base=tmp_path / "base.safetensors")
    with pytest.raises(FileNotFoundError, match="probe 'p': base .*nothing' is neither 'without adapters' nor a path that is there; write"):
        drift.DivergenceProbe("p", batches, base=tmp_path / "nothing")
    with pytest.raises(ValueError, match="reference is missing"):
        drift.DivergenceProbe("p", batches).prepare(zoo.llama())


def test_a_bfloat16_models_head_runs_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).to(torch.bfloat16), torch.randn(9000, 16).to(torch.bfloat16)  # more rows than are widened at once
    moved, bias = hidden + (2**-6 * torch.randn(40, 16)).to(torch.bfloat16), torch.randn(9000).to(torch.bfloat16)
    targets = torch.randint(0, 9000, (40,))
    exact = token_divergences(*(x.double() @ weight.double().T + bias.double() for x in (hidden, moved)), targets)
    measured = token_divergences(Projected(hidden, weight, bias), Projected(moved, weight, bias), targets)
    for metric in METRICS:
        torch.testing.assert_close(getattr(measured, metric).double(), getattr(exact, metric), rtol=1e-4, atol=1e-6)
    rounded = token_divergences(*(nn.functional.linear(x, weight, bias) for x in (hidden, moved)), targets)
    assert rounded.kl_base_model.mean() > 1.05 * exact.kl_base_model.mean(), "what rounded logits do"


def test_a_float32_checkpoint_is_the_base_of_a_bfloat16_model(tmp_path) -> None:
    model = zoo.llama()
    model.save_pretrained(tmp_path)
    cast, probe = copy.deepcopy(model).to(torch.bfloat16), drift.DivergenceProbe("p", [zoo.batch(vocabulary=32)], base=tmp_path)
    probe.prepare(cast)
    assert float(probe.per_row(cast).kl_base_model.abs().max()) == 0, "it has nothing but those weights, rounded"
    second = drift.DivergenceProbe("p", [zoo.batch(vocabulary=32)], base=model)
    second.prepare(cast)
    assert 0 < float(second.per_row(cast).kl_base_model.sum()) < 1e-3


def test_wrong_tokens_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"targets must be whole numbers in 0 ... 2, the vocabulary, got torch.int64 in 0 ... 7"):
        token_divergences(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 7]))
    model, batch = zoo.llama(), zoo.batch(vocabulary=32)
    probe = probe_on(model, [batch])
    model.model.norm.weight.data[3] = math.inf
    with pytest.raises(FloatingPointError, match="the weight is not finite in 1 of 20 parameters: model.norm.weight"):
        probe.per_row(model)
    broken = drift.DivergenceProbe("p", [batch], base=model)
    broken.prepare(zoo.llama())
    with pytest.raises(FloatingPointError, match="probe 'p': log-probabilities of the base are not numbers"):
        broken.per_row(zoo.llama())
    hidden = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match="probe 'p', batch 1: no label differs from -100"):
        drift.DivergenceProbe("p", [batch, hidden])
    with pytest.raises(ValueError, match="has parameters on the meta device"):
        probe.per_row(zoo.llama().to("meta"))


def test_logits_that_ask_for_gradients_are_compared() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    assert not token_divergences(logits, 2 * logits, torch.zeros(3, dtype=torch.long)).kl_base_model.requires_grad


def test_perplexity_is_that_of_the_mean_nll() -> None:
    model = zoo.llama()
    with drift.record(model, probes=[drift.DivergenceProbe("p", [zoo.batch(vocabulary=32)])]) as rec:
        pass
    rows = {r["metric"]: r for r in rec.table().to_pylist() if r["source"] == "p"}
    assert rows["ppl/model"]["value"] == pytest.approx(math.exp(rows["nll/model"]["value"]))
    assert rows["ppl/base"]["stderr"] == pytest.approx(rows["ppl/base"]["value"] * rows["nll/base"]["stderr"])


def test_two_types_are_compared_in_the_wider() -> None:
    torch.manual_seed(0)
    base, other, targets = torch.randn(3, 5).double(), torch.randn(3, 5), torch.tensor([0, 1, 2])
    mixed, wide = token_divergences(base, other, targets), token_divergences(base, other.double(), targets)
    torch.testing.assert_close(mixed.kl_base_model, wide.kl_base_model, rtol=0, atol=0)
