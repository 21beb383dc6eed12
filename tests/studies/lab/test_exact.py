"""Expectations, Fisher matrices and divergences against explicit sums over responses."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from sasft.sampling import PAPER, Sampler, draw
from studies.lab import exact
from studies.lab.exact import Expected
from studies.lab.model import flat, log_probs
from studies.lab.tree import CONTENT, FINISHED, LENGTHS, NODES, RESPONSES, flow, response_probabilities
from studies.lab.world import foreign_old, own_new, pure
from tests.studies.lab import tiny


def explicit_loss(params: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient [P] of rows [X, R], one response at a time through transformers as it is."""
    model = tiny.as_it_is(params, 4)
    loss = -sum(rows[x, r] * tiny.response_log_prob(model, x, RESPONSES[r]) for x, r in rows.nonzero().tolist())
    by_name = dict(model.named_parameters())
    return loss.detach(), flat(dict(zip(params, torch.autograd.grad(loss, [by_name[n] for n in params]), strict=True)))


# --- samplers, and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 1.0), (1.0, 0.9), (0.7, 0.9), (0.2, 0.3)])
def test_the_sampler_is_the_package_s(temperature: float, top_p: float) -> None:
    log_p, n = tiny.bases().log_p[0][:, ::40].reshape(-1, 10), 2000
    expected = exact.sampler(log_p, temperature, top_p).exp()
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spread: a token is drawn n·p times, give or take one
    drawn = draw(log_p.repeat_interleave(n, 0), u.repeat(len(log_p)), Sampler(temperature=temperature, top_p=top_p)).view(-1, n)
    frequency = torch.nn.functional.one_hot(drawn, 10).double().mean(1)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=1 / n + 1e-6)
    assert ((frequency > 0) <= (expected > 0)).all() and ((expected > 1.01 / n) <= (frequency > 0)).all()
    assert (expected == 0).any() == (top_p < 1)


def test_sampled_rows_are_the_sampler_s_responses() -> None:
    log_p = tiny.bases().log_p[0]
    rows = exact.sampled_rows(log_p, tiny.TOPIC, PAPER.temperature, PAPER.top_p)
    assert rows.sum().item() == pytest.approx(1, abs=1e-13) and (rows[3:] == 0).all() and (rows == 0).any(0).any()
    torch.testing.assert_close(exact.sampled_rows(log_p, tiny.TOPIC), tiny.TOPIC[:, None] * tiny.bases().own[0], rtol=0, atol=1e-15)


def test_rules_for_rows_are_their_definitions() -> None:
    rows = tiny.TOPIC[:, None] * tiny.bases().own[0]
    mean = exact.per_response(rows)
    shape = torch.tensor([1 / len(r) for r in RESPONSES], dtype=torch.float64)
    torch.testing.assert_close(mean / rows.clamp(min=1e-300), (mean[0, 0] / rows[0, 0] * shape).expand(9, -1) * (rows > 0), rtol=1e-12, atol=0)
    assert flow(mean).sum().item() == pytest.approx(flow(rows).sum().item())

    finished = exact.drop_unfinished(rows)
    assert finished.sum().item() == pytest.approx(1) and (finished[:, ~FINISHED] == 0).all()
    torch.testing.assert_close(finished[:, FINISHED], rows[:, FINISHED] / rows[:, FINISHED].sum(), rtol=1e-13, atol=0)
    by_prompt = torch.rand(9, len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exact.kept(rows, by_prompt), rows * by_prompt / (rows * by_prompt).sum(), rtol=1e-13, atol=0)


def test_duplicates_count_once() -> None:
    rows, n = torch.tensor([[0.6, 0.3], [0.1, 0.0]], dtype=torch.float64), 3
    drawn = torch.zeros(4, dtype=torch.float64)
    for draws in product(range(4), repeat=n):
        for row in set(draws):
            drawn[row] += math.prod(rows.flatten()[i].item() for i in draws)
    torch.testing.assert_close(exact.drop_likely_duplicates(rows, n), (drawn / drawn.sum()).view(2, 2), rtol=1e-13, atol=1e-15)


def test_drawn_rows_are_whole_numbers_of_draws() -> None:
    rows, n = tiny.TOPIC[:, None] * tiny.bases().own[0], 500
    found = exact.drawn_rows(rows, n, seed=3)
    assert torch.equal(found, exact.drawn_rows(rows, n, seed=3)) and not torch.equal(found, exact.drawn_rows(rows, n, seed=4))
    assert ((found * n) == (found * n).round()).all() and found.sum().item() == pytest.approx(1) and (found[rows == 0] == 0).all()
    many = torch.stack([exact.drawn_rows(rows, n, seed=s) for s in range(100)]).mean(0)
    for share, said in [(p[:, c == CONTENT].sum().item(), many[:, c == CONTENT].sum().item()) for c in (4, 5, 6) for p in [rows]]:
        assert abs(said - share) < 4 * math.sqrt(share * (1 - share) / (100 * n))


# --- derivatives ----------------------------------------------------------------------------------------------------------


def test_losses_and_gradients_are_sums_over_responses() -> None:
    made = tiny.bases()
    params, own = made.one(0), made.own[0]
    drawn = exact.drawn_rows(tiny.TOPIC[:, None] * own, 25, seed=0)
    for rows in (own_new(own, tiny.TOPIC, made.truth(0)), drawn):
        expected = Expected(made.model, flow(rows))
        loss, gradient = explicit_loss(params, rows)
        assert expected.loss(params).item() == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(expected.gradient(params), gradient, rtol=0, atol=1e-11)


def test_wide_and_narrow_flows_are_differentiated_alike() -> None:
    """Derivatives of a source are those of its slices by first token, each over its own part of the tree."""
    made = tiny.bases()
    params = made.one(0)
    whole = flow(foreign_old(made.own[0], tiny.TOPIC, pure(9)))
    slices = [whole * torch.tensor([first in (n or (1,))[:1] for n in NODES])[:, None] for first in range(1, 10)]
    v = tiny.random_direction(params, 0)
    for derive in (lambda e: e.gradient(params), lambda e: e.hessian_product(params, v)):
        parts = [Expected(made.model, part) for part in slices]
        assert max(e.walk.size for e in parts) < Expected(made.model, whole).walk.size / 8
        torch.testing.assert_close(derive(Expected(made.model, whole)), sum(map(derive, parts)), rtol=0, atol=1e-11)


def test_hessians_are_differences_of_gradients() -> None:
    made = tiny.bases()
    params, expected = made.one(0), Expected(made.model, tiny.task_flow())
    hessian = expected.hessian(params)
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-10)
    for seed in range(3):
        v = tiny.random_direction(params, seed)
        torch.testing.assert_close(expected.hessian_product(params, v), hessian @ v, rtol=0, atol=1e-10)
        errors = []
        for step in (2e-3, 1e-3):
            ahead, behind = (expected.gradient(tiny.moved(params, s * step * v)) for s in (1, -1))
            errors.append(((ahead - behind) / (2 * step) - hessian @ v).norm().item())
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.02) and errors[1] < 1e-3 * (hessian @ v).norm().item()


# --- scores ---------------------------------------------------------------------------------------------------------------


def test_fisher_is_a_sum_of_squared_scores() -> None:
    made = tiny.bases()
    params, p = made.one(0), made.own[0]
    fisher = tiny.self_fisher()
    torch.testing.assert_close(fisher, fisher.T, rtol=0, atol=1e-12)
    sharp = flow(exact.sampled_rows(made.log_p[0], tiny.TOPIC, 0.7, 0.9))
    with_weights = exact.fisher(made.model, params, tiny.TOPIC, sharp)
    number = {r: i for i, r in enumerate(RESPONSES)}
    for seed in range(3):
        v = tiny.random_direction(params, seed)
        slopes = tiny.along(params, v)  # s·v of every token
        of_tokens, of_responses = 0.0, 0.0
        for x in range(3):
            tokens = [[slopes[x, node, token].item() for node, token in path(r)] for r in RESPONSES]
            of_tokens += sum(p[x, number[r]].item() * sum(s * s for s in of) for r, of in zip(RESPONSES, tokens, strict=True)) / 3
            of_responses += sum(p[x, number[r]].item() * sum(of) ** 2 for r, of in zip(RESPONSES, tokens, strict=True)) / 3
        assert (v @ fisher @ v).item() == pytest.approx(of_tokens, rel=1e-11)
        assert of_responses == pytest.approx(of_tokens, rel=1e-11)  # scores are martingale differences: no covariance
        assert (v @ with_weights @ v).item() == pytest.approx((sharp * slopes.square()).sum().item(), rel=1e-11)
        assert exact.quadratic(made.model, params, sharp, 2 * v).item() == pytest.approx(4 * (v @ with_weights @ v).item(), rel=1e-11)
        assert abs((v @ with_weights @ v).item() / of_tokens - 1) > 1e-3


def path(response: tuple[int, ...]) -> list[tuple[int, int]]:
    """(node, token) of each token, by counting in base nine."""
    found, node, first = [], 0, 0
    for t, v in enumerate(response):
        found.append((first + node, v))
        node, first = node * 9 + v - 1, first + 9**t
    return found


def test_gradients_of_single_rows() -> None:
    made = tiny.bases()
    params = made.one(1)
    x, responses = torch.tensor([0, 8, 3, 0, 5]), torch.tensor([0, 5, 200, 7000, 1])
    found = exact.row_gradients(made.model, params, x, responses)
    for i, (prompt, r) in enumerate(zip(x.tolist(), responses.tolist(), strict=True)):
        row = torch.zeros(9, len(RESPONSES), dtype=torch.float64)
        row[prompt, r] = 1.0
        torch.testing.assert_close(found[i], explicit_loss(params, row)[1], rtol=0, atol=1e-11)


# --- divergences ----------------------------------------------------------------------------------------------------------


def test_divergences_are_sums_over_responses() -> None:
    made = tiny.bases()
    base, other = made.log_p
    prompts = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q, weight = made.own[0].tolist(), made.own[1].tolist(), prompts.tolist()
    pairs = [(x, r) for x in range(9) for r in range(len(RESPONSES))]
    facts = made.worlds[0].facts
    assert exact.kl(base, other, prompts).item() == pytest.approx(sum(weight[x] * p[x][r] * math.log(p[x][r] / q[x][r]) for x, r in pairs), rel=1e-11)
    assert exact.entropy(base, prompts).item() == pytest.approx(-sum(weight[x] * p[x][r] * math.log(p[x][r]) for x, r in pairs), rel=1e-11)
    assert exact.tokens(base, prompts).item() == pytest.approx(sum(weight[x] * p[x][r] * len(RESPONSES[r]) for x, r in pairs), rel=1e-12)
    for x, fact in enumerate(facts.tolist()):
        said = sum(p[x][r] for r in range(len(RESPONSES)) if next((v for v in RESPONSES[r] if v in (4, 5, 6)), None) == fact)
        assert exact.says(base, facts)[x].item() == pytest.approx(said, rel=1e-12)
    both = exact.kl(base, torch.stack([base, other]), prompts)
    assert both[0] == 0 and both[1] == exact.kl(base, other, prompts)


def test_truncated_responses_have_a_finite_entropy() -> None:
    sharp = exact.sampler(tiny.bases().log_p[0], 0.7, 0.9)
    p = response_probabilities(sharp)[0]
    assert (p == 0).any() and LENGTHS[p > 0].unique().numel() > 1
    found = exact.entropy(sharp, torch.eye(9, dtype=torch.float64)[0]).item()
    assert found == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x > 0), rel=1e-12)
    assert log_probs(tiny.bases().model, tiny.bases().one(0)).isfinite().all()
