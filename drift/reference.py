"""The weights that drift is measured from: a model's as they were, or as files hold them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from drift.adapters import Adapter, adapters, adapters_disabled, has_adapters
from drift.names import canonical_name, parameters, tied

_AT_ONCE = 2**20  # numbers that are widened and compared together
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that take the adapter's start out of the base weight


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values in one piece: sharded ones (FSDP2) are gathered, in which every process must take part."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


class Reference:
    """Weights by canonical name, and LoRA adapters: in memory, or in safetensors files that are mapped and read piece by piece.

    >>> model = nn.Linear(2, 2)
    >>> reference = Reference.snapshot(model)
    >>> with torch.no_grad(): _ = model.bias.mul_(3.0)
    >>> from drift import parameter_drift
    >>> [round(p.rel, 6) for p in parameter_drift(model, reference)]
    [0.0, 2.0]
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, files: Mapping[str, tuple[Path, str]] | None = None,
                 adapters: Iterable[Adapter] = (), source: str = "the reference", moved_base: str | None = None, partial: bool = False) -> None:
        self._tensors = dict(tensors or {})
        self._files = dict(files or {})
        self._opened: dict[Path, Any] = {}
        self._held: dict[tuple[str, ...] | tuple[str, int, int], bool] = {}  # comparisons that were made once
        self.source = source
        self.partial = partial  # an adapter folder, which has few of the model's parameters
        self.moved_base = moved_base  # the initialisation of an adapter folder, where it changed the base weights
        self.adapters: dict[str, list[Adapter]] = {}
        for adapter in adapters:
            self.adapters.setdefault(adapter.base, []).append(adapter)

    @classmethod
    def snapshot(cls, model: nn.Module) -> Self:
        """Remember the model's weights and adapters as they are now.

        One copy on the CPU of every trainable parameter; frozen ones are kept as they are, without a copy, and unfreezing one
        later makes :func:`~drift.weights.parameter_drift` refuse. Raises ``ValueError`` for parameters without values (the meta device), and for
        adapters as :func:`drift.adapters.adapters` does.
        """
        mine = parameters(model)
        meta = [n for n, p in mine.items() if p.is_meta]
        if meta:
            raise ValueError(f"{len(meta)} parameters are on the meta device and have no values ({', '.join(meta[:3])}); load the weights first")
        tensors = {n: whole(p).to("cpu", copy=True) if p.requires_grad else whole(p) for n, p in mine.items()}
        return cls(tensors, adapters=[a.copy().to("cpu") for a in adapters(model)])

    @classmethod
    def live(cls, model: nn.Module) -> Self:
        """The model's own weights, whatever they come to be."""
        return cls(parameters(model), adapters=adapters(model), source=type(model).__name__)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Weights in a ``.safetensors`` file, a folder of them (sharded or not), or a PEFT adapter folder; mapped, not copied.

        Raises ``FileNotFoundError`` if there is none, ``ValueError`` for a torn file, ``NotImplementedError`` for adapters other than LoRA, and for those with
        ``lora_bias`` or ``target_parameters``.
        """
        path = Path(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            others = sorted(f.name for f in path.glob("*.bin")) if path.is_dir() else []
            absent = "is not there (nothing is fetched from a hub: give a file or a folder, or load the model and give that)"
            hint = f", but {', '.join(others[:3])}: save it with safe_serialization=True" if others else ""
            raise FileNotFoundError(f"{path} {f'is a folder without .safetensors files{hint}' if path.is_dir() else absent}")
        index = path / "model.safetensors.index.json"
        if path.is_dir() and index.exists():
            files = sorted({path / f for f in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        names: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    names.update({canonical_name(name): (file, name) for name in opened.keys()})
            except SafetensorError as error:
                raise ValueError(f"{file} is no whole .safetensors file: {error}") from None
        if not (path / "adapter_config.json").exists():
            return cls(files=names, source=str(path))
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        plain = cls(files={n: f for n, f in names.items() if ".lora_" not in n}, source=str(path), moved_base=_moved_base(config), partial=True)
        factors = cls(files=names, source=str(path))
        for adapter in _stored_adapters(names, factors, config):
            plain.adapters.setdefault(adapter.base, []).append(adapter)
        return plain

    @classmethod
    def of(cls, source: "nn.Module | Path | str | Reference") -> "Reference":
        """A reference as it is; a model's live weights; the files of a path."""
        if isinstance(source, Reference):
            return source
        if not isinstance(source, nn.Module | Path | str):
            raise TypeError(f"a side of a drift must be a model, a Reference, or the path of a file or a folder, got {type(source).__name__}")
        return cls.live(source) if isinstance(source, nn.Module) else cls.open(source)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._files

    def names(self) -> set[str]:
        """The canonical names that it holds."""
        return {*self._tensors, *self._files}

    def get(self, name: str) -> Tensor:
        """One tensor in one piece; from files it is a view of the mapped memory."""
        if name in self._tensors:
            return whole(self._tensors[name])
        if name not in self._files:
            raise KeyError(f"{self.source} has no parameter {name!r}; it has {len(self.names())} others")
        file, key = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file].get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        file, key = self._files[name]
        with safe_open(file, framework="pt") as opened:
            return tuple(opened.get_slice(key).get_shape())

    def aliases(self, name: str, parameter: Tensor) -> bool:
        """Whether the tensor of this name is the parameter's own memory, and not a copy."""
        kept = self._tensors.get(name)
        return kept is not None and kept is not parameter and kept.data_ptr() == parameter.data_ptr() and parameter.numel() > 0

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor of this name has these values. Compared once, until the tensor is changed in place: it is asked of weights that stay as
        they are."""
        key = (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        if key not in self._held:
            mine = self.get(name)
            self._held[key] = mine.data_ptr() == tensor.data_ptr() or all(
                torch.equal(a.to(b.device).double(), b.double())
                for a, b in zip(mine.reshape(-1).split(_AT_ONCE), tensor.reshape(-1).split(_AT_ONCE), strict=True))
        return self._held[key]

    def left_by(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a frozen parameter has other values than the tensor of this name: it was trained before, or its model comes from elsewhere.

        False where there is nothing to compare: of names that are not here or of another shape, of quantised, sharded and empty parameters.
        """
        plain = parameter.is_floating_point() and not parameter.is_meta and not hasattr(parameter, "full_tensor")
        return plain and name in self and self.get(name).shape == parameter.shape and not self.holds(name, parameter)

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 of the shapes and the first 64 numbers of the tensors of these names that are here, LoRA factors and quantised weights left out.

        It tells one θ₀ from another, in a snapshot as in files, at the cost of a page of each.
        """
        digest = hashlib.sha256()
        for name in sorted(n for n in names if n in self and ".lora_" not in n):
            tensor = self.get(name)
            if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point():
                continue
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1)[:64].cpu().double().numpy().tobytes())
        return digest.hexdigest()

    def surplus(self, model: nn.Module) -> list[str]:
        """What shows that these are another model's weights: names in memory that the model has not, and weights that are tied in it and differ here.

        Files may hold more than parameters.
        """
        mine, aliases = parameters(model), tied(model)
        extra = [n for n in self._tensors if n not in mine and n not in aliases and ".lora_" not in n]
        return extra + [n for n, first in aliases.items() if n in self and first in self and not self._equal(n, first)]

    def _equal(self, name: str, other: str) -> bool:
        key = (name, other)
        if key not in self._held:
            self._held[key] = self.shape(name) == self.shape(other) and self.holds(name, self.get(other))
        return self._held[key]

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless every parameter of the model is here with its shape (LoRA factors may be missing), and nothing else."""
        mine = parameters(model)
        aliases: dict[str, str] = {new: old for old, new in tied(model).items()}
        missing = [n for n in mine if n not in self and aliases.get(n) not in self and ".lora_" not in n]
        if missing:
            raise ValueError(f"{self.source} lacks {len(missing)} of the model's {len(mine)} parameters "
                             f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); "
                             f"it has {len(self.names())} names such as {sorted(self.names())[:2]}")
        wrong = [(n, tuple(p.shape), self.shape(n)) for n, p in mine.items() if n in self and self.shape(n) != tuple(p.shape)]
        if wrong:
            raise ValueError("shapes differ between model and reference: "
                             + "; ".join(f"{n} is {a}, reference {b}" for n, a, b in wrong[:5]))
        if surplus := self.surplus(model):
            raise ValueError(f"{self.source} has {len(surplus)} parameters that the model has not, or ties to others ({', '.join(surplus[:5])})")

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Put these weights into the model, in place."""
        self.check(model)
        for name, parameter in parameters(model).items():
            if name in self:
                parameter.copy_(self.get(name))

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """The model holds these weights inside the block, and its own, to the bit, after it (also after an exception).

        Adapters that the reference does not hold (it was read from a base model's files) are switched off instead.
        """
        self.check(model)
        mine = parameters(model)
        adapted = has_adapters(model)
        moved = {n: p for n, p in mine.items() if n in self and (p.requires_grad or not adapted)}
        sharded = [n for n, p in moved.items() if hasattr(p, "full_tensor")]
        if sharded:
            raise NotImplementedError(f"{sharded[0]} is sharded over processes (FSDP2), so θ₀ can't be put into the model; measure "
                                      "against a second model or stored log-probabilities instead")
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


def _moved_base(config: Mapping[str, Any]) -> str | None:
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_MOVED_BASE) else None


def _stored_adapters(names: Mapping[str, Any], factors: Reference, config: Mapping[str, Any]) -> Iterator[Adapter]:
    """The adapters of a PEFT folder: their factors, and their scaling by PEFT's rules."""
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(f"{factors.source}: adapter_config.json says {config.get('peft_type')!r}; only LORA is covered")
    if config.get("lora_bias"):
        raise NotImplementedError(f"{factors.source}: adapter_config.json has lora_bias={config['lora_bias']}, which is not covered")
    if config.get("target_parameters"):
        raise NotImplementedError(f"{factors.source}: adapter_config.json has target_parameters={config['target_parameters']}, and its files don't say "
                                  "which factors are of which parameter and expert; load the adapter into its model with PEFT, and give that")
    for name_a in sorted(names):
        match = re.fullmatch(r"(.+)\.(lora_A|lora_embedding_A)(\.weight)?", name_a)
        if match is None:
            continue
        path, kind, rest = match.group(1), match.group(2), match.group(3) or ""
        name_b = f"{path}.{kind.replace('_A', '_B')}{rest}"
        a = factors.get(name_a)
        alpha = next((value for key, value in (config.get("alpha_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({key})", path)),
                     config["lora_alpha"])
        magnitude = next((n for n in (f"{path}.lora_magnitude_vector", f"{path}.lora_magnitude_vector.weight") if n in names), None)
        rank = len(a)
        yield Adapter(f"{path}.weight", "stored", a, factors.get(name_b), alpha / (rank**0.5 if config.get("use_rslora") else rank),
                      name_a, name_b, transposed=kind != "lora_A" or bool(config.get("fan_in_fan_out")),
                      magnitude=None if magnitude is None else factors.get(magnitude))
