r"""What is known at θ₀ of one base model and its task: gradients, curvatures, and what they predict of training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.lab import exact
from studies.lab.exact import Expected
from studies.lab.experiment import ALL, OTHERS, TASK, Bases, rows_of_cell
from studies.lab.tree import TOPICS, flow
from studies.lab.world import prompts_of


@dataclass(frozen=True)
class Start:
    r"""``task`` [P] and ``hessian`` [P, P]: the task's gradient and Hessian H; ``gauss_newton``: the
    part of H that is positive semidefinite, :math:`\mathbb E\sum_tJ_t^\top(\operatorname{diag}p-pp^\top)J_t`; ``fisher_self``, ``fisher_others``: F on self-prompts, and on the
    topics that are to be kept. ``style``, ``content`` [X, P]: for each prompt the expected gradients' main effects
    :math:`\tfrac12[(g^{fo}-g^{oo})+(g^{fn}-g^{on})]` and :math:`\tfrac12[(g^{on}-g^{oo})+(g^{fn}-g^{fo})]`.
    """

    task: Tensor
    hessian: Tensor
    gauss_newton: Tensor
    fisher_self: Tensor
    fisher_others: Tensor
    style: Tensor
    content: Tensor

    @classmethod
    def of(cls, bases: Bases, seed: int) -> "Start":
        """Compute all of it for one seed; a few seconds, most of it for the Fisher matrices."""
        model, params = bases.model, bases.one(seed)
        fisher = [exact.fisher(model, params, prompts_of([t])) for t in range(len(TOPICS))]
        task = flow(rows_of_cell(bases, seed, "foreign", "new"))
        gauss_newton = exact.fisher(model, params, prompts_of(TASK), task.sum(-1, keepdim=True) * bases.log_p[seed].exp())
        expected = Expected(model, task)
        cells = {(s, c): gradients_by_prompt(bases, seed, rows_of_cell(bases, seed, s, c, ALL)) for s in ("own", "foreign") for c in ("old", "new")}
        fo, fn, oo, on = (cells[s, c] for s in ("foreign", "own") for c in ("old", "new"))
        return cls(expected.gradient(params), expected.hessian(params), gauss_newton, _mean(fisher, ALL), _mean(fisher, OTHERS),
                   ((fo - oo) + (fn - on)) / 2, ((on - oo) + (fn - fo)) / 2)

    def spans(self, topics: Sequence[int] = TASK) -> dict[str, Tensor]:
        """Orthonormal bases [P, k] of the span of style's effects on the prompts of some topics, and of what is left of content's beside it."""
        at = prompts_of(topics) > 0
        style = torch.linalg.qr(self.style[at].T)[0]
        content = self.content[at].T
        return {"style": style, "content": torch.linalg.qr(content - style @ (style.T @ content))[0]}

    def descent(self, lam: float, lr: float, record: Sequence[int], *, gauss_newton: bool = False) -> Tensor:
        r"""Drift [K, P] that gradient descent on the quadratic model reaches (F5): :math:`\delta\leftarrow\delta-\mathrm{lr}[(1-\lambda)(g+H\delta)+\lambda F\delta]`.

        H may be indefinite, and then δ grows without bound; ``gauss_newton`` puts its positive semidefinite part in its place.
        """
        curvature = (1 - lam) * (self.gauss_newton if gauss_newton else self.hessian) + lam * self.fisher_self
        drift, found = torch.zeros_like(self.task), []
        for step in range(record[-1] + 1):
            if step in record:
                found.append(drift)
            drift = drift - lr * ((1 - lam) * self.task + curvature @ drift)
        return torch.stack(found)


def _mean(matrices: Sequence[Tensor], topics: Sequence[int]) -> Tensor:
    return torch.stack([matrices[t] for t in topics]).mean(0)


def gradients_by_prompt(bases: Bases, seed: int, rows: Tensor) -> Tensor:
    """Expected gradients [X, P] of rows [X, R] at each prompt."""
    found = []
    for x, of_prompt in enumerate(rows):
        only = torch.zeros_like(rows)
        only[x] = of_prompt / of_prompt.sum()
        found.append(Expected(bases.model, flow(only)).gradient(bases.one(seed)))
    return torch.stack(found)
