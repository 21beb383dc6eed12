"""Self-dialogues: the model writes a user turn and answers it, through its own chat template.

Every row is appended to a JSONL file as it ends (:mod:`sasft.writing`); when all are there, the file is put in the order of their
numbers. A row depends on the run's seed and its own number alone,
and a stopped run goes on without repeating or changing a row.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sasft.chat import Chat
from sasft.data import Row
from sasft.errors import UsageError
from sasft.files import JsonlWriter, write_jsonl
from sasft.sampling import row_seed
from sasft.writing import Job, Messages, Writer, answer, answer_until, existing, progress_bar, respond

__all__ = ["SINGLE_TURN", "Dialogues", "Job", "Writer", "answer", "answer_until", "generated_tokens", "respond", "write_dialogues"]

# Candidates are drawn in chunks of this many batches, or of one call to a refilled batch if that is more.
_BATCHES_A_CHUNK = 2
_OWN_ID = re.compile(r"self-\d+-\d{6,}(\.\d+)?")  # of a row that write_dialogues has written
_TOPIC = "The user asks about {topic}."


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """What self-dialogues are about and how long they go on; all of it chooses prompts alone, so F1 stays (docs/theory.md).

    ``turns``: user turns of a dialogue, each with its answer. Every answer is a row of its own, with the conversation before it
    as its prompt, so that each is in the loss once. A dialogue ends early at an answer that is cut, or at a user turn that is
    empty or does not end: the rows before it stay, and its past alone decides whether a further one is drawn (a stopping time).
    ``systems``: system prompts, of which one is drawn for each dialogue; none leaves the template's default in place.
    ``topics``: taken in turn. While the *user's* part is written, the system prompt also says "The user asks about ..." (the
    wording is this package's choice); the answer is drawn without that sentence, and the row does not have it.
    """

    turns: int = 1
    systems: Sequence[str] = ()
    topics: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise UsageError(f"turns must be at least 1, got {self.turns}")
        for name in ("systems", "topics"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(text, str) and text.strip() for text in value):
                raise UsageError(f"{name} must be a list of texts that are not empty, got {value!r}")

    def identity(self) -> dict[str, Any]:
        """What every row of one file must share; None where there is nothing but a single turn."""
        def digest(texts: Sequence[str]) -> str | None:
            return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest() if texts else None

        return {"turns": self.turns if self.turns > 1 else None, "systems_sha256": digest(self.systems),
                "topics_sha256": digest(self.topics)}

    def opening(self, seed: int, candidate: int) -> Messages:
        """What stands before a candidate's first user turn."""
        if not self.systems:
            return ()
        return ({"role": "system", "content": self.systems[row_seed(seed, "system", candidate) % len(self.systems)]},)

    def topic(self, candidate: int) -> str | None:
        """What a candidate's user asks about."""
        return self.topics[candidate % len(self.topics)] if self.topics else None


SINGLE_TURN = Dialogues()
"""One user turn, the default system prompt, no topic."""


def write_dialogues(writer: Writer, n: int, out: Path, *, seed: int = 0, max_user_tokens: int = 64,
                    dialogues: Dialogues = SINGLE_TURN, shard: tuple[int, int] = (0, 1), progress: bool = True) -> list[Row]:
    """Write ``n`` self-dialogues to ``out`` (JSONL) and return their rows; rows already there are kept.

    The template is fed up to the opening of the user turn (default system prompt in place), the model writes the user
    turn up to its end-of-turn token, then the answer. A candidate whose user turn is empty or does not end within
    ``max_user_tokens`` is passed over: that rule looks at the prompt alone, so it leaves the score identity intact.
    Answers cut by the sampler's length cap are kept, for the same reason. ``dialogues``: several turns, system prompts, topics.

    ``shard = (i, N)``: this is the i-th of N parts, candidates i, i + N, i + 2N, ... with their share of ``n``, so that no two
    shards have a seed in common. Every shard needs a file of its own (:mod:`sasft.shards`).

    Raises :class:`UsageError` if ``out`` holds rows of another model, sampler, seed, shard or kind of dialogue.
    """
    index, shards = shard
    if not 0 <= index < shards:
        raise UsageError(f"shard must be (i, N) with 0 <= i < N, got {shard}")
    if n < shards:
        raise UsageError(f"n (the number of self-dialogues) must be at least {shards}, got {n}"
                         + (": each shard needs one" if shards > 1 else ""))
    n = len(range(index, n, shards))
    design = {**dialogues.identity(), "shard": f"{index} of {shards}" if shards > 1 else None}
    written = {row.id: row for row in existing(out, {**writer.identity(), **design, "seed": seed})}
    meta = {name: value for name, value in design.items() if value is not None}
    chunk = max(_BATCHES_A_CHUNK * writer.batch_size, writer.rows_a_call)
    # Chunks before the last one on file are complete: a chunk is begun only when the one before it is done.
    start = max((place(key)[0] // shards for key in written), default=0) // chunk * chunk

    def begun(below: float = float("inf")) -> int:
        return sum(turn == 1 and candidate // shards < below for candidate, turn in map(place, written))

    text = f"self-dialogues → {out.name}"
    with JsonlWriter(out) as sink, progress_bar(n * dialogues.turns, len(written), text, progress) as bar:
        # Whether a dialogue goes on is not on file, so that a last chunk of several turns is gone through again.
        while begun() < n or dialogues.turns > 1:
            openings = [_Opening(k, 1, dialogues.opening(seed, k))
                        for k in range(start * shards + index, (start + chunk) * shards, shards)]
            wanted = n - begun(start)
            for _ in range(dialogues.turns):
                jobs = _user_turns(writer, openings, dialogues, seed, max_user_tokens, wanted, meta, bar)
                written |= {row.id: row for row in respond(writer, jobs, sink, source="self", bar=bar, done=written, seed=seed)}
                openings = [_following(written[job.id]) for job in jobs if written[job.id].finished]
            if begun() >= n:
                break
            start += chunk
    ids = sorted(written, key=place)
    if ids != list(written):  # they ended the longest last: whoever takes the file's end would choose rows by their answers
        write_jsonl(out, (written[key].as_json() for key in ids))
    last = [candidate for candidate, turn in map(place, ids) if turn == 1][n - 1]
    return [written[key] for key in ids if place(key)[0] <= last]


@dataclass(frozen=True)
class _Opening:
    """A user turn to be written: of which candidate, the how manieth, and the messages before it."""

    candidate: int
    turn: int
    before: Messages

    @property
    def path(self) -> tuple[int, ...]:
        """Its place among the draws of the run."""
        return (self.candidate,) if self.turn == 1 else (self.candidate, self.turn)


def _following(row: Row) -> _Opening:
    candidate, turn = place(row.id)
    return _Opening(candidate, turn + 1, (*row.prompt, {"role": "assistant", "content": row.response}))


def _user_turns(writer: Writer, openings: Sequence[_Opening], dialogues: Dialogues, seed: int, cap: int, wanted: int,
                meta: Mapping[str, Any], bar: tqdm) -> list[Job]:
    """The first ``wanted`` user turns that are neither empty nor unfinished, as jobs to be answered."""
    jobs: list[Job] = []
    together = min(writer.rows_a_call, _BATCHES_A_CHUNK * writer.batch_size)
    bar.set_postfix_str("user turns")
    for i in range(0, len(openings), together):
        part = openings[i : i + together]
        turns = writer.sample([_user_prefix(writer.chat, opening.before, dialogues.topic(opening.candidate)) for opening in part],
                              [row_seed(seed, "user", *opening.path) for opening in part], max_new_tokens=cap)
        for opening, turn in zip(part, turns, strict=True):
            text = writer.chat.tokenizer.decode(turn.ids).strip()
            if turn.finished and text:
                topic = dialogues.topic(opening.candidate)
                jobs.append(Job(".".join([f"self-{seed}-{opening.candidate:06d}", *map(str, opening.path[1:])]),
                                (*opening.before, {"role": "user", "content": text}), row_seed(seed, "assistant", *opening.path),
                                meta=meta if topic is None else {**meta, "topic": topic}))
        if len(jobs) >= wanted:
            break
    bar.set_postfix_str("answers")
    return jobs[:wanted]


def _user_prefix(chat: Chat, before: Messages, topic: str | None) -> list[int]:
    """All up to the opening of the next user turn; the system prompt names the topic for as long as the user writes."""
    system, history = None, before
    if before and before[0]["role"] == "system":
        system, history = before[0]["content"], before[1:]
    if topic is not None:
        system = " ".join(filter(None, [system, _TOPIC.format(topic=topic)]))
    return chat.user_prefix_ids(system, history)


def generated_tokens(rows: Sequence[Row], chat: Chat) -> int:
    """Tokens that had to be written for these rows: of all answers, and of self-dialogues the user turns that they answer, ends of turns
    among them. User turns that were passed over leave no rows, and are not counted; text without ``response_ids`` counts as the
    tokenizer cuts it."""
    def of(text: str) -> int:
        return len(chat.tokenizer(text, add_special_tokens=False).input_ids)

    answers = sum((of(row.response) if row.response_ids is None else len(row.response_ids)) + row.finished for row in rows)
    return answers + sum(of(row.prompt[-1]["content"]) + 1 for row in rows if _OWN_ID.fullmatch(row.id))


def place(row_id: str) -> tuple[int, int]:
    """Candidate and turn of a self-dialogue's row.

    >>> place("self-0-000012"), place("self-0-000012.3")
    ((12, 1), (12, 3))
    """
    candidate, _, turn = row_id.rsplit("-", 1)[1].partition(".")
    return int(candidate), int(turn or 1)
