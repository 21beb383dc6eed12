"""Rows in JSONL files: reading them with exact errors, and encoding them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sasft.chat import Chat, Encoded
from sasft.errors import UsageError
from sasft.files import is_torn

_SHAPES = ('{"messages": [{"role": ..., "content": ...}, ...]} with the assistant last, '
           '{"prompt": ..., "response": ...}, or {"instruction": ..., "input": ..., "output": ...}')


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

        ``{"messages": [...]}`` with the assistant's message last, ``{"prompt", "response"}``, or
        ``{"instruction", "input" (may be missing), "output"}``. An empty answer counts as an answer
        only where ``response_ids`` show that a model gave it. Raises :class:`UsageError`.

        >>> row = Row.from_json({"instruction": "Add.", "input": "2 + 2", "output": "4", "n": 1})
        >>> row.prompt[0]["content"], row.response, row.meta
        ('Add.\\n\\n2 + 2', '4', {'n': 1})
        """
        rest = dict(data)
        if "messages" in data:
            *prompt, last = _messages(rest.pop("messages"))
            if last["role"] != "assistant":
                raise _NoAnswer(f"the last message is the {last['role']}'s, not the assistant's")
            if not prompt:
                raise UsageError("there is no message before the assistant's; add the prompt")
            response = last["content"]
        elif {"prompt", "response"} & data.keys():
            prompt, response = [_user(_text(rest, "prompt"))], _answer(rest, "response")
        elif "instruction" in data:
            instruction, extra = _text(rest, "instruction"), rest.pop("input", None)
            prompt = [_user(f"{instruction}\n\n{extra}" if extra else instruction)]
            response = _answer(rest, "output")
        else:
            fields = ", ".join(map(repr, data)) or "(none)"
            raise UsageError(f"fields {fields} make none of the known shapes: {_SHAPES}")
        ids, finished = rest.pop("response_ids", None), rest.pop("finished", True)
        if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
            raise UsageError(f'"response_ids" must be a list of integers, got {_brief(ids)}')
        if not isinstance(finished, bool):
            raise UsageError(f'"finished" must be true or false, got {finished!r}')
        if ids is None and not response.strip():
            raise _NoAnswer("the answer is empty")
        return cls(
            id=str(rest.pop("id", default_id)), source=str(rest.pop("source", default_source)),
            prompt=tuple(prompt), response=response,
            response_ids=None if ids is None else tuple(ids), finished=finished, meta=rest)


class _NoAnswer(UsageError):
    """A row without anything to learn; reported together with all others of its file."""


def read_rows(path: Path | str, *, torn_ok: bool = False) -> list[Row]:
    """The rows of a JSONL file: UTF-8 (a byte-order mark is fine), one object a line, in the shapes
    of :meth:`Row.from_json`; blank lines hold no row.

    ``torn_ok`` is for a file that :class:`JsonlWriter` was writing when it was stopped: its last
    line may be torn, and it may hold no row yet.

    Raises :class:`UsageError` for a file that is missing, unreadable or empty, for a malformed line
    (its number, its fault, how it starts), and for rows without an answer (how many, which lines).
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}; it should be a JSONL file, "
                         "one row a line") from None
    rows: list[Row] = []
    unanswered: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (torn_ok and number == len(lines) and is_torn(line)):
            continue
        try:
            rows.append(Row.from_json(_parse(line), default_id=f"{path.stem}-{number}",
                                      default_source=path.stem))
        except _NoAnswer:
            unanswered.append(number)
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}. The line starts with "
                             f"{line[:60].decode('utf-8', 'replace')!r}") from None
    if unanswered:
        shown = ", ".join(map(str, unanswered[:10])) + (", ..." if len(unanswered) > 10 else "")
        total = len(rows) + len(unanswered)
        raise UsageError(f"{path}: {len(unanswered)} of {total} rows have no answer (lines "
                         f"{shown}); add the answers, or remove the rows")
    if not rows and not torn_ok:
        raise UsageError(f"{path} has no rows; it should have one JSON object a line: {_SHAPES}")
    return rows


@dataclass(frozen=True)
class EncodeReport:
    """What :func:`encode_rows` did; ``longest`` is the longest row before that, in tokens."""

    rows: int
    kept: int
    truncated: int
    dropped: int
    longest: int
    loss_tokens: int

    def __str__(self) -> str:
        return (f"{self.kept} of {self.rows} rows, {self.loss_tokens} tokens in the loss "
                f"({self.truncated} rows truncated, {self.dropped} dropped as too long; "
                f"longest {self.longest} tokens)")


def encode_rows(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    too_long: Literal["error", "truncate", "drop"] = "error",
) -> tuple[list[Encoded], EncodeReport]:
    """Encode rows in their order, and deal with those of more than ``max_tokens`` tokens as told.

    ``truncate`` cuts the end of the answer, which then has no end-of-turn token; ``drop`` leaves
    rows out. On self-data, dropping picks rows by their answers and so breaks the score identity,
    whereas cutting does not (docs/theory.md, F1 and F2c).

    Raises :class:`UsageError`, naming rows, where a row cannot be encoded, where rows are too long
    under ``error``, where truncation would leave no answer, and where dropping would leave no row.
    """
    if too_long not in ("error", "truncate", "drop"):
        raise UsageError(f"too_long must be error, truncate or drop, got {too_long!r}")
    encoded = [_encode(row, chat) for row in rows]
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
        encoded = [e for e in encoded if len(e.input_ids) <= max_tokens]
        if not encoded:
            raise UsageError(f"all {len(rows)} rows have more than max_tokens={max_tokens} tokens, "
                             "so dropping them leaves nothing; raise max_tokens, or set too_long "
                             "to truncate")
    return encoded, EncodeReport(
        rows=len(rows), kept=len(encoded), truncated=len(over) if too_long == "truncate" else 0,
        dropped=len(rows) - len(encoded), longest=longest,
        loss_tokens=sum(e.loss_tokens for e in encoded))


def _encode(row: Row, chat: Chat) -> Encoded:
    if row.response_ids is not None and chat.tokenizer.decode(row.response_ids) != row.response:
        raise UsageError(f"row {row.id}: its response_ids do not spell its answer, so the row was "
                         "written with another tokenizer or edited since; remove response_ids to "
                         "use the text")
    response = row.response if row.response_ids is None else row.response_ids
    try:
        return chat.encode(row.prompt, response, finished=row.finished)
    except UsageError as error:
        raise UsageError(f"row {row.id}: {error}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode())
        json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UsageError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError:
        raise UsageError("an escape such as \\ud83d is half a character (a cut emoji?)") from None
    if not isinstance(data, dict):
        raise UsageError(f"a row must be a JSON object, got a {type(data).__name__}")
    return data


def _messages(value: Any) -> list[dict[str, str]]:
    def is_message(m: Any) -> bool:
        return isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))

    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise UsageError('"messages" must be a list of {"role": text, "content": text}, '
                         f"got {_brief(value)}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
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
