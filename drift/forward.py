"""Running a model on batches as Hugging Face has them, and finding the positions that count."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from drift.names import parameters
from drift.numerics import at_least_fp32, check_finite

Batch = Mapping[str, Any]  # input_ids, attention_mask, labels [B, T]; labels are not shifted, -100 where a token is not counted
Forward = Callable[[nn.Module, Batch], Tensor]
IGNORE = -100


def logits_of(model: nn.Module, batch: Batch, columns: Tensor | None = None) -> Tensor:
    """The default forward pass: ``model(input_ids, attention_mask, position_ids).logits``, [B, T, V].

    ``columns`` [C] int64: return the logits of these positions only, [B, C, V]; models that take ``logits_to_keep`` then
    compute no others. Position ids are counted from the attention mask where the batch has none, so that left padding changes nothing.
    """
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    accepted = signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if "input_ids" not in accepted and not takes_any:
        raise TypeError(f"{type(model).__name__} takes no input_ids; give forward=, a function of the model and a batch that returns logits [B, T, V]")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and "position_ids" not in inputs and (takes_any or "position_ids" in accepted):
        inputs["position_ids"] = mask.cumsum(-1).sub(1).clamp(min=0)
    if takes_any or "use_cache" in accepted:
        inputs["use_cache"] = False
    if columns is None:
        return model(**inputs).logits
    if "logits_to_keep" in accepted:
        return model(**inputs, logits_to_keep=columns).logits
    return model(**inputs).logits[:, columns]


def check_batch(batch: Batch) -> None:
    """Raise ``ValueError`` unless ``labels`` are whole numbers [B, T] that count in every row, and ids, mask and positions, where there are any, go with
    them.

    A row without a label that counts has no gradient and no prediction to measure, and would still weigh in means over rows.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a dictionary of tensors, got {type(batch).__name__} (where batches are asked for, give a list of them)")
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__ if "labels" in batch else "none"
        raise ValueError(f"a batch must have labels, whole numbers [B, T], -100 where a token is not counted; got {found}")
    for key in ("input_ids", "attention_mask", "position_ids"):
        tensor = batch.get(key)
        if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape != labels.shape and not (key == "position_ids" and len(tensor) == 1):
            raise ValueError(f"{key} and labels must have one shape [B, T], got {list(tensor.shape)} and {list(labels.shape)}")
    hidden = (labels[:, 1:] == IGNORE).all(1).nonzero().flatten().tolist()
    if hidden:
        which = "no label differs" if len(hidden) == len(labels) else f"no label of row {', '.join(map(str, hidden[:5]))} differs"
        raise ValueError(f"{which} from -100 (the first of a row is predicted by nothing), so there is no position to measure; leave such rows out")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies, and so its batches go. Raises ``ValueError`` if it has no values (the meta device)."""
    name, first = next(iter(parameters(model).items()))
    if first.is_meta:
        raise ValueError(f"{type(model).__name__} has parameters on the meta device, without values ({name}, ...); load the weights first")
    return first.device


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch, checked, with its tensors on ``device``."""
    check_batch(batch)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def counted(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column) of every position [N] that predicts a counted token, and those tokens [N].

    >>> [x.tolist() for x in counted(torch.tensor([[-100, 7, -100, 5]]))]
    [[0, 0], [0, 2], [7, 5]]
    """
    shifted = labels[:, 1:]
    row, column = (shifted != IGNORE).nonzero(as_tuple=True)
    if not len(row):
        raise ValueError("no label differs from -100, so there is no position to measure")
    return row, column, shifted[row, column]


def logits_at(model: nn.Module, batch: Batch, forward: Forward, row: Tensor, column: Tensor, *, head_everywhere: bool = True) -> Tensor:
    """Logits [N, V] of the positions (``row``, ``column``) [N] in a batch. Raises ``ValueError`` if ``forward`` gives no [B, T, V].

    ``head_everywhere=False``: the default forward pass runs the head in the columns asked for only, so that what watches the head sees [B, C].
    """
    if forward is logits_of and not head_everywhere:
        columns, place = column.unique(return_inverse=True)
        return logits_of(model, batch, columns)[row, place]
    logits = forward(model, batch)
    rows, tokens = batch["labels"].shape
    if not isinstance(logits, Tensor) or logits.dim() != 3 or len(logits) != rows or not tokens - 1 <= logits.shape[1] <= tokens:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"forward must return logits [B, T, V], of {rows} rows and {tokens} tokens here, got {found}")
    return logits[row, column]


def counted_log_p(model: nn.Module, batch: Batch, forward: Forward, *, head_everywhere: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, V] at the counted positions, in float32 at least, and the tokens [N] that stand there."""
    row, column, targets = counted(batch["labels"])
    log_p = torch.log_softmax(at_least_fp32(logits_at(model, batch, forward, row, column, head_everywhere=head_everywhere)), -1)
    if int(targets.min()) < 0 or int(targets.max()) >= log_p.shape[1]:
        raise ValueError(f"labels must be -100 or lie in 0 ... {log_p.shape[1] - 1}, the vocabulary, got {int(targets.min())} ... {int(targets.max())}")
    finite = log_p.detach().gather(1, targets.unsqueeze(1)).isfinite()
    if not bool(finite.all()):
        check_finite("the weight", {n: bool(p.isfinite().all()) for n, p in parameters(model).items()})
        raise FloatingPointError(f"the model's log-probability is not finite at {int((~finite).sum())} of {len(finite)} counted tokens")
    return log_p, targets


def summed_nll(model: nn.Module, batch: Batch, forward: Forward, *, head_everywhere: bool = False) -> Tensor:
    """Sum of −log p over the counted tokens; ``head_everywhere`` as for :func:`logits_at`."""
    log_p, targets = counted_log_p(model, batch, forward, head_everywhere=head_everywhere)
    return nn.functional.nll_loss(log_p, targets, reduction="sum")


@contextmanager
def headless(head: nn.Module) -> Iterator[None]:
    """Inside the block the head hands its input through, so that a model's "logits" are the states before it."""
    kept = head.__dict__.get("forward")
    head.forward = lambda x, *_: x
    try:
        yield
    finally:
        if kept is None:
            del head.forward
        else:
            head.forward = kept
