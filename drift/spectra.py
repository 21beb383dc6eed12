"""Singular directions of weights and of their updates."""

import torch
from torch import Tensor


def leading(matrix: Tensor, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    r"""The ``k`` leading singular triplets of a matrix [m, n]: left [m, k], values [k], right [n, k], float64.

    From the eigenvectors of the smaller Gram matrix in float64: a value :math:`\sigma` carries an absolute error of about
    :math:`10^{-16}\sigma_1^2/\sigma`, so leading ones are exact to many digits and ones below :math:`10^{-8}\sigma_1` are noise. Cost
    :math:`O(mn\min(m,n))`.

    >>> leading(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 2)[1]
    tensor([4., 3.], dtype=torch.float64)
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix must have two dimensions, got {tuple(matrix.shape)}")
    m, n = matrix.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k must be at least 1 and at most {min(m, n)}, got {k}")
    x = matrix.detach().double()
    if m > n:
        right, values, left = leading(x.T, k)
        return left, values, right
    squares, vectors = torch.linalg.eigh(x @ x.T)
    left, values = vectors[:, -k:].flip(1), squares[-k:].flip(0).clamp(min=0).sqrt()
    right = x.T @ left / values.clamp(min=torch.finfo(torch.float64).tiny)
    return left, values, right


def principal_angles(x: Tensor, y: Tensor) -> Tensor:
    r"""Principal angles between the spans of the columns of ``x`` [m, p] and ``y`` [m, q], in radians, smallest first.

    Cosines are the singular values of :math:`Q_x^\top Q_y`; small angles are taken from the sines, as cosines near 1 have lost
    them (Björck and Golub 1973).

    >>> angles = principal_angles(torch.eye(3)[:, :2], torch.tensor([[1.0], [0.0], [1.0]]))
    >>> round(angles.item(), 6)  # 45 degrees
    0.785398
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [m, p] and [m, q], got {tuple(x.shape)} and {tuple(y.shape)}")
    (q_x, _), (q_y, _) = torch.linalg.qr(x.double()), torch.linalg.qr(y.double())
    if q_x.shape[1] < q_y.shape[1]:
        q_x, q_y = q_y, q_x
    cosines = torch.linalg.svdvals(q_x.T @ q_y).clamp(max=1)
    sines = torch.linalg.svdvals(q_y - q_x @ (q_x.T @ q_y)).flip(0).clamp(max=1)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos())


def intruders(base: Tensor, tuned: Tensor, k: int = 10, threshold: float = 0.6) -> int:
    r"""Intruder dimensions: how many of the ``k`` leading left singular vectors of ``tuned`` [m, n] look like none of ``base``'s.

    :math:`\#\{i\le k:\max_j|\langle u_i(W),u_j(W_0)\rangle|<\epsilon\}` over all j (Shuttleworth et al., arXiv 2410.21228). Degenerate singular values
    have no vectors of their own, so a random base shows intruders where a trained one does not.

    >>> base = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> intruders(base, base + 9 * torch.ones(4, 4), k=2), intruders(base, 1.01 * base, k=2)
    (1, 0)
    """
    if base.shape != tuned.shape:
        raise ValueError(f"base and tuned must have one shape, got {tuple(base.shape)} and {tuple(tuned.shape)}")
    k = min(k, *base.shape)
    before = leading(base, min(base.shape))[0]
    closest = (before.T @ leading(tuned, k)[0]).abs().amax(0)
    return int((closest < threshold).sum())
