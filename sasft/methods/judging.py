"""Answers graded by the model itself, from 0 (wrong, poor) to 1 (right, excellent)."""

import json
from collections.abc import Mapping
from itertools import takewhile

import torch

from sasft.chat import Chat
from sasft.errors import UsageError
from sasft.evaluation.subject import Subject
from sasft.files import JsonlWriter
from sasft.methods.base import Workshop
from sasft.methods.written import greedy, writing
from sasft.sampling import row_seed
from sasft.writing import Job, progress_bar

_GRADES = range(1, 6)
_BATCHES_ON_FILE = 8  # graded before they are written down: what a stopped run repeats

AGAINST_REFERENCE = """Below are a question, its correct answer, and the answer of a student.

Question:
{question}

Correct answer:
{reference}

Student's answer:
{answer}

{order} Give a grade from 1 (wrong) to 5 (says the same as the correct answer), as "Grade: n"."""

ON_ITS_OWN = """Below are a request and an answer to it.

Request:
{question}

Answer:
{answer}

How good is the answer: helpful, correct and complete? Give a grade from 1 (poor) to 5 (excellent), as "Grade: n"."""


def against_reference(question: str, reference: str, answer: str, *, think: bool) -> str:
    """What a judge is asked that knows the right answer; ``think``: it is to reason before it grades."""
    order = ("First compare the two step by step, in a few sentences." if think else "Compare the two.")
    return AGAINST_REFERENCE.format(question=question, reference=reference, answer=answer, order=order)


def on_its_own(question: str, answer: str) -> str:
    """What a judge is asked that knows nothing but the request."""
    return ON_ITS_OWN.format(question=question, answer=answer)


def grades(workshop: Workshop, method: str, questions: Mapping[str, str], *, think_tokens: int = 0) -> dict[str, float]:
    r"""The model's grade of each question (what it is asked, by name), in [0, 1].

    .. math:: \frac14\Big(\frac{\sum_{k=1}^5k\,p_k}{\sum_{k=1}^5p_k}-1\Big),\qquad p_k=p_{\theta_0}(\text{"Grade: }k\text{"}\mid
       \text{question, reasoning}),

    the expected grade rather than the one most probable: no verdict that can't be read, and few ties. ``think_tokens``: most
    tokens of a greedy reasoning that the grade is conditioned on; 0 grades at once. Both, and the wording, are our choices.

    Grades are kept in ``<folder>/<method>-grades.jsonl``, from which a stopped run goes on. Cost: a forward pass over question
    and reasoning each, and the reasoning's tokens.
    """
    chat, writer = workshop.chat, workshop.writer
    prompts = {name: chat.prompt_ids(({"role": "user", "content": text},)) for name, text in questions.items()}
    if think_tokens:
        jobs = [Job(name, ({"role": "user", "content": text},), row_seed(workshop.seed, method, "reasoning", name))
                for name, text in questions.items()]
        with writing(workshop, method, "reasoning", greedy(think_tokens), len(jobs)) as write:
            for job, thought in zip(jobs, write(jobs), strict=True):
                prompts[job.id] += thought.response_ids
    elif writer is None:
        raise UsageError(f"the method {method} has the model grade answers, so its workshop needs a writer; got None")
    shared, verdicts = _verdicts(chat, "\n\n" if think_tokens else "")
    prompts = {name: [*ids, *shared] for name, ids in prompts.items()}
    workshop.costs.forward_tokens += sum(
        len(ids) + len(begun) for ids in prompts.values() for begun in {verdict[:-1] for verdict in verdicts})
    out = workshop.folder / f"{method}-grades.jsonl"
    subject = Subject(model=writer.model, chat=chat, precision=writer.precision, batch_size=writer.batch_size)
    with JsonlWriter(out) as sink:  # which mends the file first, so that every line is whole
        found = {line["id"]: line["grade"] for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
        todo = sorted(prompts.keys() - found.keys(), key=lambda name: (len(prompts[name]), name))
        together = _BATCHES_ON_FILE * writer.batch_size
        with progress_bar(len(prompts), len(found), f"{method}: grades", progress=True) as bar:
            for i in range(0, len(todo), together):
                names = todo[i : i + together]
                scored = subject.loglikelihoods([(prompts[name], verdict) for name in names for verdict in verdicts])
                p = torch.tensor(scored, dtype=torch.float64).view(len(names), len(verdicts)).softmax(1)
                expected = (p @ torch.tensor([*_GRADES], dtype=torch.float64)).tolist()
                new = {name: (grade - _GRADES[0]) / (_GRADES[-1] - _GRADES[0])
                       for name, grade in zip(names, expected, strict=True)}
                sink.write([{"id": name, "grade": grade} for name, grade in new.items()])
                found |= new
                bar.update(len(new))
    return {name: found[name] for name in questions}


def _verdicts(chat: Chat, lead: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """What all verdicts begin with, and how each of them goes on, as tokens."""
    whole = [tuple(chat.tokenizer(f"{lead}Grade: {k}", add_special_tokens=False).input_ids) for k in _GRADES]
    n = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*whole, strict=False)))
    return whole[0][:n], [ids[n:] for ids in whole]
