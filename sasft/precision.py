"""The precision of a forward pass, named once for sampling and training alike."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from sasft.errors import UsageError

Precision = Literal["auto", "bf16", "fp32"]


def resolved(precision: str) -> Literal["bf16", "fp32"]:
    """The precision that ``precision`` stands for here: ``auto`` is bf16 where the hardware multiplies it, else fp32.

    Where it doesn't, as on most desktop processors, bf16 is emulated and several times slower than fp32. Raises
    :class:`UsageError` for a name that there is not.

    >>> resolved("fp32"), resolved("auto") in ("bf16", "fp32")
    ('fp32', True)
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UsageError(f"precision must be auto, bf16 or fp32, got {precision!r}")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name) else "fp32"


def autocast(precision: Precision, device_type: str) -> AbstractContextManager:
    """bf16 autocast, or nothing for fp32; weights keep their own dtype either way."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=resolved(precision) == "bf16")
