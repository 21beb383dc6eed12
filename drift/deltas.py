r"""The change :math:`\delta = W - W_0` of one weight, in the form in which it is known: dense, factored, or rescaled by DoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from drift import lowrank
from drift.adapters import Adapter
from drift.numerics import moments, squared_norm
from drift.spectra import leading

_ROWS = 256  # rows of a factored weight that are formed at once, where nothing but its elements will do
NAN = torch.tensor(float("nan"), dtype=torch.float64)


class Delta(Protocol):
    """A change: its squared norm, inner product with the base, the base's squared norm (nan if unknown), its largest element; 0-d float64."""

    numel: int

    def squared(self) -> Tensor: ...

    def with_base(self) -> Tensor: ...

    def base_squared(self) -> Tensor: ...

    def max_abs(self) -> Tensor: ...

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        """Leading left directions [m, k] and all singular values that are not 0, largest first."""
        ...

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The change a few rows at a time, float64."""
        ...

    def formed(self) -> Tensor:
        """The change itself, float64."""
        ...

    def base(self) -> Tensor: ...


@dataclass(frozen=True)
class DenseDelta:
    """Two dense tensors of one shape."""

    now: Tensor
    before: Tensor

    @property
    def numel(self) -> int:
        return self.now.numel()

    @cached_property
    def _moments(self):
        return moments(self.now, self.before)

    def squared(self) -> Tensor:
        return self._moments.squared_distance

    def with_base(self) -> Tensor:
        return self._moments.inner_with_base

    def base_squared(self) -> Tensor:
        return self._moments.squared_base

    def max_abs(self) -> Tensor:
        return self._moments.max_abs

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        return _dense_directions(self.formed(), k)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, 2**20 // max(1, self.now[0].numel()))
        for i in range(0, len(self.now), step):
            rows = slice(i, i + step)
            yield rows, self.now[rows].double() - self.before[rows].to(self.now.device).double()

    def formed(self) -> Tensor:
        return self.now.double() - self.before.to(self.now.device).double()

    def base(self) -> Tensor:
        return self.before


def oriented(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Factors (a, b), scaling folded in, whose product has the shape of the stored weight."""
    a, b = adapter.a.detach().double(), adapter.scaling * adapter.b.detach().double()
    return (b.T, a.T) if adapter.transposed else (a, b)


def factors_of(found: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """Several adapters of one weight as one pair of factors: their products add up."""
    pairs = [oriented(adapter) for adapter in found]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


@dataclass(frozen=True)
class FactoredDelta:
    r"""Update :math:`BA - B_0A_0` of a weight that began as ``frozen`` :math:`+ B_0A_0` (``frozen``: None if it is not at hand)."""

    a: Tensor
    b: Tensor
    a0: Tensor | None
    b0: Tensor | None
    frozen: Tensor | None

    @property
    def numel(self) -> int:
        return self.a.shape[1] * self.b.shape[0]

    @cached_property
    def joined(self) -> tuple[Tensor, Tensor]:
        """Factors (a, b) of the whole change, float64."""
        return lowrank.joined(self.a, self.b, self.a0, self.b0)

    @property
    def _known(self) -> bool:
        return self.frozen is not None and self.frozen.is_floating_point() and self.frozen.shape == (len(self.b), self.a.shape[1])

    def squared(self) -> Tensor:
        return lowrank.norm(self.a, self.b, a0=self.a0, b0=self.b0).square()

    def with_base(self) -> Tensor:
        if not self._known:
            return NAN
        a, b = self.joined
        product = lowrank.inner_with_dense(self.frozen, a, b)
        return product if self.a0 is None else product + lowrank.inner(self.a0, self.b0, a, b)

    def base_squared(self) -> Tensor:
        if not self._known:
            return NAN
        square = squared_norm(self.frozen)
        if self.a0 is None:
            return square
        crossed = lowrank.inner_with_dense(self.frozen, self.a0, self.b0)
        return square + 2 * crossed + lowrank.norm(self.a0, self.b0).square()

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        a, b = self.joined
        for i in range(0, len(b), _ROWS):
            yield slice(i, i + _ROWS), b[i : i + _ROWS] @ a

    def max_abs(self) -> Tensor:
        return torch.stack([d.abs().max() for _, d in self.rows()]).max()

    def scaled(self, left: Tensor, right: Tensor) -> "FactoredDelta":
        """The change with its rows multiplied by ``left`` [m] and its columns by ``right`` [n]."""
        a, b = self.joined
        return FactoredDelta(a * right.to(a.device), left.to(b.device)[:, None] * b, None, None, None)

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        a, b = self.joined
        left, values, _ = lowrank.directions(a, b, min(len(a), *(b.shape[0], a.shape[1])))
        return left[:, :k], values

    def formed(self) -> Tensor:
        a, b = self.joined
        return b @ a

    def base(self) -> Tensor:
        if not self._known:
            raise ValueError("the base weight is not at hand (or quantised), so directions can't be compared with it; give the base model")
        return self.frozen.double() if self.a0 is None else self.frozen.double() + self.b0.double() @ self.a0.double()


@dataclass(frozen=True)
class ResidualDelta:
    """A factored update on top of a frozen weight that differs from the base's: formed a few rows at a time, in float64."""

    now: Tensor
    before: Tensor
    a: Tensor
    b: Tensor

    @property
    def numel(self) -> int:
        return self.now.numel()

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for i, (d, _) in enumerate(self._rows()):
            yield slice(i * _ROWS, (i + 1) * _ROWS), d

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.b), _ROWS):
            rows = slice(i, i + _ROWS)
            before = self.before[rows].to(self.now.device).double()
            yield self.now[rows].double() - before + self.b[rows].double() @ self.a.double(), before

    @cached_property
    def _sums(self) -> Tensor:
        parts = [torch.stack([d.square().sum(), (d * w).sum(), w.square().sum(), d.abs().max()]) for d, w in self._rows()]
        stacked = torch.stack(parts)
        return torch.cat([stacked[:, :3].sum(0), stacked[:, 3:].amax(0)])

    def squared(self) -> Tensor:
        return self._sums[0]

    def with_base(self) -> Tensor:
        return self._sums[1]

    def base_squared(self) -> Tensor:
        return self._sums[2]

    def max_abs(self) -> Tensor:
        return self._sums[3]

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        return _dense_directions(self.formed(), k)

    def formed(self) -> Tensor:
        return torch.cat([d for d, _ in self._rows()])

    def base(self) -> Tensor:
        return self.before


@dataclass(frozen=True)
class StackedDelta:
    """Changes of the E matrices that are stacked in one weight [E, m, n] (mixtures of experts), one each; a stack has no directions of its own."""

    parts: tuple[FactoredDelta | ResidualDelta, ...]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def squared(self) -> Tensor:
        return torch.stack([part.squared() for part in self.parts]).sum()

    def with_base(self) -> Tensor:
        return torch.stack([part.with_base() for part in self.parts]).sum()

    def base_squared(self) -> Tensor:
        return torch.stack([part.base_squared() for part in self.parts]).sum()

    def max_abs(self) -> Tensor:
        return torch.stack([part.max_abs() for part in self.parts]).max()

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for expert, part in enumerate(self.parts):
            yield slice(expert, expert + 1), part.formed().unsqueeze(0)

    def formed(self) -> Tensor:
        return torch.stack([part.formed() for part in self.parts])

    def base(self) -> Tensor:
        return torch.stack([part.base() for part in self.parts])


@dataclass(frozen=True)
class DoraDelta:
    r"""DoRA's weight :math:`\operatorname{diag}(m/\lVert V\rVert_{row})\,V`, :math:`V = W_0 + BA`, against its start :math:`\operatorname{diag}(c_0)\,W_0`.

    Row by row :math:`\delta_i=(c_i-c_{0,i})w_i+c_i(BA)_i` with :math:`c_i=m_i/\lVert v_i\rVert`: its norm follows from :math:`\lVert w_i\rVert^2`,
    :math:`\langle w_i,(BA)_i\rangle` and :math:`\lVert(BA)_i\rVert^2`, all O(r) a number from the factors. ``frozen`` [m, n] has one row
    an output (``transposed``: it is stored the other way round); ``magnitude0`` None: the start is :math:`W_0` itself.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor
    magnitude0: Tensor | None
    frozen: Tensor
    transposed: bool

    @property
    def numel(self) -> int:
        return self.frozen.numel()

    @cached_property
    def _products(self) -> tuple[Tensor, ...]:
        """Per row: ‖w‖², ⟨w, BA⟩, ‖BA‖², c, c₀."""
        a, b = self.a.double(), self.b.double()
        w2 = torch.cat([rows.double().square().sum(1) for rows in self.frozen.split(_ROWS)])
        wba = torch.cat([((rows.double() @ a.T) * factor).sum(1) for rows, factor in zip(self.frozen.split(_ROWS), b.split(_ROWS), strict=True)])
        ba2 = ((b @ (a @ a.T)) * b).sum(1)
        c = self.magnitude.double().flatten() / (w2 + 2 * wba + ba2).sqrt()
        c0 = torch.ones_like(c) if self.magnitude0 is None else self.magnitude0.to(c.device).double().flatten() / w2.sqrt()
        return w2, wba, ba2, c, c0

    def squared(self) -> Tensor:
        w2, wba, ba2, c, c0 = self._products
        return ((c - c0) ** 2 * w2 + 2 * (c - c0) * c * wba + c**2 * ba2).sum().clamp(min=0)

    def with_base(self) -> Tensor:
        w2, wba, _, c, c0 = self._products
        return (c0 * ((c - c0) * w2 + c * wba)).sum()

    def base_squared(self) -> Tensor:
        w2, *_, c0 = self._products
        return (c0**2 * w2).sum()

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), self.formed()

    def _rows(self) -> Iterator[Tensor]:
        *_, c, c0 = self._products
        for i in range(0, len(self.b), _ROWS):
            rows = slice(i, i + _ROWS)
            update = self.b[rows].double() @ self.a.double()
            yield (c - c0)[rows, None] * self.frozen[rows].double() + c[rows, None] * update

    def max_abs(self) -> Tensor:
        return torch.stack([rows.abs().max() for rows in self._rows()]).max()

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        return _dense_directions(self.formed(), k)

    def formed(self) -> Tensor:
        return self._stored(torch.cat(list(self._rows())))

    def base(self) -> Tensor:
        return self._stored(self._products[-1][:, None] * self.frozen.double())

    def _stored(self, x: Tensor) -> Tensor:
        return x.T if self.transposed else x


def _dense_directions(delta: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left, values, _ = leading(delta, min(delta.shape))
    return left[:, :k], values
