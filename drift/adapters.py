"""The LoRA adapters of a PEFT model, as plain factors. Read from its layers' attributes; peft itself is not imported."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from drift.names import canonical_name


@dataclass(frozen=True)
class Adapter:
    r"""One adapter of one weight: :math:`W = W_0 + s\,BA`, or with DoRA's ``magnitude`` m: rows of :math:`W_0 + s\,BA` scaled to length m.

    ``base``: canonical name of the weight. ``a`` [r, n] and ``b`` [m, r]: the factors, of canonical names ``name_a`` and ``name_b``.
    ``transposed``: the weight is stored as [n, m], so its update is :math:`(s\,BA)^\top` (embeddings, transformers' Conv1D). ``expert``: which of
    the matrices that are stacked in the weight this one is of (None: the weight is a matrix); ``a`` and ``b`` are then that expert's part of the factors.
    """

    base: str
    adapter: str
    a: Tensor
    b: Tensor
    scaling: float
    name_a: str
    name_b: str
    transposed: bool = False
    magnitude: Tensor | None = None
    expert: int | None = None

    def copy(self) -> "Adapter":
        """The same with its own memory, outside the autograd graph."""
        return self._with(lambda x: x.detach().clone())

    def to(self, device: torch.device | str) -> "Adapter":
        """The same on another device."""
        return self._with(lambda x: x.detach().to(device))

    def _with(self, change) -> "Adapter":
        return replace(self, a=change(self.a), b=change(self.b), magnitude=None if self.magnitude is None else change(self.magnitude))


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Every active, unmerged adapter of the model's linear layers, embeddings and bare parameters (``target_parameters``: one an expert).

    Raises ``ValueError`` for merged adapters and ``NotImplementedError`` for LoRA on convolutions and for AdaLoRA, naming the layer.
    """
    for path, module in model.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "scaling") and hasattr(module, "base_layer")):
            continue
        if getattr(module, "merged_adapters", None):
            raise ValueError(f"the adapters of {path} are merged into its weight; unmerge them to measure their drift")
        if not isinstance(module.lora_A, nn.ModuleDict):
            raise NotImplementedError(f"{path} has {type(module).__module__.split('.')[-2]}; only LoRA on linear layers, embeddings and bare parameters is covered")
        if hasattr(module, "parameter_name"):
            yield from _of_parameter(path, module)
            continue
        embedding = bool(module.lora_embedding_A)
        for adapter in module.active_adapters:
            if adapter not in (module.lora_embedding_A if embedding else module.lora_A):
                continue
            if embedding:
                a, b, names = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter], ("lora_embedding_A", "lora_embedding_B")
                paths = [f"{path}.{n}.{adapter}" for n in names]
            else:
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                paths = [f"{path}.{n}.{adapter}.weight" for n in ("lora_A", "lora_B")]
            if a.dim() != 2:
                raise NotImplementedError(f"{path} is a convolution with LoRA; only linear layers and embeddings are covered")
            magnitudes = getattr(module, "lora_magnitude_vector", {})
            yield Adapter(canonical_name(f"{path}.base_layer.weight"), adapter, a, b, float(module.scaling[adapter]),
                          *(canonical_name(p) for p in paths), transposed=embedding or bool(getattr(module, "fan_in_fan_out", False)),
                          magnitude=magnitudes[adapter].weight if adapter in magnitudes else None)


def _of_parameter(path: str, module: nn.Module) -> Iterator[Adapter]:
    """Adapters of a bare parameter, [m, n] or of E stacked matrices: PEFT keeps all experts' factors as one A [rE, n] and one B [m, rE]."""
    weight, owner = canonical_name(f"{path}.base_layer.{module.parameter_name}"), module.get_base_layer()
    shape = getattr(owner, module.parameter_name).shape
    experts = shape[0] if len(shape) == 3 else 1
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        names = [canonical_name(f"{path}.{factor}.{adapter}.weight") for factor in ("lora_A", "lora_B")]
        # A has one expert's rows after the other's, B has the experts' columns in turn.
        for expert, (part_a, part_b) in enumerate(zip(a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).unbind(2), strict=True)):
            yield Adapter(weight, adapter, part_a, part_b, float(module.scaling[adapter]), *names,
                          transposed=len(shape) == 3 and bool(getattr(owner, "is_transposed", False)), expert=expert if len(shape) == 3 else None)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model holds LoRA adapters."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def adapters_disabled(model: nn.Module) -> AbstractContextManager:
    """The model without its adapters inside the block (PEFT's own switch)."""
    if not hasattr(model, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} holds LoRA layers but no disable_adapter(); pass the PeftModel itself")
    return model.disable_adapter()
