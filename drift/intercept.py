"""Taking the parameter gradients of a backward pass apart, group of tokens by group, while autograd computes them.

Inside a module that owns trainable parameters, the calls that use them (``linear``, ``embedding``, ``layer_norm``, ``rms_norm``,
``addmm``) are replaced by functions with the same values and input gradients, which hand the pieces of the *parameter*
gradient to a :class:`Collector`; its answer is the gradient that autograd goes on with. So the pass costs what it did.

Modules with vectors only (norms of any family) see them spread over the tokens; modules with stacked weights (mixtures of
experts, their routers) are run once a group on that group's tokens. Both are done only where a trial run gives
the module's own output.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from drift.groups import Groups, Split
from drift.names import canonical_name, tied
from drift.uses import Dense, Formed, Sparse, Use


class Collector(Protocol):
    """What takes the pieces. ``expect`` is called in the forward pass for every use of a parameter (with the ids of an
    embedding); ``collect`` in the backward pass, and returns that use's gradient, or None where none is wanted."""

    def expect(self, name: str, ids: Tensor | None) -> None: ...

    def collect(self, name: str, use: Use) -> Tensor | None: ...


class UseCollector:
    """A collector that keeps every parameter's uses until all have come, and then calls ``process`` once with them."""

    def __init__(self) -> None:
        self._expected: Counter[str] = Counter()
        self._uses: dict[str, list[Use]] = {}

    def expect(self, name: str, ids: Tensor | None) -> None:
        self._expected[name] += 1

    def collect(self, name: str, use: Use) -> None:
        found = self._uses.setdefault(name, [])
        found.append(use)
        if len(found) == self._expected[name]:
            self.process(name, self._uses.pop(name))

    def process(self, name: str, uses: Sequence[Use]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Process what still waits for uses that took no part in the loss; the next forward pass announces its own."""
        for name in list(self._uses):
            self.process(name, self._uses.pop(name))
        self._expected.clear()


@dataclass(frozen=True)
class _Tap:
    """Where one use of one parameter is told."""

    collector: Collector
    name: str
    split: Split

    def announce(self, ids: Tensor | None = None) -> "_Tap":
        # Activation checkpointing runs a forward pass again inside the backward pass; the same use must count once.
        if torch._C._current_graph_task_id() == -1:
            self.collector.expect(self.name, ids)
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


class _Spread(torch.autograd.Function):
    """A vector [n] as a tensor [*lead, n] that repeats it, so that its gradient comes token by token."""

    @staticmethod
    def forward(ctx, vector, lead, tap):
        ctx.tap = tap
        return vector.view(*(1 for _ in lead), -1).expand(*lead, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        return ctx.tap.vectors(e.reshape(-1, e.shape[-1])), None, None


class _Fork(torch.autograd.Function):
    """One parameter as G names of it, one for every group."""

    @staticmethod
    def forward(ctx, parameter, n, tap):
        ctx.tap = tap
        return tuple(parameter.view_as(parameter) for _ in range(n))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return ctx.tap.collector.collect(ctx.tap.name, Formed(torch.stack(gradients))), None, None


class _Calls(TorchFunctionMode):
    """Replaces the calls that use one module's own parameters, while that module's forward pass runs."""

    def __init__(self, tap: Callable[[Tensor, tuple[int, ...], Tensor | None], _Tap | None]) -> None:
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


class Interceptor:
    """Intercepts the uses of a model's trainable parameters between :meth:`attach` and :meth:`detach`; see the module's text.

    ``groups``: the groups of the batch that is in the model (None: leave everything alone).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.collector: Collector | None = None
        self.groups: Groups | None = None
        self._alias = tied(model)
        self._trusted: dict[nn.Module, bool] = {}  # modules that may be run spread or forked, after their trial
        self._kept: dict[nn.Module, Any] = {}  # forward methods that instances had of their own

    def attach(self, collector: Collector) -> None:
        """Start handing what the model's layers do to ``collector``."""
        self.detach()
        self.collector = collector
        for path, module in self.model.named_modules():
            own = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
            run = self._way(module, own)
            if run is not None:
                self._kept[module] = module.__dict__.get("forward")
                names = {n: self._name(path, n) for n in own}
                module.forward = _instead(module.forward, run, module, names)

    def detach(self) -> None:
        """Give all modules their own forward methods back."""
        self.collector = self.groups = None
        for module, kept in self._kept.items():
            if kept is None:
                del module.forward
            else:
                module.forward = kept
        self._kept.clear()

    @contextmanager
    def collecting(self, collector: Collector, groups: Groups) -> Iterator[None]:
        """Attached inside the block, and detached after it, also on errors."""
        self.attach(collector)
        self.groups = groups
        try:
            yield
        finally:
            self.detach()

    def _name(self, path: str, name: str) -> str:
        canonical = canonical_name(f"{path}.{name}" if path else name)
        return self._alias.get(canonical, canonical)

    def _way(self, module: nn.Module, own: Mapping[str, nn.Parameter]):
        if not own or isinstance(module, nn.ParameterDict | nn.ParameterList):
            return None
        dimensions = {p.dim() for p in own.values()}
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm) or type(module).__name__ == "Conv1D":
            return self._replaced
        if next(module.children(), None) is not None and not max(dimensions) > 2:
            return self._replaced
        return self._spread if dimensions == {1} else self._forked

    def _replaced(self, forward, module, names, args, kwargs):
        own = {id(p): names[n] for n, p in module._parameters.items() if n in names and p is not None}
        groups = self.groups

        def tap(parameter: Tensor, lead: tuple[int, ...], ids: Tensor | None) -> _Tap | None:
            name = own.get(id(parameter))
            split = None if name is None or groups is None else groups.split(lead)
            return None if split is None else _Tap(self.collector, name, split).announce(ids)

        if isinstance(module, nn.Embedding) and groups is not None and args:
            args = (_own_positions(args[0], groups), *args[1:])
        with _Calls(tap):
            return forward(*args, **kwargs)

    def _spread(self, forward, module, names, args, kwargs):
        groups = self.groups
        x = args[0] if args and isinstance(args[0], Tensor) else None
        own = {n: p for n, p in module._parameters.items() if n in names and p is not None}
        if x is None or groups is None or any(x.shape[-1:] != p.shape for p in own.values()):
            return forward(*args, **kwargs)
        split = groups.split(x.shape[:-1])
        lead = x.shape[:-1]
        if split is None or not self._trial(module, forward, args, kwargs, lambda: self._run_with(
                module, {n: p.view(*(1 for _ in lead), -1).expand(*lead, -1) for n, p in own.items()}, forward, args, kwargs)):
            return forward(*args, **kwargs)
        spread = {n: _Spread.apply(p, lead, _Tap(self.collector, names[n], split).announce()) for n, p in own.items()}
        return self._run_with(module, spread, forward, args, kwargs)

    def _forked(self, forward, module, names, args, kwargs):
        groups = self.groups
        x = args[0] if args and isinstance(args[0], Tensor) else None
        split = None if x is None or groups is None or x.dim() < 2 else groups.split(x.shape[:-1])
        if split is None or kwargs:
            return forward(*args, **kwargs)
        own = {n: p for n, p in module._parameters.items() if n in names and p is not None}
        present = [g for g in range(groups.n) if split.bounds[g] < split.bounds[g + 1]]

        def run(parameters: Callable[[int], Mapping[str, Tensor]]):
            outputs = [self._run_with(module, parameters(g), forward, _tokens(args, split, g, x.shape[:-1]), {}) for g in present]
            return _joined(outputs, split, x.shape[:-1])

        if not self._trial(module, forward, args, kwargs, lambda: run(lambda g: {})):
            return forward(*args, **kwargs)
        forks = {n: _Fork.apply(p, groups.n, _Tap(self.collector, names[n], split).announce()) for n, p in own.items()}
        return run(lambda g: {n: fork[g] for n, fork in forks.items()})

    def _trial(self, module, forward, args, kwargs, other: Callable[[], Any]) -> bool:
        """Whether another way to run the module gives its own output; tried once a module."""
        if module not in self._trusted:
            devices = sorted({a.device.index for a in args if isinstance(a, Tensor) and a.device.type == "cuda"})
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                try:
                    self._trusted[module] = _equal(forward(*args, **kwargs), other())
                except (RuntimeError, IndexError, ValueError, TypeError):  # it does not take tensors of these shapes
                    self._trusted[module] = False
        return self._trusted[module]

    @staticmethod
    def _run_with(module: nn.Module, tensors: Mapping[str, Tensor], forward, args, kwargs):
        # An instance attribute hides the registered parameter from the forward method and from nobody else.
        module.__dict__.update(tensors)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in tensors:
                del module.__dict__[name]


def _instead(forward: Callable[..., Any], run: Callable[..., Any], module: nn.Module, names: Mapping[str, str]):
    @wraps(forward)  # callers look at the signature of a model's forward method
    def intercepted(*args, **kwargs):
        return run(forward, module, names, args, kwargs)

    return intercepted


def _own_positions(ids: Tensor, groups: Groups) -> Tensor:
    """Position ids that all rows share ([T] or [1, T]) as one copy a row: added to [B, T, D] they come to the same."""
    if groups.tokens is None or not isinstance(ids, Tensor):
        return ids
    rows, tokens = groups.tokens
    shared = rows > 1 and (ids.shape == (1, tokens) or (ids.shape == (tokens,) and tokens != rows))
    return ids.expand(rows, tokens) if shared else ids


def _tokens(args: tuple, split: Split, group: int, lead: tuple[int, ...]) -> tuple:
    """The arguments with the vectors of one group only, as a flat list [N_g, ...]."""
    def cut(a):
        if not isinstance(a, Tensor) or a.shape[: len(lead)] != lead:
            return a
        return split.sort(a.reshape(-1, *a.shape[len(lead) :]))[split.bounds[group] : split.bounds[group + 1]]

    return tuple(cut(a) for a in args)


def _joined(outputs: list, split: Split, lead: tuple[int, ...]):
    """The groups' outputs put together in the order that the tokens came in."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts), split, lead) for parts in zip(*outputs, strict=True))
    flat = torch.cat(outputs)
    if len(flat) != split.bounds[-1]:
        raise ValueError("the module does not give one output a token")
    if split.order is not None:
        flat = flat.index_select(0, split.order.argsort().to(flat.device))
    return flat.reshape(*lead, *flat.shape[1:])


def _equal(a, b) -> bool:
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(x.abs().max()) if x.is_floating_point() else 0)
               for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(output) -> Iterator[Tensor]:
    for x in output if isinstance(output, tuple) else (output,):
        if isinstance(x, Tensor):
            yield x
