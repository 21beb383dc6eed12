"""Methods that weigh, soften or leave out the tokens of the task's answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from sasft.chat import IGNORE, Encoded
from sasft.errors import UsageError
from sasft.methods.base import Batch, Costs, Method, Objective
from sasft.methods.checks import check_weights, need_rows, source_names
from sasft.methods.frozen_base import FrozenBase, scored_rows
from sasft.methods.tokens import TokenObjective, forward_kl, in_chunks
from sasft.mixing import TASK
from sasft.settings import option

_ON = "sources that it acts on, with commas between them; others keep the plain cross-entropy"


@dataclass(frozen=True, kw_only=True)
class Stm(Method):
    r"""Low-perplexity token learning: the tokens that the base finds too surprising leave the loss.

    Once, before training, :math:`ppl_t=\exp(-\log p_{\theta_0}(y_t|x,y_{<t}))`; then :math:`L=\frac1{|M_\tau|}\sum_{t\in
    M_\tau}CE_t` with :math:`M_\tau=\{t\in M: ppl_t\le\tau\}`. Masked tokens stay in the input. Source: arXiv 2501.14315 and its
    code, τ = 2.5. Our choice: the token that ends a row's turn stays in the loss, or the model would not learn to stop. Cost: a
    forward pass of the base on every row. The default divisor of the loss, the mean number of loss tokens a step, counts the
    tokens left.
    """

    name: ClassVar[str] = "stm"
    paper: ClassVar[str] = "arXiv 2501.14315"

    tau: float = option(2.5, "largest perplexity of a token under the base that stays in the loss, >= 1; inf is SFT")
    on: str = option(TASK, _ON)

    def __post_init__(self) -> None:
        if not self.tau >= 1:
            raise UsageError(f"tau is a perplexity, so it must be >= 1, got {self.tau}")
        source_names(self.on)

    def encoded(self, rows: Mapping[str, Sequence[Encoded]], model: nn.Module, pad_id: int, costs: Costs,
                folder: Path | None = None) -> dict[str, list[Encoded]]:
        masked = super().encoded(rows, model, pad_id, costs)
        if self.tau < math.inf:
            need_rows(self.name, rows, self.on)
            masked |= {source: self._masked(source, masked[source], model, pad_id, costs) for source in source_names(self.on)}
        return masked

    def _masked(self, source: str, rows: Sequence[Encoded], model: nn.Module, pad_id: int, costs: Costs) -> list[Encoded]:
        found: list[Encoded] = list(rows)
        empty: list[int] = []
        for numbers, scored in scored_rows(model, rows, pad_id, costs):
            kept = scored.nll() <= math.log(self.tau)
            for place, number in enumerate(numbers):
                labels = _kept_labels(rows[number], kept[scored.rows == place].tolist())
                if all(label == IGNORE for label in labels):
                    empty.append(number)
                else:
                    found[number] = Encoded(rows[number].input_ids, labels, rows[number].finished)
        if empty:
            raise UsageError(f"tau={self.tau} leaves no token in the loss of {len(empty)} of {len(rows)} rows of {source} (the "
                             f"first is row {min(empty)} of them); raise tau, or leave these rows out")
        return found


def _kept_labels(row: Encoded, kept: Sequence[bool]) -> tuple[int, ...]:
    labels, told = list(row.labels), iter(kept)
    for t, label in enumerate(row.labels):
        if label != IGNORE and not next(told) and not (row.finished and t == len(labels) - 1):
            labels[t] = IGNORE
    return tuple(labels)


class _Dft(TokenObjective):
    def __init__(self, costs: Costs, on: Sequence[str], base: FrozenBase | None, weight: float) -> None:
        super().__init__(costs, on, base)
        self.weight = weight

    def tokens(self, batch: Batch, rows: Tensor, logits: Tensor, labels: Tensor, nll: Tensor, base: Tensor | None) -> Tensor:
        losses = nll.detach().neg().exp() * nll
        return losses if base is None else losses + self.weight * forward_kl(base, logits)


@dataclass(frozen=True, kw_only=True)
class Dft(Method):
    r"""Dynamic fine-tuning: :math:`L=\frac1{|M|}\sum_t\mathrm{sg}(p_\theta(y_t|t))\,CE_t`.

    Its gradient is that of :math:`-\frac1{|M|}\sum_tp_\theta(y_t|t)`, since :math:`\nabla p=p\nabla\log p`.

    Source: arXiv 2508.05629. Tokens that the model finds improbable hardly move it; small models want another learning rate
    than in SFT. Self rows keep their cross-entropy (our choice). No cost.
    """

    name: ClassVar[str] = "dft"
    paper: ClassVar[str] = "arXiv 2508.05629"

    on: str = option(TASK, _ON)

    def __post_init__(self) -> None:
        source_names(self.on)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        need_rows(self.name, rows, self.on)
        return _Dft(costs, source_names(self.on), None, 0.0)


@dataclass(frozen=True, kw_only=True)
class Asft(Method):
    r"""Anchored SFT: DFT and a KL to the base.

    .. math:: L=\frac1{|M|}\sum_t[\mathrm{sg}(p_\theta(y_t|t))\,CE_t+\lambda\,KL(p_{\theta_0}(\cdot|t)\Vert p_\theta(\cdot|t))]

    The KL is forward, over the whole vocabulary, on the task's own tokens; λ = 0 is DFT. Source: arXiv 2509.23753 and its code
    (λ = 0.05). Self rows keep their cross-entropy (our choice). Cost: a forward pass of the base on task rows.
    """

    name: ClassVar[str] = "asft"
    paper: ClassVar[str] = "arXiv 2509.23753"

    weight: float = option(0.05, "weight of the KL to the base; 0 is DFT")
    on: str = option(TASK, _ON)

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        source_names(self.on)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        need_rows(self.name, rows, self.on)
        return _Dft(costs, source_names(self.on), FrozenBase(model) if self.weight else None, self.weight)


@dataclass(frozen=True, kw_only=True)
class Ual(Method):
    r"""Uncertainty-aware learning: label smoothing of a strength of its own for every row.

    .. math:: L_i=\sum_t\Big[(1-v_i)\,CE_t+\frac{v_i}V\sum_{k=1}^V-\log p_\theta(k|t)\Big],\qquad
       v_i=v_{max}\frac{u_i-u_{min}}{u_{max}-u_{min}}

    Source: arXiv 2406.04854, where a stronger model judges the uncertainty :math:`u_i`. Ours is "self-UAL": the base's mean
    entropy on the row's tokens, :math:`u_i=\frac1{T_i}\sum_tH(p_{\theta_0}(\cdot|t))`; the linear map and ``v_max`` are our
    choices, as is :math:`v_{max}/2` for rows that are all equally uncertain. Smoothing raises the negative log-likelihood of
    text by construction, and lifts ids that a padded vocabulary never uses. Cost: a forward pass of the base on every row.
    """

    name: ClassVar[str] = "ual"
    paper: ClassVar[str] = "arXiv 2406.04854"

    v_max: float = option(0.1, "smoothing of the most uncertain row, in [0, 1]; 0 is SFT")
    on: str = option(TASK, _ON)

    def __post_init__(self) -> None:
        check_weights(0, 1, v_max=self.v_max)
        source_names(self.on)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        if self.v_max == 0:
            return None
        need_rows(self.name, rows, self.on)
        names = source_names(self.on)
        uncertainty = {source: _mean_entropies(model, rows[source], pad_id, costs) for source in names}
        every = torch.cat(list(uncertainty.values()))
        low, high = every.min(), every.max()
        scaled = {s: (u - low) / (high - low) if high > low else torch.full_like(u, 0.5) for s, u in uncertainty.items()}
        return _Ual(costs, names, {s: self.v_max * share for s, share in scaled.items()})


class _Ual(TokenObjective):
    def __init__(self, costs: Costs, on: Sequence[str], smoothing: Mapping[str, Tensor]) -> None:
        super().__init__(costs, on)
        self.smoothing = smoothing

    def tokens(self, batch: Batch, rows: Tensor, logits: Tensor, labels: Tensor, nll: Tensor, base: Tensor | None) -> Tensor:
        of_rows = torch.stack([self.smoothing[s][i] if s in self.on else torch.zeros(())
                               for s, i in zip(batch["source"], batch["index"], strict=True)])
        v = of_rows.to(logits.device)[rows]
        return (1 - v) * nll + v * in_chunks(_uniform_nll, logits)


def _uniform_nll(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits.logsumexp(-1) - logits.mean(-1)


def _mean_entropies(model: nn.Module, rows: Sequence[Encoded], pad_id: int, costs: Costs) -> Tensor:
    """The model's mean entropy on each row's counted tokens [R], in nats, fp32 on the CPU."""
    found = torch.zeros(len(rows))
    for numbers, scored in scored_rows(model, rows, pad_id, costs):
        entropies = in_chunks(_entropy, scored.logits)
        for place, number in enumerate(numbers):
            found[number] = entropies[scored.rows == place].mean().cpu()
    return found


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)
