r"""Random projections of gradients and of drift that keep inner products, small enough to hold for thousands of rows.

A matrix G [m, n] becomes :math:`LGR` [p, q], with independent entries of L and R equal to :math:`\pm1/\sqrt p` and :math:`\pm1/\sqrt q`. The
gradient of a layer is :math:`\sum_te_ta_t^\top`, so its projection :math:`\sum_t(Le_t)(R^\top a_t)^\top` never needs the gradient itself.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drift.deltas import FactoredDelta
from drift.forward import Batch, Forward, logits_of, on_device, summed_nll
from drift.groups import Groups
from drift.intercept import Interceptor, UseCollector
from drift.modes import measuring
from drift.names import layer_index, trainable
from drift.numerics import at_least_fp32, check_finite
from drift.uses import Dense, Sparse, Use
from drift.weights import Side, deltas


@dataclass(frozen=True)
class Sketches:
    """``values`` [R, K] float64: one sketch a row (or one of a drift). ``columns``: the columns of every parameter; ``missing``: the parameters left out."""

    values: NDArray[np.float64]
    columns: Mapping[str, slice]
    missing: tuple[str, ...] = ()

    def of(self, *, layer: int | None = None, module: str | None = None) -> NDArray[np.float64]:
        """The columns of one block or one parameter (neither: all)."""
        chosen = [c for name, c in self.columns.items() if (module is None or name == module) and (layer is None or layer_index(name) == layer)]
        if not chosen:
            raise ValueError(f"no parameter matches layer={layer}, module={module!r}; there are {list(self.columns)[:4]}, ...")
        return np.concatenate([self.values[:, c] for c in chosen], axis=1)

    def common(self, other: "Sketches") -> tuple["Sketches", "Sketches"]:
        """This and the other one by the same Sketch, cut down to the parameters that both have, in one order.

        Gradients lack what a model has frozen and what is named in ``missing``; drift lacks LoRA's factors, and has the weights that they adapt.
        """
        names = [n for n in self.columns if n in other.columns]
        if not names:
            raise ValueError(f"the sketches have no parameter in common; one has {list(self.columns)[:2]}, ..., the other {list(other.columns)[:2]}, ...")
        wrong = next((n for n in names if len(self.of(module=n).T) != len(other.of(module=n).T)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} has {len(self.of(module=wrong).T)} columns here and {len(other.of(module=wrong).T)} there: they are by different Sketches")
        return tuple(_stacked({n: x.of(module=n) for n in names}, x.missing) for x in (self, other))


@dataclass(frozen=True)
class Sketch:
    r"""A random projection of every parameter to at most ``p`` · ``q`` numbers, fixed by ``seed`` and the parameter's name.

    :math:`\langle LXR,LYR\rangle` has mean :math:`\langle X,Y\rangle`. Its standard deviation is at most
    :math:`\lVert X\rVert\lVert Y\rVert\sqrt{2(1/p+1/q)+4/(pq)}` for one matrix, reached by matrices of rank one (:meth:`error`), and that divided by about the root
    of the number of parameters of like weight for their sum. Sides not longer than p or q are left as they are, without error.
    Sketches of one Sketch compare with each other and with nobody else's. Raises ``ValueError`` for ``p`` or ``q`` below 1.

    >>> x, y = torch.ones(2, 200, 300).unbind()
    >>> a, b = (Sketch(16, 16).project("weight", z) for z in (x, 2 * y))
    >>> a.shape, bool((a * b).sum() == 2 * (a * a).sum())  # one projection for all: products of equals are kept to the last digit
    (torch.Size([16, 16]), True)
    """

    p: int = 32
    q: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.p < 1 or self.q < 1:
            raise ValueError(f"p and q must be at least 1, got p={self.p}, q={self.q}")

    def error(self) -> float:
        r"""Bound on the standard deviation of a product of one matrix's sketches, in units of :math:`\lVert X\rVert\lVert Y\rVert`.

        >>> round(Sketch(32, 32).error(), 3)
        0.359
        """
        return math.sqrt(2 * (1 / self.p + 1 / self.q) + 4 / (self.p * self.q))

    def gradients(self, model: nn.Module, batch: Batch, *, forward: Forward = logits_of) -> Sketches:
        """Sketches of the rows' gradients, of summed NLL as for :func:`drift.gradient_gram`, in one forward and one backward pass.

        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
        >>> ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
        >>> found = Sketch(4, 4).gradients(model, {"input_ids": ids, "labels": ids}, forward=lambda m, b: m(b["input_ids"]))
        >>> found.values.shape, found.of(module="1.bias").shape  # 6 + 6 + 3 numbers: sides this short are left as they are
        ((2, 15), (2, 3))
        """
        trained = trainable(model)
        batch = on_device(batch, next(iter(trained.values())).device)
        labels = batch["labels"]
        groups = Groups(torch.arange(len(labels)).unsqueeze(1).expand(labels.shape), len(labels), tuple(labels.shape))
        collector = _Projections(self, {n: p.shape for n, p in trained.items()})
        with measuring(model), torch.enable_grad(), Interceptor(model).collecting(collector, groups):
            unseen = torch.autograd.grad(summed_nll(model, batch, forward), list(trained.values()), allow_unused=True)
            collector.close()
        missing = tuple(n for n, g in zip(trained, unseen, strict=True) if g is not None)
        rows = len(labels)
        parts = {n: collector.found[n].reshape(rows, -1).double().cpu().numpy() if n in collector.found else np.zeros((rows, self._size(shape)))
                 for n, shape in collector.shapes.items() if n not in missing}
        check_finite("the gradient", {n: bool(np.isfinite(part).all()) for n, part in parts.items()})
        return _stacked(parts, missing)

    def change(self, model: Side, base: Side) -> Sketches:
        """Sketch [1, K] of the drift between two states, as :func:`drift.parameter_drift` takes them; factored updates are not formed."""
        parts = {}
        for name, delta in deltas(model, base):
            if isinstance(delta, FactoredDelta):
                a, b = delta.joined
                left, right = self.sides(name, torch.Size((len(b), a.shape[1])), a.device)
                projected = _times(left, b) @ _times(right, a.T).T
            else:
                projected = self.project(name, delta.formed())
            parts[name] = projected.reshape(1, -1).cpu().numpy()
        return _stacked(parts, ())

    def project(self, name: str, tensor: Tensor) -> Tensor:
        """The projection of one parameter's gradient or drift; vectors are matrices of one column, stacks of matrices one below the other."""
        matrix = tensor.detach().double().reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.detach().double().unsqueeze(1)
        left, right = self.sides(name, tensor.shape, tensor.device)
        return _times(right, _times(left, matrix).T).T

    def sides(self, name: str, shape: torch.Size, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """L [p, m] and R' [q, n] of a parameter; None for a side that is left as it is."""
        m, n = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
        number = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7])
        generator = torch.Generator().manual_seed(number)

        def signs(k: int, size: int) -> Tensor | None:
            if size <= k:
                return None
            return (2.0 * torch.randint(0, 2, (k, size), generator=generator, dtype=torch.int8) - 1).double().div(math.sqrt(k)).to(device)

        return signs(self.p, m), signs(self.q, n)

    def _size(self, shape: torch.Size) -> int:
        m, n = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
        return min(self.p, m) * min(self.q, n)


def _times(side: Tensor | None, x: Tensor) -> Tensor:
    """side @ x, where None stands for the identity."""
    return x if side is None else side.to(x.dtype) @ x


def _stacked(parts: Mapping[str, NDArray[np.float64]], missing: Sequence[str]) -> Sketches:
    columns, start = {}, 0
    for name, part in parts.items():
        columns[name] = slice(start, start + part.shape[1])
        start += part.shape[1]
    return Sketches(np.concatenate(list(parts.values()), axis=1), columns, tuple(missing))


class _Projections(UseCollector):
    """Projections [R, p, q] of the groups' gradients, use by use: they are linear."""

    def __init__(self, sketch: Sketch, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.sketch, self.shapes = sketch, shapes
        self.found: dict[str, Tensor] = {}

    def process(self, name: str, uses: Sequence[Use]) -> None:
        for use in uses:
            projected = self._projected(name, use)
            self.found[name] = self.found[name] + projected if name in self.found else projected

    def _projected(self, name: str, use: Use) -> Tensor:
        if not isinstance(use, Dense | Sparse):
            return torch.stack([self.sketch.project(name, part) for part in use.parts])
        left, right = self.sketch.sides(name, self.shapes[name], use.right.device)
        rights = _times(right, at_least_fp32(use.right).T).T
        if isinstance(use, Sparse):
            lefts = nn.functional.one_hot(use.ids, self.shapes[name][0]).to(rights.dtype) if left is None else left.T[use.ids].to(rights.dtype)
        else:
            lefts, rights = use.split.sort(_times(left, at_least_fp32(use.left).T).T), use.split.sort(rights)
        bounds = use.bounds
        return torch.stack([lefts[low:high].T @ rights[low:high] for low, high in zip(bounds, bounds[1:], strict=False)])
