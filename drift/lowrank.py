"""Drift of LoRA weights from their factors, without ever forming the product."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift.names import canonical_name


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


def has_adapters(model: nn.Module) -> bool:
    """Whether the model holds LoRA adapters."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def adapters_disabled(model: nn.Module) -> AbstractContextManager:
    """The model without its adapters inside the block (PEFT's own switch)."""
    if not hasattr(model, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} holds LoRA layers but no disable_adapter(); pass the PeftModel itself")
    return model.disable_adapter()


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    """(canonical name of the base weight, factors) for every layer with active, unmerged LoRA adapters.

    Reads PEFT's layers by their attributes. Raises ``NotImplementedError`` naming the layer for what a product B A does not
    describe: DoRA (it also rescales the base weight) and LoRA on convolutions; ``ValueError`` for merged adapters.
    """
    for path, module in model.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "scaling") and hasattr(module, "base_layer")):
            continue
        name = canonical_name(f"{path}.base_layer.weight")
        if getattr(module, "merged_adapters", None):
            raise ValueError(f"the adapters of {path} are merged into its weight; unmerge them to measure their drift")
        embedding = bool(module.lora_embedding_A)
        sides_a, sides_b = (module.lora_embedding_A, module.lora_embedding_B) if embedding else (module.lora_A, module.lora_B)
        parts = []
        for adapter in module.active_adapters:
            if adapter not in sides_a:
                continue
            if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_magnitude_vector", {}):
                raise NotImplementedError(f"{path} uses DoRA, whose update is not the product of two factors; "
                                          "its drift can't be read from them")
            a, b = sides_a[adapter], sides_b[adapter]
            a, b = (a, b) if embedding else (a.weight, b.weight)
            if a.dim() != 2:
                raise NotImplementedError(f"{path} is a convolution with LoRA; only linear layers and embeddings are covered")
            parts.append((a, b * module.scaling[adapter]))
        if parts:
            yield name, Factors(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1))
