"""How far the model's predictions are from the base model's: KL both ways, entropy, NLL, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from drift.modes import measuring
from drift.numerics import at_least_fp32
from drift.reference import Reference
from drift.table import Row

Batch = Mapping[str, Any]
Forward = Callable[[nn.Module, Batch], Tensor]
IGNORE = -100
_HUGE = 1e30  # stands for −log 0
_CHUNK = 256  # positions whose [chunk, V] log-probabilities are in memory at once


def logits_of(model: nn.Module, batch: Batch, columns: Tensor | None = None) -> Tensor:
    """The default forward pass: ``model(input_ids, attention_mask, position_ids).logits``, [B, T, V].

    ``columns`` [C] int64: return the logits of these positions only, [B, C, V]; models that take ``logits_to_keep`` then
    compute no others. Position ids are counted from the attention mask where the batch has none, so that left padding changes nothing.
    """
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    accepted = signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if "attention_mask" in inputs and "position_ids" not in inputs and (takes_any or "position_ids" in accepted):
        inputs["position_ids"] = inputs["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
    if takes_any or "use_cache" in accepted:
        inputs["use_cache"] = False
    if columns is None:
        return model(**inputs).logits
    if "logits_to_keep" in accepted:
        return model(**inputs, logits_to_keep=columns).logits
    return model(**inputs).logits[:, columns]


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


def token_divergences(base: Tensor, model: Tensor, targets: Tensor) -> TokenDivergences:
    r"""Compare two sets of next-token logits (or log-probabilities) ``base``, ``model`` [N, V] at ``targets`` [N].

    Log-softmax runs in float32 whatever the input's type (float64 stays), chunk by chunk, so memory stays at a few
    [256, V] blocks. A token that one side excludes (logit :math:`-\infty`) counts 0 where its weight is 0 and makes the KL
    infinite where it is not. The KL keeps its digits when it is small: in float32 about 1e-4 of a KL of 1e-5, where the plain
    sum is off by a fifth. Cost: two log-softmaxes and a dozen passes over N x V.

    >>> d = token_divergences(torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([1]))
    >>> round(d.kl_base_model.item(), 6), round(d.nll_model.item(), 6)  # ½ ln(½/¼) + ½ ln(½/¾), −ln ¾
    (0.143841, 0.287682)
    """
    if base.shape != model.shape or base.dim() != 2 or targets.shape != base.shape[:1]:
        raise ValueError(f"base and model must be [N, V] and targets [N], got {tuple(base.shape)}, {tuple(model.shape)} "
                         f"and {tuple(targets.shape)}")
    parts = [_chunk(base[i : i + _CHUNK], model[i : i + _CHUNK], targets[i : i + _CHUNK]) for i in range(0, len(base), _CHUNK)]
    if not parts:
        raise ValueError("there is no position to compare (N = 0)")
    return TokenDivergences(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk(base: Tensor, model: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = _log_softmax(base), _log_softmax(model.to(base.device))
    y = targets.to(base.device).unsqueeze(-1)
    nll_base, nll_model = (-log.gather(-1, y).squeeze(-1) for log in (log_p, log_q))
    log_p.clamp_(min=-_HUGE), log_q.clamp_(min=-_HUGE)  # 0 · log 0 is then 0
    p, q = log_p.exp(), log_q.exp()
    entropy_base, entropy_model = -_dot(p, log_p), -_dot(q, log_q)
    cut_by_model, cut_by_base = _excluded(p, log_q), _excluded(q, log_p)
    d = log_p.sub_(log_q)
    # Σ(q − p) is 0 but for the rounding of both normalisers, which Σ p d carries in full: adding it takes that error out of
    # the KL. (With KL = 1e-7 it is several times the KL.) q − p without cancellation: sign(d) max(p, q) (e^−|d| − 1).
    slack = d.abs().neg_().expm1_().mul_(torch.maximum(p, q)).mul_(d.sign()).sum(-1)
    # Rounding can leave a KL of equal distributions a hair below 0, which no KL is.
    forward = (_dot(p, d) + slack).clamp(min=0).masked_fill(cut_by_model, torch.inf)
    reverse = (-_dot(q, d) - slack).clamp(min=0).masked_fill(cut_by_base, torch.inf)
    return forward, reverse, entropy_base, entropy_model, nll_base, nll_model


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def _excluded(weight: Tensor, log: Tensor) -> Tensor:
    """Where a token has weight here and none there."""
    return ((weight > 0) & (log <= -_HUGE)).any(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(at_least_fp32(logits), dim=-1)


@dataclass(frozen=True)
class RowDivergences(TokenDivergences):
    """The same quantities summed over the counted tokens of each row [R], and the number of those tokens ``tokens`` [R]."""

    tokens: Tensor

    def mean(self, metric: str) -> tuple[float, float]:
        r"""Mean per token of a metric, with its standard error clustered by row.

        :math:`\hat\mu=\sum_i s_i/\sum_i n_i`; :math:`\mathrm{se}^2=\frac{R}{R-1}\sum_i (s_i-\hat\mu n_i)^2/(\sum_i n_i)^2`.
        A ratio of means: consistent as rows are added, with a bias of order 1/R where rows differ in length.
        """
        sums, tokens = getattr(self, metric).double(), self.tokens.double()
        value = sums.sum() / tokens.sum()
        n = len(tokens)
        if n < 2:
            return float(value), float("nan")
        error = ((sums - value * tokens).square().sum() * n / (n - 1)).sqrt() / tokens.sum()
        return float(value), float(error)


class DivergenceProbe:
    """KL to the base (both ways), entropy and NLL on fixed held-out rows, as a probe of :func:`drift.record`.

    ``batches``: dictionaries of tensors as Hugging Face uses them (``input_ids``, ``attention_mask``, ``labels`` [B, T]; labels
    not shifted, -100 where a token is not counted). The base's logits at the counted positions are computed
    once, by :meth:`prepare`, and kept in float32 on the CPU: 4·N·V bytes (1,000 positions of a 50,000-token vocabulary:
    200 MB).

    ``forward(model, batch)`` returns logits [B, T, V]; the default calls a Hugging Face model.
    """

    def __init__(self, name: str, batches: Sequence[Batch], *, forward: Forward = logits_of,
                 every: Callable[[int], bool] | int | None = None) -> None:
        if not batches:
            raise ValueError(f"probe {name!r}: batches is empty; give at least one batch with labels")
        self.name, self.batches, self.forward, self.every = name, list(batches), forward, every
        if not any(bool((b["labels"][:, 1:] != IGNORE).any()) for b in self.batches):
            raise ValueError(f"probe {name!r}: no label differs from -100, so there is no position to measure")
        self._base: list[Tensor] | None = None
        self._prepared_for: Reference | None = None

    def prepare(self, model: nn.Module, reference: Reference) -> None:
        """Compute the base's logits with θ₀ in the model; once for a reference, however often it is called."""
        if self._prepared_for is reference:
            return
        with measuring(model), torch.no_grad(), reference.swapped_into(model):
            self._base = [at_least_fp32(self._counted(model, batch)[0]).cpu() for batch in self.batches]
        self._prepared_for = reference

    def per_row(self, model: nn.Module) -> RowDivergences:
        """Measure the model now; one entry a row, in the order of the batches."""
        if self._base is None:
            raise RuntimeError(f"probe {self.name!r} is not prepared; call prepare(model, reference) first")
        columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(RowDivergences)}
        with measuring(model), torch.no_grad():
            for batch, base in zip(self.batches, self._base, strict=True):
                logits, targets, rows = self._counted(model, batch)
                tokens = token_divergences(base.to(logits.device), logits, targets)
                n = len(batch["labels"])
                columns["tokens"].append(torch.bincount(rows.cpu(), minlength=n))
                for metric in METRICS:
                    values = getattr(tokens, metric).double().cpu()
                    columns[metric].append(torch.zeros(n, dtype=torch.float64).index_add_(0, rows.cpu(), values))
        return RowDivergences(**{name: torch.cat(parts) for name, parts in columns.items()})

    def rows(self, model: nn.Module, step: int) -> list[Row]:
        """Table rows: each metric's mean per token with its clustered standard error."""
        measured = self.per_row(model)
        n = int(measured.tokens.sum())
        return [Row(step=step, metric=key, source=self.name, value=value, stderr=error, n_tokens=n)
                for metric, key in METRICS.items() for value, error in [measured.mean(metric)]]

    def _counted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V] that predict the counted tokens, those tokens [N], and their rows [N]."""
        device = next(model.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = moved["labels"][:, 1:]
        row, column = (labels != IGNORE).nonzero(as_tuple=True)
        if self.forward is logits_of:
            columns, place = column.unique(return_inverse=True)
            return logits_of(model, moved, columns)[row, place], labels[row, column], row
        return self.forward(model, moved)[row, column], labels[row, column], row
