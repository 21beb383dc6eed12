r"""Quadratic penalties on the way from the start: :math:`L+\frac w2\sum_iF_i(\theta_i-\theta_{0,i})^2`.

They move weights through the optimiser, so that AdamW preconditions them as it does the loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from drift import fisher
from drift.adapters import Adapter, adapters
from drift.names import trainable
from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.methods.base import Costs, Method, Objective
from sasft.methods.checks import check_counts, check_weights, need_rows, source_names
from sasft.mixing import SELF
from sasft.probes import batches
from sasft.processes import cut_as, gathered
from sasft.settings import option


@dataclass(frozen=True, kw_only=True)
class L2Sp(Method):
    r"""L2-SP: :math:`L+\frac\alpha2\lVert\theta-\theta_0\rVert^2`, a sum over all trained weights. Source: arXiv 1802.01483.

    With LoRA the distance is that of the adapted weights, :math:`\lVert s(BA-B_0A_0)\rVert_F^2`, from the factors in
    :math:`O((m+n)r^2)` (our choice; a distance of factors would depend on how they share the update). Not the decoupled form
    :math:`\theta\leftarrow\theta-\eta\alpha(\theta-\theta_0)`, which is another method. Memory: a copy of the trained weights.
    """

    name: ClassVar[str] = "l2-sp"
    paper: ClassVar[str] = "arXiv 1802.01483"

    weight: float = option(0.01, "alpha; 0 is SFT")

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        return None if self.weight == 0 else _L2Sp(costs, model, self.weight)


class _L2Sp(Objective):
    in_step = True

    def __init__(self, costs: Costs, model: nn.Module, weight: float) -> None:
        super().__init__(costs)
        self.weight = weight
        self.factors = {(a.base, a.adapter): a.copy() for a in adapters(model)}
        names = {name for a in self.factors.values() for name in (a.name_a, a.name_b)}
        self.start = {name: p.detach().clone() for name, p in trainable(model).items() if name not in names}

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        terms = [square.sum() for _, square in _squares(model, self.start)]
        terms += [_factored_square(now, self.factors[now.base, now.adapter]) for now in adapters(model)] if self.factors else []
        return 0.5 * self.weight * torch.stack([gathered(term) for term in terms]).sum()


def _squares(model: nn.Module, start: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    r""":math:`(\theta_i-\theta_{0,i})^2` by parameter, in fp32.

    Of sharded weights each process has its own part, and keeps no more of ``start``.
    """
    mine = trainable(model)
    for name in start:
        start[name] = cut_as(start[name], mine[name])
        yield name, (mine[name] - start[name]).float().square()


def _factored_square(now: Adapter, start: Adapter) -> Tensor:
    r""":math:`\lVert s(BA-B_0A_0)\rVert_F^2`, as 0-d fp32; Gram matrices in float64, where their difference keeps its digits."""
    a, b = gathered(now.a).double(), gathered(now.b).double()
    if bool(start.b.any()) and bool(start.a.any()):
        a, b = torch.cat([a, start.a.double()]), torch.cat([b, -start.b.double()], dim=1)
    return (now.scaling**2 * ((b.T @ b) * (a @ a.T)).sum()).float()


@dataclass(frozen=True, kw_only=True)
class Ewc(Method):
    r"""EWC: :math:`L+\frac\lambda2\sum_iF_i(\theta_i-\theta_{0,i})^2`, F the Fisher diagonal on old data.

    Source: arXiv 1612.00796. What was learnt before is not at hand for a language model, so F is that of self rows (our choice):
    per row, labels drawn from the model, gradients of single rows squared (:func:`drift.fisher.diagonal`, in fp32 and evaluation
    mode; squared gradients of batch means, as released code has them, understate F). Where these rows are the model's own,
    λ = 1 makes the penalty the diagonal part of the KL per row from the base, in nats. With LoRA, F and the distance are those
    of the factors (our choice); as B starts at 0, A has no Fisher information and is not held.
    Cost: a forward and a backward pass over ``fisher_rows`` rows. Memory: two copies of the trained weights.
    """

    name: ClassVar[str] = "ewc"
    paper: ClassVar[str] = "arXiv 1612.00796"

    weight: float = option(1.0, "lambda; 0 is SFT")
    on: str = option(SELF, "sources of the rows that stand for old data, with commas between them")
    fisher_rows: int = option(256, "rows of them that F is estimated on, from the first one")
    seed: int = option(0, "seed of the labels")

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        source_names(self.on)
        check_counts(fisher_rows=self.fisher_rows)

    def reads(self) -> Sequence[str]:
        return source_names(self.on) if self.weight else ()

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        if self.weight == 0:
            return None
        old = need_rows(self.name, rows, self.on)[: self.fisher_rows]
        costs.backward_tokens += sum(len(row.input_ids) for row in old)
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            found = fisher.diagonal(model, batches(old, pad_id), seed=self.seed)
        if found.missing:
            raise UsageError(f"the Fisher information of {len(found.missing)} trained parameters cannot be seen "
                             f"({', '.join(found.missing[:3])}); freeze them, or take l2-sp")
        return _Ewc(costs, model, self.weight, found.values)


class _Ewc(Objective):
    in_step = True

    def __init__(self, costs: Costs, model: nn.Module, weight: float, values: Mapping[str, Tensor]) -> None:
        super().__init__(costs)
        self.weight = weight
        mine = trainable(model)
        self.values = {name: values[name].to(p.device, torch.float32).reshape(p.shape)
                       for name, p in mine.items() if name in values}
        self.start = {name: mine[name].detach().clone() for name in self.values}

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        terms = []
        for name, square in _squares(model, self.start):
            self.values[name] = cut_as(self.values[name], square)
            terms.append(gathered((self.values[name] * square).sum()))
        return 0.5 * self.weight * torch.stack(terms).sum()
