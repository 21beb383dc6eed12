"""Fisher information against sums over every position and every label, one score at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drift
from drift import fisher
from drift.intercept import UseCollector
from drift.names import parameters
from tests.drift import families, zoo


def scores(model: nn.Module, batch: dict[str, Tensor], forward) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Scores [K, numel] of every (counted position, label) pair by parameter, their probabilities [K], and their rows [K]."""
    model.eval()
    named = {n: p for n, p in parameters(model).items() if p.requires_grad}
    found: dict[str, list[Tensor]] = {n: [] for n in named}
    weights, rows = [], []
    log_p = torch.log_softmax(forward(model, batch), -1)
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        for label in range(log_p.shape[-1]):
            gradients = torch.autograd.grad(log_p[row, column, label], list(named.values()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(named.items(), gradients, strict=True):
                found[name].append((torch.zeros_like(p) if g is None else g).flatten())
            weights.append(log_p[row, column, label].exp().detach())
            rows.append(row)
    return {n: torch.stack(g) for n, g in found.items()}, torch.stack(weights), torch.tensor(rows)


def exact_diagonal(model, batch, forward) -> dict[str, Tensor]:
    s, p, _ = scores(model, batch, forward)
    return {n: (p[:, None] * x.square()).sum(0).view_as(parameters(model)[n]) / len(batch["labels"]) for n, x in s.items()}


def small_batch() -> dict[str, Tensor]:
    return zoo.batch(rows=2, tokens=4)


@pytest.mark.parametrize("kind", [zoo.Tied, zoo.Norms, zoo.Reused, zoo.Frozen, zoo.Flattened], ids=lambda k: k.__name__)
def test_the_diagonal_is_unbiased(kind) -> None:
    model, batch = zoo.make(kind), small_batch()
    exact = exact_diagonal(model, batch, zoo.forward)
    draws = [fisher.diagonal(model, [batch], seed=s, forward=zoo.forward).values for s in range(600)]
    for name, expected in exact.items():
        x = torch.stack([d[name] for d in draws])
        z = (x.mean(0) - expected) / (x.std(0) / math.sqrt(len(draws))).clamp(min=1e-12)
        assert z.abs().max() < 5 and z.square().mean() < 2.5, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_squares_are_those_of_one_backward_pass_a_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the labels fixed: data labels in place of drawn ones."""
    model, batch = families.make(family), zoo.batch(rows=4, vocabulary=families.V)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100].unsqueeze(1)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: targets)
    found = fisher.diagonal(model, [batch])
    assert not found.missing
    model.eval()
    expected = {n: torch.zeros_like(p) for n, p in parameters(model).items()}
    for row in range(4):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        loss = nn.functional.cross_entropy(model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[0, :-1], one["labels"][0, 1:], reduction="sum")
        for name, g in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            expected[name] += g.square() / 4
    for name, f in found.values.items():
        torch.testing.assert_close(f, expected[name], rtol=1e-5, atol=1e-9)
    margins = fisher.rank_one(model, [batch])
    for name, (u, v) in margins.factors.items():
        torch.testing.assert_close(u, expected[name].sum(1), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(u.sum() * v, expected[name].sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", [zoo.Base, zoo.Tied, zoo.Reused], ids=lambda k: k.__name__)
def test_every_layer_is_let_go_within_its_backward_pass(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the inputs of all layers would be held at once, from the second batch or draw on."""
    waiting = []
    close = UseCollector.close
    monkeypatch.setattr(UseCollector, "close", lambda self: (waiting.append(len(self._uses)), close(self)))
    fisher.diagonal(zoo.make(kind), [small_batch()] * 2, samples=2, forward=zoo.forward)
    assert waiting == [0, 0, 0, 0]


def test_the_token_estimator_is_exact_where_positions_do_not_mix() -> None:
    model, batch = zoo.make(zoo.Base), small_batch()
    exact = exact_diagonal(model, batch, zoo.forward)
    draws = [fisher.diagonal(model, [batch], estimator="token", seed=s, forward=zoo.forward).values for s in range(400)]
    for name in ("head.weight", "body.0.weight"):
        x = torch.stack([d[name] for d in draws])
        z = (x.mean(0) - exact[name]) / (x.std(0) / 20).clamp(min=1e-12)
        assert z.abs().max() < 5 and z.square().mean() < 2.5


def test_squaring_the_gradient_of_a_batch_mean_is_another_thing() -> None:
    """What is often called the empirical Fisher falls with the batch size; the estimators here do not."""
    model = zoo.make(zoo.Base)
    batch = zoo.batch(rows=24)
    truth = sum(float(f.sum()) for f in exact_diagonal(model, batch, zoo.forward).values())
    ours = np.mean([sum(float(f.sum()) for f in fisher.diagonal(model, [batch], seed=s, forward=zoo.forward).values.values()) for s in range(40)])
    assert ours == pytest.approx(truth, rel=0.1)
    log_p = torch.log_softmax(zoo.forward(model, batch), -1)[:, :-1]
    kept = log_p[batch["labels"][:, 1:] != -100]
    loss = -kept.gather(1, torch.multinomial(kept.exp(), 1, generator=torch.Generator().manual_seed(0))).sum() / 24
    squared = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
    assert squared < 0.3 * truth


@pytest.mark.parametrize("estimator", ["sequence", "token"])
def test_sums_over_many_batches_of_a_bfloat16_model_keep_their_digits(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argsort(-1)[:, -2:-1])
    model, batch = zoo.make(zoo.Base).to(torch.bfloat16), small_batch()
    once, often = (fisher.diagonal(model, [batch] * n, estimator=estimator, forward=zoo.forward).values for n in (1, 600))
    for name, x in often.items():
        torch.testing.assert_close(x, once[name], rtol=1e-4, atol=0)


def test_kfac_is_exact_for_a_single_linear_layer_with_one_input() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(zoo.D, zoo.V, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.linspace(-1, 1, zoo.D, dtype=torch.float64).expand(*ids.shape, -1))

    torch.manual_seed(0)
    model, batch = One().double(), small_batch()
    s, p, _ = scores(model, batch, zoo.forward)
    delta = torch.randn_like(model.head.weight)
    exact = float((p * (s["head.weight"] @ delta.flatten()) ** 2).sum()) / 2
    reference = drift.Reference.snapshot(model)
    with torch.no_grad():
        model.head.weight += delta
    with reference.swapped_into(model):
        found = fisher.kfac(model, [batch], samples=3000, forward=zoo.forward)
    assert 2 * fisher.weighted_drift(found, model, reference)[0].value == pytest.approx(exact, rel=0.05)


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [zoo.Tied, zoo.Norms, zoo.Reused], ids=lambda k: k.__name__)
def test_products_are_exact(kind) -> None:
    model, batch = zoo.make(kind), small_batch()
    s, p, _ = scores(model, batch, zoo.forward)
    torch.manual_seed(2)
    vector = {n: torch.randn_like(q) for n, q in parameters(model).items()}
    flat, v = torch.cat(list(s.values()), 1), torch.cat([x.flatten() for x in vector.values()])
    expected = flat.T @ (p * (flat @ v)) / 2
    halves = [{k: x[i : i + 1] for k, x in batch.items()} for i in range(2)]
    for batches in ([batch], halves):
        found = fisher.product(model, batches, vector, forward=zoo.forward)
        torch.testing.assert_close(torch.cat([x.flatten() for x in found.values()]), expected, rtol=1e-9, atol=1e-11)
        assert fisher.quadratic(model, batches, vector, forward=zoo.forward) == pytest.approx(float(v @ expected), rel=1e-9)


def test_products_agree_with_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, batch = zoo.make(zoo.Norms), small_batch()
    targets = batch["labels"][:, 1:]

    class Positions(nn.Module):
        """Logits at the counted positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x) -> Tensor:
            return self.inner(x)[:, :-1][targets != -100]

    wrapped = Positions()
    named = dict(wrapped.named_parameters())
    operator = curvlinops.GGNLinearOperator(wrapped, nn.CrossEntropyLoss(reduction="sum"), list(named.values()),
                                            [(batch["input_ids"], targets[targets != -100])], check_deterministic=False,
                                            num_data=int((targets != -100).sum()))
    torch.manual_seed(2)
    vector = {n: torch.randn_like(p) for n, p in parameters(model).items()}
    flat = operator @ torch.cat([vector[n.removeprefix("inner.")].flatten() for n in named])
    found = fisher.product(model, [batch], vector, forward=zoo.forward)
    torch.testing.assert_close(torch.cat([found[n.removeprefix("inner.")].flatten() for n in named]), flat / 2, rtol=1e-8, atol=1e-10)


def test_products_through_fused_attention() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=3, vocabulary=families.V)
    vector = {n: torch.randn_like(p) for n, p in parameters(model).items()}
    eager = fisher.quadratic(model, [batch], vector)
    model.config._attn_implementation = "sdpa"
    assert fisher.quadratic(model, [batch], vector) == pytest.approx(eager, rel=1e-6)


# --- what drift runs into ---------------------------------------------------------------------------------------


def test_the_quadratic_form_is_the_kl_to_second_order() -> None:
    model, batch = zoo.make(zoo.Norms), zoo.batch(rows=3)
    reference = drift.Reference.snapshot(model)
    direction = {n: torch.randn_like(p) for n, p in parameters(model).items()}
    probe = drift.DivergenceProbe("p", [batch], forward=zoo.forward)
    probe.prepare(model, reference)
    errors = []
    for size in (0.02, 0.01):
        reference.load_into(model)
        predicted = fisher.quadratic(model, [batch], direction, forward=zoo.forward) * size**2 / 2
        with torch.no_grad():
            for n, p in parameters(model).items():
                p += size * direction[n]
        kl = float(probe.per_row(model).kl_base_model.sum()) / 3
        errors.append(abs(kl - predicted))
    assert errors[1] < errors[0] / 6, "the remainder is of third order"


def _fishers(model, batch) -> list[fisher.Fisher]:
    return [fisher.diagonal(model, [batch]), fisher.rank_one(model, [batch]), fisher.kfac(model, [batch])]


def dense_form(f: fisher.Fisher, name: str) -> Tensor:
    """The matrix of the quadratic form over the flattened parameter."""
    if isinstance(f, fisher.Diagonal):
        return torch.diag(f.values[name].flatten().double())
    x, y = (t.double() for t in f.factors[name])
    return torch.diag(torch.outer(x, y).flatten()) if isinstance(f, fisher.RankOne) else torch.kron(x, y)


def test_weighted_drift_of_full_fine_tuning() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=3, vocabulary=families.V)
    reference = drift.Reference.snapshot(model)
    for f in _fishers(model, batch):
        reference.load_into(model)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        for w in fisher.weighted_drift(f, model, reference):
            d = (parameters(model)[w.name].detach() - reference.get(w.name)).flatten()
            assert w.value == pytest.approx(0.5 * float(d @ dense_form(f, w.name) @ d), rel=1e-9)
            assert w.layer == drift.names.layer_index(w.name)


def test_weighted_drift_of_lora_from_its_factors() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=3, vocabulary=families.V)
    found = _fishers(model, batch)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = zoo.lora(model.float(), rank=3).double()
    reference = drift.Reference.snapshot(wrapped)
    reference.adapters.clear()
    merged = {drift.names.canonical_name(n): p for n, p in copy.deepcopy(wrapped).merge_and_unload().named_parameters()}
    for f in found:
        values = fisher.weighted_drift(f, wrapped, reference)
        assert len(values) == 4
        for w in values:
            d = (merged[w.name].detach().double() - before[w.name].double()).flatten()
            assert w.value == pytest.approx(0.5 * float(d @ dense_form(f, w.name) @ d), rel=1e-4)


def test_the_force_of_own_rows_is_that_of_the_fisher_matrix() -> None:
    """F4: on every response of the base, each counted as often as it is likely, slope and cosine go to 1 as the drift shrinks."""
    model = zoo.make(zoo.Norms)
    prompt = torch.tensor([4, 7])
    responses = torch.cartesian_prod(torch.arange(zoo.V), torch.arange(zoo.V))
    ids = torch.cat([prompt.expand(len(responses), -1), responses], 1)
    with torch.no_grad():
        p = torch.log_softmax(model(ids), -1)[:, 1:-1].gather(-1, responses.unsqueeze(-1)).squeeze(-1).sum(1).exp()
    counts = (4000 * p).round().long()
    drawn = ids.repeat_interleave(counts, 0)
    labels = drawn.clone()
    labels[:, :2] = -100
    batches = [{"input_ids": drawn[i::4], "labels": labels[i::4]} for i in range(4)]
    reference = drift.Reference.snapshot(model)
    slopes = []
    for size in (0.02, 0.002):
        reference.load_into(model)
        torch.manual_seed(0)
        with torch.no_grad():
            for q in model.parameters():
                q += size * torch.randn_like(q)
        force = fisher.restoring_force(model, reference, batches, forward=zoo.forward)
        slopes.append(abs(force.slope - 1))
        assert force.cos > 0.97 and force.predicted == pytest.approx(force.force, rel=0.15)
        assert force.slope_along_drift == pytest.approx(1, abs=0.15) and 0 < force.slope_along_drift_stderr < 0.1
    assert slopes[1] < 0.02


def test_wrong_input_is_explained() -> None:
    model, batch = zoo.make(zoo.Base), small_batch()
    with pytest.raises(ValueError, match="estimator must be 'sequence' or 'token', got 'empirical'"):
        fisher.diagonal(model, [batch], estimator="empirical", forward=zoo.forward)
    with pytest.raises(ValueError, match="batches is empty"):
        fisher.diagonal(model, [], forward=zoo.forward)
    with pytest.raises(ValueError, match="batches is empty"):
        fisher.quadratic(model, [], {"head.weight": model.head.weight}, forward=zoo.forward)
    with pytest.raises(ValueError, match=r"vector names \['nose'\]"):
        fisher.product(model, [batch], {"nose": torch.zeros(1)}, forward=zoo.forward)
    with pytest.raises(ValueError, match=r"head.weight is \(1,\), the parameter \(13, 6\)"):
        fisher.product(model, [batch], {"head.weight": torch.zeros(1)}, forward=zoo.forward)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fisher.diagonal(zoo.make(zoo.Base).requires_grad_(False), [batch], forward=zoo.forward)
    other = fisher.diagonal(zoo.make(zoo.Base), [batch], forward=zoo.forward)
    other.values["head.weight"].resize_(4, 4)
    with pytest.raises(ValueError, match="fisher is of another model: it has 16 numbers for head.weight, the drift has 78"):
        fisher.weighted_drift(other, model, drift.Reference.snapshot(model))
    adapted = zoo.lora(zoo.make(zoo.Base), target_modules=["head"])
    of_factors = fisher.diagonal(adapted, [batch], forward=zoo.forward)
    with pytest.raises(ValueError, match="covers none of the parameters that can drift.*so take fisher of the base model"):
        fisher.weighted_drift(of_factors, adapted, drift.Reference.snapshot(adapted))
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match="no label differs from -100"):
        fisher.diagonal(model, [nothing], forward=zoo.forward)
    assert not any("forward" in m.__dict__ for m in model.modules())
