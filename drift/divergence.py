"""How far one set of predictions is from another: KL both ways, entropy, NLL, token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

_HUGE = 1e30  # stands for −log 0
_CHUNK = 128  # positions whose [chunk, V] log-probabilities are in memory at once
_ROWS = 8192  # rows of a head that are widened at once


@dataclass(frozen=True)
class Projected:
    """Logits :math:`hW^\top + b` that are formed a few positions at a time: ``hidden`` [N, d], ``weight`` [V, d], ``bias`` [V] or None.

    Whatever the types of these, the product runs in float32 at least: rounding logits to bfloat16 can double a small KL.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hidden.dim() != 2 or self.weight.dim() != 2 or self.hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(f"hidden [N, d] and weight [V, d] must share d, got {tuple(self.hidden.shape)} and {tuple(self.weight.shape)}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.hidden), len(self.weight)))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def formed(self, positions: slice, out: Tensor) -> Tensor:
        """Logits of some positions, [n, V], in ``out`` and in its type."""
        hidden = self.hidden[positions].to(out.device, out.dtype)
        if self.weight.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        else:
            for i in range(0, len(self.weight), _ROWS):
                out[:, i : i + _ROWS] = hidden @ self.weight[i : i + _ROWS].to(out.dtype).T
        return out if self.bias is None else out.add_(self.bias)

    def to(self, device: torch.device) -> "Projected":
        """The same on another device."""
        return Projected(self.hidden.to(device), self.weight.to(device), None if self.bias is None else self.bias.to(device))


Logits = Tensor | Projected


@dataclass(frozen=True)
class TokenDivergences:
    r"""Divergences at N positions, in nats, each a tensor [N].

    With base :math:`p_0` and model :math:`p_\theta` over the vocabulary at a position with target :math:`y`:

    - ``kl_base_model`` :math:`=\sum_v p_0(v)\,[\log p_0(v)-\log p_\theta(v)]` (forward KL, base to model)
    - ``kl_model_base`` :math:`=\sum_v p_\theta(v)\,[\log p_\theta(v)-\log p_0(v)]` (reverse KL, on the same prefixes)
    - ``entropy_base``, ``entropy_model`` :math:`=-\sum_v p(v)\log p(v)`
    - ``nll_base``, ``nll_model`` :math:`=-\log p(y)`

    All are sums over the whole vocabulary, no estimates from samples. Averaged over positions of sequences drawn from
    :math:`p_0` itself (T = 1, untruncated), ``kl_base_model`` estimates the sequence KL per token without bias;
    ``kl_model_base`` does not, because its prefixes come from the base and not from the model.
    """

    kl_base_model: Tensor
    kl_model_base: Tensor
    entropy_base: Tensor
    entropy_model: Tensor
    nll_base: Tensor
    nll_model: Tensor


METRICS = {"kl_base_model": "kl/base_model", "kl_model_base": "kl/model_base", "entropy_base": "entropy/base",
           "entropy_model": "entropy/model", "nll_base": "nll/base", "nll_model": "nll/model"}


@torch.no_grad()
def token_divergences(base: Logits, model: Logits, targets: Tensor) -> TokenDivergences:
    r"""Compare two sets of next-token logits (or log-probabilities) ``base``, ``model`` [N, V] at ``targets`` [N].

    Either side may be :class:`Projected`: its logits then never exist all at once.

    Log-softmax runs in float32 whatever the input's type (float64 stays), chunk by chunk, so memory stays at a few
    [128, V] blocks. A token that one side excludes (logit :math:`-\infty`) counts 0 where its weight is 0 and makes the KL
    infinite where it is not. The KL keeps its digits when it is small: in float32 about 1e-4 of a KL of 1e-5, where the plain
    sum is off by a fifth. Cost: two log-softmaxes and a dozen passes over N x V.

    >>> d = token_divergences(torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([1]))
    >>> round(d.kl_base_model.item(), 6), round(d.nll_model.item(), 6)  # ½ ln(½/¼) + ½ ln(½/¾), −ln ¾
    (0.143841, 0.287682)
    """
    if base.shape != model.shape or len(base.shape) != 2 or targets.shape != base.shape[:1]:
        raise ValueError(f"base and model must be [N, V] and targets [N], got {tuple(base.shape)}, {tuple(model.shape)} "
                         f"and {tuple(targets.shape)}")
    n, v = base.shape
    if n == 0:
        raise ValueError("there is no position to compare (N = 0)")
    if targets.is_floating_point() or int(targets.min()) < 0 or int(targets.max()) >= v:
        raise ValueError(f"targets must be whole numbers in 0 ... {v - 1}, the vocabulary, got {targets.dtype} in {targets.min()} ... {targets.max()}")
    if isinstance(base, Projected):
        base = base.to(model.device)
    wide = torch.promote_types(torch.promote_types(base.dtype, model.dtype), torch.float32)
    # The same five blocks serve every chunk: fresh memory is slow to come by, and its remains pile up in the allocator.
    scratch = torch.empty(5, min(n, _CHUNK), v, dtype=wide, device=model.device)
    chunks = (slice(i, min(n, i + _CHUNK)) for i in range(0, n, _CHUNK))
    parts = [_chunk(base, model, targets.to(model.device), chunk, scratch) for chunk in chunks]
    return TokenDivergences(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk(base: Logits, model: Logits, targets: Tensor, chunk: slice, scratch: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q, p, q, other = scratch[:, : chunk.stop - chunk.start]
    _log_softmax(base, chunk, other, log_p)
    _log_softmax(model, chunk, other, log_q)
    y = targets[chunk].unsqueeze(-1)
    nll_base, nll_model = (-log.gather(-1, y).squeeze(-1) for log in (log_p, log_q))
    log_p.clamp_(min=-_HUGE), log_q.clamp_(min=-_HUGE)  # 0 · log 0 is then 0
    torch.exp(log_p, out=p), torch.exp(log_q, out=q)
    entropy_base, entropy_model = -_dot(p, log_p), -_dot(q, log_q)
    cut_by_model, cut_by_base = _excluded(p, log_q), _excluded(q, log_p)
    d = log_p.sub_(log_q)
    # Σ(q − p) is 0 but for the rounding of both normalisers, which Σ p d carries in full: adding it takes that error out of
    # the KL. (With KL = 1e-7 it is several times the KL.) q − p without cancellation: sign(d) max(p, q) (e^−|d| − 1).
    terms = torch.abs(d, out=other).neg_().expm1_().mul_(torch.maximum(p, q, out=log_q))
    slack = terms.mul_(torch.sign(d, out=log_q)).sum(-1)
    # Rounding can leave a KL of equal distributions a hair below 0, which no KL is.
    forward = (_dot(p, d) + slack).clamp(min=0).masked_fill(cut_by_model, torch.inf)
    reverse = (-_dot(q, d) - slack).clamp(min=0).masked_fill(cut_by_base, torch.inf)
    return forward, reverse, entropy_base, entropy_model, nll_base, nll_model


def _log_softmax(logits: Logits, chunk: slice, space: Tensor, out: Tensor) -> None:
    """Log-probabilities of some positions into ``out``; ``space`` is of its shape and takes formed logits."""
    formed = logits.formed(chunk, space) if isinstance(logits, Projected) else logits[chunk].to(space.device, space.dtype)
    torch.log_softmax(formed, -1, out=out)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def _excluded(weight: Tensor, log: Tensor) -> Tensor:
    """Where a token has weight here and none there."""
    cut = log.amin(-1) <= -_HUGE
    if bool(cut.any()):
        cut = ((weight > 0) & (log <= -_HUGE)).any(-1)
    return cut


@dataclass(frozen=True)
class RowDivergences(TokenDivergences):
    """The same quantities summed over the counted tokens of each row [R], and the number of those tokens ``tokens`` [R]."""

    tokens: Tensor

    def mean(self, metric: str) -> tuple[float, float]:
        r"""Mean per token of a metric, with its standard error clustered by row.

        :math:`\hat\mu=\sum_i s_i/\sum_i n_i`; :math:`\mathrm{se}^2=\frac{R}{R-1}\sum_i (s_i-\hat\mu n_i)^2/(\sum_i n_i)^2`.
        A ratio of means: consistent as rows are added, with a bias of order 1/R where rows differ in length.

        >>> nll = torch.tensor([4.0, 2.0])
        >>> RowDivergences(nll, nll, nll, nll, nll, nll, tokens=torch.tensor([3, 1])).mean("nll_model")  # (4 + 2) / (3 + 1)
        (1.5, 0.25)
        """
        sums, tokens = getattr(self, metric).double(), self.tokens.double()
        value = sums.sum() / tokens.sum()
        n = len(tokens)
        if n < 2:
            return float(value), float("nan")
        error = ((sums - value * tokens).square().sum() * n / (n - 1)).sqrt() / tokens.sum()
        return float(value), float(error)
