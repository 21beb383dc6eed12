r"""Norms, products, spectra and angles of factored updates :math:`\Delta W = s\,BA`, without ever forming the product.

``a`` [r, n] and ``b`` [m, r] throughout; ``a0``, ``b0`` are the factors at the start, for updates :math:`s\,(BA - B_0A_0)` whose
start is not a zero product (PiSSA, OLoRA). All run in float64: a Gram matrix of factors can cancel wholly in float32.
"""

import torch
from torch import Tensor

from drift.spectra import principal_angles


def joined(a: Tensor, b: Tensor, a0: Tensor | None = None, b0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors (a', b') in float64, of rank r + r0, whose product is B A - B0 A0.

    >>> a, b = joined(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
    >>> b @ a  # 3 (1, 2) - 2 (1, 0)
    tensor([[1., 6.]], dtype=torch.float64)
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"a [r, n] and b [m, r] must share r, got {tuple(a.shape)} and {tuple(b.shape)}")
    if (a0 is None) != (b0 is None):
        raise ValueError("give both a0 and b0 (the factors at the start) or neither")
    a, b = a.detach().double(), b.detach().double()
    if a0 is not None:
        a0, b0 = a0.detach().to(a.device).double(), b0.detach().to(b.device).double()
        a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    return a, b


def _cores(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Orthonormal left and right bases [m, k], [n, k'] and the small middle factor: :math:`BA = Q_b M Q_a^\top`."""
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    return q_b, r_b @ r_a.T, q_a


def spectrum(a: Tensor, b: Tensor, scaling: float = 1.0, a0: Tensor | None = None, b0: Tensor | None = None) -> Tensor:
    r"""Singular values of :math:`s\,(BA - B_0A_0)`, largest first, float64.

    With :math:`B = Q_B R_B` and :math:`A^\top = Q_A R_A`, :math:`BA = Q_B (R_B R_A^\top) Q_A^\top`, so they are the singular
    values of the small middle factor. Backward stable; cost :math:`O((m+n) r^2 + r^3)` (rank 2r with a start).

    >>> spectrum(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    tensor([10.], dtype=torch.float64)
    """
    a, b = joined(a, b, a0, b0)
    r_a, r_b = torch.linalg.qr(a.T, mode="r")[1], torch.linalg.qr(b, mode="r")[1]
    return abs(scaling) * torch.linalg.svdvals(r_b @ r_a.T)


def norm(a: Tensor, b: Tensor, scaling: float = 1.0, a0: Tensor | None = None, b0: Tensor | None = None) -> Tensor:
    r"""Frobenius norm :math:`\lVert s\,(BA - B_0A_0)\rVert_F`, a 0-d float64 tensor.

    Without a start :math:`\lVert BA\rVert_F^2 = \langle B^\top B,\, A A^\top\rangle`, a sum whose terms can't cancel badly in
    float64; with one the difference can cancel wholly, so QR factors are used (:func:`spectrum`).
    Cost :math:`O((m+n) r^2)`, against :math:`O(mnr)` for the product.

    >>> norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0).item()
    10.0
    """
    if a0 is not None or b0 is not None:
        return torch.linalg.vector_norm(spectrum(a, b, scaling, a0, b0))
    a, b = joined(a, b)
    return abs(scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def inner(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    r"""Inner product :math:`\langle B_1A_1, B_2A_2\rangle_F = \langle B_1^\top B_2, A_1A_2^\top\rangle` of two updates of one weight, 0-d float64.

    Ranks may differ. Cost :math:`O((m+n) r_1 r_2)`.

    >>> inner(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])).item()
    10.0
    """
    (a1, b1), (a2, b2) = joined(a1, b1), joined(a2, b2)
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise ValueError(f"updates must have one shape, got {[b1.shape[0], a1.shape[1]]} and {[b2.shape[0], a2.shape[1]]}")
    return ((b1.T @ b2) * (a1 @ a2.T)).sum()


def inner_with_dense(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Inner product :math:`\langle W, BA\rangle_F = \langle W A^\top, B\rangle` with a dense matrix [m, n], 0-d float64. Cost :math:`O(mnr)`.

    >>> inner_with_dense(torch.eye(2), torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0], [1.0]])).item()
    7.0
    """
    a, b = joined(a, b)
    if weight.shape != (len(b), a.shape[1]):
        raise ValueError(f"weight must have the update's shape {[len(b), a.shape[1]]}, got {list(weight.shape)}")
    return torch.stack([((rows.double() @ a.T) * b[i * 1024 : i * 1024 + len(rows)]).sum()
                        for i, rows in enumerate(weight.detach().to(a.device).split(1024))]).sum()


def directions(a: Tensor, b: Tensor, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    r"""The ``k`` leading singular triplets of :math:`BA`: left [m, k], values [k], right [n, k], float64.

    >>> left, values, right = directions(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]]))
    >>> values.item(), left.abs().flatten().tolist()
    (10.0, [0.0, 1.0])
    """
    left, middle, right = _cores(*joined(a, b))
    if not 1 <= k <= min(middle.shape):
        raise ValueError(f"k must be at least 1 and at most the rank {min(middle.shape)}, got {k}")
    u, values, v = torch.linalg.svd(middle, full_matrices=False)
    return left @ u[:, :k], values[:k], right @ v[:k].T


def angles(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, k: int = 1) -> Tensor:
    """Principal angles [k] in radians between the leading ``k`` left directions of two factored updates, smallest first.

    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(angles(one, one.T, other, other.T).item(), 4)  # orthogonal
    1.5708
    """
    return principal_angles(directions(a1, b1, k)[0], directions(a2, b2, k)[0])


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
    for name, d, factor in (("d_a", d_a, a), ("d_b", d_b, b)):
        if d is not None and d.shape[1:] != factor.shape:
            raise ValueError(f"{name} must be [G, {factor.shape[0]}, {factor.shape[1]}], got {list(d.shape)}")
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
