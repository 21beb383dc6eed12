"""Functions with the values and input gradients of torch's own that hand the pieces of a *parameter* gradient to a :class:`Collector`.

Its answer is the gradient that autograd goes on with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from drift.groups import Split
from drift.uses import Dense, Formed, Sparse, Use


class Collector(Protocol):
    """What takes the pieces. ``expect`` is called in the forward pass for every use of a parameter, with the tensor that is used (of a
    sharded one it is the whole) and the ids of an embedding; ``collect`` in the backward pass, and returns that use's gradient, or None where
    none is wanted."""

    def expect(self, name: str, parameter: Tensor, ids: Tensor | None) -> None: ...

    def collect(self, name: str, use: Use) -> Tensor | None: ...


@dataclass(frozen=True)
class Tap:
    """Where one use of one parameter is told."""

    collector: Collector
    name: str
    split: Split

    def announce(self, parameter: Tensor, ids: Tensor | None = None) -> "Tap":
        # Activation checkpointing runs a forward pass again inside the backward pass; the same use must count once.
        if torch._C._current_graph_task_id() == -1:
            self.collector.expect(self.name, parameter, ids)
        return self

    def dense(self, left: Tensor, right: Tensor) -> Tensor | None:
        return self.collector.collect(self.name, Dense(left.detach(), right.detach(), self.split))

    def vectors(self, per_token: Tensor) -> Tensor | None:
        return self.collector.collect(self.name, Formed(self.split.sums(per_token)))


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, or x W + b where ``transposed`` (the weight of transformers' Conv1D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_tap, bias_tap, transposed):
        ctx.save_for_backward(x, weight)
        ctx.taps, ctx.transposed = (weight_tap, bias_tap), transposed
        if transposed:
            return torch.addmm(bias, x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        x, weight = ctx.saved_tensors
        weight_tap, bias_tap = ctx.taps
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = e @ (weight.T if ctx.transposed else weight)
        flat = e.reshape(-1, e.shape[-1])
        if weight_tap is not None and ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            grad_weight = weight_tap.dense(inputs, flat) if ctx.transposed else weight_tap.dense(flat, inputs)
        elif ctx.needs_input_grad[1]:
            grad_weight = x.reshape(-1, x.shape[-1]).T @ flat if ctx.transposed else flat.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0) if bias_tap is None else bias_tap.vectors(flat)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx, tap):
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.tap = padding_idx, tap
        return functional.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        ids, split = ctx.saved_tensors[0].reshape(-1), ctx.tap.split
        e = e.reshape(-1, e.shape[-1])
        if ctx.padding_idx is not None:
            e = e.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0.0)
        grad = ctx.tap.collector.collect(ctx.tap.name, Sparse(split.sort(ids), split.sort(e), split.bounds))
        return None, grad, None, None


class _Affine(torch.autograd.Function):
    """The identity on a norm's output; its backward pass gives the norm's weight and bias their gradients."""

    @staticmethod
    def forward(ctx, y, x, weight, bias, normalise, weight_tap, bias_tap):
        ctx.save_for_backward(x)
        ctx.normalise, ctx.taps = normalise, (weight_tap, bias_tap)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        weight_tap, bias_tap = ctx.taps
        flat = e.reshape(-1, e.shape[-1])
        grad_weight = grad_bias = None
        if weight_tap is not None:
            normalised = ctx.normalise(ctx.saved_tensors[0]).reshape(flat.shape)
            grad_weight = weight_tap.vectors(flat * normalised)
        if bias_tap is not None:
            grad_bias = bias_tap.vectors(flat)
        return e, None, grad_weight, grad_bias, None, None, None


class Spread(torch.autograd.Function):
    """A vector [n] as a tensor [*lead, n] that repeats it, so that its gradient comes token by token."""

    @staticmethod
    def forward(ctx, vector, lead, tap):
        ctx.tap = tap
        return vector.view(*(1 for _ in lead), -1).expand(*lead, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        return ctx.tap.vectors(e.reshape(-1, e.shape[-1])), None, None


class Fork(torch.autograd.Function):
    """One parameter as G names of it, one for every group."""

    @staticmethod
    def forward(ctx, parameter, n, tap):
        ctx.tap = tap
        return tuple(parameter.view_as(parameter) for _ in range(n))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return ctx.tap.collector.collect(ctx.tap.name, Formed(torch.stack(gradients))), None, None


class Calls(TorchFunctionMode):
    """Replaces the calls that use one module's own parameters, while that module's forward pass runs."""

    def __init__(self, tap: Callable[[Tensor, tuple[int, ...], Tensor | None], Tap | None]) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        replaced = getattr(self, _CALLS.get(func, ""), None)
        output = NotImplemented if replaced is None else replaced(*args, **kwargs)
        return func(*args, **kwargs) if output is NotImplemented else output

    def linear(self, x, weight, bias=None):
        return self._linear(x, weight, bias, transposed=False)

    def addmm(self, bias, x, weight, *, beta=1, alpha=1):
        if beta != 1 or alpha != 1 or bias.dim() != 1:
            return NotImplemented
        return self._linear(x, weight, bias, transposed=True)

    def _linear(self, x, weight, bias, *, transposed):
        weight_tap = self.tap(weight, x.shape[:-1], None)
        bias_tap = None if bias is None else self.tap(bias, x.shape[:-1], None)
        if weight_tap is None and bias_tap is None:
            return NotImplemented
        if torch.is_autocast_enabled(x.device.type):  # inside a custom function autocast would come too late
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _Linear.apply(x, weight, bias, weight_tap, bias_tap, transposed)

    def embedding(self, ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
        if max_norm is not None or scale_grad_by_freq or sparse:
            return NotImplemented
        tap = self.tap(weight, ids.shape, ids)
        return NotImplemented if tap is None else _Embedding.apply(ids, weight, padding_idx, tap)

    def layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):
        return self._norm(functional.layer_norm, x, normalized_shape, weight, bias, eps)

    def rms_norm(self, x, normalized_shape, weight=None, eps=None):
        return self._norm(functional.rms_norm, x, normalized_shape, weight, None, eps)

    def _norm(self, norm, x, normalized_shape, weight, bias, eps):
        taps = [None if p is None else self.tap(p, x.shape[:-1], None) for p in (weight, bias)]
        untold = any(tap is None and p is not None and p.requires_grad for p, tap in zip((weight, bias), taps, strict=True))
        if len(normalized_shape) > 1 or untold or not any(taps):
            return NotImplemented
        kept = [p if p is None else p.detach() for p in (weight, bias)]
        shape = tuple(normalized_shape)
        y = norm(x, shape, *(kept if norm is functional.layer_norm else kept[:1]), eps=eps)
        normalise = _LayerNorm(norm, shape, eps)
        return _Affine.apply(y, x.detach(), weight, bias, normalise, *taps)


_CALLS = {functional.linear: "linear", torch.addmm: "addmm", functional.embedding: "embedding",
          functional.layer_norm: "layer_norm", functional.rms_norm: "rms_norm"}


@dataclass(frozen=True)
class _LayerNorm:
    norm: Callable[..., Tensor]
    shape: tuple[int, ...]
    eps: float | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x, self.shape, eps=self.eps)
