"""Rows laid end to end without padding, each on its own to the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from drift.modes import measuring
from sasft.chat import IGNORE, Encoded
from sasft.errors import UsageError

_TOKENS = 8  # of a row in the trial


def pack(rows: Sequence[Encoded]) -> dict[str, Any]:
    """Rows end to end as tensors [1, T]; ``rows`` says to which of them each token belongs.

    ``position_ids`` start again at 0 with every row. By that, where it is given no attention mask, transformers tells packed rows
    apart: each token sees its own row alone (a block-diagonal mask for ``eager``, ``sdpa`` and ``flex_attention``, the rows'
    bounds for ``flash_attention``). :func:`check_rows_apart` makes sure of it. ``attention_mask`` is 1 throughout, for counting.
    A masked attention still spends its time on all T² pairs, ``flash_attention`` and ``flex_attention`` on those within rows.

    Raises :class:`UsageError` if a row's first token, which nothing predicts, is in the loss.

    >>> batch = pack([Encoded((5, 6, 7), (-100, 6, 7)), Encoded((8, 9), (-100, 9))])
    >>> batch["position_ids"].tolist(), batch["rows"].tolist()
    ([[0, 1, 2, 0, 1]], [[0, 0, 0, 1, 1]])
    """
    if any(row.labels[0] != IGNORE for row in rows):
        raise UsageError("a row's first token is in the loss, and nothing comes before it to predict it; mask it")
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    input_ids = torch.tensor([[token for row in rows for token in row.input_ids]])
    return {
        "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
        "rows": torch.repeat_interleave(torch.arange(len(rows)), lengths)[None],
    }


@torch.no_grad()
def check_rows_apart(model: nn.Module, row: Encoded) -> None:
    """Raise :class:`UsageError` unless the model keeps packed rows apart; three passes over a few tokens of ``row`` tell.

    Behind another row it must give the logits that it gives alone, whatever that other row's tokens are (up to rounding). A model
    that carries a state along, or whose mask or positions come from elsewhere than ``position_ids``, does not.
    """
    ids = list(row.input_ids[:_TOKENS])
    device = next(model.parameters()).device
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "its own")

    def logits(*rows: list[int]) -> torch.Tensor:
        batch = pack([Encoded.text(r) for r in rows])
        return model(input_ids=batch["input_ids"].to(device), position_ids=batch["position_ids"].to(device),
                     use_cache=False).logits[0, -len(ids) :]

    # Flash attention takes half precision only.
    with measuring(model), torch.autocast(device.type, torch.bfloat16, enabled="flash" in attention):
        alone, *behind = logits(ids), logits([0] * _TOKENS, ids), logits([1] * _TOKENS, ids)
    rounding = 0.05 * alone.abs().max()  # far above that of bf16; what leaks changes logits by tens of per cent
    if (behind[0] - behind[1]).abs().max() > rounding:
        found = "tokens of one row see those of another"
    elif (behind[0] - alone).abs().max() > rounding:
        found = "rows do not begin at position 0"
    else:
        return
    raise UsageError(f"packing is on, but {found} in a {type(model).__name__} (attention: {attention}); turn packing off, or load "
                     "the model with another attention")
