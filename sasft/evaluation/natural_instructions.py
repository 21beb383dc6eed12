"""Tasks of Super-NaturalInstructions, from files in two shapes or from the hub."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasft.errors import UsageError
from sasft.evaluation.checked import reference_suite
from sasft.evaluation.request import Request
from sasft.evaluation.sources import Hub, Source, check_columns, check_texts, read_jsonl
from sasft.evaluation.suites import Item, Suite, cluster_of_text, turns, user
from sasft.files import sha256_file

_HOME = "https://github.com/allenai/natural-instructions/tree/master/tasks"
_FILE = re.compile(r"(task\d+_\w+)(?:\.test)?\.jsonl?")


def super_ni(request: Request) -> Suite:
    """A task of Super-NaturalInstructions (arXiv 2204.07705), ``super_ni:task024``: ROUGE-L and exact match over all references.

    The prompt is the task's definition, a blank line and the input, as in training rows of the shape instruction, input,
    output; inputs that begin with the same line (a passage) make a cluster. Reads ``super_ni/<task>.test.jsonl`` (id, input,
    output) beside its ``definition.txt``, or a JSON file as the authors publish it (Definition, Instances). Shots: positive
    examples of the latter, the first rows of ``train.jsonl`` for the former; the set on the hub has neither.
    """
    task = _task(request)
    worked = [(f"{task.definition}\n\n{asked}", said) for asked, said in task.examples]
    items = [Item(id=i, asked=asked, gold=gold, cluster=_passage(asked),
                  prompt=user(question, *turns(request.examples(worked, question))))
             for i, asked, gold in task.instances for question in [f"{task.definition}\n\n{asked}"]]
    return reference_suite(request.spec, items, task.source, max_new_tokens=128)


def _passage(asked: str) -> str:
    """The cluster of an input: its first line, if that is not all and so long (40 characters) that it is no heading."""
    first, _, rest = asked.strip().partition("\n")
    return cluster_of_text(first) if rest and len(first) >= 40 else ""


@dataclass(frozen=True)
class _Task:
    """``instances``: (id, input, references); ``examples``: (input, output)."""

    definition: str
    instances: list[tuple[str, str, list[str]]]
    examples: list[tuple[str, str]]
    source: dict[str, Any]


def _task(request: Request) -> _Task:
    """The task from a file of the folder of data, or from the hub."""
    folder = None if request.folder is None else request.folder / "super_ni"
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    known = {match[1]: path for path in files if (match := _FILE.fullmatch(path.name))}
    if not re.fullmatch(r"task\d+\w*", request.part):
        raise UsageError(f"suite {request.spec!r} needs a task, such as super_ni:task024; in the folder of data there are "
                         f"{', '.join(known) or 'none'}")
    named = [task for task in known if task == request.part or task.startswith(request.part + "_")]
    if len(named) > 1:
        raise UsageError(f"suite {request.spec!r} names several tasks: {', '.join(named)}")
    if not named:
        return _from_hub(request.part)
    path = known[named[0]]
    provenance = {"file": f"super_ni/{path.name}", "sha256": sha256_file(path)}
    if path.suffix == ".json":
        task = _published(path)
        definition = task["Definition"] if isinstance(task["Definition"], str) else " ".join(task["Definition"])
        return _Task(definition, [(str(r.get("id", i)), r["input"], _references(r)) for i, r in enumerate(task["Instances"])],
                     [(e["input"], _references(e)[0]) for e in task["Positive Examples"]], provenance)
    rows = read_jsonl(path)
    check_columns(rows, ("id", "input", "output"), str(path))
    check_texts(rows, ("input",), str(path))
    text, train = (path.with_name(f"{named[0]}.{end}") for end in ("definition.txt", "train.jsonl"))
    if not text.exists():
        raise UsageError(f"{text} is missing: it holds the task's definition, which every prompt begins with")
    shown = read_jsonl(train) if request.shots and train.exists() else []
    if shown:
        check_columns(shown, ("input", "output"), str(train))
    examples = [(r["input"], _references(r)[0]) for r in shown]
    return _Task(text.read_text(encoding="utf-8").strip(), [(str(r["id"]), r["input"], _references(r)) for r in rows], examples,
                 provenance)


def _published(path: Path) -> dict[str, Any]:
    """A task's file as its authors publish it."""
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise UsageError(f"{path} is not the JSON of a task as it is published at {_HOME}: {error}") from None
    check_columns([task], ("Definition", "Positive Examples", "Instances"), str(path))
    for name in ("Positive Examples", "Instances"):
        rows = task[name]
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise UsageError(f"{name} of {path} must be a list of objects, got {str(rows)[:60]!r}")
        if rows or name == "Instances":
            check_columns(rows, ("input", "output"), f"{name} of {path}")
            check_texts(rows, ("input",), f"{name} of {path}")
    return task


def _references(row: Mapping[str, Any]) -> list[str]:
    """A row's outputs, one text or several."""
    found = [row["output"]] if isinstance(row["output"], str) else row["output"]
    if not (isinstance(found, list) and found and all(isinstance(text, str) for text in found)):
        raise UsageError(f"the output of the input {str(row['input'])[:60]!r} must be a text or texts, got {row['output']!r}")
    return found


def _from_hub(part: str) -> _Task:
    source = Source(title=f"Super-NaturalInstructions, {part}", file=f"super_ni/{part}_<name>.json", home=_HOME,
                    columns=("id", "definition", "inputs", "targets"), texts=("definition", "inputs", "targets"),
                    form="the task's JSON file as it is",
                    hub=Hub(name="Muennighoff/natural-instructions", split="train+test",
                            revision="a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c",
                            keep=lambda row: row["task_name"] == part or row["task_name"].startswith(part + "_")))
    rows, provenance = source.read(None)
    references: dict[tuple[str, str], list[str]] = {}  # an instance with several has a row for each
    for row in rows:
        references.setdefault((str(row["id"]), row["inputs"]), []).append(row["targets"])
    return _Task(rows[0]["definition"], [(i, asked, gold) for (i, asked), gold in references.items()], [], provenance)
