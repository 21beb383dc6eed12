"""Each method's defining equation, against plain PyTorch on whole rows, one at a time."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from drift import fisher
from sasft.chat import IGNORE, Encoded
from sasft.errors import UsageError
from sasft.methods import Costs, method, response_loss, spin
from sasft.methods.frozen_base import FrozenBase
from sasft.methods.penalties import _Ewc, _L2Sp
from sasft.methods.tokens import forward_kl
from sasft.mixing import SELF, TASK
from sasft.probes import batches
from tests.sasft.methods import cases

KEYS = [(TASK, 0), (SELF, 1), (TASK, 5), (TASK, 2), (SELF, 4)]


def log_p(model, row: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, V] that predict a row's counted tokens, and these tokens."""
    labels = torch.tensor(row.labels)
    at = (labels != IGNORE).nonzero().squeeze(-1)
    out = torch.log_softmax(model(torch.tensor([row.input_ids])).logits[0].double(), -1)
    return out[at - 1], labels[at]


def nll(model, row: Encoded) -> torch.Tensor:
    out, labels = log_p(model, row)
    return -out.gather(1, labels[:, None]).squeeze(1)


def kl(base, model, row: Encoded) -> torch.Tensor:
    p, q = log_p(base, row)[0].detach(), log_p(model, row)[0]
    return (p.exp() * (p - q)).sum(-1)


def expect(name: str, plain, keys=KEYS, rel: float = 2e-5, **options) -> None:
    """The objective of a method gives ``plain(base, model, source, row)`` summed over rows, and its gradients."""
    data, model, base = cases.rows(), cases.tiny(), cases.tiny()
    objective, data = cases.started(method(name, **options), model, data)
    cases.wander(model)
    loss = objective.loss(model, cases.batch_of(data, keys))
    wanted = sum(plain(base, model, source, data[source][i]) for source, i in keys)
    assert loss.item() == pytest.approx(wanted.item(), rel=rel)
    assert cases.apart(cases.gradients(model, loss), cases.gradients(model, wanted)) < 10 * rel


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_kl_on_self_rows_takes_the_place_of_cross_entropy(weight: float) -> None:
    def plain(base, model, source, row):
        if source == TASK:
            return nll(model, row).sum()
        return ((1 - weight) * nll(model, row) + weight * kl(base, model, row)).sum()

    expect("kl-self", plain, weight=weight)


def test_kl_on_task_rows_is_added() -> None:
    expect("kl-task", lambda base, model, source, row:
           (nll(model, row) + (2.5 * kl(base, model, row) if source == TASK else 0)).sum(), weight=2.5)


def test_dft_has_the_gradient_of_minus_the_probability() -> None:
    """∇(sg(p)·(−log p)) = −∇p: the values differ, the gradients do not."""
    data, model = cases.rows(), cases.tiny()
    objective, _ = cases.started(method("dft"), model, data)
    keys = [(TASK, 0), (TASK, 3)]
    loss = objective.loss(model, cases.batch_of(data, keys))
    probabilities = sum((-nll(model, data[s][i])).exp().sum() for s, i in keys)
    assert cases.apart(cases.gradients(model, loss), cases.gradients(model, -probabilities)) < 1e-4
    expect("dft", lambda base, model, source, row: ((-nll(model, row)).exp().detach() * nll(model, row)).sum()
           if source == TASK else nll(model, row).sum())


def test_asft_is_dft_and_kl_to_the_base() -> None:
    expect("asft", lambda base, model, source, row: nll(model, row).sum() if source == SELF else
           ((-nll(model, row)).exp().detach() * nll(model, row) + 0.7 * kl(base, model, row)).sum(), weight=0.7)


@pytest.mark.parametrize("name, options", [("kl-self", {}), ("kl-task", {"weight": 3.0}), ("asft", {"weight": 3.0})])
def test_at_the_base_a_divergence_has_no_gradient(name: str, options, tmp_path: Path) -> None:
    for lora in (False, True):
        data, model = cases.rows(), cases.tiny(tmp_path, lora)
        objective, _ = cases.started(method(name, **options), model, data)
        keys = [(SELF, 0), (SELF, 1)] if name == "kl-self" else [(TASK, 0), (TASK, 1)]
        without, _ = cases.started(method("dft" if name == "asft" else "kl-self"), model, data)
        batch = cases.batch_of(data, keys)
        rest = objective.loss(model, batch)
        if name != "kl-self":
            rest = rest - (response_loss(model, batch) if name == "kl-task" else without.loss(model, batch))
        scale = max(g.abs().max() for g in cases.gradients(model, response_loss(model, batch)).values())
        assert abs(rest.item()) < 1e-4 and max(g.abs().max() for g in cases.gradients(model, rest).values()) < 1e-5 * scale


def test_forward_kl_is_the_sum_in_float64_over_many_chunks() -> None:
    torch.manual_seed(0)
    base, logits = torch.randn(600, 11), torch.randn(600, 11, requires_grad=True)
    p, q = torch.log_softmax(base.double(), -1), torch.log_softmax(logits.double(), -1)
    wanted = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(forward_kl(base, logits).double(), wanted, rtol=1e-5, atol=1e-6)
    got, = torch.autograd.grad(forward_kl(base, logits).sum(), logits)
    torch.testing.assert_close(got, torch.softmax(logits, -1).detach() - torch.softmax(base, -1), rtol=1e-4, atol=1e-6)


def test_the_base_of_adapters_is_the_model_without_them_and_else_a_copy(tmp_path: Path) -> None:
    data = cases.rows()
    batch = cases.batch_of(data, [(TASK, 0)])
    for lora in (False, True):
        model = cases.tiny(tmp_path, lora)
        base, at_start = FrozenBase(model), response_loss(cases.tiny(), batch)
        cases.wander(model)
        costs = Costs()
        with base.in_place() as frozen:
            assert response_loss(frozen, batch).item() == pytest.approx(at_start.item(), rel=1e-6)
        assert base.shared == lora and not base.score(batch, costs).logits.requires_grad
        assert costs.forward_tokens == len(data[TASK][0].input_ids)
        assert not FrozenBase(model).shared  # adapters that have an effect already are part of the base


def test_stm_keeps_the_tokens_that_the_base_expects() -> None:
    model, data = cases.tiny(), cases.rows()
    spread = torch.cat([nll(model, r) for r in data[TASK]]).exp()
    tau = spread.median().item()
    masked = method("stm", tau=tau).encoded(data, model, 0, costs := Costs())
    assert masked[SELF] == data[SELF] and costs.forward_tokens == sum(len(r.input_ids) for r in data[TASK])
    kept = 0
    for before, after in zip(data[TASK], masked[TASK], strict=True):
        assert after.input_ids == before.input_ids
        told = iter(nll(model, before).exp() <= tau)
        wanted = [IGNORE if label == IGNORE or not next(told) else label for label in before.labels]
        wanted[-1] = before.labels[-1]  # the end of the turn is learnt whatever the base thinks of it
        assert list(after.labels) == wanted
        kept += after.loss_tokens
    assert 0 < kept < sum(r.loss_tokens for r in data[TASK])
    cases.wander(model, 0.5)
    other = method("stm", tau=tau).encoded(data, model, 0, Costs())
    assert other[TASK] != masked[TASK]  # it is the base that decides


def test_a_row_that_stm_hides_wholly_is_refused() -> None:
    data = cases.rows()
    data[TASK][3] = data[TASK][3].cut(data[TASK][3].start + 2)  # no end of turn that would stay
    with pytest.raises(UsageError, match=r"tau=1.0 leaves no token in the loss of 1 of 8 rows of task \(the first is row 3 of them\); raise tau"):
        method("stm", tau=1.0).encoded(data, cases.tiny(), 0, Costs())


def test_ual_is_label_smoothing_by_the_entropy_of_the_base() -> None:
    data, base = cases.rows(), cases.tiny()
    entropies = []
    for row in data[TASK]:
        out = log_p(base, row)[0]
        entropies.append(-(out.exp() * out).sum(-1).mean().item())
    low, high = min(entropies), max(entropies)

    def plain(base, model, source, row):
        v = 0.0 if source == SELF else 0.2 * (entropies[data[TASK].index(row)] - low) / (high - low)
        out, labels = log_p(model, row)
        return cross_entropy(out, labels, label_smoothing=v, reduction="sum")

    expect("ual", plain, keys=[(TASK, i) for i in range(8)] + [(SELF, 0)], v_max=0.2, rel=1e-4)


def test_rows_of_equal_uncertainty_are_smoothed_alike() -> None:
    model, data = cases.tiny(), cases.rows()
    data[TASK] = data[TASK][:1] * 3
    objective, _ = cases.started(method("ual", v_max=0.2), model, data)
    out, labels = log_p(model, data[TASK][0])
    assert objective.loss(model, cases.batch_of(data, [(TASK, 2)])).item() == pytest.approx(
        cross_entropy(out, labels, label_smoothing=0.1, reduction="sum").item(), rel=1e-5)


# --- penalties ----------------------------------------------------------------------------------------------------


def test_l2_sp_is_the_squared_way_from_the_start() -> None:
    model = cases.tiny()
    start = cases.weights(model)
    objective, _ = cases.started(method("l2-sp", weight=3.0), model, cases.rows())
    assert all(not g.any() for g in cases.gradients(model, objective.penalty(model, 1)).values())
    cases.wander(model)
    penalty = objective.penalty(model, 1)
    assert penalty.item() == pytest.approx(sum(1.5 * (p - start[n]).double().square().sum().item() for n, p in model.named_parameters()), rel=1e-6)
    for name, gradient in cases.gradients(model, penalty).items():
        torch.testing.assert_close(gradient, 3.0 * (model.get_parameter(name) - start[name]).detach())


@pytest.mark.parametrize("start_moved", [False, True])
def test_l2_sp_of_adapters_is_that_of_the_weights_they_make(start_moved: bool, tmp_path: Path) -> None:
    model = cases.tiny(tmp_path, lora=True)
    if start_moved:
        cases.wander(model, seed=3)
    objective, _ = cases.started(method("l2-sp", weight=3.0), model, cases.rows())

    def products():
        return [m.scaling["default"] * (m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double())
                for m in model.modules() if hasattr(m, "lora_A")]

    start = [w.detach() for w in products()]
    assert max(g.abs().max() for g in cases.gradients(model, objective.penalty(model, 1)).values()) < 1e-12
    cases.wander(model)
    wanted = 1.5 * sum((now - then).square().sum() for now, then in zip(products(), start, strict=True))
    penalty = objective.penalty(model, 1)
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert cases.apart(cases.gradients(model, penalty), cases.gradients(model, wanted)) < 1e-5


@pytest.mark.parametrize("lora", [False, True])
def test_ewc_weighs_the_way_by_the_fisher_diagonal_of_self_rows(lora: bool, tmp_path: Path) -> None:
    model, data = cases.tiny(tmp_path, lora), cases.rows()
    costs = Costs()
    objective = method("ewc", weight=7.0, fisher_rows=5, seed=2).objective(model, data, 0, costs)
    values = fisher.diagonal(model, batches(data[SELF][:5], 0), seed=2).values
    assert costs.backward_tokens == sum(len(r.input_ids) for r in data[SELF][:5])
    named = {n.replace("base_model.model.", ""): p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in named.items()}
    assert all(not g.any() for g in cases.gradients(model, objective.penalty(model, 1)).values())
    cases.wander(model)
    penalty = objective.penalty(model, 1)
    assert penalty.item() == pytest.approx(
        sum(3.5 * (values[n].double().reshape(p.shape) * (p - start[n]).double().square()).sum().item() for n, p in named.items()), rel=1e-5)
    penalty.backward()
    for n, p in named.items():
        torch.testing.assert_close(p.grad, 7.0 * values[n].float().reshape(p.shape) * (p - start[n]).detach(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("fisher_value, weight", [(1.0, 0.5), (3.0, 2.0)])
def test_a_quadratic_task_under_a_penalty_ends_where_it_must(fisher_value: float, weight: float) -> None:
    """½(θ − b)² + ½λF(θ − θ₀)² has its minimum at (b + λFθ₀) / (1 + λF)."""
    torch.manual_seed(0)
    for kind in ("ewc", "l2-sp"):
        model = torch.nn.Linear(3, 2, bias=False)
        start, goal = model.weight.detach().clone(), torch.randn(2, 3)
        f = fisher_value if kind == "ewc" else 1.0
        objective = (_Ewc(Costs(), model, weight, {"weight": torch.full((2, 3), f)}) if kind == "ewc" else _L2Sp(Costs(), model, weight))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(400):
            (0.5 * (model.weight - goal).square().sum() + objective.penalty(model, step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), (goal + weight * f * start) / (1 + weight * f))


# --- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_online_replay_is_a_mean_over_what_the_base_writes(loss: str, lora: bool, tmp_path: Path) -> None:
    model, base, data = cases.tiny(tmp_path, lora), cases.tiny(), cases.rows()
    costs = Costs()
    objective = method("online-replay", loss=loss, weight=3.0, rows_per_step=3, buffer=2, max_new_tokens=8).objective(model, data, 0, costs)
    cases.wander(model)
    replayed = {step: objective.replayed(step) for step in (1, 2, 3)}
    again = method("online-replay", loss=loss, rows_per_step=3, buffer=2, max_new_tokens=8).objective(cases.tiny(), data, 0, Costs())
    assert again.replayed(3) == replayed[3] and again.replayed(2) == replayed[2]  # of seed and step alone, written by the base
    assert len(set(map(tuple, replayed.values()))) == 3
    prompts = {r.input_ids[: r.start] for r in data[SELF]}
    assert all(r.input_ids[: r.start] in prompts for rows in replayed.values() for r in rows)
    penalty = objective.penalty(model, 2)
    tokens = [nll(model, r) if loss == "ntp" else kl(base, model, r) for r in replayed[2]]
    wanted = 3.0 * torch.cat(tokens).mean()
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert cases.apart(cases.gradients(model, penalty), cases.gradients(model, wanted)) < 1e-3
    assert costs.generated_tokens > 0 and costs.backward_tokens == sum(len(r.input_ids) for r in replayed[2])


def test_at_the_base_replayed_kl_has_no_gradient_and_replayed_cross_entropy_has() -> None:
    found = {}
    for loss in ("kl", "ntp"):
        model, data = cases.tiny(), cases.rows()
        objective = method("online-replay", loss=loss, rows_per_step=4, buffer=1, max_new_tokens=8).objective(model, data, 0, Costs())
        found[loss] = max(g.abs().max().item() for g in cases.gradients(model, objective.penalty(model, 1)).values())
    assert found["kl"] < 1e-6 < 1e-2 < found["ntp"]


def test_replay_and_its_kl_have_one_expected_gradient() -> None:
    """On a language of three symbols and two tokens, enumerated: E ∇CE = E ∇KL for y ~ p₀, at any θ (docs/theory.md, F3)."""
    torch.manual_seed(0)
    tables = torch.randn(4, 3, dtype=torch.float64)  # logits of the first token, and of the second after each first
    theta = (tables + 0.5 * torch.randn_like(tables)).requires_grad_()
    p0, p = torch.log_softmax(tables, -1), torch.log_softmax(theta, -1)
    expected_nll = expected_kl = 0.0
    for first in range(3):
        for second in range(3):
            probability = (p0[0, first] + p0[1 + first, second]).exp()
            expected_nll = expected_nll - probability * (p[0, first] + p[1 + first, second])
            expected_kl = expected_kl + probability * forward_kl(p0[[0, 1 + first]], p[[0, 1 + first]]).sum()
    a, = torch.autograd.grad(expected_nll, theta, retain_graph=True)
    b, = torch.autograd.grad(expected_kl, theta)
    torch.testing.assert_close(a, b)


# --- self-play ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_spin_sets_the_tasks_answers_against_the_models_own(weight: float) -> None:
    opponents = method("spin", max_new_tokens=8).encoded(cases.rows(), cases.tiny(), 0, Costs())["opponent"]
    data = cases.rows()
    assert [o.input_ids[: o.start] for o in opponents] == [r.input_ids[: r.start] for r in data[TASK]]
    assert any(o.finished for o in opponents) and all(o.labels[-1] == 2 for o in opponents if o.finished)

    def plain(base, model, source, row):
        if source == SELF:
            return nll(model, row).sum()
        other = opponents[data[TASK].index(row)]
        margin = (nll(base, row) - nll(model, row)).sum() - (nll(base, other) - nll(model, other)).sum()
        return (1 - weight) * nll(model, row).sum() - weight * logsigmoid(0.3 * margin)

    expect("spin", plain, weight=weight, beta=0.3, max_new_tokens=8, rel=1e-4)


def test_spin_at_its_start_is_ln_2_and_pulls_towards_the_task_and_away_from_the_model() -> None:
    model, data = cases.tiny(), cases.rows()
    objective, data = cases.started(method("spin", beta=0.5, max_new_tokens=8), model, data)
    loss = objective.loss(model, cases.batch_of(data, [(TASK, 1)]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    pull = -0.25 * (nll(model, data["opponent"][1]).sum() - nll(model, data[TASK][1]).sum())
    assert cases.apart(cases.gradients(model, loss), cases.gradients(model, pull)) < 1e-3
    data["opponent"][1] = data[TASK][1]
    objective = method("spin").objective(model, data, 0, Costs())
    same = objective.loss(model, cases.batch_of(data, [(TASK, 1)]))
    assert max(g.abs().max() for g in cases.gradients(model, same).values()) < 1e-6


def test_spin_counts_what_it_spends() -> None:
    model, data = cases.tiny(), cases.rows()
    data = method("spin", max_new_tokens=8).encoded(data, model, 0, costs := Costs())
    assert costs.generated_tokens == sum(o.loss_tokens for o in data["opponent"])
    objective = method("spin", max_new_tokens=8).objective(model, data, 0, costs)
    assert costs.forward_tokens == sum(len(r.input_ids) for s in (TASK, "opponent") for r in data[s])
    objective.loss(model, cases.batch_of(data, KEYS))
    assert costs.backward_tokens == sum(len(data["opponent"][i].input_ids) for s, i in KEYS if s == TASK)


def test_spins_answers_are_on_file_and_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, method_ = cases.tiny(), cases.rows(), method("spin", max_new_tokens=8)
    whole = method_.encoded(data, model, 0, wanted := Costs())
    written, calls = spin.answer_rows, []

    def stopped(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return written(*args, **kwargs)

    monkeypatch.setattr(spin, "_ROWS", 3)
    monkeypatch.setattr(spin, "answer_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        method_.encoded(data, model, 0, Costs(), tmp_path)
    assert method_.encoded(data, model, 0, costs := Costs(), tmp_path) == whole and calls == [3, 3, 3, 2]
    assert method_.encoded(data, model, 0, Costs(), tmp_path) == whole and len(calls) == 4 and costs == wanted
