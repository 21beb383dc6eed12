"""The base model θ₀ beside the model in training."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from drift.adapters import adapters, adapters_disabled, has_adapters
from drift.forward import on_device
from drift.modes import measuring
from drift.names import parameters
from sasft.chat import Encoded, collate
from sasft.methods.base import Batch, Costs, Scored, score

_ROWS = 16  # rows scored together before training


class FrozenBase:
    """θ₀, for as long as the model trains.

    It is the model itself with its adapters switched off, where they start without an effect and nothing else is trained; else a
    frozen copy, which is a second model in memory (in full fine-tuning there is no way round it).
    """

    def __init__(self, model: nn.Module) -> None:
        self.shared = starts_at_base(model)
        self._model = model if self.shared else copy.deepcopy(model).requires_grad_(False)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """θ₀ as a model, in evaluation mode, without gradients."""
        with torch.no_grad(), measuring(self._model), adapters_disabled(self._model) if self.shared else nullcontext():
            yield self._model

    def score(self, batch: Batch, costs: Costs) -> Scored:
        """θ₀'s predictions of the batch's counted tokens."""
        costs.forward_tokens += int(batch["attention_mask"].sum())
        with self.in_place() as model:
            return score(model, batch)


def starts_at_base(model: nn.Module) -> bool:
    """Whether adapters are all that is trained, and have no effect as yet (B = 0)."""
    if not has_adapters(model):
        return False
    others = [name for name, p in parameters(model).items() if p.requires_grad and ".lora_" not in name]
    return not others and all(not bool(adapter.b.any()) for adapter in adapters(model))


def subset(batch: Batch, rows: Tensor) -> Batch:
    """The rows of a batch for which ``rows`` [B] is true, in the same columns, or packed anew."""
    tokens = rows[batch["rows"][0]] if "rows" in batch else None  # of packed rows, whose tensors are [1, T]

    def cut(value: Tensor) -> Tensor:
        return value[rows] if tokens is None or value.dim() == 1 else value[:, tokens]

    kept = {name: cut(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if tokens is not None:
        kept["rows"] = rows.cumsum(0)[kept["rows"]] - 1
    for name in ("source", "index"):
        kept[name] = [value for value, keep in zip(batch[name], rows.tolist(), strict=True) if keep]
    return kept


def scored_rows(model: nn.Module, rows: Sequence[Encoded], pad_id: int, costs: Costs) -> Iterator[tuple[list[int], Scored]]:
    """The untrained model's predictions of many rows, without gradients: batches of similar length, with their rows' numbers."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for i in range(0, len(order), _ROWS):
        numbers = order[i : i + _ROWS]
        batch = on_device(collate([rows[k] for k in numbers], pad_id), device)
        costs.forward_tokens += int(batch["attention_mask"].sum())
        with torch.no_grad(), measuring(model):
            yield numbers, score(model, batch)
