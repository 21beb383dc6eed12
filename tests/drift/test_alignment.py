"""Gradient Gram matrices against one backward pass a row; estimators against full enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drift
from drift.alignment import (
    AlignmentProbe,
    coherence,
    coherence_error,
    cosine,
    cosine_error,
    gradient_gram,
    jackknife,
    join_batches,
    mean_inner,
    mean_inner_error,
    raw_cosine,
    raw_cosine_error,
)
from drift.forward import logits_of
from drift.names import parameters
from tests.drift import zoo


def brute(model: nn.Module, batch: dict[str, Tensor], forward) -> dict[str, np.ndarray]:
    """Gram matrix of every parameter from one ordinary backward pass a row."""
    model.eval()
    named = {n: p for n, p in parameters(model).items() if p.requires_grad}
    gradients: dict[str, list[Tensor]] = {n: [] for n in named}
    for row in range(len(batch["labels"])):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        log_p = torch.log_softmax(forward(model, one), -1)
        loss = sum(-log_p[0, t - 1, label] for t, label in enumerate(one["labels"][0]) if t > 0 and label != -100)
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
            gradients[name].append(torch.zeros_like(named[name]).flatten() if g is None else g.flatten())
    return {n: (torch.stack(g).double() @ torch.stack(g).double().T).numpy() for n, g in gradients.items()}


def agree(gram: drift.GradientGram, expected: dict[str, np.ndarray], rtol: float = 1e-9) -> None:
    scale = max(np.abs(m).max() for m in expected.values())
    for name, matrix in expected.items():
        if name in gram.missing:
            assert np.abs(matrix).max() == 0, f"{name} has a gradient and is said to be missing"
        else:
            np.testing.assert_allclose(gram.per_parameter[name], matrix, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("kind", zoo.ZOO)
def test_gram_is_that_of_one_backward_pass_a_row(kind) -> None:
    model, batch = zoo.make(kind), zoo.batch()
    agree(gradient_gram(model, batch, forward=zoo.forward), brute(model, batch, zoo.forward))


def test_gram_is_that_of_torchjd() -> None:
    """A second opinion: the Gramian of the rows' losses, over all parameters together."""
    autogram = pytest.importorskip("torchjd.autogram")
    model, batch = zoo.make(zoo.Norms), zoo.batch()
    ours = gradient_gram(model, batch, forward=zoo.forward)
    engine = autogram.Engine(model, batch_dim=0)
    log_p = torch.log_softmax(model(batch["input_ids"])[:, :-1], -1)
    labels = batch["labels"][:, 1:]
    losses = nn.functional.nll_loss(log_p.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
    theirs = engine.compute_gramian(losses)
    np.testing.assert_allclose(sum(ours.per_parameter.values()), theirs.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_gram_of_a_llama(tied: bool) -> None:
    model, batch = zoo.llama(tied=tied).double(), zoo.batch(vocabulary=32)
    gram = gradient_gram(model, batch)
    assert gram.coverage == 1.0 and gram.missing == ()
    agree(gram, brute(model, batch, logits_of), rtol=1e-5)  # transformers' RMSNorm computes in float32


def test_gram_of_lora_factors() -> None:
    model, batch = zoo.lora(zoo.llama().double()).double(), zoo.batch(vocabulary=32)
    expected = brute(model, batch, logits_of)
    gram = gradient_gram(model, batch)
    assert set(gram.per_parameter) == set(expected) and gram.coverage == 1.0
    agree(gram, expected, rtol=1e-5)


def test_rows_may_be_packed_into_one_sequence() -> None:
    """Token-wise sources: three rows side by side in one batch entry, for a model whose positions are independent."""
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=3)
    packed = {k: v.reshape(1, -1) for k, v in batch.items()}
    packed["labels"][0, [7, 14]] = -100  # position 0 of a row has no prediction of its own
    rows = torch.arange(3).repeat_interleave(7).reshape(1, -1)
    agree(gradient_gram(model, packed, rows=rows, forward=zoo.forward), brute(model, batch, zoo.forward))


def test_rows_packed_by_a_block_mask_are_those_of_a_batch() -> None:
    model, batch = zoo.llama().double(), {k: v for k, v in zoo.batch(rows=3, vocabulary=32).items() if k != "attention_mask"}
    rows = torch.arange(3).repeat_interleave(7).reshape(1, -1)
    sees = (rows == rows.T) & torch.ones(21, 21).tril().bool()
    packed = {k: v.reshape(1, -1) for k, v in batch.items()} | {
        "position_ids": torch.arange(7).repeat(1, 3), "attention_mask": torch.where(sees, 0.0, -torch.inf).double()[None, None]}
    found = gradient_gram(model, packed, rows=rows)
    assert found.coverage == 1.0
    agree(found, brute(model, batch, logits_of), rtol=1e-5)


def test_the_head_runs_where_a_token_is_counted_only() -> None:
    """A head of a large vocabulary is half the work; prompts need none of it."""
    model, batch, seen = zoo.llama(), zoo.batch(vocabulary=32), []
    with model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])):
        gradient_gram(model, batch)
    assert seen == [5]  # of 7 tokens the first 2 are prompt, and the last predicts nothing: columns 1 ... 5


def test_a_trace_is_left_nowhere() -> None:
    model, batch = zoo.make(zoo.Dropout), zoo.batch()
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    gradient_gram(model, batch, forward=zoo.forward)
    assert torch.equal(torch.rand(2), expected) and model.training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight)) and model.embed.weight.grad is None
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_hooks_go_even_after_an_error() -> None:
    def broken(model, batch):
        zoo.forward(model, batch)
        raise RuntimeError("boom")

    model = zoo.make(zoo.Base)
    with pytest.raises(RuntimeError, match="boom"):
        gradient_gram(model, zoo.batch(), forward=broken)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_weight_used_outside_its_module_is_named() -> None:
    gram = gradient_gram(zoo.make(zoo.Functional), zoo.batch(), forward=zoo.forward)
    assert gram.missing == ("head.weight",) and "head.weight" not in gram.per_parameter and gram.coverage < 1


class Odd(zoo.Base):
    """A parameter of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(zoo.V))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.shift


def test_what_is_not_covered_is_named() -> None:
    gram = gradient_gram(zoo.make(Odd), zoo.batch(), forward=zoo.forward)
    assert gram.missing == ("shift",) and 0.9 < gram.coverage < 1


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradient_gram(zoo.make(zoo.Base).requires_grad_(False), zoo.batch(), forward=zoo.forward)


# --- estimators -----------------------------------------------------------------------------------------------

POPULATION = np.array([[1.0, 0.5, -1.0], [2.0, 0.0, 1.0], [0.0, 1.5, 2.0]])  # three equally likely gradients of a source
OTHER = np.array([[0.5, -1.0, 0.0], [1.0, 1.0, 3.0]])


def expectation(n_a: int, n_b: int, statistic) -> float:
    """Mean of a statistic of (Gram, rows a, rows b) over every possible pair of samples."""
    values = []
    for a in itertools.product(range(len(POPULATION)), repeat=n_a):
        for b in itertools.product(range(len(OTHER)), repeat=n_b):
            g = np.concatenate([POPULATION[list(a)], OTHER[list(b)]])
            values.append(statistic(g @ g.T, list(range(n_a)), list(range(n_a, n_a + n_b))))
    return float(np.mean(values))


def test_inner_products_and_squared_norms_are_unbiased() -> None:
    mean_a, mean_b = POPULATION.mean(0), OTHER.mean(0)
    assert expectation(3, 2, mean_inner) == pytest.approx(mean_a @ mean_b, abs=1e-12)
    assert expectation(3, 2, lambda k, a, b: mean_inner(k, a, a)) == pytest.approx(mean_a @ mean_a, abs=1e-12)
    plain = expectation(3, 2, lambda k, a, b: k[np.ix_(a, a)].mean())  # what the correction removes
    assert plain == pytest.approx(mean_a @ mean_a + POPULATION.var(0).sum() / 3, abs=1e-12)


def test_cosine_is_consistent_where_the_raw_one_shrinks() -> None:
    rng = np.random.default_rng(0)
    mean_a, mean_b = np.array([1.0, 0, 0, 0]), np.array([0.6, 0.8, 0, 0])
    g = np.concatenate([mean_a + rng.normal(size=(300, 4)), mean_b + rng.normal(size=(300, 4))])
    k, a, b = g @ g.T, list(range(300)), list(range(300, 600))
    assert cosine(k, a, b) == pytest.approx(0.6, abs=0.1)
    small = [raw_cosine(k, a[i : i + 3], b[i : i + 3]) for i in range(0, 300, 3)]
    assert np.mean(small) < 0.45


def test_cosine_is_silent_where_a_mean_gradient_is_only_noise() -> None:
    k = np.array([[1.0, -0.5, 0.3, 0.1], [-0.5, 1.0, 0.2, 0.0], [0.3, 0.2, 1.0, 0.5], [0.1, 0.0, 0.5, 1.0]])
    assert math.isnan(cosine(k, [0, 1], [2, 3]))


def test_overlapping_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share \[1\]"):
        mean_inner(np.eye(3), [0, 1], [1, 2])


def test_jackknife_error_is_the_spread_of_the_estimate() -> None:
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(400):
        g = np.concatenate([[1.0, 0, 0] + 0.7 * rng.normal(size=(20, 3)), [0.6, 0.8, 0] + 0.7 * rng.normal(size=(25, 3))])
        groups = [list(range(20)), list(range(20, 45))]
        k = g @ g.T
        values.append(cosine(k, *groups))
        errors.append(jackknife(lambda rows, k=k: cosine(k, *rows), groups))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n, m", [(2, 4), (3, 3), (4, 2), (5, 9)])
def test_errors_from_row_sums_are_those_of_leaving_rows_out_one_by_one(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g, order = rng.normal(size=(n + m, 4)) + [0.7, 0, 0, 0], rng.permutation(n + m).tolist()
    k, a, b = g @ g.T, order[:n], order[n:]
    for found, statistic, groups in (
            (mean_inner_error(k, a, b), lambda r: mean_inner(k, *r), [a, b]), (mean_inner_error(k, a, a), lambda r: mean_inner(k, r[0], r[0]), [a]),
            (cosine_error(k, a, b), lambda r: cosine(k, *r), [a, b]), (raw_cosine_error(k, a, b), lambda r: raw_cosine(k, *r), [a, b]),
            (coherence_error(k, b), lambda r: coherence(k, r[0]), [b])):
        assert found == pytest.approx(jackknife(statistic, groups), rel=1e-11, nan_ok=True)
        assert found > 0 or math.isnan(found)
        assert min(map(len, groups)) >= 3 or math.isnan(found)


def test_coherence_of_equal_and_of_opposite_gradients() -> None:
    same, opposite = np.ones((3, 3)), np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert coherence(same, [0, 1, 2]) == 1.0
    assert coherence(opposite, [0, 1]) == -1.0


# --- the score identity on a real (tiny) model ----------------------------------------------------------------


def test_score_identity_by_enumeration() -> None:
    """Own samples at T = 1 exert no force; sharpened ones do (docs/theory.md, F1 and F2a): all responses enumerated."""
    model = zoo.make(zoo.Norms)
    prompt, length = torch.tensor([4, 7]), 2
    responses = torch.tensor(list(itertools.product(range(zoo.V), repeat=length)))
    ids = torch.cat([prompt.expand(len(responses), -1), responses], 1)
    log_p = torch.log_softmax(model(ids), -1)[:, 1:-1].gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    named = list(model.parameters())

    def force(weights: Tensor) -> float:
        gradients = torch.autograd.grad((weights * log_p.sum(1)).sum(), named, retain_graph=True)
        return math.sqrt(sum(float(g.square().sum()) for g in gradients))

    probability = log_p.sum(1).exp().detach()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    typical = force(torch.eye(len(responses), dtype=torch.float64)[0])
    assert force(probability) < 1e-12 * typical
    sharper = torch.log_softmax(model(ids) / 0.7, -1)[:, 1:-1].gather(-1, responses.unsqueeze(-1)).squeeze(-1)
    assert force(sharper.sum(1).exp().detach()) > 1e-3 * typical


# --- the probe ------------------------------------------------------------------------------------------------


def test_rows_that_are_none_are_refused() -> None:
    model, batch = zoo.llama(), zoo.batch(vocabulary=32)
    for rows in (torch.full((5, 7), -1), torch.zeros(5, 7), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rows must be whole numbers from 0 on in the shape of labels \(5, 7\), got"):
            drift.gradient_gram(model, batch, rows=rows)
    with pytest.raises(ValueError, match="batches is empty"):
        join_batches([])


def test_batches_join_on_the_right() -> None:
    joined = join_batches([zoo.batch(rows=2, tokens=5), zoo.batch(rows=3, tokens=7)])
    assert {k: tuple(v.shape) for k, v in joined.items()} == dict.fromkeys(("input_ids", "attention_mask", "labels"), (5, 7))
    assert (joined["labels"][:2, 5:] == -100).all() and not joined["attention_mask"][:2, 5:].any()


def test_the_probe_reports_every_pair_and_source_for_every_block() -> None:
    model = zoo.llama()
    probe = AlignmentProbe("a", {"task": [zoo.batch(vocabulary=32, seed=1)], "self": [zoo.batch(vocabulary=32, seed=2)]})
    probe.prepare(model, drift.Reference.snapshot(model))
    rows = probe.rows(model, step=3)
    assert probe.coverage == {"covered": 1.0, "missing": []}
    assert {r.layer for r in rows} == {None, 0, 1} and {r.step for r in rows} == {3}
    assert {(r.metric, r.source) for r in rows} == {
        *((f"align/{m}", "task|self") for m in ("inner", "cos", "raw_cos")),
        *((f"grad/{m}", s) for m in ("norm2", "coherence") for s in ("task", "self"))}
    expected = sum(brute(model.double(), probe.batch, logits_of).values())
    whole = next(r for r in rows if r.layer is None and r.metric == "align/inner")
    assert whole.value == pytest.approx(mean_inner(expected, range(5), range(5, 10)), rel=1e-4)
    assert whole.n_tokens == 2 * 21
    for metric, statistic in (("align/inner", mean_inner), ("align/cos", cosine), ("align/raw_cos", raw_cosine)):
        row = next(r for r in rows if r.layer is None and r.metric == metric)
        assert row.stderr == pytest.approx(jackknife(lambda r, f=statistic: f(expected, *r), [range(5), range(5, 10)]), rel=1e-3, nan_ok=True)
    for metric, statistic in (("grad/norm2", lambda r: mean_inner(expected, r[0], r[0])), ("grad/coherence", lambda r: coherence(expected, r[0]))):
        row = next(r for r in rows if r.layer is None and r.metric == metric and r.source == "self")
        assert row.stderr == pytest.approx(jackknife(statistic, [range(5, 10)]), rel=1e-3)


def test_the_probe_needs_two_sources() -> None:
    with pytest.raises(ValueError, match="probe 'a': sources must name at least two sources with batches"):
        AlignmentProbe("a", {"task": [zoo.batch()], "self": []})
