"""Forming every source's gradients of one optimiser step, and keeping their products (for :mod:`drift.sources`)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drift.adapters import Adapter, adapters
from drift.forward import IGNORE
from drift.lowrank import induced_gram
from drift.numerics import check_finite, squared_distance, squared_norm
from drift.uses import Formed, Scratch, Sparse, Use, blocks, gram

Gram = NDArray[np.float64]
SGD, ADAM, LORA = "sgd", "adam", "lora"
SMALL = 2**16  # parameters of so many numbers are kept until the step ends: that is cheaper than one product each
NOT_TAKEN_APART = "its gradient comes from an operation that is not taken apart"
IN_PART = "part of its gradient comes from outside its module (a fused or functional operation)"


@dataclass(frozen=True)
class Collected:
    """Products of one step: ``grams[metric][parameter]`` [G, G], rows in each group ``units`` [G], and what was not seen."""

    grams: Mapping[str, Mapping[str, Gram]]
    units: NDArray[np.int64]
    coverage: float
    missing: Mapping[str, str]


@dataclass
class _Expected:
    """The uses of one parameter that a forward pass has announced."""

    uses: int = 0
    ids: list[Tensor] = field(default_factory=list)


class SourceCollector:
    """Forms every source's gradients of one step, and keeps their products.

    A weight with a single use is dealt with block by block in the backward pass. An embedding keeps the rows that the batch
    uses, also where it is tied to a head: elsewhere its gradient is 0, so the head's products need only be mended
    there. What has several dense uses, several passes, or is small, is kept whole until :meth:`finish`.

    Every gradient that autograd gives to a parameter is noted, so that none goes by unseen; with ``compare`` it is also compared with
    what has been seen of it. ``in_part``: the parameters of which an earlier comparison has shown that only a part is seen.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], n_sources: int, folds: int, *, untagged: bool,
                 accumulate: bool, optimizer: torch.optim.Optimizer | None, process_group: dist.ProcessGroup | None, scratch: Scratch,
                 compare: bool, in_part: Collection[str]) -> None:
        self.n_sources, self.folds, self.accumulate = n_sources, folds, accumulate
        self.optimizer, self.process_group, self._scratch = optimizer, process_group, scratch
        self.n_real = n_sources * folds
        self.n_groups = self.n_real + int(self.accumulate or untagged)  # the last is nobody's
        self.units = torch.zeros(self.n_real, dtype=torch.int64)
        self._dealt = (torch.zeros(0, dtype=torch.int64),) * 2  # unit (-1: nobody's) and group of every row or token in the model now
        self.result: Collected | None = None
        self.touched = False
        self._expected: dict[str, _Expected] = {}
        self._grams: dict[str, dict[str, Tensor]] = {SGD: {}, **({ADAM: {}} if self.optimizer is not None else {})}
        self._whole: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}  # row numbers [R], embedding gradients there [G, R, n]
        self._head_rows: dict[str, Tensor] = {}  # a tied head's gradients at the same rows
        self._trained = trained
        self._adapters = [a.copy() for a in adapters(model)]
        self._compare, self._in_part = compare, set(in_part)
        self._answers: dict[str, Tensor] = {}  # the gradient of a pass so far, as this collector has given it
        self._noted: dict[str, list[tuple[Tensor, Tensor]]] = {}  # of what autograd gives: squared distance from that, squared norm
        self._watches = {n: self._watch(n, p) for n, p in trained.items() if not hasattr(p, "full_tensor")}

    def deal(self, index: Tensor, units: Tensor | None) -> Tensor:
        """Group of every row or token: each source's units go to its folds in turn."""
        unit = _units(index) if units is None else _consecutive(index, units)
        group = torch.full_like(index, self.n_real)
        for s in range(self.n_sources):
            mine = index == s
            if not bool(mine.any()):
                continue
            places, rank = unit[mine].unique(return_inverse=True)
            done = int(self.units[s * self.folds : (s + 1) * self.folds].sum())
            group[mine] = s * self.folds + (rank + done) % self.folds
            self.units += torch.bincount(s * self.folds + (torch.arange(len(places)) + done) % self.folds, minlength=self.n_real)
        self._dealt = unit.where(index >= 0, -1), group
        return group

    def discount(self, labels: Any) -> None:
        """Count no unit of which no label [B, T] is in the loss: it has no gradient, and would make a mean over units smaller than it is."""
        unit, group = self._dealt
        if not isinstance(labels, Tensor) or labels.dim() != 2 or len(labels) != len(unit):
            return
        counted = (labels[:, 1:] != IGNORE).cpu()
        unit, group = (x.unsqueeze(1).expand(labels.shape) if x.dim() == 1 else x for x in (unit, group))
        hidden = (unit >= 0) & ~torch.isin(unit, unit[:, 1:][counted])
        for u in unit[hidden].unique():
            self.units[group[unit == u][0]] -= 1

    def expect(self, name: str, parameter: Tensor, ids: Tensor | None) -> None:
        if name not in self._watches and hasattr(self._trained[name], "full_tensor"):
            # Sharded parameters (FSDP2) pass no hook; the whole ones that are gathered of them do.
            self._watches[name] = self._watch(name, parameter)
        expected = self._expected.setdefault(name, _Expected())
        if ids is None:
            expected.uses += 1
        else:
            expected.ids.append(ids.detach().reshape(-1))

    def collect(self, name: str, use: Use) -> Tensor:
        answer = self._collect(name, use)
        if self._compare:
            self._answers[name] = self._answers[name] + answer if name in self._answers else answer
        return answer

    def _watch(self, name: str, parameter: Tensor) -> RemovableHandle:
        return parameter.register_hook(lambda gradient: self._note(name, gradient))

    def _note(self, name: str, gradient: Tensor) -> None:
        noted = self._noted.setdefault(name, [])
        if self._compare:
            answer = self._answers.pop(name, None)
            seen = torch.zeros_like(gradient) if answer is None else answer.view_as(gradient)
            noted.append((squared_distance(gradient, seen), squared_norm(gradient)))

    def _collect(self, name: str, use: Use) -> Tensor:
        self.touched = True
        expected = self._expected.get(name, _Expected(uses=1))
        if isinstance(use, Formed):
            if self._at_once(name, expected):
                self._add(name, use.parts, slice(None))
            else:
                self._keep(name, use.parts, slice(None))
            return use.parts.sum(0)
        if isinstance(use, Sparse):
            return self._collect_sparse(name, use, expected)
        at_once = self._at_once(name, expected)
        ids = torch.cat(expected.ids).unique() if expected.ids and at_once else None
        head_rows = None if ids is None else use.left.new_empty(self.n_groups, len(ids), use.right.shape[1])
        grad = use.left.new_empty(use.left.shape[1], use.right.shape[1])
        for rows, parts in blocks([use], self._scratch):
            torch.sum(parts, 0, out=grad[rows])
            if not at_once:
                self._keep(name, parts, rows, shape=grad.shape)
                continue
            self._add(name, parts, rows)
            if ids is not None:
                low, high = torch.searchsorted(ids, torch.tensor([rows.start, rows.stop], device=ids.device)).tolist()
                head_rows[:, low:high] = parts[:, ids[low:high] - rows.start]
        if ids is not None:
            self._head_rows[name] = head_rows
        return grad

    def _at_once(self, name: str, expected: _Expected) -> bool:
        if self.accumulate or expected.uses > 1 or self._trained[name].numel() <= SMALL or ".lora_" in name:
            return False
        return not expected.ids or self.process_group is None  # processes see different ids

    def _collect_sparse(self, name: str, use: Sparse, expected: _Expected) -> Tensor:
        grad = use.right.new_zeros(self._trained[name].shape)
        grad.index_add_(0, use.ids, use.right)
        if self._at_once(name, expected):
            ids, parts = self._rows.get(name, (torch.cat(expected.ids).unique(), 0.0))
            self._rows[name] = ids, parts + use.at(ids)
        else:
            whole = self._kept(name, use.right, grad.shape)
            use_parts = use.groups() * len(grad) + use.ids
            whole.view(-1, grad.shape[1]).index_add_(0, use_parts, use.right.to(whole.dtype))
        return grad

    def _keep(self, name: str, parts: Tensor, rows: slice, shape: torch.Size | None = None) -> None:
        whole = self._kept(name, parts, parts.shape[1:] if shape is None else shape)
        whole[:, rows] += parts

    def _kept(self, name: str, like: Tensor, shape: torch.Size) -> Tensor:
        if name not in self._whole:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._whole[name] = torch.zeros(self.n_groups, *shape, dtype=dtype, device=like.device)
        return self._whole[name]

    def _add(self, name: str, parts: Tensor, rows: slice | Tensor) -> None:
        if self.process_group is not None:
            parts = parts.contiguous().clone()
            dist.all_reduce(parts, group=self.process_group)
            parts /= dist.get_world_size(self.process_group)
        self._sum(SGD, name, gram(parts))
        if self.optimizer is not None and (weights := self._preconditioner(name, rows)) is not None:
            self._sum(ADAM, name, gram(parts, weights))

    def _sum(self, metric: str, name: str, products: Tensor) -> None:
        found = self._grams[metric]
        found[name] = found[name] + products if name in found else products

    def _preconditioner(self, name: str, rows: slice | Tensor) -> Tensor | None:
        parameter = self._trained[name]
        state = self.optimizer.state.get(parameter, {})
        if not state:  # before the optimiser's first step
            return None
        moments = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # AMSGrad divides by the largest so far
        if moments is None:
            raise NotImplementedError(f"the adam metric needs the optimiser's second moments (exp_avg_sq), and {type(self.optimizer).__name__} keeps "
                                      f"{', '.join(state)} of {name}; leave optimizer out")
        if moments.shape != parameter.shape or hasattr(moments, "to_local"):
            raise NotImplementedError(f"the optimiser's second moments of {name} are sharded or of another shape; the adam metric "
                                      "needs them whole. Leave optimizer out")
        settings = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        correction = 1 - settings["betas"][1] ** float(state["step"])
        return 1 / ((moments[rows] / correction).sqrt() + settings["eps"])

    # --- the end of a step -----------------------------------------------------------------------------------------

    def release(self) -> None:
        """Stop watching the parameters."""
        for watch in self._watches.values():
            watch.remove()
        self._watches.clear()

    def finish(self) -> None:
        self.release()
        for name, (ids, parts) in self._rows.items():
            self._add(name, parts, ids)
            if name in self._head_rows:
                self._mend(name, ids, parts)
        for name, parts in self._whole.items():
            self._add(name, parts, slice(None))
        induced = self._induced()
        if induced:
            self._grams[LORA] = induced
        missing = self._missing()
        covered = {name: k for name, k in self._grams[SGD].items() if name not in missing}
        grams = {metric: self._on_cpu({n: k for n, k in found.items() if n not in missing}) for metric, found in self._grams.items()}
        check_finite("the gradient", {n: bool(np.isfinite(grams[SGD][n]).all()) for n in self._trained if n in grams[SGD]})
        numel = {n: self._trained[n].numel() for n in (*covered, *missing)}
        units = self.units.clone()
        if self.process_group is not None:
            dist.all_reduce(units, group=self.process_group)
        self.result = Collected({m: g for m, g in grams.items() if g}, units.numpy(),
                                sum(numel[n] for n in covered) / max(1, sum(numel.values())), missing)
        self._whole.clear(), self._rows.clear(), self._head_rows.clear()

    def _mend(self, name: str, ids: Tensor, parts: Tensor) -> None:
        """Products between a tied head's gradient and its embedding's."""
        head = self._head_rows[name]
        for metric in self._grams:
            weights = None if metric == SGD else self._preconditioner(name, ids)
            if metric == SGD or weights is not None:
                crossed = gram(torch.cat([head, parts]), weights)[: self.n_groups, self.n_groups :]
                self._sum(metric, name, crossed + crossed.T)

    def _induced(self) -> dict[str, Tensor]:
        by_weight: dict[str, list[Adapter]] = {}
        for adapter in self._adapters:
            if adapter.name_a in self._whole or adapter.name_b in self._whole:
                by_weight.setdefault(adapter.base, []).append(adapter)
        # With DoRA the step in W depends on the rows of W itself, and on its magnitudes' gradients.
        return {name: self._induced_by(found) for name, found in by_weight.items() if not any(a.magnitude is not None for a in found)}

    def _induced_by(self, found: Sequence[Adapter]) -> Tensor:
        """Products of the steps that all adapters of one weight induce together, as if they were one of higher rank."""
        def gradients(name: str, like: Tensor) -> Tensor:
            return self._whole[name] if name in self._whole else like.new_zeros(self.n_groups, *like.shape)

        a, b = torch.cat([x.a for x in found]), torch.cat([x.scaling * x.b for x in found], 1)
        return induced_gram(a, b, torch.cat([gradients(x.name_a, x.a) for x in found], 1),
                            torch.cat([x.scaling * gradients(x.name_b, x.b) for x in found], 2))

    def _missing(self) -> dict[str, str]:
        """Parameters that took a gradient which was not seen, or not seen whole."""
        for name, noted in self._noted.items():
            if name in self._grams[SGD] and sum(float(d) for d, _ in noted) > 1e-4 * sum(float(g) for _, g in noted):
                self._in_part.add(name)
        unseen = [n for n in self._noted if n not in self._grams[SGD]]
        # Of a sharded parameter that no layer has used it isn't known whether it has a gradient.
        unseen += [n for n, p in self._trained.items() if hasattr(p, "full_tensor") and n not in self._expected]
        return {n: IN_PART for n in self._trained if n in self._in_part} | dict.fromkeys(unseen, NOT_TAKEN_APART)

    @property
    def in_part(self) -> frozenset[str]:
        """The parameters of whose gradients only a part is seen."""
        return frozenset(self._in_part)

    def _on_cpu(self, grams: Mapping[str, Tensor]) -> dict[str, Gram]:
        if not grams:
            return {}
        device = next(iter(grams.values())).device
        stacked = torch.stack([k.to(device) for k in grams.values()]).cpu().numpy()  # one synchronisation
        return dict(zip(grams, stacked[:, : self.n_real, : self.n_real], strict=True))


def _units(index: Tensor) -> Tensor:
    """Unit of every row, or of every token: runs of one source within a row of the batch."""
    if index.dim() == 1:
        return torch.arange(len(index))
    return _consecutive(index, torch.zeros_like(index))


def _consecutive(index: Tensor, units: Tensor) -> Tensor:
    """Numbers that change wherever the source, the unit or the row of the batch does."""
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[:, 1:] = (index[:, 1:] != index[:, :-1]) | (units[:, 1:] != units[:, :-1])
    return starts.flatten().cumsum(0).view_as(index)
