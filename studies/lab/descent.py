"""Gradient descent on expected losses, no row drawn: many models, arms and seeds side by side."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from studies.lab.model import Params, Support, flat_stacked
from studies.lab.tree import PROMPTS
from studies.lab.walk import Walk

TOGETHER = 6  # models in one batch: more would only leave the processor's caches


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
    gradient = _gradient(model, flows)
    params, kept = {n: p.clone() for n, p in params.items()}, []
    for step in range(record[-1] + 1):
        if step in record:
            kept.append(flat_stacked(params))
        if step < record[-1]:
            for p, g in zip(params.values(), gradient(params), strict=True):
                p -= lr * g
    return torch.stack(kept)


def _gradient(model: nn.Module, flows: Tensor) -> Callable[[Params], Iterable[Tensor]]:
    """The gradients of all models' losses: over the whole tree where the flows fill it, else over what they touch."""
    support = Support(flows)
    if support.fills_the_tree:
        walk = Walk(model, PROMPTS[support.prompts])
        whole = walk.of(flows[:, support.prompts])

        def of_walk(params: Params) -> Iterable[Tensor]:
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            return torch.autograd.grad(walk.loss(leaves, whole), list(leaves.values()))

        return of_walk
    targets = support.of(flows)
    of_one = vmap(grad(lambda p, target: -(target * support.log_probs(model, p)).sum()))
    return lambda params: of_one(params, targets).values()
