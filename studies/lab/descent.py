"""Gradient descent on expected losses, no row drawn: many models, arms and seeds side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from studies.lab.model import Params, Support, flat_stacked, log_probs
from studies.lab.tree import N_NODES, PROMPTS

TOGETHER = 12  # models in one batch: more would only leave the processor's caches


def descend(model: nn.Module, params: Params, flows: Tensor, *, lr: float, record: Sequence[int]) -> Tensor:
    r"""Weights [K, M, P] of M models after the steps ``record`` (rising; 0 is the start) of :math:`\theta\leftarrow\theta-\mathrm{lr}\,\nabla L`.

    ``params``: their starting weights, stacked [M, ...]; ``flows`` [M, X, N, V]: the source of each.
    """
    found = []
    for low in range(0, len(flows), TOGETHER):
        some = slice(low, low + TOGETHER)
        found.append(_together(model, {n: p[some] for n, p in params.items()}, flows[some], lr, record))
    return torch.cat(found, 1)


def _together(model: nn.Module, params: Params, flows: Tensor, lr: float, record: Sequence[int]) -> Tensor:
    support = Support(flows)
    targets = support.of(flows)

    def loss(p: Params, target: Tensor) -> Tensor:
        if len(support.nodes) > N_NODES // 2:
            return -(target * log_probs(model, p, PROMPTS[support.prompts])[:, support.nodes]).sum()
        return -(target * support.log_probs(model, p)).sum()

    gradient = vmap(grad(loss))
    params, kept = {n: p.clone() for n, p in params.items()}, []
    for step in range(record[-1] + 1):
        if step in record:
            kept.append(flat_stacked(params))
        if step < record[-1]:
            for p, g in zip(params.values(), gradient(params, targets).values(), strict=True):
                p -= lr * g
    return torch.stack(kept)
