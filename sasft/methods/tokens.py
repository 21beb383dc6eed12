"""Losses that are sums over tokens, each a function of the logits at the token's position."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drift.numerics import at_least_fp32
from sasft.methods.base import Batch, Costs, Objective, of_sources, score
from sasft.methods.frozen_base import FrozenBase, subset
from sasft.processes import sharded

_CHUNK = 256  # positions whose fp32 log-probabilities are in memory at once


class TokenObjective(Objective):
    """Cross-entropy, which on tokens of the sources ``on`` gives way to :meth:`tokens`; ``base``: if it needs θ₀'s logits."""

    one_pass = True
    in_step = True

    def __init__(self, costs: Costs, on: Sequence[str], base: FrozenBase | None = None) -> None:
        super().__init__(costs)
        self.on, self.base = on, base

    def tokens(self, batch: Batch, rows: Tensor, logits: Tensor, labels: Tensor, nll: Tensor, base: Tensor | None) -> Tensor:
        """Losses [N] of tokens: ``rows`` within the batch, ``logits`` [N, V], ``labels``, cross-entropies, θ₀'s logits."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        scored = score(model, batch)
        nll = scored.nll()
        chosen = of_sources(batch, self.on)
        everywhere = self.base is not None and self.base.shared and sharded(model)  # all processes must run it, or none
        if not chosen.any():
            if everywhere:
                self.base.score(batch, self.costs)
            return scored.total(nll)
        if chosen.all():
            base = None if self.base is None else self.base.score(batch, self.costs).logits
            return scored.total(self.tokens(batch, scored.rows, scored.logits, scored.labels, nll, base))
        chosen = chosen.to(scored.rows.device)
        at = chosen[scored.rows].nonzero().squeeze(-1)
        if everywhere:
            base = self.base.score(batch, self.costs).logits[at]
        else:
            base = None if self.base is None else self.base.score(subset(batch, chosen), self.costs).logits
        losses = self.tokens(batch, scored.rows[at], scored.logits[at], scored.labels[at], nll[at], base)
        return scored.total(nll.index_put((at,), losses))


def forward_kl(base: Tensor, logits: Tensor) -> Tensor:
    r""":math:`\sum_v p_0(v)[\log p_0(v)-\log p_\theta(v)]` at each position [N], from logits [N, V], in nats, in fp32 at least.

    >>> round(forward_kl(torch.zeros(1, 2), torch.log(torch.tensor([[0.25, 0.75]]))).item(), 6)
    0.143841
    """
    return in_chunks(_forward_kl, base, logits)


def _forward_kl(base: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(at_least_fp32(base), -1), torch.log_softmax(at_least_fp32(logits), -1)
    return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def in_chunks(per_token: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``per_token`` of a few positions at a time, computed anew in the backward pass, so that only the inputs are kept."""
    n = len(inputs[0])
    return torch.cat([checkpoint(per_token, *(x[i : i + _CHUNK] for x in inputs), use_reentrant=False, preserve_rng_state=False)
                      for i in range(0, n, _CHUNK)])
