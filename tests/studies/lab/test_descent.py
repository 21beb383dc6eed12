"""Descent side by side against a plain loop on each model."""

import pytest
import torch

from studies.lab import descent
from studies.lab.descent import descend
from studies.lab.model import flat_stacked, log_probs
from studies.lab.tree import NODES, flow
from studies.lab.walk import Walk
from studies.lab.world import foreign_old, own_old, pure
from tests.studies.lab import tiny


@pytest.mark.parametrize("kind", ["narrow", "wide"])
def test_descent_is_a_loop_of_plain_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.bases()
    if kind == "narrow":
        flows = torch.stack([tiny.task_flow(s % 2) * (1 + s) for s in range(3)])
    else:
        flows = torch.stack([0.5 * tiny.task_flow(s % 2) + 0.5 * tiny.self_flow(s % 2) for s in range(3)])
    monkeypatch.setattr(descent, "TOGETHER", 2 * Walk(made.model, flows).size)
    params = {n: p[[0, 1, 0]] for n, p in made.params.items()}
    found = descend(made.model, params, flows, lr=0.01, record=(0, 1, 3))
    assert found.shape == (3, 3, 420)
    assert all(torch.equal(params[n], made.params[n][[0, 1, 0]]) for n in params)  # the start is left alone
    torch.testing.assert_close(found[0], flat_stacked(params), rtol=0, atol=0)
    for m in range(3) if kind == "narrow" else [2]:
        model = tiny.as_it_is({n: p[m] for n, p in params.items()}, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        reached = {}
        for step in range(1, 4):
            optimizer.zero_grad()
            loss = -sum(flows[m, x, n] @ tiny.next_token(model, x, NODES[n]) for x, n in flows[m].sum(-1).nonzero().tolist()) if kind == "narrow" else (
                -(flows[m] * log_probs(made.model, dict(model.named_parameters()))).sum())
            loss.backward()
            optimizer.step()
            reached[step] = torch.cat([dict(model.named_parameters())[n].detach().flatten() for n in params])
        for k, step in [(1, 1), (2, 3)]:
            torch.testing.assert_close(found[k, m], reached[step], rtol=0, atol=1e-11)


def test_own_rows_move_nothing() -> None:
    made = tiny.bases()
    flows = torch.stack([flow(own_old(made.own[s], tiny.TOPIC)) for s in range(2)])
    still = descend(made.model, made.params, flows, lr=0.004, record=(5,))
    assert (still[0] - flat_stacked(made.params)).abs().max() < 1e-14
    styled = torch.stack([flow(foreign_old(made.own[s], tiny.TOPIC, pure(9))) for s in range(2)])
    assert (descend(made.model, made.params, styled, lr=0.004, record=(5,))[0] - flat_stacked(made.params)).abs().max() > 0.01
