"""What training, writing and reading cost on this machine, measured on a little of each.

Nothing is kept: weights stay as they are, and every measurement says what it leaves out.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import drift
from drift.modes import measuring
from drift.names import parameters
from sasft.batches import MicroBatches, batch_of
from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.methods import response_loss
from sasft.mixing import Plan
from sasft.precision import Precision, autocast
from sasft.sampling import EXACT, sample
from sasft.trainer import FitSettings

_STEPS = 4  # tokens that are written to see how long one takes
_ON_CPU = 512  # tokens of a batch on a processor, where time is in proportion to them; a GPU is measured on a whole batch


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What a plan takes on one process.

    ``seconds_per_token``: of a forward and backward pass, a token of the batch with its padding; ``optimizer_seconds``: of one
    step of AdamW. ``seconds`` = tokens of all micro-batches × the first + steps × the second, without recordings and checkpoints.

    ``activation_bytes``: what autograd keeps of the largest micro-batch, scaled by tokens from the one that was measured.
    ``bytes`` = weights + gradients and two AdamW moments of the trained ones + activations: a floor for the peak.
    """

    tokens: int
    seconds_per_token: float
    optimizer_seconds: float
    seconds: float
    weight_bytes: int
    state_bytes: int
    activation_bytes: int

    @property
    def bytes(self) -> int:
        """All of the memory that is counted."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes


def measure_training(model: nn.Module, plan: Plan, rows: Mapping[str, Sequence[Encoded]], settings: FitSettings,
                     pad_id: int) -> TrainingCost:
    """Time and memory of training ``model`` on the plan with the plain loss, from a pass over a middling micro-batch (on a
    processor, as many of its rows as have 512 tokens).

    The optimiser is stepped at a learning rate of 0, so that no weight moves.
    Raises :class:`UsageError` if the micro-batch does not fit into memory.
    """
    parts = list(MicroBatches(plan, rows, settings.micro_rows, packing=settings.packing, micro_tokens=settings.micro_tokens))
    sizes = [_size([rows[s][i] for s, i in part], settings.packing) for part in parts]
    middling = sorted(range(len(parts)), key=sizes.__getitem__)[len(parts) // 2]
    device = next(model.parameters()).device
    items = [((s, i), rows[s][i]) for s, i in parts[middling]]
    items = items[: _rows(device, sizes[middling] // len(items), len(items))]
    size = _size([row for _, row in items], settings.packing)
    batch: dict[str, Any] = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                             for name, value in batch_of(items, pad_id, plan.loss_weights, packing=settings.packing).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    kept = _Kept({p.untyped_storage().data_ptr() for p in model.parameters()})

    def backward() -> None:
        kept.begin()
        keeping = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
        with keeping, autocast(settings.precision, device.type):
            loss = response_loss(model, batch)
        loss.backward()

    was_training = model.training
    model.train()
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable()
    try:
        a_pass, a_step = _seconds(device, backward), _seconds(device, optimizer.step)
    except torch.OutOfMemoryError:
        raise UsageError(f"a micro-batch of {len(items)} rows ({size} tokens with padding) does not fit into the "
                         f"memory of {device}; lower micro_rows, train adapters, or set activation_checkpointing") from None
    finally:
        optimizer.zero_grad(set_to_none=True)
        if settings.activation_checkpointing:
            model.activation_checkpointing_disable()
        model.train(was_training)
    a_token = a_pass / size
    return TrainingCost(
        tokens=sum(sizes), seconds_per_token=a_token, optimizer_seconds=a_step, seconds=a_token * sum(sizes) + a_step * len(plan),
        weight_bytes=weight_bytes(model), state_bytes=sum(3 * p.numel() * p.element_size() for p in trained),
        activation_bytes=math.ceil(kept.bytes * max(sizes) / size))


def measure_recording(model: nn.Module, probes: Sequence[drift.Probe]) -> float:
    """Seconds of the first recording of drift and ``probes``, in which these get ready too: as long as any, and longer than most."""
    with drift.record(model, probes=probes) as recorder:
        pass
    return recorder.overhead


def measure_writing(model: nn.Module, prompt: Sequence[int], batch_size: int, precision: Precision,
                    pad_id: int) -> tuple[float, float]:
    """Seconds that a batch of such prompts takes to be read, and seconds of each further token of all its rows."""
    device = next(model.parameters()).device

    def write(tokens: int) -> None:
        sampler = type(EXACT)(temperature=1.0, top_p=1.0, max_new_tokens=tokens)
        with autocast(precision, device.type):
            sample(model, [prompt] * batch_size, list(range(batch_size)), sampler, stop_id=-1, pad_id=pad_id)

    reading, both = _seconds(device, lambda: write(1)), _seconds(device, lambda: write(1 + _STEPS))
    return reading, max(both - reading, 0.0) / _STEPS


def measure_reading(model: nn.Module, prompt: Sequence[int], batch_size: int, precision: Precision) -> float:
    """Seconds a token of a forward pass on a batch of such prompts."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)] * _rows(device, len(prompt), batch_size), device=device)

    def read() -> None:
        with torch.no_grad(), measuring(model), autocast(precision, device.type):
            model(input_ids=ids, use_cache=False)

    return _seconds(device, read) / ids.numel()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, tied ones once."""
    return sum(p.numel() * p.element_size() for p in parameters(model).values())


def cache_bytes(config: Any, precision: Precision) -> int:
    """Bytes of keys and values of one token in all layers, from a model's configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * (2 if precision == "bf16" else 4)


def _rows(device: torch.device, tokens: int, rows: int) -> int:
    """How many of a batch's rows of so many tokens each are measured."""
    return max(1, min(rows, _ON_CPU // tokens)) if device.type == "cpu" else rows


def _size(rows: Sequence[Encoded], packing: bool) -> int:
    """Tokens of a micro-batch with its padding: responses begin in one column (:func:`sasft.chat.collate`)."""
    if packing:
        return sum(len(row.input_ids) for row in rows)
    return len(rows) * (max(row.start for row in rows) + max(len(row.input_ids) - row.start for row in rows))


class _Kept:
    """Counts the bytes of what autograd keeps in a pass, each storage once, weights left out."""

    def __init__(self, known: set[int]) -> None:
        self.known = known

    def begin(self) -> None:
        self.bytes = 0
        self._seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known and storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage
            self.bytes += storage.nbytes()
        return tensor


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """How long it takes, on a GPU the second time, when what it compiles and allocates is there."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        work()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
