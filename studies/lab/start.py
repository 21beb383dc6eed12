r"""What is known at θ₀ of one base model and its task: gradients, curvatures, and what they predict of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.lab import exact
from studies.lab.exact import Expected
from studies.lab.experiment import ALL, OTHERS, TASK, Bases, rows_of_cell
from studies.lab.tree import PROMPTS, TOPICS, flow
from studies.lab.world import prompts_of


@dataclass(frozen=True)
class Start:
    r"""``task`` [P] and ``hessian`` [P, P]: the task's gradient and Hessian H; ``fisher_self``, ``fisher_others``: F on self-prompts, and on the
    topics that are to be kept. ``style``, ``content`` [X, P]: for each prompt the expected gradients' main effects
    :math:`\tfrac12[(g^{fo}-g^{oo})+(g^{fn}-g^{on})]` and :math:`\tfrac12[(g^{on}-g^{oo})+(g^{fn}-g^{fo})]`.
    """

    task: Tensor
    hessian: Tensor
    fisher_self: Tensor
    fisher_others: Tensor
    style: Tensor
    content: Tensor

    @classmethod
    def of(cls, bases: Bases, seed: int) -> "Start":
        """Compute all of it for one seed; a few seconds, most of it for the Fisher matrices."""
        model, params = bases.model, bases.one(seed)
        fisher = [exact.fisher(model, params, prompts_of([t])) for t in range(len(TOPICS))]
        task = Expected(model, flow(rows_of_cell(bases, seed, "foreign", "new")))
        cells = {(s, c): _by_prompt(bases, seed, s, c) for s in ("own", "foreign") for c in ("old", "new")}
        fo, fn, oo, on = (cells[s, c] for s in ("foreign", "own") for c in ("old", "new"))
        return cls(task.gradient(params), task.hessian(params), _mean(fisher, ALL), _mean(fisher, OTHERS),
                   ((fo - oo) + (fn - on)) / 2, ((on - oo) + (fn - fo)) / 2)

    def directions(self, topics: Sequence[int] = TASK) -> tuple[Tensor, Tensor]:
        """Unit vectors [P] along the mean style effect and the mean content effect on the prompts of some topics."""
        at = prompts_of(topics)
        return tuple(v / v.norm() for v in (at @ self.style, at @ self.content))

    def descent(self, lam: float, lr: float, record: Sequence[int]) -> Tensor:
        r"""Drift [K, P] that gradient descent on the quadratic model reaches (F5): :math:`\delta\leftarrow\delta-\mathrm{lr}[(1-\lambda)(g+H\delta)+\lambda F\delta]`."""
        curvature = (1 - lam) * self.hessian + lam * self.fisher_self
        drift, found = torch.zeros_like(self.task), []
        for step in range(record[-1] + 1):
            if step in record:
                found.append(drift)
            drift = drift - lr * ((1 - lam) * self.task + curvature @ drift)
        return torch.stack(found)


def _mean(matrices: Sequence[Tensor], topics: Sequence[int]) -> Tensor:
    return torch.stack([matrices[t] for t in topics]).mean(0)


def _by_prompt(bases: Bases, seed: int, style: str, content: str) -> Tensor:
    """Expected gradients of a cell at each prompt, [X, P]."""
    rows = rows_of_cell(bases, seed, style, content, ALL) * len(PROMPTS)
    found = []
    for x in range(len(PROMPTS)):
        only = torch.zeros_like(rows)
        only[x] = rows[x]
        found.append(Expected(bases.model, flow(only)).gradient(bases.one(seed)))
    return torch.stack(found)
