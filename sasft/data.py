"""Rows of chat data: reading them with exact errors, and encoding them."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sasft.chat import Chat, Encoded, Turns
from sasft.errors import UsageError
from sasft.sources import Source, listed

_SHAPES = ('{"messages": [{"role": ..., "content": ...}, ...]} with the assistant last, '
           '{"prompt": ..., "response": ...}, or {"instruction": ..., "input": ..., "output": ...}')
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Row:
    """One training row: the messages before the answer, and the answer.

    ``response_ids``: the answer's tokens as they were sampled, None for text from elsewhere.
    ``finished``: False for an answer that a length cap has cut; it has no end-of-turn token.
    ``source``: where the row comes from, by default the name of its file. ``meta``: other fields.
    """

    id: str
    source: str
    prompt: tuple[Mapping[str, str], ...]
    response: str
    response_ids: tuple[int, ...] | None = None
    finished: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], *, default_id: str = "", default_source: str = ""
    ) -> "Row":
        """The row that a JSON object describes, in any of three shapes.

        ``{"messages": [...]}`` with the assistant's message last (or ``conversations``, with ``from`` and ``value``);
        ``{"prompt", "response"}`` (or ``completion``), both texts or both lists of messages; or
        ``{"instruction", "input" (may be missing), "output"}``. An empty answer counts as an answer
        only where ``response_ids`` show that a model gave it. Raises :class:`UsageError`.

        >>> row = Row.from_json({"instruction": "Add.", "input": "2 + 2", "output": "4", "n": 1})
        >>> row.prompt[0]["content"], row.response, row.meta
        ('Add.\\n\\n2 + 2', '4', {'n': 1})
        """
        rest = dict(data)
        if "completion" in rest and "response" not in rest:
            rest["response"] = rest.pop("completion")
        if "conversations" in rest and "messages" not in rest:
            rest["messages"] = _turns(rest.pop("conversations"))
        if isinstance(rest.get("prompt"), list) and isinstance(rest.get("response"), list):
            rest["messages"] = [*rest.pop("prompt"), *rest.pop("response")]
        if "messages" in rest:
            *prompt, last = _messages(rest.pop("messages"))
            if last["role"] != "assistant":
                raise _NoAnswer(f"the last message is the {last['role']}'s, not the assistant's")
            if not prompt:
                raise UsageError("there is no message before the assistant's; add the prompt")
            response = last["content"]
        elif {"prompt", "response"} & rest.keys():
            prompt, response = [_user(_text(rest, "prompt"))], _answer(rest, "response")
        elif "instruction" in rest:
            instruction, extra = _text(rest, "instruction"), rest.pop("input", None)
            prompt = [_user(f"{instruction}\n\n{extra}" if extra else instruction)]
            response = _answer(rest, "output")
        else:
            raise UsageError(f"the columns found, {listed(data)}, make none of the shapes needed: {_SHAPES}; if others hold the "
                             "same, say which behind the name: FILE:prompt=question,response=answer")
        ids, finished = rest.pop("response_ids", None), rest.pop("finished", True)
        name, source = rest.pop("id", None), rest.pop("source", None)  # a missing one may be written as null
        if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
            raise UsageError(f'"response_ids" must be a list of integers, got {_brief(ids)}')
        if not isinstance(finished, bool):
            raise UsageError(f'"finished" must be true or false, got {finished!r}')
        if ids is None and not response.strip():
            raise _NoAnswer("the answer is empty")
        return cls(
            id=default_id if name is None else str(name), source=default_source if source is None else str(source),
            prompt=tuple(prompt), response=response,
            response_ids=None if ids is None else tuple(ids), finished=finished, meta=rest)

    def as_json(self) -> dict[str, Any]:
        """The object that :meth:`from_json` reads as this row.

        >>> row = Row("1", "self", ({"role": "user", "content": "Hi!"},), "Hello.", (5, 6), meta={"seed": 3})
        >>> Row.from_json(row.as_json()) == row
        True
        """
        ids = {} if self.response_ids is None else {"response_ids": list(self.response_ids)}
        return {"id": self.id, "source": self.source, "messages": [*self.prompt, {"role": "assistant", "content": self.response}],
                **ids, "finished": self.finished, **self.meta}


class _NoAnswer(UsageError):
    """A row without anything to learn; reported together with all others of its file."""


def read_rows(source: Source | Path | str, *, torn_ok: bool = False) -> list[Row]:
    """The rows of a JSONL or Parquet file, or of a dataset on the hub (see :class:`sasft.sources.Source` for how to name
    one and its columns), in the shapes of :meth:`Row.from_json`. JSONL is UTF-8 (a byte-order mark is fine), one object a line;
    blank lines hold no row.

    ``torn_ok`` is for a file that :class:`JsonlWriter` was writing when it was stopped: its last
    line may be torn, and it may hold no row yet.

    Raises :class:`UsageError` for a source that is missing, unreadable, out of reach or empty, for a malformed row
    (its number, its fault, how it starts), for another schema (columns found, columns needed), and for rows without an
    answer (how many, which).
    """
    source = Source.parse(source)
    rows: list[Row] = []
    unanswered: list[int] = []
    for number, data, start in source.records(torn_ok=torn_ok):
        try:
            rows.append(Row.from_json(data, default_id=f"{source.name}-{number}", default_source=source.name))
        except _NoAnswer:
            unanswered.append(number)
        except UsageError as error:
            raise UsageError(f"{source}, {source.unit} {number}: {error}. The {source.unit} starts with {start!r}") from None
    if unanswered:
        shown = ", ".join(map(str, unanswered[:10])) + (", ..." if len(unanswered) > 10 else "")
        total = len(rows) + len(unanswered)
        raise UsageError(f"{source}: {len(unanswered)} of {total} rows have no answer ({source.unit}s "
                         f"{shown}); add the answers, or remove the rows")
    if not rows and not torn_ok:
        raise UsageError(f"{source} has no rows; it should have one JSON object a line: {_SHAPES}")
    return rows


@dataclass(frozen=True)
class EncodeReport:
    """What :func:`encode_rows` did; ``longest`` is the longest row before that, in tokens; ``kept_rows``: which ones were kept."""

    rows: int
    kept: int
    truncated: int
    dropped: int
    longest: int
    loss_tokens: int
    kept_rows: Sequence[int]

    def __str__(self) -> str:
        return (f"{self.kept} of {self.rows} rows, {self.loss_tokens} tokens in the loss "
                f"({self.truncated} rows truncated, {self.dropped} dropped as too long; "
                f"longest {self.longest} tokens)")


def encode_rows(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    too_long: Literal["error", "truncate", "drop"] = "error",
    turns: Turns = "last",
) -> tuple[list[Encoded], EncodeReport]:
    """Encode rows in their order, and deal with those of more than ``max_tokens`` tokens as told.

    ``turns``: whether the last turn of the assistant is in the loss, or all of them (:meth:`sasft.chat.Chat.encode`).

    ``truncate`` cuts the end of the answer, which then has no end-of-turn token; ``drop`` leaves
    rows out. On self-data, dropping picks rows by their answers and so breaks the score identity,
    whereas cutting does not (docs/theory.md, F1 and F2c): dropped rows that a model has sampled give a
    :class:`sasft.filters.BreaksScoreIdentity` warning.

    Raises :class:`UsageError`, naming rows, where a row cannot be encoded, where rows are too long
    under ``error``, where truncation would leave no answer, and where dropping would leave no row.
    """
    if too_long not in ("error", "truncate", "drop"):
        raise UsageError(f"too_long must be error, truncate or drop, got {too_long!r}")
    encoded = [_encode(row, chat, turns) for row in rows]
    kept: Sequence[int] = range(len(rows))
    longest = max((len(e.input_ids) for e in encoded), default=0)
    over = [i for i, e in enumerate(encoded) if len(e.input_ids) > max_tokens]
    if over and too_long == "error":
        raise UsageError(
            f"{len(over)} of {len(rows)} rows have more than max_tokens={max_tokens} tokens (the "
            f"longest has {longest}; the first is row {rows[over[0]].id}); raise max_tokens, or "
            "set too_long to truncate (cuts the ends of answers) or drop")
    if over and too_long == "truncate":
        stuck = [rows[i].id for i in over if encoded[i].start >= max_tokens]
        if stuck:
            raise UsageError(
                f"the prompts of {len(stuck)} of {len(rows)} rows fill max_tokens={max_tokens} by "
                f"themselves (the first is row {stuck[0]}), so truncation would leave no answer; "
                "raise max_tokens, or set too_long to drop")
        encoded = [e.cut(max_tokens) for e in encoded]
    elif over:
        kept = [i for i, e in enumerate(encoded) if len(e.input_ids) <= max_tokens]
        encoded = [encoded[i] for i in kept]
        if not encoded:
            raise UsageError(f"all {len(rows)} rows have more than max_tokens={max_tokens} tokens, "
                             "so dropping them leaves nothing; raise max_tokens, or set too_long "
                             "to truncate")
        if sampled := sum(rows[i].response_ids is not None for i in over):
            from sasft.filters import BreaksScoreIdentity  # which needs this module

            warnings.warn(BreaksScoreIdentity(f"max_tokens={max_tokens} with too_long=drop", sampled), stacklevel=2)
    return encoded, EncodeReport(
        rows=len(rows), kept=len(encoded), truncated=len(over) if too_long == "truncate" else 0,
        dropped=len(rows) - len(encoded), longest=longest,
        loss_tokens=sum(e.loss_tokens for e in encoded), kept_rows=kept)


def _encode(row: Row, chat: Chat, turns: Turns) -> Encoded:
    if row.response_ids is not None and chat.tokenizer.decode(row.response_ids) != row.response:
        raise UsageError(f"row {row.id}: its response_ids do not spell its answer, so the row was "
                         "written with another tokenizer or edited since; remove response_ids to "
                         "use the text")
    response = row.response if row.response_ids is None else row.response_ids
    try:
        return chat.encode(row.prompt, response, finished=row.finished, turns=turns)
    except UsageError as error:
        raise UsageError(f"row {row.id}: {error}") from error


def _messages(value: Any) -> list[dict[str, str]]:
    def is_message(m: Any) -> bool:
        return isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))

    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise UsageError('"messages" must be a list of {"role": text, "content": text}, '
                         f"got {_brief(value)}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _turns(value: Any) -> Any:
    """Turns as ShareGPT writes them, as messages; anything else as it is, for :func:`_messages` to refuse."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [{"role": _ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")} for turn in value]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "…"


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _text(data: dict[str, Any], name: str) -> str:
    value = data.pop(name, None)
    if not isinstance(value, str):
        raise UsageError(f'"{name}" must be text, got {_brief(value)}')
    return value


def _answer(data: dict[str, Any], name: str) -> str:
    if data.get(name) is None:
        raise _NoAnswer(f'there is no "{name}"')
    return _text(data, name)
