"""The model under evaluation: what it answers, and how likely it finds given tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import drift
from drift.divergence import RowDivergences
from drift.forward import logits_of
from drift.modes import measuring
from drift.numerics import at_least_fp32
from sasft.chat import Chat, Encoded, collate
from sasft.precision import Precision, autocast
from sasft.sampling import Sampler, row_seed, sample

Base = nn.Module | Literal["without adapters"] | None


@dataclass(frozen=True)
class Answer:
    """``text`` up to the first special token; ``tokens`` generated; ``finished``: the model ended its turn; ``off_template``: it
    wrote a special token in the midst of it."""

    text: str
    tokens: int
    finished: bool
    off_template: bool


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its chat template, and how it is run.

    ``temperature`` 0 decodes greedily; above it, answers are drawn with seeds that depend on ``seed`` and the item alone.
    ``precision`` is that of the forward pass; fp32 leaves the weights' own. ``base`` is what KL is measured to: another model of
    the same tokenizer, or "without adapters". ``max_new_tokens`` caps every answer; 0 leaves the suites' own caps.
    """

    model: nn.Module
    chat: Chat
    base: Base = None
    precision: Precision = "fp32"
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    max_new_tokens: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model's first weights lie."""
        return next(self.model.parameters()).device

    def answers(self, prompts: Sequence[Sequence[int]], names: Sequence[tuple[str, str]], max_new_tokens: int) -> list[Answer]:
        """An answer to each prompt, all in one batch; ``names`` are what the draws' seeds hang on, ``max_new_tokens`` the
        suite's cap."""
        greedy = self.temperature == 0
        sampler = Sampler(temperature=1.0 if greedy else self.temperature, top_p=1.0,
                          max_new_tokens=self.max_new_tokens or max_new_tokens)
        with autocast(self.precision, self.device.type):
            found = sample(self.model, prompts, [row_seed(self.seed, *name) for name in names], sampler,
                           stop_id=self.chat.end_of_turn, pad_id=self.chat.pad_id, greedy=greedy)
        return [self._answer(s.ids, s.finished) for s in found]

    def _answer(self, ids: Sequence[int], finished: bool) -> Answer:
        tokenizer = self.chat.tokenizer
        added = (token for token, made in tokenizer.added_tokens_decoder.items() if made.special)
        special = {*added, *tokenizer.all_special_ids}
        end = next((i for i, token in enumerate(ids) if token in special), len(ids))
        return Answer(tokenizer.decode(ids[:end]).strip(), len(ids) + finished, finished, end < len(ids))

    @torch.no_grad()
    def loglikelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, rounded: bool = True) -> list[float]:
        r"""For each (prompt, continuation) :math:`\sum_t \log p_\theta(c_t \mid \text{prompt}, c_{<t})` in nats.

        A continuation's last token is never fed, so the choices of a question that are one token each share one row of one
        forward pass. Log-softmax runs in float32. ``rounded=False`` keeps autocast out, whatever the precision.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for i, (prompt, continuation) in enumerate(pairs):
            places.setdefault((*prompt, *continuation[:-1]), []).append(i)
        inputs, found = list(places), [0.0] * len(pairs)
        with measuring(self.model), autocast(self.precision if rounded else "fp32", self.device.type):
            for begin in range(0, len(inputs), self.batch_size):
                rows = inputs[begin : begin + self.batch_size]
                last = max(len(pairs[i][1]) for row in rows for i in places[row])
                for row, logits in zip(rows, self._last_logits(rows, last), strict=True):
                    for i in places[row]:
                        continuation = torch.tensor(pairs[i][1], device=logits.device)
                        log_p = torch.log_softmax(at_least_fp32(logits[-len(continuation) :]), -1)
                        found[i] = log_p.gather(-1, continuation.unsqueeze(-1)).double().sum().item()
        return found

    def _last_logits(self, rows: Sequence[Sequence[int]], last: int) -> torch.Tensor:
        """Logits [B, last, V] at the last positions of every row, rows padded on the left."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.chat.pad_id] * (width - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        columns = torch.arange(width - last, width, device=self.device)
        return logits_of(self.model, {"input_ids": ids, "attention_mask": mask}, columns)

    def divergences(self, rows: Sequence[Encoded]) -> RowDivergences:
        """Divergences from the base's predictions, entropies and NLL, summed over each row's tokens in the loss."""
        probe = drift.DivergenceProbe("evaluation", [collate(rows, self.chat.pad_id)], base=self.base)
        probe.prepare(self.model)
        return probe.per_row(self.model)
