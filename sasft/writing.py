"""A model that writes, and its answers to given prompts.

Every row is appended to a JSONL file as it ends, with all that is needed to know where it came from. A row depends on the
run's seed and its own id alone, and a stopped run goes on without repeating or changing a row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sasft.backends import BACKENDS, Backend, vllm_sample, vllm_version
from sasft.chat import Chat
from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.files import JsonlWriter
from sasft.precision import autocast, resolved
from sasft.sampling import Sample, Sampler, row_seed, sample

Messages = tuple[dict[str, str], ...]
# Refilled batches stay full for longer the more rows they are given at once, but a run that was stopped repeats as many.
_BATCHES_A_REFILLED_CALL = 8


@dataclass(frozen=True)
class Job:
    """One response to be written: the prompt, the seed of its draw, and what the row shall remember.

    ``shown`` is what the model sees instead of ``messages`` when it answers (a prompt that reveals the truth, say);
    the row is kept under ``messages`` and remembers what was shown. ``meta``: other fields of the row.
    """

    id: str
    messages: Messages
    seed: int
    shown: Messages | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


Write = Callable[[Sequence[Job]], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A model that writes: its chat template, its sampler, and the identity that each row carries.

    ``provenance`` names the model and the hash of its weights; ``precision`` is that of the forward pass (:func:`sasft.precision.resolved`), and
    should be the one of the training, since another precision is, strictly, another model (docs/theory.md F2d).

    ``backend``: ``padded`` runs ``model`` (of transformers) on batches of ``batch_size`` rows, each until its last row has
    ended; ``refilled`` gives the places of rows that have ended to the next ones (:func:`sasft.sampling.sample`), at the same
    memory, and draws the same rows up to the rounding of logits. ``vllm`` takes a vLLM engine as ``model``
    (:func:`sasft.backends.vllm_engine`), which draws its own random numbers; ``precision`` then only names the engine's.
    """

    model: Any
    chat: Chat
    sampler: Sampler
    provenance: Mapping[str, Any]
    precision: str = "auto"
    batch_size: int = 64
    backend: Backend = "padded"

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", resolved(self.precision))
        if self.backend not in BACKENDS:
            raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")

    def identity(self) -> dict[str, Any]:
        """What every row of one file must share."""
        backend = {"padded": None, "refilled": "refilled", "vllm": f"vllm {vllm_version()}"}[self.backend]
        return {**self.provenance, "sampler": self.sampler.describe(), "precision": self.precision,
                "batch_size": self.batch_size, **({} if backend is None else {"backend": backend})}

    @property
    def rows_a_call(self) -> int:
        """How many rows :meth:`sample` is asked for at once; they are what a stopped run repeats."""
        return self.batch_size * (1 if self.backend == "padded" else _BATCHES_A_REFILLED_CALL)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, greedy: bool = False,
               max_new_tokens: int | None = None, on_tokens: Callable[[int], None] = lambda n: None,
               on_done: Callable[[Mapping[int, Sample]], None] = lambda done: None) -> list[Sample]:
        """Sample under this writer's precision, with its backend (see :func:`sasft.sampling.sample`)."""
        sampler = self.sampler if max_new_tokens is None else replace(self.sampler, max_new_tokens=max_new_tokens)
        if self.backend == "vllm":
            return vllm_sample(self.model, prompts, seeds, sampler, stop_id=self.chat.end_of_turn, greedy=greedy)
        with autocast(self.precision, self.model.device.type):
            return sample(self.model, prompts, seeds, sampler, stop_id=self.chat.end_of_turn, pad_id=self.chat.pad_id,
                          slots=self.batch_size if self.backend == "refilled" else None, greedy=greedy, on_tokens=on_tokens,
                          on_done=on_done)


def respond(writer: Writer, jobs: Sequence[Job], sink: JsonlWriter, *, source: str, bar: tqdm,
            done: Iterable[str] = (), seed: int = 0) -> list[Row]:
    """Answer ``jobs``, ordered by prompt length, appending rows to ``sink`` as they end; skips ids in ``done``.

    What is sampled together is settled before finished jobs are skipped, so that a resumed run repeats it exactly.
    """
    done = set(done)
    prompts = {job.id: writer.chat.prompt_ids(job.shown or job.messages) for job in jobs}
    ordered = sorted(jobs, key=lambda job: (len(prompts[job.id]), job.id))
    rows: list[Row] = []
    for i in range(0, len(ordered), writer.rows_a_call):
        together = ordered[i : i + writer.rows_a_call]
        if all(job.id in done for job in together):
            continue

        def keep(answers: Mapping[int, Sample], together: Sequence[Job] = together) -> None:
            new = [_row(writer, together[k], answer, source, seed)
                   for k, answer in answers.items() if together[k].id not in done]
            sink.write(new)
            done.update(row["id"] for row in new)
            rows.extend(map(Row.from_json, new))
            bar.update(len(new))

        as_they_end = {"on_done": keep} if writer.backend == "refilled" else {}
        answers = writer.sample([prompts[job.id] for job in together], [job.seed for job in together], **as_they_end)
        keep(dict(enumerate(answers)))
    return rows


def _row(writer: Writer, job: Job, answer: Sample, source: str, seed: int) -> dict[str, Any]:
    return {
        "id": job.id, "source": source,
        "messages": [*job.messages, {"role": "assistant", "content": writer.chat.tokenizer.decode(answer.ids)}],
        "response_ids": list(answer.ids), "finished": answer.finished,
        "logprobs": [round(lp, 6) for lp in answer.logprobs],
        **writer.identity(), "seed": seed, "row_seed": job.seed,
        **({"shown": list(job.shown)} if job.shown else {}), **job.meta,
    }


@contextmanager
def writing_to(out: Path, writer: Writer, *, source: str, seed: int, total: int, text: str,
               progress: bool = True) -> Iterator[Write]:
    """A function that answers jobs, in their order; the rows are kept in ``out``, from which a stopped run takes its own.

    ``total``: how many jobs there will be; ``text``: what the bar says. Raises :class:`UsageError` if the file holds rows of
    another run.
    """
    written = {row.id: row for row in existing(out, {**writer.identity(), "seed": seed})}
    with JsonlWriter(out) as sink, progress_bar(total, 0, text, progress) as bar:

        def write(jobs: Sequence[Job]) -> list[Row]:
            bar.total -= sum(job.id in written for job in jobs)  # the bar is of what is left to write
            new = respond(writer, jobs, sink, source=source, bar=bar, done=written, seed=seed)
            written.update((row.id, row) for row in new)
            return [written[job.id] for job in jobs]

        yield write


def answer(writer: Writer, prompts: Mapping[str, str], out: Path, *, source: str, seed: int = 0,
           progress: bool = True) -> list[Row]:
    """The model's own answer to each prompt (``{id: user text}``), written to ``out`` and returned in that order."""
    jobs = [Job(key, ({"role": "user", "content": text},), row_seed(seed, source, key)) for key, text in prompts.items()]
    text = f"{source} → {out.name}"
    with writing_to(out, writer, source=source, seed=seed, total=len(jobs), text=text, progress=progress) as write:
        return write(jobs)


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
        if not jobs:
            break
        text = f"{source} → {out.name} try {k + 1} of {tries}"
        with writing_to(out, writer, source=source, seed=seed, total=len(jobs), text=text, progress=progress) as write:
            for row in write(jobs):
                key = row.id.rsplit("/", 1)[0]
                if accept(key, row):
                    accepted[key] = row
    return [accepted[key] for key in prompts if key in accepted]


def existing(out: Path, identity: Mapping[str, Any]) -> list[Row]:
    """The rows a former run left, after checking that it was the same run."""
    if not out.exists() or out.stat().st_size == 0:
        return []
    rows = read_rows(out, torn_ok=True)
    identity = {"backend": None, **identity}  # what is None now must not have been there then
    for row in rows:
        differing = {k: (row.meta.get(k), v) for k, v in identity.items() if row.meta.get(k) != v}
        if differing:
            what = "; ".join(f"{k} is {was!r}, now {now!r}" for k, (was, now) in differing.items())
            raise UsageError(f"{out} holds rows of another run (row {row.id}: {what}); name another file, or "
                             "remove this one")
    return rows


def progress_bar(total: int, initial: int, text: str, progress: bool) -> tqdm:
    """A bar of ``total`` rows, of which ``initial`` are there; an invisible one without ``progress``."""
    return tqdm(total=total, initial=initial, desc=text, unit="row", disable=not progress, dynamic_ncols=True)
