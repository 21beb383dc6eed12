"""The probes that a run records by default, built from rows held out of its training."""

from collections.abc import Mapping, Sequence

from torch import nn

import drift
from sasft.chat import Chat, Encoded, collate
from sasft.mixing import SELF, TASK
from sasft.precision import Precision, autocast
from sasft.sampling import Sampler, row_seed, sample

_ROWS_A_BATCH = 16
_WINDOW = 256  # tokens of general text scored together
_WINDOWS = 16
_STYLE_TOKENS = 64
_ALIGNED_TOKENS = 2048  # of each source, with padding: all rows' gradients are taken in one pass, whose memory grows with them
_FEWEST = 3  # rows that have a standard error


def run_probes(chat: Chat, held_out: Mapping[str, Sequence[Encoded]], general_text: str | None = None, *,
               precision: Precision = "auto") -> list[drift.Probe]:
    """KL, entropy and NLL on held-out task and self rows and on general text; alignment of task and self gradients; style.

    ``held_out``: encoded rows of the sources ``task`` and ``self``; sources without rows are left out, and alignment and style
    need self rows. Alignment takes the first rows of each that come to 2,048 tokens together, and three at least. All but the writing of texts for style runs in the weights' own precision.
    """
    probes: list[drift.Probe] = [
        drift.DivergenceProbe(source, batches(rows, chat.pad_id)) for source, rows in held_out.items() if rows]
    if general_text is not None:
        probes.append(drift.DivergenceProbe("general_text", batches(windows(chat, general_text), chat.pad_id)))
    if held_out[TASK] and held_out[SELF]:
        probes.append(drift.AlignmentProbe("align", {s: batches(_first(held_out[s]), chat.pad_id) for s in (TASK, SELF)}))
    if len(held_out[SELF]) >= _FEWEST:
        probes.append(style_probe(chat, held_out[SELF], precision))
    return probes


def _first(rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """The first rows, as many as come to 2,048 tokens with padding, and three at least.

    >>> len(_first([Encoded.text([1] * 500)] * 16)), len(_first([Encoded.text([1] * 5000)] * 16))
    (4, 3)
    """
    longest, n = 0, 0
    for row in rows:
        longest = max(longest, len(row.input_ids))
        if n >= _FEWEST and longest * (n + 1) > _ALIGNED_TOKENS:
            break
        n += 1
    return rows[:n]


def batches(rows: Sequence[Encoded], pad_id: int) -> list[dict]:
    """Rows in batches of 16, in their order."""
    return [collate(rows[i : i + _ROWS_A_BATCH], pad_id) for i in range(0, len(rows), _ROWS_A_BATCH)]


def windows(chat: Chat, text: str) -> list[Encoded]:
    """The first windows of a text, each scored on its own without a prompt."""
    ids = chat.tokenizer(text, add_special_tokens=False).input_ids
    return [Encoded.text(ids[i : i + _WINDOW]) for i in range(0, min(len(ids), _WINDOW * _WINDOWS), _WINDOW)
            if len(ids[i : i + _WINDOW]) > 1]


def style_probe(chat: Chat, rows: Sequence[Encoded], precision: Precision) -> drift.StyleProbe:
    """What the model now answers to the rows' prompts, against what it answered at θ₀ with the same random numbers."""
    prompts = [row.input_ids[: row.start] for row in rows]
    sampler = Sampler(temperature=1.0, top_p=1.0, max_new_tokens=_STYLE_TOKENS)
    seeds = [row_seed(0, "style", k) for k in range(len(prompts))]

    def write(model: nn.Module) -> list[str]:
        with autocast(precision, next(model.parameters()).device.type):
            answers = sample(model, prompts, seeds, sampler, stop_id=chat.end_of_turn, pad_id=chat.pad_id)
        return [chat.tokenizer.decode(answer.ids) for answer in answers]

    return drift.StyleProbe("self-prompts", write, paired=True)
