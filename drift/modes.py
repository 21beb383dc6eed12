"""Measuring without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside the block; modes and random states are as before after it, also on errors.

    >>> model = nn.Sequential(nn.Dropout()); _ = model.train()
    >>> with measuring(model): print(model[0].training)
    False
    >>> model[0].training
    True
    """
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
