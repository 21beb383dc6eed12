"""The main experiment's tables: each number against its definition, drifts made by hand in place of training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from studies.lab import courses, exact
from studies.lab.courses import LINE, RECORDED_PUSH
from studies.lab.experiment import LAMBDAS, TASK_ONLY, Bases, cell, measure, mixed, self_rows
from studies.lab.model import flat, log_probs, unflat
from studies.lab.start import Start
from studies.lab.tree import FINISHED, N_RESPONSES, RESPONSE_OF, flow, response_probabilities
from studies.lab.world import prompts_of
from tests.studies.lab import tiny

RECORD = (0, 1, 4)


def small() -> Bases:
    """The tests' bases with a short record."""
    made = tiny.bases()
    return Bases.of(replace(made.setup, record=RECORD, lr=0.002), made.params)


def steps(*directions: Tensor, size: float = 1e-3) -> Tensor:
    """A course [K, P]: nothing, then two drifts."""
    return torch.stack([torch.zeros_like(directions[0]), *(size * d for d in directions)])


def gradient_of_the_divergence(bases: Bases, drift: Tensor) -> Tensor:
    """∇KL(p₀ ‖ p_θ) on all prompts, which by F3 is the self-data's gradient."""
    at = (flat(bases.one(0)) + drift).requires_grad_()
    return torch.autograd.grad(exact.kl(bases.log_p[0], log_probs(bases.model, unflat(at, bases.one(0))), tiny.ALL), at)[0]


def cos(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# --- arms, and rival accounts ----------------------------------------------------------------------------------------------


def test_a_row_for_every_arm_step_and_seed() -> None:
    bases = small()
    start = torch.stack([flat(bases.one(s)) for s in range(2)])
    weights = torch.stack([torch.stack([start + 0.01 * (a + 1) * k + torch.tensor([[0.0], [0.001 * k]]) for k in range(3)]) for a in range(2)])
    rows = courses.arms_table(bases, {"a": cell("own", "old"), "b": cell("own", "old")}, weights)
    assert [(r["arm"], r["step"], r["seed"]) for r in rows] == [(a, k, s) for a in "ab" for k in RECORD for s in range(2)]
    for r in rows:
        k = RECORD.index(r["step"])
        shift = 0.01 * ("ab".index(r["arm"]) + 1) * k + 0.001 * k * r["seed"]
        assert r["drift"] == pytest.approx(shift * 420**0.5)
    at = measure(bases, weights[1, 2])
    assert all(rows[-1][name] == pytest.approx(values[1].item(), rel=1e-9) for name, values in at.items())


def test_accounts_of_a_drift_and_of_the_data() -> None:
    bases, start = small(), tiny.start()
    params, v, w = bases.one(0), tiny.random_direction(tiny.bases().one(0), 0), start.style[:3].sum(0) / start.style[:3].sum(0).norm()
    arms = {"task": cell("foreign", "new"), "mix": mixed(0.5, self_rows)}
    rows = list(courses._accounts(bases, 0, start, arms, {"task": steps(v, w), "mix": steps(w, v, size=0.1)}))
    assert [(r["arm"], r["step"], r["seed"]) for r in rows] == [(a, k, 0) for a in arms for k in RECORD]
    kept = flow(self_rows(bases, 0, prompts=(1, 2)))
    tokens = kept.sum().item()  # of an expected answer
    for r, drift in ((rows[1], 1e-3 * v), (rows[4], 0.1 * w)):
        along = tiny.along(params, drift)
        assert r["fisher"] == pytest.approx((kept * along**2).sum().item() / 2 / tokens, rel=1e-9)
        per_weight = torch.stack([start.fisher_others[i, i] * drift[i] ** 2 for i in range(420)]).sum().item()
        assert r["fisher_diagonal"] == pytest.approx(per_weight / 2 / tokens, rel=1e-9)
        assert r["l2"] == pytest.approx(drift.norm().item()) and r["relative"] == pytest.approx(drift.norm().item() / flat(params).norm().item())
        assert r["spectral"] == pytest.approx(max(np.linalg.svd(p.numpy(), compute_uv=False)[0] for p in unflat(drift, params).values() if p.dim() == 2))
    observed = measure(bases, torch.stack([flat(bases.one(s)) + torch.stack([1e-3 * v, 0 * v])[s] for s in range(2)]))["kl"][0].item()
    assert rows[1]["fisher"] == pytest.approx(observed, rel=0.02)  # F4
    assert rows[2]["along_style"] == pytest.approx(1e-3) and rows[2]["along_content"] < 1e-12  # w lies in the span of style's
    assert rows[1]["along_style"] ** 2 + rows[1]["along_content"] ** 2 < 1e-6
    assert all(rows[k][name] == 0 for k in (0, 3) for name in ("fisher", "fisher_diagonal", "l2", "relative", "spectral", "along_style", "tokens"))
    # The task's rows are four tokens of the foreign style; half of the mix are the base's own rows, which say its facts 2/3 of the time elsewhere.
    truth = bases.worlds[0].new_facts.tolist()
    table = bases.log_p[0]
    nll = -sum(response_probabilities(table)[x, RESPONSE_OF[(9, truth[x], 9, 0)]].log().item() for x in range(3)) / 3
    assert rows[0]["perplexity"] == pytest.approx(nll / 4) and [r["tokens"] for r in rows[:3]] == pytest.approx([0, 4, 16])
    own = flow(self_rows(bases, 0))
    entropy, length = exact.entropy(table, tiny.ALL).item(), own.sum().item()
    assert rows[3]["perplexity"] == pytest.approx((nll + entropy) / (4 + length)) and rows[4]["tokens"] == pytest.approx((4 + length) / 2)
    facts = exact.says(table, bases.worlds[0].facts)[3:].sum().item() / 9
    assert rows[0]["no_replay"] == pytest.approx(1) and rows[3]["no_replay"] == pytest.approx(1 - facts / 2)
    assert rows[0]["style_distance"] == pytest.approx(1 - table[:3, 0, 9].exp().mean().item())


def test_style_distance_and_replay_of_hand_made_sources() -> None:
    bases, world = small(), tiny.bases().worlds[0]
    rows = torch.zeros(9, N_RESPONSES, dtype=torch.float64)
    rows[4, RESPONSE_OF[(8, int(world.facts[4]), 0)]] = 0.2  # a kept topic's fact
    rows[8, RESPONSE_OF[(8, 7, int(world.facts[8]), 0)]] = 0.1  # another's, in a manner of its own
    rows[8, RESPONSE_OF[(8, int(world.new_facts[8]), int(world.facts[8]), 0)]] = 0.3  # said too late
    rows[0, RESPONSE_OF[(8, int(world.facts[0]), 0)]] = 0.4  # the task's topic
    assert courses.replay(bases, 0, flow(rows)) == pytest.approx(0.3) and courses.replay(bases, 0, flow(2 * rows)) == pytest.approx(0.3)
    openers = bases.log_p[0, [4, 8, 8, 0], 0].exp()
    mean = (openers * torch.tensor([[0.2], [0.1], [0.3], [0.4]])).sum(0)
    assert courses.style_distance(bases, 0, flow(rows)) == pytest.approx(1 - mean[8].item())
    assert courses.style_distance(bases, 0, flow(self_rows(bases, 0))) < 1e-12


# --- the push, and the dose --------------------------------------------------------------------------------------------------


def test_the_push_is_the_gradient_of_the_divergence() -> None:
    bases, start = small(), tiny.start()
    theta0 = flat(bases.one(0))
    away, back = -start.task / start.task.norm(), tiny.random_direction(bases.one(0), 5)
    drift = {RECORDED_PUSH[0]: steps(away, away, size=0.2), RECORDED_PUSH[1]: steps(back, away, size=0.1)}
    rows = list(courses._push(bases, 0, start, theta0, drift))
    assert [(r["course"], r["step"]) for r in rows] == [(c, k) for c in RECORDED_PUSH for k in RECORD[1:]] + [("line", 0)] * len(LINE)
    for r, delta in ((rows[0], 0.2 * away), (rows[2], 0.1 * back), (rows[4], LINE[0] * 0.2 * away)):
        force, foretold = gradient_of_the_divergence(bases, delta), start.fisher_self @ delta
        params = unflat(theta0 + delta, bases.one(0))
        task = exact.Expected(bases.model, cell("foreign", "new")(bases, 0)).gradient(params)
        expected = {"slope": (force @ foretold / foretold.norm() ** 2).item(), "cos_prediction": cos(force, foretold), "cos_drift": cos(force, delta),
                    "cos_task": cos(force, task), "force": force.norm().item(), "predicted": foretold.norm().item(), "drift": delta.norm().item()}
        assert all(r[name] == pytest.approx(value, rel=1e-6) for name, value in expected.items())
    assert rows[4]["slope"] == pytest.approx(1, abs=0.01) and rows[4]["cos_prediction"] > 0.999 and abs(rows[-1]["slope"] - 1) > 0.01
    assert rows[4]["drift"] == pytest.approx(LINE[0] * rows[-1]["drift"]) and rows[-1]["slope"] == pytest.approx(rows[0]["slope"])


def test_the_dose_curve_and_what_is_foretold_of_it() -> None:
    bases, start = small(), tiny.start()
    tokens = flow(self_rows(bases, 0, prompts=(1, 2))).sum().item()
    spans = start.spans()
    names = {0.0: TASK_ONLY, **{lam: f"SA-SFT {lam}" for lam in LAMBDAS}}
    drift = {name: steps(-start.task, -2 * start.task, size=0.002 * (1 - lam)) for lam, name in names.items()}  # the first step, as it is
    rows = list(courses._dose(bases, 0, start, drift))
    assert [(r["lam"], r["step"]) for r in rows] == [(lam, k) for lam in names for k in RECORD[1:]]
    for r in rows:
        first = r["step"] == 1
        for name, v in spans.items():
            assert not first or r[f"along_{name}"] == pytest.approx(r[f"along_{name}_foretold"])
            assert r[f"along_{name}"] == pytest.approx(0.002 * (1 - r["lam"]) * (1 if first else 2) * (v.T @ start.task).norm().item())
        # Four steps by hand.
        for column, curvature in (("kl_foretold", start.hessian), ("kl_foretold_gn", start.gauss_newton)):
            delta = torch.zeros(420, dtype=torch.float64)
            for _ in range(r["step"]):
                delta = delta - 0.002 * ((1 - r["lam"]) * (start.task + curvature @ delta) + r["lam"] * start.fisher_self @ delta)
            assert r[column] == pytest.approx((delta @ start.fisher_others @ delta).item() / 2 / tokens, rel=1e-9)
        for name, v in spans.items():
            for letter, matrix in (("f", start.fisher_self), ("h", start.gauss_newton)):
                assert r[f"{letter}_{name}"] == pytest.approx(sum((c @ matrix @ c).item() for c in v.T) / 3)
    at_end = [r["kl_foretold"] for r in rows if r["step"] == 4]
    assert at_end == sorted(at_end, reverse=True)


# --- style and content at the start, and forces ------------------------------------------------------------------------------


def test_coherence_and_agreement_of_hand_made_effects() -> None:
    empty, axes = torch.zeros(0), torch.eye(600, dtype=torch.float64)

    def start(style: Tensor, content: Tensor) -> Start:
        return Start(empty, empty, empty, empty, empty, style, content)

    # Style: the same two directions in every topic, in other proportions. Content: a direction of its own for every prompt.
    shared = torch.stack([(3 + x % 3) * axes[0] + (x % 2) * axes[1] for x in range(9)])
    row = courses._start(7, start(shared, axes[10:19]))
    assert row["seed"] == 7
    assert row["coherence_content"] == pytest.approx(1 / 9) and row["cos_topics_content"] == pytest.approx(0, abs=1e-12)
    mean = shared.mean(0).norm().item() ** 2 / (shared.norm(dim=1) ** 2).mean().item()
    assert row["coherence_style"] == pytest.approx(mean) and row["coherence_style"] > 0.9
    means = [shared[k : k + 3].mean(0) for k in (0, 3, 6)]
    assert row["cos_topics_style"] == pytest.approx((cos(means[0], means[1]) + cos(means[0], means[2]) + cos(means[1], means[2])) / 3)
    assert row["shared_style"] == pytest.approx(1, abs=1e-9) and row["shared_p_style"] == pytest.approx(1 / 201)
    assert row["shared_content"] < 0.1 and row["shared_null_style"] < 0.1 and row["shared_p_content"] > 0.05
    assert row["cos_style_content"] == pytest.approx(0, abs=1e-12)
    assert courses._start(0, start(shared, -shared))["cos_style_content"] == pytest.approx(-1)


def test_forces_at_the_start() -> None:
    bases, params = small(), tiny.bases().one(1)
    rows = {r["source"]: r for r in courses.forces(bases, 1)}
    assert len(rows) == 12 and all(r["seed"] == 1 for r in rows.values())
    assert rows["exact"]["of_task"] < 1e-12 and rows["task"]["of_task"] == 1
    assert all(r["of_task"] > 1e-6 for name, r in rows.items() if name != "exact")
    # Against ∇KL(q ‖ p_θ) (F2 i): the norm of the pull of the paper's sampler.
    at = {n: p.clone().requires_grad_() for n, p in params.items()}
    sharp = exact.sampler(bases.log_p[1], 0.7, 0.9)
    pull = torch.autograd.grad(exact.kl(sharp, log_probs(bases.model, at), prompts_of((0, 1, 2))), list(at.values()))
    assert rows["paper (0.7, 0.9)"]["norm"] == pytest.approx(sum(g.norm() ** 2 for g in pull).sqrt().item())
    # Against ∇ log P(kept) (F2 ii).
    kept = (tiny.ALL @ (response_probabilities(log_probs(bases.model, at)) * FINISHED).sum(1)).log()
    pull = torch.autograd.grad(kept, list(at.values()))
    assert rows["unfinished dropped"]["norm"] == pytest.approx(sum(g.norm() ** 2 for g in pull).sqrt().item())
    assert rows["sampled in bfloat16"]["norm"] < rows["own answers, foreign style"]["norm"] / 10
    assert all(r["of_task"] == pytest.approx(r["norm"] / rows["task"]["norm"]) for r in rows.values())
