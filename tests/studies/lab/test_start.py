"""What θ₀ foretells, against sums over responses one at a time, directional derivatives and closed forms."""

import pytest
import torch
from torch import Tensor

from studies.lab import exact
from studies.lab.experiment import Bases, rows_of_cell, self_rows
from studies.lab.model import flat
from studies.lab.start import Start
from studies.lab.tree import CONTENT, RESPONSES, WELL_FORMED, flow
from tests.studies.lab import tiny


def made() -> tuple[Bases, Start]:
    return tiny.bases(), tiny.start()


def test_curvatures_are_squares_of_directional_derivatives() -> None:
    bases, start = made()
    params = bases.one(0)
    task = flow(rows_of_cell(bases, 0, "foreign", "new"))
    along_task = task.sum(-1, keepdim=True) * bases.log_p[0].exp()  # where the task leads, the base's next token
    for seed in range(2):
        v = tiny.random_direction(params, seed)
        squared = tiny.along(params, v) ** 2
        for matrix, weights in ((start.fisher_self, flow(self_rows(bases, 0))), (start.fisher_others, flow(self_rows(bases, 0, prompts=(1, 2)))),
                                (start.gauss_newton, along_task)):
            assert (v @ matrix @ v).item() == pytest.approx((weights * squared).sum().item(), rel=1e-9)
    assert all((m - m.T).abs().max() < 1e-9 for m in (start.fisher_self, start.fisher_others, start.gauss_newton, start.hessian))


def test_the_task_s_gradient_and_hessian_are_differences_of_its_loss() -> None:
    bases, start = made()
    params = bases.one(0)
    v, step = tiny.random_direction(params, 3), 1e-3

    def loss(share: float) -> float:
        model = tiny.as_it_is(tiny.moved(params, share * v), 4)
        truth = bases.worlds[0].new_facts.tolist()
        return -sum(tiny.response_log_prob(model, x, (9, truth[x], 9, 0)).item() for x in range(3)) / 3

    below, here, above = loss(-step), loss(0), loss(step)
    assert (above - below) / (2 * step) == pytest.approx((start.task @ v).item(), rel=1e-4)
    assert (above - 2 * here + below) / step**2 == pytest.approx((v @ start.hessian @ v).item(), rel=1e-3)


def _score(bases: Bases, x: int, weights: dict[int, float]) -> Tensor:
    """Gradient [P] of the NLL of weighted responses to a prompt, one at a time."""
    model = tiny.as_it_is(bases.one(0), 4)
    loss = -sum(w * tiny.response_log_prob(model, x, RESPONSES[r]) for r, w in weights.items())
    by_name = dict(model.named_parameters())
    return flat(dict(zip(bases.params, torch.autograd.grad(loss, [by_name[n] for n in bases.params]), strict=True)))


@pytest.mark.parametrize("x", [1, 5])  # on the task's topic, and on another
def test_effects_of_style_and_content_by_sums_over_responses(x: int) -> None:
    bases, start = made()
    own, truth = bases.own[0, x], int(bases.worlds[0].new_facts[x])
    formed = [r for r in range(len(RESPONSES)) if WELL_FORMED[r]]
    said = {digit: sum(own[r].item() for r in formed if CONTENT[r] == digit) for digit in (4, 5, 6)}
    # By F1 the base's own answers sum to no force, so its ill-formed ones to the opposite of its well-formed ones'.
    restyled = _score(bases, x, {RESPONSES.index((9, digit, 9, 0)): p for digit, p in said.items()}) - _score(bases, x, {r: own[r].item() for r in formed})
    task = _score(bases, x, {RESPONSES.index((9, truth, 9, 0)): 1.0})
    revealed = _score(bases, x, {r: own[r].item() / said[truth] for r in formed if CONTENT[r] == truth})
    torch.testing.assert_close(start.style[x], (restyled + task - revealed) / 2, rtol=0, atol=1e-9)
    torch.testing.assert_close(start.content[x], (revealed + task - restyled) / 2, rtol=0, atol=1e-9)
    assert (start.style[x] + start.content[x]).norm() > 1


def test_spans_hold_the_effects_and_do_not_overlap() -> None:
    _, start = made()
    for topics, at in (((0,), slice(0, 3)), ((1, 2), slice(3, 9))):
        spans = start.spans(topics)
        style, content = spans["style"], spans["content"]
        for basis in (style, content):
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-10)
        assert (style.T @ content).abs().max() < 1e-10
        for vectors, basis in ((start.style[at], style), (start.content[at], torch.cat([style, content], 1))):
            torch.testing.assert_close(vectors @ basis @ basis.T, vectors, rtol=0, atol=1e-8)


def test_the_quadratic_model_s_descent_in_closed_form() -> None:
    g, h, positive, f = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0, 3.0], [2.0, -1.0, 0.0], [2.0, 1.0, 0.5], [0.5, 4.0, 0.0]))
    start = Start(g, h.diag(), positive.diag(), f.diag(), torch.zeros(3, 3), torch.zeros(9, 3), torch.zeros(9, 3))
    lam, lr, record = 0.25, 0.1, (0, 1, 4, 9)
    for curvature, gauss_newton in ((h, False), (positive, True)):
        found = start.descent(lam, lr, record, gauss_newton=gauss_newton)
        a = 0.75 * curvature + 0.25 * f
        for k, step in enumerate(record):
            # A geometric series; where a direction has no curvature, as many equal steps.
            expected = torch.where(a == 0, -0.75 * g * lr * step, -0.75 * g * (1 - (1 - lr * a) ** step) / torch.where(a == 0, 1, a))
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-15)


def test_the_first_step_of_the_mix_is_foretold_exactly() -> None:
    bases, start = made()
    mix = 0.75 * flow(rows_of_cell(bases, 0, "foreign", "new")) + 0.25 * flow(self_rows(bases, 0))
    force = exact.Expected(bases.model, mix).gradient(bases.one(0))
    torch.testing.assert_close(start.descent(0.25, 0.01, (1,))[0], -0.01 * force, rtol=0, atol=1e-13)
