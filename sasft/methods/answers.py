"""Answers that a model gives to the prompts of encoded rows, as rows that can be trained on."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.methods.base import Costs
from sasft.sampling import EXACT, sample


def answer_rows(model: nn.Module, rows: Sequence[Encoded], seeds: Sequence[int], *, max_new_tokens: int, stop_id: int,
                pad_id: int, costs: Costs) -> list[Encoded]:
    """The model's own answer to the prompt of each row, at T = 1 from its whole distribution, all sampled together."""
    prompts = [row.input_ids[: row.start] for row in rows]
    answers = sample(model, prompts, seeds, replace(EXACT, max_new_tokens=max_new_tokens), stop_id=stop_id, pad_id=pad_id)
    costs.generated_tokens += sum(len(answer.logprobs) for answer in answers)
    return [Encoded.answered(prompt, (*answer.ids, stop_id) if answer.finished else answer.ids, answer.finished)
            for prompt, answer in zip(prompts, answers, strict=True)]


def end_of_turn(rows: Sequence[Encoded]) -> int:
    """The token that ends the rows' turns; raises :class:`UsageError` if none of them is finished."""
    for row in rows:
        if row.finished:
            return row.input_ids[-1]
    raise UsageError("no row is finished, so there is no end-of-turn token to stop at; give rows with whole answers")
