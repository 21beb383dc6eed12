"""Several processes, as ``accelerate launch`` and ``torchrun`` start them: the first one writes, the others wait for it.

``accelerate launch -m sasft.cli train ...`` copies the weights to every process (DDP). With ``--config_file``, a YAML file with
``distributed_type: FSDP`` and an ``fsdp_config`` of ``fsdp_version: 2``, ``fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`` and
``fsdp_cpu_ram_efficient_loading: false``, it shards them; every process still loads them whole, before they are sharded.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from drift.names import trainable
from drift.reference import whole
from sasft.errors import UsageError

_PATIENCE = timedelta(days=7)  # how long the first process may generate or write while the others wait


def join() -> bool:
    """Meet the other processes, if there are any; whether this one is the first, which writes. It has its own GPU from then on.

    Raises :class:`UsageError` for an accelerate configuration under which the others would load no weights.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true" and sharding_asked():
        raise UsageError("accelerate's fsdp_cpu_ram_efficient_loading leaves all processes but the first without the model's weights, "
                         "from which methods start; set it to false in the file given to accelerate launch --config_file")
    return PartialState(cpu=not torch.cuda.is_available()).is_main_process


def sharding_asked() -> bool:
    """Whether accelerate was told to shard the weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The block in the first process, and then in the others, which find what it has written. After :func:`join`."""
    if not _several():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        if dist.get_rank() > 0:
            dist.barrier(group)
        yield
    finally:
        if dist.get_rank() == 0:
            dist.barrier(group)
        dist.destroy_process_group(group)


def sharded(model: nn.Module) -> bool:
    """Whether processes hold a part each of the model's weights (FSDP2), also while it has them together in a pass."""
    return isinstance(model, FSDPModule)


def cut_as(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, on the device of ``like`` and, where that is sharded (FSDP2), cut in the same places.

    No process waits for another. What is cut already stays as it is.
    """
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(x: Tensor) -> Tensor:
    """A tensor of which processes hold parts, whole in each of them, with its gradient; every process must take part.

    What each process makes of it must be the same, so that every part gets its gradient once.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """The memory of a tensor that this process holds: all of it, or its shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters in one piece each, on the CPU, by canonical name; every process must take part."""
    return {name: whole(p).detach().cpu() for name, p in trainable(model).items()}


@torch.no_grad()
def in_one_piece(model: nn.Module, untrained: Callable[[], nn.Module]) -> nn.Module:
    """The trained model with whole weights: itself, or if they are sharded, in the first process an ``untrained`` one that is given them.

    Every process must take part; the others get ``model`` back as it is.
    """
    if not sharded(model):
        return model
    weights = trained_weights(model)
    if dist.get_rank() > 0:
        return model
    model = untrained()
    for name, parameter in trainable(model).items():
        parameter.copy_(weights[name])
    return model


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
