r"""Forms of a Fisher matrix F that fit into memory, each with :math:`\delta^\top F\delta` of a parameter's drift."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drift.deltas import Delta, FactoredDelta


@dataclass(frozen=True)
class Diagonal:
    r"""Diagonal of F: ``values[name]`` has the parameter's shape. ``missing``: trainable parameters that it does not cover."""

    values: Mapping[str, Tensor]
    rows: int
    missing: tuple[str, ...] = ()

    def quadratic(self, name: str, delta: Delta) -> Tensor:
        r""":math:`\sum_i F_{ii}\delta_i^2`, 0-d float64; factored updates are formed a few rows at a time."""
        diagonal = self.values[name]
        return torch.stack([(diagonal[rows].to(d.device).double().reshape(d.shape) * d.square()).sum() for rows, d in delta.rows()]).sum()


@dataclass(frozen=True)
class RankOne:
    r"""The best rank-one form of F's diagonal, :math:`F_{ij}\approx u_iv_j`, from its row and column sums (as Adafactor has them).

    It minimises the generalised KL divergence to the diagonal. ``factors[name]`` = (u [m], v [n]). Memory O(m + n); of a factored update
    :math:`\sum_{ij}u_iv_j(BA)_{ij}^2=\lVert\operatorname{diag}(\sqrt u)BA\operatorname{diag}(\sqrt v)\rVert_F^2` costs :math:`O((m+n)r^2)`.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rows: int
    missing: tuple[str, ...] = ()

    def quadratic(self, name: str, delta: Delta) -> Tensor:
        r""":math:`\sum_{ij}u_iv_j\delta_{ij}^2`, 0-d float64."""
        u, v = (x.double() for x in self.factors[name])
        if isinstance(delta, FactoredDelta):
            return delta.scaled(u.sqrt(), v.sqrt()).squared()
        return torch.stack([(u[rows].to(d.device)[:, None] * v.to(d.device) * d.square()).sum() for rows, d in delta.rows()]).sum()


@dataclass(frozen=True)
class KroneckerFactored:
    r"""K-FAC: :math:`F_W\approx S\otimes A` for linear layers, S [m, m] of output gradients, A [n, n] of inputs (Martens and Grosse 2015).

    ``factors[name]`` = (S, A). Exact if inputs and output gradients of a position are independent, and positions of each other ("expand").
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rows: int
    missing: tuple[str, ...] = ()

    def quadratic(self, name: str, delta: Delta) -> Tensor:
        r""":math:`\operatorname{tr}(\delta^\top S\delta A)`, 0-d float64; of :math:`BA` it is :math:`\langle B^\top SB, AAA^\top\rangle`, in :math:`O((m^2+n^2)r)`."""
        s, a = (x.double() for x in self.factors[name])
        if isinstance(delta, FactoredDelta):
            factor_a, factor_b = delta.joined
            return ((factor_b.T @ s @ factor_b) * (factor_a @ a @ factor_a.T)).sum()
        d = delta.formed().to(s.device)
        return ((s @ d) * (d @ a)).sum()


Fisher = Diagonal | RankOne | KroneckerFactored
