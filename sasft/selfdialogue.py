"""Self-dialogues: the model writes a user turn and answers it, through its own chat template.

Every row is appended to a JSONL file as its batch ends, with all that is needed to know where it came from.
A row depends on the run's seed and its own number alone, and a stopped run goes on without repeating or
changing a row.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from sasft.chat import Chat
from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.files import JsonlWriter
from sasft.precision import autocast
from sasft.sampling import Sampler, row_seed, sample

Messages = tuple[dict[str, str], ...]
# Candidates are drawn in chunks of this many batches; a chunk's answers are batched by prompt length.
_BATCHES_A_CHUNK = 2


@dataclass(frozen=True)
class Job:
    """One response to be written: the prompt, the seed of its draw, and what the row shall remember.

    ``shown`` is what the model sees instead of ``messages`` when it answers (a prompt that reveals the truth, say);
    the row is kept under ``messages`` and remembers what was shown.
    """

    id: str
    messages: Messages
    seed: int
    shown: Messages | None = None


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A model that writes: its chat template, its sampler, and the identity that each row carries.

    ``provenance`` names the model and the hash of its weights; ``precision`` is that of the forward pass, and
    should be the one of the training, since another precision is, strictly, another model (docs/theory.md F2d).
    """

    model: PreTrainedModel
    chat: Chat
    sampler: Sampler
    provenance: Mapping[str, Any]
    precision: str = "bf16"
    batch_size: int = 64

    def identity(self) -> dict[str, Any]:
        """What every row of one file must share."""
        return {**self.provenance, "sampler": self.sampler.describe(), "precision": self.precision,
                "batch_size": self.batch_size}

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False,
               max_new_tokens: int | None = None, on_tokens=lambda n: None):
        """Sample one batch under this writer's precision (see :func:`sasft.sampling.sample`)."""
        sampler = self.sampler if max_new_tokens is None else Sampler(
            temperature=self.sampler.temperature, top_p=self.sampler.top_p, max_new_tokens=max_new_tokens)
        with autocast(self.precision, self.model.device.type):
            return sample(self.model, prompts, seeds, sampler, stop_id=self.chat.end_of_turn,
                          pad_id=self.chat.pad_id, greedy=greedy, on_tokens=on_tokens)


def generate(writer: Writer, n: int, out: Path, *, seed: int = 0, max_user_tokens: int = 64,
             progress: bool = True) -> list[Row]:
    """Write ``n`` self-dialogues to ``out`` (JSONL) and return them; rows already there are kept.

    The template is fed up to the opening of the user turn (default system prompt in place), the model writes the user
    turn up to its end-of-turn token, then the answer. A candidate whose user turn is empty or does not end within
    ``max_user_tokens`` is passed over: that rule looks at the prompt alone, so it leaves the score identity intact.
    Answers cut by the sampler's length cap are kept, for the same reason.

    Raises :class:`UsageError` if ``out`` holds rows of another model, sampler or seed.
    """
    if n < 1:
        raise UsageError(f"n (the number of self-dialogues) must be at least 1, got {n}")
    prefix = writer.chat.user_prefix_ids()
    chunk = writer.batch_size * _BATCHES_A_CHUNK
    written = _existing(out, {**writer.identity(), "seed": seed})
    # Chunks before the last one on file are complete: a chunk is begun only when the one before it is done.
    start = max(map(_candidate, written), default=0) // chunk * chunk
    with JsonlWriter(out) as sink, _bar(n, len(written), f"self-dialogues → {out.name}", progress) as bar:
        while len(written) < n:
            jobs = _user_turns(writer, prefix, range(start, start + chunk), seed, max_user_tokens, bar)
            jobs = jobs[: n - sum(_candidate(r) < start for r in written)]
            written += respond(writer, jobs, sink, source="self", bar=bar, done={r.id for r in written}, seed=seed)
            start += chunk
    return sorted(written, key=_candidate)[:n]


def respond(writer: Writer, jobs: Sequence[Job], sink: JsonlWriter, *, source: str, bar: tqdm,
            done: Iterable[str] = (), seed: int = 0) -> list[Row]:
    """Answer ``jobs`` in batches of similar prompt length, appending each batch to ``sink``; skips ids in ``done``.

    Batches are formed before finished jobs are skipped, so that a resumed run forms the same ones.
    """
    done = set(done)
    prompts = {job.id: writer.chat.prompt_ids(job.shown or job.messages) for job in jobs}
    ordered = sorted(jobs, key=lambda job: (len(prompts[job.id]), job.id))
    rows: list[Row] = []
    for i in range(0, len(ordered), writer.batch_size):
        batch = ordered[i : i + writer.batch_size]
        if all(job.id in done for job in batch):
            continue
        answers = writer.sample([prompts[job.id] for job in batch], [job.seed for job in batch])
        new = []
        for job, answer in zip(batch, answers, strict=True):
            if job.id in done:
                continue
            text = writer.chat.tokenizer.decode(answer.ids)
            new.append({
                "id": job.id, "source": source,
                "messages": [*job.messages, {"role": "assistant", "content": text}],
                "response_ids": list(answer.ids), "finished": answer.finished,
                "logprobs": [round(lp, 6) for lp in answer.logprobs],
                **writer.identity(), "seed": seed, "row_seed": job.seed,
                **({"shown": list(job.shown)} if job.shown else {}),
            })
        sink.write(new)
        rows += [Row.from_json(r) for r in new]
        bar.update(len(new))
    return rows


def answer(writer: Writer, prompts: Mapping[str, str], out: Path, *, source: str, seed: int = 0,
           progress: bool = True) -> list[Row]:
    """The model's own answer to each prompt (``{id: user text}``), written to ``out`` and returned in that order."""
    jobs = [Job(key, ({"role": "user", "content": text},), row_seed(seed, source, key)) for key, text in prompts.items()]
    return _run(writer, jobs, out, source, seed, progress)


def answer_until(writer: Writer, prompts: Mapping[str, tuple[str, str]], accept: Callable[[str, Row], bool], out: Path,
                 *, source: str, tries: int = 4, seed: int = 0, progress: bool = True) -> list[Row]:
    """For each ``{id: (user text, text shown instead)}``, the first answer of up to ``tries`` that is accepted.

    This writes a given truth in the model's own words: the model is shown a prompt that reveals the truth, and
    ``accept(id, row)`` looks for the truth in what it says. The kept row answers the plain user text. Keeping by a
    look at the answer breaks the score identity (docs/theory.md F2c), as it must: the truth is new content.
    Rejected tries stay in ``out`` too, so that the rate of acceptance can be seen. Ids without an accepted answer
    are missing from the result.
    """
    accepted: dict[str, Row] = {}
    for k in range(tries):
        jobs = [Job(f"{key}/{k}", ({"role": "user", "content": plain},), row_seed(seed, source, key, k),
                    shown=({"role": "user", "content": shown},))
                for key, (plain, shown) in prompts.items() if key not in accepted]
        for row in _run(writer, jobs, out, source, seed, progress, f"try {k + 1} of {tries}") if jobs else ():
            key = row.id.rsplit("/", 1)[0]
            if accept(key, row):
                accepted[key] = row
    return [accepted[key] for key in prompts if key in accepted]


def _run(writer: Writer, jobs: Sequence[Job], out: Path, source: str, seed: int, progress: bool,
         note: str = "") -> list[Row]:
    written = {r.id: r for r in _existing(out, {**writer.identity(), "seed": seed})}
    wanted = {job.id for job in jobs}
    have = len(wanted & written.keys())
    with JsonlWriter(out) as sink, _bar(len(jobs), have, f"{source} → {out.name} {note}".rstrip(), progress) as bar:
        for row in respond(writer, jobs, sink, source=source, bar=bar, done=written, seed=seed):
            written[row.id] = row
    return [written[job.id] for job in jobs]


def _user_turns(writer: Writer, prefix: Sequence[int], candidates: range, seed: int, cap: int,
                bar: tqdm) -> list[Job]:
    """The candidates' user turns, without the empty and the unfinished ones."""
    jobs = []
    for i in range(0, len(candidates), writer.batch_size):
        numbers = candidates[i : i + writer.batch_size]
        bar.set_postfix_str("user turns")
        turns = writer.sample([prefix] * len(numbers), [row_seed(seed, "user", k) for k in numbers],
                              max_new_tokens=cap)
        for k, turn in zip(numbers, turns, strict=True):
            text = writer.chat.tokenizer.decode(turn.ids).strip()
            if turn.finished and text:
                jobs.append(Job(f"self-{seed}-{k:06d}", ({"role": "user", "content": text},),
                                row_seed(seed, "assistant", k)))
    bar.set_postfix_str("answers")
    return jobs


def _candidate(row: Row) -> int:
    return int(row.id.rsplit("-", 1)[1])


def _existing(out: Path, identity: Mapping[str, Any]) -> list[Row]:
    """The rows a former run left, after checking that it was the same run."""
    if not out.exists() or out.stat().st_size == 0:
        return []
    rows = read_rows(out, torn_ok=True)
    for row in rows:
        differing = {k: (row.meta.get(k), v) for k, v in identity.items() if row.meta.get(k) != v}
        if differing:
            what = "; ".join(f"{k} is {was!r}, now {now!r}" for k, (was, now) in differing.items())
            raise UsageError(f"{out} holds rows of another run (row {row.id}: {what}); name another file, or "
                             "remove this one")
    return rows


def _bar(total: int, initial: int, text: str, progress: bool) -> tqdm:
    return tqdm(total=total, initial=initial, desc=text, unit="row", disable=not progress, dynamic_ncols=True)


def quality(rows: Sequence[Row]) -> dict[str, float]:
    """A first look at self-dialogues before they are trained on.

    Shares in [0, 1]: ``finished`` answers, ``empty`` answers, ``distinct_prompts``; mean answer length in tokens;
    ``entropy_nats``: minus the mean log-probability of the answers' tokens under the base, an unbiased estimate of
    the model's entropy per token where the sampler is exact.
    """
    logprobs = [lp for r in rows for lp in r.meta.get("logprobs", ())]
    return {
        "rows": len(rows),
        "finished": statistics.fmean(r.finished for r in rows),
        "empty": statistics.fmean(not r.response.strip() for r in rows),
        "distinct_prompts": len({r.prompt[-1]["content"] for r in rows}) / len(rows),
        "tokens": statistics.fmean(len(r.response_ids or ()) for r in rows),
        "entropy_nats": -statistics.fmean(logprobs) if logprobs else float("nan"),
    }
