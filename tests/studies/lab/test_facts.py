"""F1 to F5 of docs/theory.md, to numerical precision: every expectation is a sum over all responses."""

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.func import jvp

from studies.lab import exact
from studies.lab.exact import Expected
from studies.lab.model import Params, flat, log_probs, unflat
from studies.lab.tree import CONTENT, END, FINISHED, LENGTHS, N_NODES, NODES, RESPONSES, WELL_FORMED, flow, response_probabilities
from studies.lab.world import foreign_old, own_new, own_old, pure
from tests.studies.lab import tiny
from tests.studies.lab.tiny import TOPIC

DEPTH = torch.tensor([len(n) for n in NODES])
EXACT = 1e-11  # "zero": typical entries of a source's gradient are of order 1


def force(flow: Tensor, seed: int = 0) -> Tensor:
    """Minus the gradient at θ₀ of a source: where descent goes first."""
    made = tiny.bases()
    return -Expected(made.model, flow).gradient(made.one(seed))


def weighted_score(coefficients: Tensor, seed: int = 0) -> Tensor:
    """Σ c(x, n, v) ∇log p₀(v | x, n), by autograd through the tables."""
    made = tiny.bases()
    params = {n: p.clone().requires_grad_() for n, p in made.one(seed).items()}
    value = (coefficients * log_probs(made.model, params)).sum()
    return flat(dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True)))


def gradient_of(quantity, seed: int = 0) -> Tensor:
    """∇ of a function of the model's table at θ₀."""
    made = tiny.bases()
    params = {n: p.clone().requires_grad_() for n, p in made.one(seed).items()}
    return flat(dict(zip(params, torch.autograd.grad(quantity(log_probs(made.model, params)), list(params.values())), strict=True)))


def slope(quantity, direction: Tensor, seed: int = 0) -> float:
    """Derivative at θ₀ of a function of the table along a direction."""
    made = tiny.bases()
    params = dict(made.one(seed))
    return jvp(lambda p: quantity(log_probs(made.model, p)), (params,), (unflat(direction, params),))[1].item()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def bias(q: Tensor, seed: int = 0) -> Tensor:
    """Closed form of F2 for tokens that follow q [X, N, V]: Σ_n reach_q(n) Σ_v (q − p₀) ∇log p₀."""
    p0 = tiny.bases().log_p[seed]
    reach = torch.stack([w * tiny.reach(q[x]) for x, w in enumerate(TOPIC.tolist())])
    return weighted_score(reach[..., None] * (q.exp() - p0.exp()), seed)


# --- F1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_f1_own_data_exert_no_force(seed: int) -> None:
    own = tiny.bases().own[seed]
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.rand(9, generator=generator, dtype=torch.float64)  # any prompts, with any weights
    whole = flow(prompts[:, None] * own)
    before = torch.randn(9, N_NODES, 1, generator=generator, dtype=torch.float64)  # weights of either sign that look at (x, y_<t)
    ahead = torch.rand(9, N_NODES, 10, generator=generator, dtype=torch.float64)
    for part in (whole, before * whole):
        assert force(part, seed).abs().max() < EXACT
    assert force(ahead * whole, seed).norm() > 0.1  # the same, of a weight that looks at the token itself


@pytest.mark.parametrize("cap", [1, 2, 3, 4])
def test_f1_holds_for_any_stopping_time(cap: int) -> None:
    whole = tiny.self_flow()
    assert force(whole * (cap > DEPTH)[:, None]).abs().max() < EXACT
    stop = (torch.rand(9, N_NODES, generator=torch.Generator().manual_seed(cap)) < 0.3).tolist()  # a rule that reads the prefix
    going = torch.tensor([[not any(stop[x][NODES.index(n[:t])] for t in range(1, len(n) + 1)) for n in NODES[:91]] for x in range(3)])
    going = torch.cat([going, going[:, 10:91].repeat_interleave(9, 1) & ~torch.tensor(stop)[:3, 91:]], 1)
    stopped = whole[:3] * going[..., None]
    assert stopped.sum() < 0.9 * whole.sum() and force(torch.cat([stopped, torch.zeros_like(whole[3:])])).abs().max() < EXACT


def test_f1_a_finite_set_of_rows_has_a_force_of_covariance_fisher_over_n() -> None:
    """Tr F / n is the mean square of n rows' mean gradient: what a draw of self-data exerts by chance."""
    made, x = tiny.bases(), torch.zeros(len(RESPONSES), dtype=torch.int64)
    gradients = exact.row_gradients(made.model, made.one(0), x, torch.arange(len(RESPONSES)))
    p = made.own[0, 0]
    only = torch.eye(9, dtype=torch.float64)[0]
    fisher = exact.fisher(made.model, made.one(0), only)
    same(p @ gradients, torch.zeros(gradients.shape[1], dtype=torch.float64))
    torch.testing.assert_close((gradients * p[:, None]).T @ gradients, fisher, rtol=0, atol=1e-11)
    n = 64
    squares = torch.stack([(exact.drawn_rows(p[None], n, s)[0] @ gradients).square().sum() for s in range(300)])
    assert (squares.mean() - fisher.trace() / n).abs() < 4 * squares.std() / 300**0.5


# --- F2 -------------------------------------------------------------------------------------------------------------------


def spread(log_p: Tensor) -> Tensor:
    """Entropy of the responses."""
    return exact.entropy(log_p, TOPIC)


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.0, 0.9), (0.7, 0.9), (0.95, 1.0), (1.2, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_f2a_a_sharpened_sampler_pulls_towards_itself(temperature: float, top_p: float, seed: int) -> None:
    log_p = tiny.bases().log_p[seed]
    found = force(flow(exact.sampled_rows(log_p, TOPIC, temperature, top_p)), seed)
    q = exact.sampler(log_p, temperature, top_p)
    same(found, bias(q, seed))
    # the same as descent on KL(q ‖ p_θ)
    reached = TOPIC[:, None, None] * flow(response_probabilities(q))
    same(found, -gradient_of(lambda t: -(reached * t).sum(), seed))
    assert found.norm() > 0.02
    assert slope(spread, found, seed) * (temperature - 1 or -1) > 0  # entropy falls, or rises where the sampler flattens


@pytest.mark.parametrize("seed", [0, 1])
def test_f2a_close_to_one_the_force_is_descent_on_the_tokens_entropies(seed: int) -> None:
    log_p = tiny.bases().log_p[seed]
    reach = torch.stack([w * tiny.reach(log_p[x]) for x, w in enumerate(TOPIC.tolist())])
    down = -gradient_of(lambda t: -(reach[..., None] * t.exp() * t).sum(), seed)
    errors = [(force(flow(exact.sampled_rows(log_p, TOPIC, 1 / (1 + b))), seed) - b * down).norm().item() for b in (0.02, 0.01, 0.005)]
    assert all(3.8 < a / b < 4.2 for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.02 * (0.005 * down).norm()


def test_f2a_with_free_logits_every_sharpening_lowers_the_entropy() -> None:
    logits = 3 * torch.randn(4000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    p, h = log_p.exp(), -(log_p.exp() * log_p).sum(-1, keepdim=True)
    for temperature, top_p, sign in [(0.7, 0.9, -1), (0.2, 1.0, -1), (1.0, 0.5, -1), (1.0, 0.95, -1), (1.5, 1.0, 1)]:
        q = exact.sampler(log_p, temperature, top_p).exp()
        change = (-p * (log_p + h) * (q - p)).sum(-1)  # ∇_z H · (q − p)
        assert (sign * change > -1e-15).all() and (sign * change).mean() > 1e-3


def test_f2b_a_mean_per_response_pulls_towards_short_answers() -> None:
    made = tiny.bases()
    log_p, own = made.log_p[0], made.own[0]
    inverse = 1 / LENGTHS.double()
    found = force(flow(TOPIC[:, None] * own * inverse))
    coefficients = torch.zeros(9, N_NODES, 10, dtype=torch.float64)
    for x in range(3):
        a = tiny.foreseen(log_p[x], inverse)  # E[1/T | n, v]
        p = log_p[x].exp()
        coefficients[x] = TOPIC[x] * tiny.reach(log_p[x])[:, None] * p * (a - (p * a).sum(1, keepdim=True))
        assert (a[DEPTH < 3, END] > a[DEPTH < 3, 1:].max(1).values).all()  # never the same for all tokens: ending makes it largest
        assert (a[DEPTH == 3] == 0.25).all()
    same(found, weighted_score(coefficients))
    same(found, gradient_of(lambda t: (TOPIC[:, None] * response_probabilities(t) * inverse).sum()))
    assert found.norm() > 0.02 and slope(lambda t: exact.tokens(t, TOPIC), found) < -1e-3
    same(force(flow(exact.per_response(TOPIC[:, None] * own))), found * exact.tokens(log_p, TOPIC))


def test_f2b_a_mean_over_the_step_does_so_by_one_over_the_batch() -> None:
    made = tiny.bases()
    own, mean = TOPIC[:, None] * made.own[0], exact.tokens(made.log_p[0], TOPIC).item()
    lengths = torch.stack([own[:, n == LENGTHS].sum() for n in range(1, 5)])
    shorter = -gradient_of(lambda t: exact.tokens(t, TOPIC)) / mean**2
    errors, forces = [], []
    for batch in (2, 4, 8, 16, 32):
        others = torch.ones(1, dtype=torch.float64)  # distribution of the other rows' tokens, from batch - 1 on
        for _ in range(batch - 1):
            others = torch.nn.functional.conv1d(others[None, None], lengths.flip(0)[None, None], padding=3)[0, 0]
        total = torch.arange(len(others), dtype=torch.float64) + batch - 1
        weight = torch.stack([(others / (total + n)).sum() for n in range(1, 5)])  # E[1/ΣT | own T]
        forces.append(force(flow(batch * own * weight[LENGTHS - 1])))
        errors.append((batch * forces[-1] - shorter).norm().item())
    assert forces[0].norm() > 0.01 and errors[-1] < 0.05 * shorter.norm()
    assert all(1.6 < a / b < 2.3 for a, b in zip(errors[1:], errors[2:], strict=False))


RULES = {
    "finished": FINISHED.double(),
    "says something": (CONTENT > 0).double(),
    "well-formed, half of the others": 0.5 + 0.5 * WELL_FORMED.double(),
    "longer than two": (LENGTHS > 2).double(),
}


@pytest.mark.parametrize("rule", RULES)
def test_f2c_a_filter_pulls_towards_what_it_keeps(rule: str) -> None:
    made = tiny.bases()
    log_p, own, keep = made.log_p[0], made.own[0], RULES[rule]
    rows = exact.kept(TOPIC[:, None] * own, keep)
    found = force(flow(rows))
    passed = (TOPIC[:, None] * own * keep).sum()
    coefficients = torch.zeros(9, N_NODES, 10, dtype=torch.float64)
    for x in range(3):
        k = tiny.foreseen(log_p[x], keep)  # P(kept | n, v)
        p = log_p[x].exp()
        coefficients[x] = TOPIC[x] * tiny.reach(log_p[x])[:, None] * p * (k - (p * k).sum(1, keepdim=True)) / passed
    same(found, weighted_score(coefficients))
    same(found, gradient_of(lambda t: (TOPIC[:, None] * response_probabilities(t) * keep).sum().log()))
    assert found.norm() > 1e-3
    assert slope(lambda t: (TOPIC[:, None] * response_probabilities(t) * keep).sum(), found) == pytest.approx((passed * found @ found).item())


def test_f2c_answers_kept_for_their_truth_are_ascent_on_the_truth() -> None:
    """Own style, new content: answers drawn until one is true exert the policy gradient of log P(true | x)."""
    made = tiny.bases()
    truth = made.truth(0)
    rule = (WELL_FORMED & (truth[:, None] == CONTENT)).double()
    same(force(flow(own_new(made.own[0], TOPIC, truth))), gradient_of(lambda t: (TOPIC * (response_probabilities(t) * rule).sum(1).log()).sum()))


def test_f2c_without_duplicates_the_pull_is_flat() -> None:
    made = tiny.bases()
    rows = TOPIC[:, None] * made.own[0]
    for n in (10, 100, 1000):
        found = force(flow(exact.drop_likely_duplicates(rows, n)))
        odds = (1 - (1 - rows) ** n) / rows.clamp(min=1e-300) * (rows > 0)
        share = odds / (rows * odds).sum()
        same(found, gradient_of(lambda t, share=share: (TOPIC[:, None] * response_probabilities(t) * share).sum()))
        assert found.norm() > 1e-2 and slope(spread, found) > 0


def test_f2c_an_end_put_after_a_cut_is_not_sampled() -> None:
    cap = 2
    capped = tiny.self_flow() * (cap > DEPTH)[:, None]
    cut = torch.zeros_like(capped)
    cut[:, cap == DEPTH, END] = tiny.self_flow()[:, cap == DEPTH].sum(-1)  # reach of the cut
    found = force(capped + cut)
    same(found, weighted_score(cut))
    assert found.norm() > 0.1 and slope(lambda t: exact.tokens(t, TOPIC), found) < 0


@pytest.mark.parametrize("other", ["bfloat16", "another base"])
def test_f2d_another_sampler_pulls_towards_itself(other: str) -> None:
    made = tiny.bases()
    params = made.one(0)
    theirs = {n: p.bfloat16().double() for n, p in params.items()} if other == "bfloat16" else made.one(1)
    q = log_probs(made.model, theirs)
    found = force(flow(TOPIC[:, None] * response_probabilities(q)))
    same(found, bias(q))
    assert found.norm() > 0.01
    assert slope(lambda t: exact.kl(q, t, TOPIC), found) == pytest.approx(-(found @ found).item())


def test_f2d_a_nearby_sampler_pulls_by_fisher_times_the_way_to_it() -> None:
    made = tiny.bases()
    params = made.one(0)
    error = flat({n: p.bfloat16().double() - p for n, p in params.items()})
    scales, errors = (1.0, 0.5, 0.25), []
    for s in scales:
        q = log_probs(made.model, tiny.moved(params, s * error))
        errors.append((force(flow(TOPIC[:, None] * response_probabilities(q))) - tiny.self_fisher() @ (s * error)).norm().item())
    assert all(3.5 < a / b < 4.5 for a, b in zip(errors, errors[1:], strict=False))


# --- F3 -------------------------------------------------------------------------------------------------------------------


def self_loss(params: Params, rows: Tensor) -> float:
    return Expected(tiny.bases().model, flow(rows)).loss(params).item()


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_f3_the_self_loss_is_a_kl_anchor(size: float) -> None:
    made = tiny.bases()
    params = made.one(0)
    base = made.log_p[0]
    far = tiny.moved(params, size * tiny.random_direction(params, 7))
    there = log_probs(made.model, far)
    own, paper = (TOPIC[:, None] * r for r in (made.own[0], response_probabilities(exact.sampler(base, 0.7, 0.9))))
    p, q = response_probabilities(base), response_probabilities(there)
    divergence = (TOPIC[:, None] * p * (p / q).log()).sum().item()
    assert self_loss(far, own) - self_loss(params, own) == pytest.approx(divergence, rel=1e-11, abs=1e-13)
    assert exact.kl(base, there, TOPIC).item() == pytest.approx(divergence, rel=1e-11)
    # For the paper's sampler it is a difference of two divergences from the sampler, which falls below zero.
    sharp = response_probabilities(exact.sampler(base, 0.7, 0.9))
    from_sampler = [(TOPIC[:, None] * sharp * (sharp.clamp(min=1e-300) / r).log()).sum().item() for r in (q, p)]
    assert self_loss(far, paper) - self_loss(params, paper) == pytest.approx(from_sampler[0] - from_sampler[1], rel=1e-10)


def test_f3_fails_for_the_paper_s_sampler_by_its_divergence_from_the_base() -> None:
    made = tiny.bases()
    params, base = made.one(0), made.log_p[0]
    paper = TOPIC[:, None] * response_probabilities(exact.sampler(base, 0.7, 0.9))
    down = force(flow(paper))
    closer = tiny.moved(params, 0.02 * down / down.norm())
    change = self_loss(closer, paper) - self_loss(params, paper)
    gap = (paper * (paper.clamp(min=1e-300) / (TOPIC[:, None] * made.own[0]).clamp(min=1e-300)).log()).sum().item()
    assert -gap < change < -0.03 and exact.kl(base, log_probs(made.model, closer), TOPIC) > 0.03
    assert gap > 0.1


def test_f3_with_weights_of_the_prefix_it_is_a_weighted_kl_of_tokens() -> None:
    made = tiny.bases()
    params, base = made.one(0), made.log_p[0]
    weight = torch.rand(9, N_NODES, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = Expected(made.model, weight * tiny.self_flow())
    far = tiny.moved(params, 2.0 * tiny.random_direction(params, 3))
    there = log_probs(made.model, far)
    reach = tiny.self_flow().sum(-1)
    of_tokens = (reach * weight[..., 0] * (base.exp() * (base - there)).sum(-1)).sum().item()
    assert (expected.loss(far) - expected.loss(params)).item() == pytest.approx(of_tokens, rel=1e-11)


def test_f3_the_hessian_is_fisher() -> None:
    made = tiny.bases()
    params = made.one(0)
    whole = Expected(made.model, tiny.self_flow())
    for seed in range(4):
        v = tiny.random_direction(params, seed)
        same(whole.hessian_product(params, v), tiny.self_fisher() @ v)
    cap = tiny.self_flow() * (DEPTH < 2)[:, None]  # all of it where answers are cut after two tokens
    same(Expected(made.model, cap).hessian(params), exact.fisher(made.model, params, TOPIC, cap))
    paper = flow(exact.sampled_rows(made.log_p[0], TOPIC, 0.7, 0.9))
    v = tiny.random_direction(params, 0)
    for fisher in (tiny.self_fisher(), exact.fisher(made.model, params, TOPIC, paper)):
        assert (Expected(made.model, paper).hessian_product(params, v) - fisher @ v).norm() > 0.05 * (fisher @ v).norm()


def test_f3_a_lower_cap_sees_less_of_the_divergence() -> None:
    made = tiny.bases()
    base, other = made.log_p
    terms = TOPIC[:, None, None] * flow(made.own[0]) * (base - other)
    seen = [terms[:, cap > DEPTH].sum().item() for cap in (1, 2, 3, 4)]
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] and seen[3] == pytest.approx(exact.kl(base, other, TOPIC).item())
    by_hand = base[:3, 0].exp() * (base[:3, 0] - other[:3, 0])  # of responses cut after one token
    assert seen[0] == pytest.approx(by_hand.sum().item() / 3)


# --- F4 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_f4_the_remainders_are_of_the_predicted_order(seed: int) -> None:
    made = tiny.bases()
    params, base, fisher = made.one(seed), made.log_p[seed], tiny.self_fisher(seed)
    restoring, forgetting = [], []
    v = tiny.random_direction(params, 10 + seed)
    for size in (4e-2, 2e-2, 1e-2, 5e-3):
        there = tiny.moved(params, size * v)
        restoring.append((Expected(made.model, tiny.self_flow(seed)).gradient(there) - size * fisher @ v).norm().item())
        forgetting.append(abs(exact.kl(base, log_probs(made.model, there), TOPIC).item() - size**2 * (v @ fisher @ v).item() / 2))
    assert all(3.5 < a / b < 4.5 for a, b in zip(restoring[1:], restoring[2:], strict=False))
    assert all(7 < a / b < 9 for a, b in zip(forgetting[1:], forgetting[2:], strict=False))


def test_f4_where_fisher_is_flat_forgetting_is_of_fourth_order() -> None:
    """F is singular. Its kernel is free to second and third order, not altogether."""
    made = tiny.bases()
    params, base = made.one(0), made.log_p[0]
    values, vectors = torch.linalg.eigh(tiny.self_fisher())
    kernel = vectors[:, values < 1e-10 * values[-1]]
    assert 20 < kernel.shape[1] < 200
    v = kernel @ tiny.random_direction({"": kernel[0]}, 0)
    kls = [exact.kl(base, log_probs(made.model, tiny.moved(params, size * v)), TOPIC).item() for size in (0.04, 0.02, 0.01)]
    assert kls[-1] > 1e-12 and all(14 < a / b < 18 for a, b in zip(kls, kls[1:], strict=False))


# --- F5 -------------------------------------------------------------------------------------------------------------------


def phi_flow(matrix: Tensor, b: Tensor, time: float) -> Tensor:
    """−τ φ(τA) b with φ(z) = (1 − e^{−z})/z and φ(0) = 1: gradient flow on bᵀδ + ½δᵀAδ from 0."""
    values, vectors = torch.linalg.eigh(matrix)
    z = time * values
    phi = torch.where(z.abs() < 1e-12, 1.0, -torch.expm1(-z) / torch.where(z == 0, 1.0, z))
    return -time * vectors @ (phi * (vectors.T @ b))


def quadratic(lam: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g, H, its Gauss–Newton part, F and A = (1 − λ)H + λF of the lab."""
    made = tiny.bases()
    params, task = made.one(0), Expected(made.model, tiny.task_flow())
    g, h, f = task.gradient(params), task.hessian(params), tiny.self_fisher()
    part = exact.fisher(made.model, params, TOPIC, tiny.task_flow().sum(-1, keepdim=True) * made.log_p[0].exp())
    return g, h, part, f, (1 - lam) * h + lam * f


def test_f5_the_mix_need_not_have_a_minimiser() -> None:
    """The task's Hessian has negative curvature where F has none: no λ < 1 bounds the quadratic model from below."""
    _, h, part, f, _ = quadratic(0.5)
    values, vectors = torch.linalg.eigh(f)
    kernel = vectors[:, values < 1e-10 * values[-1]]
    on_kernel = torch.linalg.eigh(kernel.T @ h @ kernel)
    assert on_kernel.eigenvalues[0] < -0.01
    v = kernel @ on_kernel.eigenvectors[:, 0]
    for lam in (0.0, 0.5, 0.9, 0.999):
        assert (v @ ((1 - lam) * h + lam * f) @ v) < 0.5 * (1 - lam) * on_kernel.eigenvalues[0]
    # What is negative in H is not Gauss–Newton: that part is a Fisher matrix, under the base's own labels at the task's prefixes.
    assert torch.linalg.eigvalsh(part)[0] > -1e-11 and torch.linalg.eigvalsh(h)[0] < -1


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_f5_with_the_gauss_newton_part_there_is_one(lam: float) -> None:
    """(vᵀg)² ≤ χ² vᵀGv: the task pulls only where G is curved, so that the model is bounded and its flow arrives at an A⁻¹b."""
    g, _, part, f, _ = quadratic(lam)
    a, b = (1 - lam) * part + lam * f, (1 - lam) * g
    reach, p = tiny.task_flow().sum(-1), tiny.bases().log_p[0].exp()
    chi2 = ((tiny.task_flow().square() / p).sum(-1) / reach.clamp(min=1e-300) - reach).sum()  # of the task's tokens from the base's
    values, vectors = torch.linalg.eigh(part)
    assert ((vectors.T @ g).square() <= chi2 * (values.clamp(min=0) + 1e-12)).all()
    assert (g @ torch.linalg.solve(part + 1e-6 * torch.eye(len(g)), g)) <= chi2
    for time in (1.0, 1e2, 1e4, 1e6):
        assert (b + a @ phi_flow(a, b, time)).norm() <= (chi2 * (1 - lam) / (2 * torch.e * time)).sqrt()


def definite(lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """g, H, F of the lab where H is definite: on the range of Gauss–Newton + F, H replaced by that part and a ridge."""
    g, _, part, f, _ = quadratic(lam)
    return g, part + 0.1 * torch.eye(len(g), dtype=torch.float64), f


def test_f5_minimisers_shrink_along_generalised_eigenvectors() -> None:
    g, h, f = definite(0.5)
    curvature, basis = (torch.from_numpy(x) for x in scipy.linalg.eigh(f.numpy(), h.numpy()))  # VᵀHV = 1, VᵀFV = diag(f/h)
    curvature = curvature.clamp(min=0)
    inverse = basis.T @ h
    alone = inverse @ -torch.linalg.solve(h, g)
    for lam in (0.2, 0.5, 0.9):
        found = inverse @ -torch.linalg.solve((1 - lam) * h + lam * f, (1 - lam) * g)
        torch.testing.assert_close(found, alone / (1 + lam / (1 - lam) * curvature), rtol=0, atol=1e-9)
    # The basis is not orthogonal, and projecting on one of its vectors is not a coordinate.
    lengths = basis / basis.norm(dim=0)
    assert (lengths.T @ lengths - torch.eye(len(g))).abs().max() > 0.1
    projected = lengths.T @ -torch.linalg.solve(0.5 * h + 0.5 * f, 0.5 * g)
    before = lengths.T @ -torch.linalg.solve(h, g)
    assert (projected - before / (1 + curvature)).abs().max() > 0.01 * before.abs().max()


def test_f5_flow_decouples_only_where_the_matrices_commute() -> None:
    g, h, f = definite(0.5)
    time, lam = 0.05, 0.5

    def decoupled(h: Tensor, f: Tensor, g: Tensor) -> Tensor:
        z = time * ((1 - lam) * h + lam * f)
        return -time * (1 - lam) * g * -torch.expm1(-z) / z

    drift = phi_flow((1 - lam) * h + lam * f, (1 - lam) * g, time)
    curvature, basis = (torch.from_numpy(x) for x in scipy.linalg.eigh(f.numpy(), h.numpy()))
    found = basis.T @ h @ drift
    lengths2 = basis.square().sum(0)
    assert (found - decoupled(1 / lengths2, curvature / lengths2, basis.T @ g * lengths2.reciprocal())).norm() > 0.1 * found.norm()

    values, vectors = torch.linalg.eigh(h)
    commuting = vectors @ torch.diag(values.flip(0)) @ vectors.T
    drift = phi_flow((1 - lam) * h + lam * commuting, (1 - lam) * g, time)
    torch.testing.assert_close(vectors.T @ drift, decoupled(values, values.flip(0), vectors.T @ g), rtol=0, atol=1e-10)


def descend_quadratic(a: Tensor, b: Tensor, lr: float, steps: int) -> Tensor:
    drift = torch.zeros_like(b)
    for _ in range(steps):
        drift = drift - lr * (b + a @ drift)
    return drift


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9])
def test_f5_gradient_flow_is_an_entire_function_of_any_curvature(lam: float) -> None:
    """A is singular and indefinite here: A⁻¹ does not exist, the flow does."""
    g, _, _, _, a = quadratic(lam)
    values = torch.linalg.eigvalsh(a)
    assert values[0] < -0.1 and values.abs().min() < 1e-8
    b, time = (1 - lam) * g, 0.005
    n = len(b)
    joint = torch.zeros(n + 1, n + 1, dtype=torch.float64)  # d(δ, 1)/dτ = [[−A, −b], [0, 0]] (δ, 1)
    joint[:n, :n], joint[:n, n] = -a, -b
    flowed = phi_flow(a, b, time)
    same(torch.linalg.matrix_exp(time * joint)[:n, n], flowed)
    errors = [(descend_quadratic(a, b, time / k, k) - flowed).norm().item() for k in (400, 800, 1600)]
    assert all(1.9 < x / y < 2.1 for x, y in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.01 * flowed.norm()
    # Along a negative curvature it grows like e^{|a|τ}; it ends nowhere.
    eigenvalue, v = values[0].item(), torch.linalg.eigh(a).eigenvectors[:, 0]
    late, later = (abs((v @ phi_flow(a, b, t)).item()) for t in (10 / -eigenvalue, 11 / -eigenvalue))
    assert abs((v @ b).item()) > 1e-9 and later / late == pytest.approx(torch.e, rel=1e-3)


def test_f5_short_training_feels_the_anchor_at_second_order_only() -> None:
    g, h, _, f, _ = quadratic(0.5)
    errors = []
    for dose in (4e-4, 2e-4, 1e-4):  # (1 − λ)τ, the same with and without self-data
        drift = phi_flow(0.5 * h + 0.5 * f, 0.5 * g, 2 * dose)
        alone = phi_flow(h, g, dose)
        errors.append((drift - alone - dose**2 / 2 * f @ g).norm().item())  # λ/(1 − λ) = 1
    assert all(7 < a / b < 9 for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.05 * (1e-8 / 2 * f @ g).norm()


def real_descent(source: Tensor, lr: float, steps: int) -> Tensor:
    made = tiny.bases()
    params, expected = made.one(0), Expected(made.model, source)
    drift = torch.zeros(420, dtype=torch.float64)
    for _ in range(steps):
        drift = drift - lr * expected.gradient(tiny.moved(params, drift))
    return drift


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_f5_real_descent_leaves_the_quadratic_one_at_third_order(lam: float) -> None:
    g, _, _, _, a = quadratic(lam)
    source = (1 - lam) * tiny.task_flow() + lam * tiny.self_flow()
    same(Expected(tiny.bases().model, source).gradient(tiny.bases().one(0)), (1 - lam) * g)  # F1: self-data do not enter b
    errors, to_first = [], []
    for time in (4e-3, 2e-3, 1e-3, 5e-4):
        real = real_descent(source, time / 4, 4)
        errors.append((real - descend_quadratic(a, (1 - lam) * g, time / 4, 4)).norm().item())
        to_first.append((real + time * (1 - lam) * g).norm().item())
    assert all(7 < x / y < 9 for x, y in zip(errors[1:], errors[2:], strict=False))
    assert all(3.5 < x / y < 4.5 for x, y in zip(to_first[1:], to_first[2:], strict=False))


def test_f5_a_sampler_that_is_not_exact_adds_a_force_of_its_own() -> None:
    """b = (1 − λ)g + λg_q, and g_q does not fade as λ grows: at λ = 1 exact self-data leave the model where it is, the paper's do not."""
    made = tiny.bases()
    paper = flow(exact.sampled_rows(made.log_p[0], TOPIC, 0.7, 0.9))
    there = log_probs(made.model, tiny.moved(made.one(0), real_descent(paper, 0.004, 10)))
    assert exact.kl(made.log_p[0], there, TOPIC) > 0.01 and exact.entropy(there, TOPIC) < exact.entropy(made.log_p[0], TOPIC) - 0.1
    assert real_descent(tiny.self_flow(), 0.004, 10).abs().max() < 1e-13


def test_f5_more_self_data_never_means_more_forgetting_at_the_minimum() -> None:
    """No quadratic model: among any weights, those that minimise the mix forget less and fit less as λ grows."""
    made = tiny.bases()
    params, base = made.one(0), made.log_p[0]
    task = Expected(made.model, tiny.task_flow())
    candidates = [torch.zeros(420, dtype=torch.float64)]
    for lam in (0.0, 0.3, 0.6, 0.9):
        source = (1 - lam) * tiny.task_flow() + lam * tiny.self_flow()
        candidates += [real_descent(source, 0.02, steps) for steps in (2, 6, 12)]
    losses = torch.stack([task.loss(tiny.moved(params, c)) for c in candidates])
    forgotten = torch.stack([exact.kl(base, log_probs(made.model, tiny.moved(params, c)), TOPIC) for c in candidates])
    best = [int(((1 - lam) * losses + lam * forgotten).argmin()) for lam in torch.linspace(0, 1, 101).tolist()]
    assert len(set(best)) >= 4
    assert (forgotten[best].diff() <= 0).all() and (losses[best].diff() >= 0).all()


def test_rewriting_own_answers_is_a_force() -> None:
    """Style alone: the same contents with the same probabilities, and a force all the same."""
    own = tiny.bases().own[0]
    assert force(flow(own_old(own, TOPIC))).abs().max() < EXACT < 1 < force(flow(foreign_old(own, TOPIC, pure(9)))).norm()
