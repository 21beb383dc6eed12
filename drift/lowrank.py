"""Drift of LoRA weights from their factors, without ever forming the product."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift.adapters import adapters


@dataclass(frozen=True)
class Factors:
    r"""Low-rank factors of one weight's update :math:`\Delta W = B A`: ``a`` [r, n], ``b`` [m, r].

    PEFT's scaling is folded into ``b``; several active adapters stand as one, stacked along r.
    """

    a: Tensor
    b: Tensor

    def copy(self) -> "Factors":
        """A detached copy on the CPU."""
        return Factors(self.a.detach().to("cpu", copy=True), self.b.detach().to("cpu", copy=True))


def _stacked(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"a [r, n] and b [m, r] must share r, got {tuple(a.shape)} and {tuple(b.shape)}")
    if (a0 is None) != (b0 is None):
        raise ValueError("give both a0 and b0 (the factors at the start) or neither")
    a, b = a.detach().double(), b.detach().double()
    if a0 is not None:
        a, b = torch.cat([a, a0.detach().double()]), torch.cat([b, -b0.detach().double()], dim=1)
    return a, b


def lora_spectrum(a: Tensor, b: Tensor, scaling: float = 1.0, a0: Tensor | None = None, b0: Tensor | None = None) -> Tensor:
    r"""Singular values of :math:`s\,(BA - B_0A_0)`, largest first, float64.

    With :math:`B = Q_B R_B` and :math:`A^\top = Q_A R_A`, :math:`BA = Q_B (R_B R_A^\top) Q_A^\top`, so they are the singular
    values of the small middle factor. Backward stable; cost :math:`O((m+n) r^2 + r^3)` (rank 2r with a start).

    >>> lora_spectrum(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    tensor([10.], dtype=torch.float64)
    """
    a, b = _stacked(a, b, a0, b0)
    r_a, r_b = torch.linalg.qr(a.T, mode="r")[1], torch.linalg.qr(b, mode="r")[1]
    return abs(scaling) * torch.linalg.svdvals(r_b @ r_a.T)


def lora_norm(a: Tensor, b: Tensor, scaling: float = 1.0, a0: Tensor | None = None, b0: Tensor | None = None) -> Tensor:
    r"""Frobenius norm :math:`\lVert s\,(BA - B_0A_0)\rVert_F`, a 0-d float64 tensor.

    ``a`` [r, n], ``b`` [m, r]; ``a0``, ``b0`` are the factors at the start where those are not a zero product (PiSSA, OLoRA).
    Without a start :math:`\lVert BA\rVert_F^2 = \langle B^\top B,\, A A^\top\rangle`, a sum whose terms can't cancel badly in
    float64; with one the difference can cancel wholly, so QR factors are used (:func:`lora_spectrum`).
    Cost :math:`O((m+n) r^2)`, against :math:`O(mnr)` for the product.

    >>> lora_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0).item()
    10.0
    """
    if a0 is not None or b0 is not None:
        return torch.linalg.vector_norm(lora_spectrum(a, b, scaling, a0, b0))
    a, b = _stacked(a, b, None, None)
    return abs(scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def induced_gram(a: Tensor, b: Tensor, d_a: Tensor | None, d_b: Tensor | None, scaling: float = 1.0) -> Tensor:
    r"""Inner products of the steps in :math:`W` that several gradients of its factors induce, [G, G] float64.

    A gradient step on the factors moves :math:`W = W_0 + s\,BA` along :math:`D_i=s(\partial B_i A + B\,\partial A_i)`, up to the
    learning rate and to second order. ``a`` [r, n], ``b`` [m, r]; ``d_a`` [G, r, n] and ``d_b`` [G, m, r] (None: that factor is
    frozen). All products are of r x r matrices: cost :math:`O((m+n) r^2 G^2)`.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> induced_gram(a, b, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0]]]))  # D = [1 2] + [3 0]
    tensor([[20.]], dtype=torch.float64)
    """
    if d_a is None and d_b is None:
        raise ValueError("d_a and d_b are both None: one factor at least must have gradients")
    a, b = a.double(), b.double()
    d_a, d_b = (None if d is None else d.double() for d in (d_a, d_b))
    total: Tensor | float = 0.0
    if d_b is not None:
        total = total + torch.einsum("imr,jms,rs->ij", d_b, d_b, a @ a.T)
    if d_a is not None:
        total = total + torch.einsum("irn,jsn,rs->ij", d_a, d_a, b.T @ b)
    if d_a is not None and d_b is not None:
        crossed = torch.einsum("irs,jsr->ij", d_b.mT @ b, d_a @ a.T)
        total = total + crossed + crossed.T
    return scaling**2 * total


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    """(canonical name of the base weight, factors) for every layer with active, unmerged LoRA adapters (:func:`drift.adapters.adapters`)."""
    parts: dict[str, list] = {}
    for adapter in adapters(model):
        if adapter.magnitude is not None:
            raise NotImplementedError(f"{adapter.base} uses DoRA, whose update is not the product of two factors; "
                                      "its drift can't be read from them")
        parts.setdefault(adapter.base, []).append(adapter)
    for base, found in parts.items():
        yield base, Factors(torch.cat([p.a for p in found]), torch.cat([p.b * p.scaling for p in found], dim=1))
