"""Gradient descent on expected losses, no row drawn: many models, arms and seeds side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from studies.lab.model import Params, flat_stacked
from studies.lab.walk import Walk

TOGETHER = 45_000  # prefixes read in one batch of models: more would only leave the processor's caches


def descend(model: nn.Module, params: Params, flows: Tensor, *, lr: float, record: Sequence[int]) -> Tensor:
    r"""Weights [K, M, P] of M models after the steps ``record`` (rising; 0 is the start) of :math:`\theta\leftarrow\theta-\mathrm{lr}\,\nabla L`.

    ``params``: their starting weights, stacked [M, ...]; ``flows`` [M, X, N, V]: the source of each.
    """
    walk, found = Walk(model, flows), []
    size = max(1, TOGETHER // walk.size)
    for low in range(0, len(flows), size):
        some = slice(low, low + size)
        found.append(_together(walk, {n: p[some].clone() for n, p in params.items()}, walk.of(flows[some]), lr, record))
    return torch.cat(found, 1)


def _together(walk: Walk, params: dict[str, Tensor], flows: Sequence[Tensor], lr: float, record: Sequence[int]) -> Tensor:
    kept = []
    for step in range(record[-1] + 1):
        if step in record:
            kept.append(flat_stacked(params))
        if step < record[-1]:
            for p, g in zip(params.values(), walk.gradients(params, flows).values(), strict=True):
                p -= lr * g
    return torch.stack(kept)
