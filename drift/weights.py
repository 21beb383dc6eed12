"""Parameter drift: how far the weights are from where they started, per parameter.

Norms of many millions of float32 numbers lose digits when summed in one go (one sum over 59 M elements can be off by
several parts in a thousand), and differences of bfloat16 numbers lose them before any sum. So every element is
brought to float32 first, squares are summed in float32 over short chunks, and the chunk sums in float64.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from drift.adapters import adapters_disabled, has_adapters
from drift.lowrank import Factors, adapted_weights, lora_norm
from drift.names import canonical_name, layer_index, parameters, tied

_CHUNK = 65536  # elements summed in float32 before float64 takes over


def _sum(products: Tensor) -> Tensor:
    """Sum of a 1-d tensor: float32 within chunks, float64 across them (float64 throughout for float64 input)."""
    whole = products.numel() // _CHUNK * _CHUNK
    head = products[:whole].view(-1, _CHUNK).sum(1).double().sum() if whole else products.new_zeros((), dtype=torch.float64)
    return head + products[whole:].double().sum()


def _wide(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def inner(x: Tensor, y: Tensor) -> Tensor:
    r"""Inner product :math:`\sum_i x_i y_i` of two tensors of one shape, as a 0-d float64 tensor on their device.

    Exact products of the inputs' float32 values, summed in float32 over 65,536 elements and in float64 beyond: relative
    error about 1e-6 at worst for one sign. One pass over both tensors, no synchronisation.

    >>> inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
    11.0
    """
    _same_shape(x, y)
    return _sum(_wide(x) * _wide(y))


def squared_norm(x: Tensor) -> Tensor:
    r"""Squared Euclidean norm :math:`\sum_i x_i^2`, as a 0-d float64 tensor (see :func:`inner`).

    >>> squared_norm(torch.tensor([[3.0], [4.0]])).item()
    25.0
    """
    return inner(x, x)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Euclidean distance :math:`\sum_i (x_i - y_i)^2`; both are widened *before* the subtraction.

    ``y`` is moved to the device of ``x``.

    >>> squared_distance(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 3.0])).item()
    5.0
    """
    _same_shape(x, y)
    difference = _wide(x) - _wide(y.to(x.device, non_blocking=True))
    return _sum(difference.square_())


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")


class Reference:
    """The weights θ₀ that drift is measured from: a copy in memory, or safetensors files read tensor by tensor.

    >>> model = nn.Linear(2, 2)
    >>> reference = Reference.snapshot(model)
    >>> with torch.no_grad(): _ = model.bias.mul_(3.0)
    >>> [round(p.rel, 6) for p in parameter_drift(model, reference)]
    [0.0, 2.0]
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, files: Mapping[str, Path] | None = None,
                 factors: Mapping[str, Factors] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self._files = dict(files or {})
        self.factors = dict(factors or {})  # LoRA factors at the start, by base weight

    @classmethod
    def snapshot(cls, model: nn.Module) -> "Reference":
        """Remember the model's weights (and LoRA factors) as they are now: one copy on the CPU of every parameter."""
        return cls({name: p.detach().to("cpu", copy=True) for name, p in parameters(model).items()},
                   factors={name: f.copy() for name, f in adapted_weights(model)})

    @classmethod
    def from_safetensors(cls, path: Path | str) -> "Reference":
        """Weights in a ``.safetensors`` file, or a folder of them (sharded or not); memory-mapped, not copied to memory."""
        path = Path(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} is no .safetensors file and holds none")
        index = path / "model.safetensors.index.json"
        if path.is_dir() and index.exists():
            files = sorted({path / f for f in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        names: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names.update({canonical_name(name): file for name in opened.keys()})
        return cls(files=names)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._files

    def names(self) -> set[str]:
        """The canonical names that it holds."""
        return {*self._tensors, *self._files}

    def get(self, name: str) -> Tensor:
        """One tensor of θ₀, on the CPU."""
        if name in self._tensors:
            return self._tensors[name]
        if name not in self._files:
            raise KeyError(f"the reference has no parameter {name!r}; it has {len(self.names())} others")
        with safe_open(self._files[name], framework="pt") as opened:
            stored = next(key for key in opened.keys() if canonical_name(key) == name)
            return opened.get_tensor(stored)

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless every parameter of the model is here with its shape (LoRA factors may be missing)."""
        mine = parameters(model)
        aliases: dict[str, str] = {new: old for old, new in tied(model).items()}
        missing = [n for n in mine if n not in self and aliases.get(n) not in self and ".lora_" not in n]
        if missing:
            raise ValueError(f"the reference lacks {len(missing)} of the model's {len(mine)} parameters "
                             f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); "
                             f"it has {len(self.names())} names such as {sorted(self.names())[:2]}")
        wrong = [(n, tuple(p.shape), tuple(self.get(n).shape)) for n, p in mine.items()
                 if n in self and self.get(n).shape != p.shape]
        if wrong:
            raise ValueError("shapes differ between model and reference: "
                             + "; ".join(f"{n} is {a}, reference {b}" for n, a, b in wrong[:5]))

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Put θ₀ into the model, in place."""
        self.check(model)
        for name, parameter in parameters(model).items():
            if name in self:
                parameter.copy_(self.get(name))

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """The model holds θ₀ inside the block, and its own weights, to the bit, after it (also after an exception).

        Adapters that the reference does not hold (it was read from a base model's files) are switched off instead.
        """
        self.check(model)
        mine = parameters(model)
        adapted = has_adapters(model)
        moved = {n: p for n, p in mine.items() if n in self and (p.requires_grad or not adapted)}
        switch_off = adapted and not any(".lora_" in n for n in moved)
        kept = {n: p.detach().clone() for n, p in moved.items()}
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(self.get(name))
        try:
            with adapters_disabled(model) if switch_off else nullcontext():
                yield
        finally:
            with torch.no_grad():
                for name, parameter in moved.items():
                    parameter.copy_(kept[name])


@dataclass(frozen=True)
class ParameterDrift:
    r"""Drift of one parameter: ``l2`` :math:`=\lVert\theta-\theta_0\rVert_2`, ``base_l2`` :math:`=\lVert\theta_0\rVert_2`."""

    name: str
    l2: float
    base_l2: float
    numel: int

    @property
    def rel(self) -> float:
        """``l2 / base_l2``; nan if the parameter was 0."""
        return self.l2 / self.base_l2 if self.base_l2 else float("nan")

    @property
    def layer(self) -> int | None:
        """Block index, None outside the blocks."""
        return layer_index(self.name)


@torch.no_grad()
def parameter_drift(model: nn.Module, reference: Reference) -> list[ParameterDrift]:
    r"""Drift :math:`\lVert\theta_p-\theta_{0,p}\rVert_2` of every parameter *p* that can have moved.

    Exact up to float32 rounding (see :func:`inner`). With LoRA it is the drift of the *effective* weight
    :math:`W_0 + s\,BA` under the base weight's name, from the factors alone (less their product at the start, for
    initialisations where that is not 0). Frozen parameters are left out: they are 0.
    Cost: one read of θ and θ₀; one device synchronisation in all.
    """
    names, squares = [], []
    mine = parameters(model)
    for name, parameter in mine.items():
        if parameter.requires_grad and ".lora_" not in name:
            base = reference.get(name)
            names.append((name, parameter.numel()))
            squares.append(torch.stack([squared_distance(parameter, base), squared_norm(base).to(parameter.device)]))
    for name, factors in adapted_weights(model):
        start = reference.factors.get(name)
        zero_start = start is None or not start.b.any()
        a0, b0 = (None, None) if zero_start else (start.a.to(factors.a.device), start.b.to(factors.b.device))
        norm2 = lora_norm(factors.a, factors.b, a0=a0, b0=b0).square()
        base2 = squared_norm(mine[name])
        names.append((name, mine[name].numel()))
        squares.append(torch.stack([norm2, base2]))
    if not names:
        raise ValueError("the model has no trainable parameter, so nothing can drift; set requires_grad on some")
    values = torch.stack([s.to(squares[0].device) for s in squares]).sqrt().cpu().tolist()
    return [ParameterDrift(name, l2, base, numel) for (name, numel), (l2, base) in zip(names, values, strict=True)]
