"""What a method has the model write: on file as it ends, counted, and never written twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Workshop
from sasft.sampling import Sampler
from sasft.writing import Job, Write, writing_to


def greedy(max_new_tokens: int) -> Sampler:
    """Always the most probable token: a nucleus so small holds no other."""
    return Sampler(temperature=1.0, top_p=1e-9, max_new_tokens=max_new_tokens)


@contextmanager
def writing(workshop: Workshop, method: str, name: str, sampler: Sampler, total: int) -> Iterator[Write]:
    """A function that answers jobs, in their order; ``total``: how many there will be.

    Rows are kept in ``<folder>/<method>-<name>.jsonl``, from which a stopped run takes what it has written already. They count
    as generated all the same, so that a run that was stopped costs what a whole one does.

    Raises :class:`UsageError` if the workshop has no writer, or if the file holds rows of another model, sampler or seed.
    """
    if workshop.writer is None:
        raise UsageError(f"the method {method} has the model write, so its workshop needs a writer; got None")
    writer = replace(workshop.writer, sampler=sampler)
    out = workshop.folder / f"{method}-{name}.jsonl"
    with writing_to(out, writer, source=method, seed=workshop.seed, total=total, text=f"{method}: {name}") as write:

        def counted(jobs: Sequence[Job]) -> list[Row]:
            rows = write(jobs)
            workshop.costs.generated_tokens += sum(len(row.meta["logprobs"]) for row in rows)
            return rows

        yield counted
