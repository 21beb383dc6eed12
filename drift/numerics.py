"""Sums over many numbers that keep their digits.

A float32 sum over 59 M elements in one go can be off by several parts in a thousand, and differences of bfloat16 numbers lose their
digits before any sum. So every element is brought to float32 first, squares are summed in float32 over 65,536 elements,
and beyond that in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 65536  # elements summed in float32 before float64 takes over
_BLOCK = 16 * _CHUNK  # elements that are widened at once: they stay in the cache


def check_finite(what: str, finite: Mapping[str, bool]) -> None:
    """Raise ``FloatingPointError`` naming the parameters of which ``what`` is not finite.

    >>> check_finite("the gradient", {"weight": True, "bias": False})
    Traceback (most recent call last):
    FloatingPointError: the gradient is not finite in 1 of 2 parameters: bias
    """
    bad = [name for name, good in finite.items() if not good]
    if bad:
        raise FloatingPointError(f"{what} is not finite in {len(bad)} of {len(finite)} parameters: {', '.join(bad[:5])}"
                                 f"{', ...' if len(bad) > 5 else ''}")


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _sum(products: Tensor) -> Tensor:
    """Sum of a 1-d tensor: its own type within chunks, float64 across them."""
    whole = products.numel() // _CHUNK * _CHUNK
    head = products[:whole].view(-1, _CHUNK).sum(1).double().sum() if whole else products.new_zeros((), dtype=torch.float64)
    return head + products[whole:].double().sum()


def inner(x: Tensor, y: Tensor) -> Tensor:
    r"""Inner product :math:`\sum_i x_i y_i` of two tensors of one shape, as a 0-d float64 tensor on their device.

    Exact products of the inputs' float32 values, summed in float32 over 65,536 elements and in float64 beyond: relative
    error about 1e-6 at worst for one sign. One pass over both tensors, no synchronisation.

    >>> inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
    11.0
    """
    _same_shape(x, y)
    return sum((_sum(at_least_fp32(a) * at_least_fp32(b)) for a, b in _pairs(x, y)), _zero(x))


def squared_norm(x: Tensor) -> Tensor:
    r"""Squared Euclidean norm :math:`\sum_i x_i^2`, as a 0-d float64 tensor (see :func:`inner`).

    >>> squared_norm(torch.tensor([[3.0], [4.0]])).item()
    25.0
    """
    return inner(x, x)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean distance :math:`\sum_i (x_i - y_i)^2`; both are widened *before* the subtraction.

    ``y`` is moved to the device of ``x``, piece by piece.

    >>> squared_distance(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0])).item()
    5.0
    """
    return moments(x, y).squared_distance


@dataclass(frozen=True)
class Moments:
    r"""Of a difference :math:`\delta = x - y`, each a 0-d float64 tensor: :math:`\lVert\delta\rVert^2`, :math:`\langle\delta, y\rangle`,
    :math:`\lVert y\rVert^2`, :math:`\max_i|\delta_i|`."""

    squared_distance: Tensor
    inner_with_base: Tensor
    squared_base: Tensor
    max_abs: Tensor

    def stacked(self) -> Tensor:
        """The four as one tensor [4]."""
        return torch.stack([self.squared_distance, self.inner_with_base, self.squared_base, self.max_abs])


def moments(x: Tensor, y: Tensor) -> Moments:
    r"""All that the drift of one tensor from another needs, in one pass over both.

    ``y`` may lie on another device, or in a memory-mapped file: it is read a million elements at a time. Error as in :func:`inner`.

    >>> m = moments(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0]))
    >>> [v.item() for v in m.stacked()]
    [5.0, -3.0, 5.0, 2.0]
    """
    _same_shape(x, y)
    total, largest = torch.zeros(3, dtype=torch.float64, device=x.device), _zero(x)
    for a, b in _pairs(x, y):
        b = at_least_fp32(b.to(x.device, non_blocking=True))
        d = at_least_fp32(a) - b
        whole = len(d) // _CHUNK * _CHUNK
        if whole:
            dd, bb = d[:whole].view(-1, _CHUNK), b[:whole].view(-1, _CHUNK)
            total += torch.stack([(dd * dd).sum(1), (dd * bb).sum(1), (bb * bb).sum(1)]).double().sum(1)
        if whole < len(d):
            dd, bb = d[whole:].double(), b[whole:].double()
            total += torch.stack([dd @ dd, dd @ bb, bb @ bb])
        largest = torch.maximum(largest, torch.stack(torch.aminmax(d)).abs_().max().double())
    return Moments(*total.unbind(), largest)


def _pairs(x: Tensor, y: Tensor):
    x, y = x.detach().reshape(-1), y.detach().reshape(-1)
    return ((x[i : i + _BLOCK], y[i : i + _BLOCK]) for i in range(0, x.numel(), _BLOCK))


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=x.device)


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
