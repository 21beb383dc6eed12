"""The precision of a forward pass, named once for sampling and training alike."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def autocast(precision: Precision, device_type: str) -> AbstractContextManager:
    """bf16 autocast, or nothing for fp32; weights keep their own dtype either way."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")
