"""Chat templates turned into token ids, and the loss mask that goes with them.

The tokenizer's own template is the only source of truth: what opens a turn, what ends it and what
the default system prompt says are read off its renderings, never assumed.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from typing import Any, Literal

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from sasft.errors import UsageError

IGNORE = -100
"""The label of a token that is not in the loss, as in torch and transformers."""

Messages = Sequence[Mapping[str, str]]
Turns = Literal["last", "all"]

# Rendered in place of a turn to see what the template puts around it.
_PROBE = "A turn to look for"
# What a template is told, in the order of trying, until prompts read the same with and without their answer.
_MODES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False})
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = date(2024, 7, 26)  # which Llama 3's template falls back to where it is given none
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: ``labels`` equal ``input_ids`` where a token is in the loss, else -100.

    ``finished``: the last token in the loss is the end-of-turn token. A response that a length cap
    has cut has none, so the model is not taught to stop there.

    Raises :class:`UsageError` if no token is in the loss, if a label is another token's, or if a finished row's last token,
    which must be its end of turn, is not in the loss: a model trained like that does not stop.

    >>> row = Encoded((5, 6, 7, 2), (-100, -100, 7, 2))
    >>> row.start, row.loss_tokens, row.response_ids
    (2, 2, (7,))
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    finished: bool = True

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.input_ids):
            raise UsageError(f"labels must be as long as input_ids, got {len(self.labels)} labels "
                             f"for {len(self.input_ids)} tokens")
        if not self._in_loss:
            raise UsageError("the mask hides every token, so there is nothing to learn from; "
                             "give the row a response")
        pairs = zip(self.input_ids, self.labels, strict=True)
        if any(label not in (IGNORE, token) for token, label in pairs):
            raise UsageError("a label must be its own token (labels are not shifted here) "
                             f"or {IGNORE}")
        if self.finished and self.labels[-1] == IGNORE:
            raise UsageError("the mask hides the last token of a finished row, its end of turn, so the model would not learn to "
                             "stop; label it, or set finished to False")

    @classmethod
    def text(cls, ids: Sequence[int]) -> "Encoded":
        """Plain text without a prompt: all is scored but the first token, which nothing predicts.

        >>> Encoded.text([5, 6, 7]).labels
        (-100, 6, 7)
        """
        return cls(tuple(ids), (IGNORE, *ids[1:]), finished=False)

    @classmethod
    def answered(cls, prompt: Sequence[int], response: Sequence[int], finished: bool = True) -> "Encoded":
        """A prompt that is not in the loss and a response that is, with its end-of-turn token if it is ``finished``.

        >>> Encoded.answered([5, 6], [7, 2]).labels
        (-100, -100, 7, 2)
        """
        return cls((*prompt, *response), (*[IGNORE] * len(prompt), *response), finished)

    @property
    def _in_loss(self) -> tuple[int, ...]:
        return tuple(label for label in self.labels if label != IGNORE)

    @property
    def start(self) -> int:
        """Position of the first token in the loss."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE)

    @property
    def loss_tokens(self) -> int:
        """How many tokens are in the loss."""
        return len(self._in_loss)

    @property
    def response_ids(self) -> tuple[int, ...]:
        """The response's tokens, without the end-of-turn token that closes the row (of several turns: one after the other)."""
        return self._in_loss[:-1] if self.finished else self._in_loss

    def with_response(self, ids: Sequence[int]) -> "Encoded":
        """The same prompt with other response tokens; a finished row keeps its end-of-turn token.

        Raises :class:`UsageError` if more than one turn is in the loss.

        >>> Encoded((5, 6, 7, 2), (-100, -100, 7, 2)).with_response([8, 9]).input_ids
        (5, 6, 8, 9, 2)
        """
        if IGNORE in self.labels[self.start :]:
            raise UsageError("only a row with a single turn in the loss can be given another response")
        end = self._in_loss[-1:] if self.finished else ()
        return Encoded.answered(self.input_ids[: self.start], (*ids, *end), self.finished)

    def cut(self, max_tokens: int) -> "Encoded":
        """The first ``max_tokens`` tokens; unfinished, unless the row is no longer than that.

        >>> Encoded((5, 6, 7, 2), (-100, -100, 7, 2)).cut(3)
        Encoded(input_ids=(5, 6, 7), labels=(-100, -100, 7), finished=False)
        """
        if len(self.input_ids) <= max_tokens:
            return self
        return Encoded(self.input_ids[:max_tokens], self.labels[:max_tokens], finished=False)


class Chat:
    """A tokenizer's chat template: prompts as ids, rows with their loss mask.

    A reasoning template that puts an empty think block before answers is rendered in its non-thinking mode
    (``enable_thinking=False``), if that puts the block into the prompt for sampling as well: the same text in both. A template
    that tells today's date (Llama 3's system prompt) tells one fixed day instead, our choice: prompts that change overnight
    could not be compared, and a run could not go on with them.

    Attributes: ``tokenizer``; ``template``, as it is rendered; ``end_of_turn``, the id that ends an assistant turn as the
    template writes it (not always the tokenizer's ``eos_token``); ``pad_id``, the tokenizer's padding id, or
    another special token where that one is missing or ends turns: code that tells padding by its
    id would take the end of a turn for padding, and a model trained like that never stops.

    Raises :class:`UsageError` if the tokenizer has no chat template, if the template leaves out
    the answer or puts no special token after it, or if no token is left to pad with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._name = repr(tokenizer.name_or_path)
        if not tokenizer.chat_template:
            raise UsageError(f"the tokenizer of {self._name} has no chat template, so it knows no "
                             "turns; take the chat (\"instruct\") version of the model, or put a "
                             "chat_template.jinja into its folder")
        self.template = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), tokenizer.get_chat_template())
        for self._mode in _MODES:
            self._lead, self._tail = self._around_answer()
            if self._lead is not None and not self._lead.strip():
                break
        else:
            self._mode = {}
            self._lead, self._tail = self._around_answer()
        self.end_of_turn, self._gap = self._find_end_of_turn()
        self.pad_id = self._choose_pad()

    def user_prefix_ids(self, system: str | None = None, history: Messages = ()) -> list[int]:
        """All up to the opening of the user turn that follows ``history``: fed this, the model writes the user's part.

        Without ``system``, the template's default system prompt is in place, if it has one.
        """
        messages = [*history, {"role": "user", "content": _PROBE}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self._tokens(self._render(messages).rpartition(_PROBE)[0])

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The conversation up to the opening of the assistant's turn."""
        return self._tokens(self._render(messages, add_generation_prompt=True))

    def encode(
        self, prompt: Messages, response: str | Sequence[int], *, finished: bool = True, turns: Turns = "last"
    ) -> Encoded:
        """A training row: the prompt out of the loss, response and end-of-turn token in it.

        ``response`` is text, or the very ids that were sampled, which are kept as they are (text
        encoded anew may fall into other tokens, of another probability). The prompt's ids are
        always those of :meth:`prompt_ids`: training conditions on what sampling conditions on. A
        response that is not ``finished`` gets no end-of-turn token. What the template puts behind
        that token is left out. Blanks around a text are kept or trimmed as the template has it. With ``turns="all"``, the
        assistant's turns within the prompt are in the loss as well, each with its end-of-turn token.

        Raises :class:`UsageError` if the template rewrites the conversation or the answer once the
        answer is in place (reasoning templates add or remove ``<think>`` blocks), if the response
        holds the end-of-turn token, or if the labels do not decode to the response; with ``turns="all"`` also if an
        earlier turn is rendered otherwise than when it was the last one.
        """
        if turns not in ("last", "all"):
            raise UsageError(f"turns must be last or all, got {turns!r}")
        opening = self._render(prompt, add_generation_prompt=True)
        head = self._tokens(opening)
        if isinstance(response, str):
            ids = self._response_tokens(prompt, opening, head, response, finished)
        else:
            ids = list(response)
            if outside := [i for i in ids if not 0 <= i < len(self.tokenizer)]:
                raise UsageError(f"response id {outside[0]} is none of the {len(self.tokenizer)} "
                                 f"tokens of {self._name}; were the ids sampled by another model?")
        if self.end_of_turn in ids:
            raise UsageError("the response itself holds the end-of-turn token "
                             f"{self._text([self.end_of_turn])!r}; take it out, finished responses "
                             "are given it")
        row = Encoded.answered(head, [*ids, self.end_of_turn] if finished else ids, finished)
        return self._with_earlier_turns(row, prompt) if turns == "all" else row

    def show(self, row: Encoded, *, colour: bool = True, hue: int = 32) -> str:
        """The row's text: tokens in the loss bright, in the terminal colour ``hue`` (ANSI 31 to 36), all others dim.

        Without ``colour``, the tokens in the loss stand between ⟦ and ⟧.
        """
        lost = (f"\x1b[1;{hue}m", _RESET) if colour else ("⟦", "⟧")
        kept = (_DIM, _RESET) if colour else ("", "")
        parts = []
        for masked, group in groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] == IGNORE):
            before, after = kept if masked else lost
            parts.append(before + self._text([token for token, _ in group]) + after)
        return "".join(parts)

    def _with_earlier_turns(self, row: Encoded, prompt: Messages) -> Encoded:
        labels = list(row.labels)
        for k, message in enumerate(prompt):
            if message["role"] != "assistant":
                continue
            turn = self.encode(prompt[:k], message["content"])
            end = len(turn.input_ids)
            if row.input_ids[:end] != turn.input_ids:
                raise UsageError(f"the chat template of {self._name} renders the assistant's turn {_shorten(message['content'])} "
                                 "otherwise once the conversation goes on, so it can't be learnt in its place; set turns to last")
            labels[turn.start : end] = turn.input_ids[turn.start :]
        return Encoded(row.input_ids, tuple(labels), row.finished)

    def _around_answer(self) -> tuple[str | None, str]:
        """What the template puts between the prompt for sampling and an answer, and what behind it.

        The first is None where the prompt is rendered otherwise once it is answered. Some templates put a blank there
        that does not belong to the turn's opening.
        """
        prompt = [{"role": "user", "content": _PROBE.upper()}]
        opening = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, {"role": "assistant", "content": _PROBE}])
        before, found, tail = whole.rpartition(_PROBE)
        if not found:
            raise UsageError(f"the chat template of {self._name} leaves out what the assistant "
                             f"says; it renders {_shorten(whole)}")
        return (before.removeprefix(opening) if before.startswith(opening) else None), tail

    def _response_tokens(self, prompt: Messages, opening: str, head: list[int], response: str,
                         finished: bool) -> list[int]:
        whole = self._render([*prompt, {"role": "assistant", "content": response}])
        if self._lead is None or self._lead.strip() or not whole.startswith(opening):
            raise UsageError(
                f"the chat template of {self._name} is not prefix-stable: the prompt for sampling "
                f"ends in {_shorten(opening, last=True)}, but the conversation with its answer is "
                f"{_shorten(whole, last=True)}, so training and sampling would see different "
                "prompts; use a template that renders the prompt alike in both (for a reasoning "
                "model: one that adds and removes no think block)")
        content = whole[len(opening) :].removeprefix(self._lead).removesuffix(self._tail)
        if content.strip() != response.strip():
            raise UsageError(f"the chat template of {self._name} turns the response "
                             f"{_shorten(response)} into {_shorten(content)}; use a template that "
                             "leaves it as it is")
        target = self._lead + content + (self._gap if finished else "")
        # Together with the prompt, since some tokenizers treat the start of a text differently;
        # alone where the response's first characters would melt into the prompt's last token.
        joint = self._tokens(opening + target)
        ids = joint[len(head) :] if joint[: len(head)] == head else self._tokens(target)
        expected, decoded = self._text(head) + target, self._text(head + ids)
        if unicodedata.normalize("NFC", decoded) != unicodedata.normalize("NFC", expected):
            raise UsageError(f"the tokenizer of {self._name} does not give the response back: "
                             f"{_shorten(target)} became {_shorten(self._text(ids))}; clean the "
                             "text, or use another model")
        return ids

    def _find_end_of_turn(self) -> tuple[int, str]:
        """The first special token after an answer, and the blanks that stand before it."""
        special = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        end = next((i for i in self._tokens(self._tail) if i in special), None)
        gap = None if end is None else self._tail[: self._tail.index(self._text([end]))]
        if end is None or gap.strip():
            raise UsageError(f"the chat template of {self._name} ends the assistant's turn with "
                             f"{self._tail!r}, which does not begin with a special token: no model "
                             "can learn from it where to stop; mend the template, by writing "
                             "eos_token after the assistant's content")
        return end, gap

    def _choose_pad(self) -> int:
        tokenizer = self.tokenizer
        ends = {self.end_of_turn, tokenizer.eos_token_id}
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids,
                      *tokenizer.added_tokens_decoder)
        for token in candidates:
            if token is not None and token not in ends:
                return token
        raise UsageError(f"the tokenizer of {self._name} can pad only with tokens that end a turn; "
                         "add one: tokenizer.add_special_tokens({'pad_token': '<pad>'})")

    def _render(self, messages: Messages, **kwargs: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, tokenize=False, **self._mode,
                                                      **kwargs)
        except jinja2.TemplateError as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise UsageError(f"the chat template of {self._name} refuses a conversation of the "
                             f"roles ({roles}): {error}") from error

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """A batch whose responses all begin in the same column.

    Prompts are padded on the left, responses on the right; ``response_start`` (int) is the first
    column whose token is in the loss, so that a forward pass needs vocabulary logits only from the
    column before it onwards (transformers: ``logits_to_keep=T - response_start + 1``). The tensors
    ``input_ids``, ``attention_mask``, ``position_ids`` and ``labels`` are int64 [B, T]; positions
    count a row's own tokens from 0.

    >>> a, b = Encoded((5, 6, 7, 2), (-100, -100, 7, 2)), Encoded((5, 8, 9, 2), (-100, 8, 9, 2))
    >>> batch = collate([a, b], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["response_start"]
    ([[5, 6, 7, 2, 0], [0, 5, 8, 9, 2]], 2)
    """
    if not rows:
        raise UsageError("rows must hold at least one row to make a batch of, got none")
    start = max(row.start for row in rows)
    width = start + max(len(row.input_ids) - row.start for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for i, row in enumerate(rows):
        columns = slice(start - row.start, start - row.start + len(row.input_ids))
        input_ids[i, columns] = torch.tensor(row.input_ids)
        attention_mask[i, columns] = 1
        labels[i, columns] = torch.tensor(row.labels)
    position_ids = attention_mask.cumsum(-1).sub(1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask,
            "position_ids": position_ids, "labels": labels, "response_start": start}


def _shorten(text: str, last: bool = False, length: int = 80) -> str:
    if len(text) <= length:
        return repr(text)
    return "…" + repr(text[-length:]) if last else repr(text[:length]) + "…"
