"""Taking the parameter gradients of a backward pass apart, group of tokens by group, while autograd computes them.

Inside a module that owns trainable parameters, the calls that use them (``linear``, ``embedding``, ``layer_norm``, ``rms_norm``,
``addmm``) are replaced by those of :mod:`drift.taps`, which hand the pieces of the parameter gradient to a collector. So the pass costs
what it did.

Modules with vectors only (norms of any family) see them spread over the tokens; modules with stacked weights (mixtures of
experts, their routers) are run once a group on that group's tokens. Both are done only where a trial run gives
the module's own output.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from drift.groups import Groups, Split
from drift.names import canonical_name, tied
from drift.taps import Calls, Collector, Fork, Spread, Tap
from drift.uses import Use


class UseCollector:
    """A collector that keeps every parameter's uses until all have come, and then calls ``process`` once with them."""

    def __init__(self) -> None:
        self._expected: Counter[str] = Counter()
        self._uses: dict[str, list[Use]] = {}

    def expect(self, name: str, parameter: Tensor, ids: Tensor | None) -> None:
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

        def tap(parameter: Tensor, lead: tuple[int, ...], ids: Tensor | None) -> Tap | None:
            name = own.get(id(parameter))
            split = None if name is None or groups is None else groups.split(lead)
            return None if split is None else Tap(self.collector, name, split).announce(parameter, ids)

        if isinstance(module, nn.Embedding) and groups is not None and args:
            args = (_own_positions(args[0], groups), *args[1:])
        with Calls(tap):
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
        spread = {n: Spread.apply(p, lead, Tap(self.collector, names[n], split).announce(p)) for n, p in own.items()}
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
        forks = {n: Fork.apply(p, groups.n, Tap(self.collector, names[n], split).announce(p)) for n, p in own.items()}
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
