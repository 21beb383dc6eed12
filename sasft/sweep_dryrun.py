"""What a sweep would do and what it would take, said before it does any of it."""

import heapq
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sasft.dryrun import Forecast, of_evaluation, reckon
from sasft.methods import Method
from sasft.sweep import SweepSettings, begun, checked, evaluations
from sasft.sweep_plan import Cell
from sasft.terminal import counted, duration, gib, table
from sasft.train import TrainSettings

# Settings that change neither time nor memory of a training.
_TAKE_ALIKE = ("out", "seed", "lr", "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "loss", "save_every",
               "save_model")


def of_sweep(settings: SweepSettings) -> Forecast:
    """What :func:`sweep` would do and what it would take, after all of its checks; nothing is written.

    Trainings that differ in seeds, rates and the like take alike, and so do methods but for what they add, which is not measured;
    one of each kind is (:func:`sasft.dryrun.reckon`), with as many threads as a cell has and nothing beside it.
    """
    cells = [cell for cell, _ in checked(settings)]
    todo = [cell for cell in cells if not cell.result.exists()]
    finished = len(cells) - len(todo)
    lines = [*_grid(cells), f"{finished} of {len(cells)} cells are finished, {sum(map(begun, todo))} were begun and go on",
             "checked: settings, methods with their options, files of rows, suites, and that what is there is of this plan"]
    if not todo:
        return Forecast("\n".join(lines), 0.0)
    kinds: dict[str, list[Cell]] = {}
    for cell in todo:
        if cell.trains and not (cell.folder / "run" / "summary.json").exists():
            kinds.setdefault(_kind(cell), []).append(cell)
    rows = [("cells", "such as", "rows", "steps", "tokens", "time", "memory")]
    seconds, memory = {cell.name: 0.0 for cell in todo}, {cell.name: 0 for cell in todo}
    with _on_threads(settings.cores()):
        for alike in kinds.values():
            found = reckon(TrainSettings(**alike[0].train))
            rows.append((str(len(alike)), alike[0].name, str(sum(map(len, found.plan))), str(len(found.plan)), f"{found.training.tokens:,}",
                         duration(found.seconds), gib(found.bytes)))
            seconds.update({cell.name: found.seconds for cell in alike})
            memory.update({cell.name: found.bytes for cell in alike})
        tested = {model: of_evaluation(evaluation) for model, evaluation in evaluations(todo).items()}
    for cell in todo:
        if cell.evaluate is not None:
            seconds[cell.name] += tested[cell.train["model"], cell.train["revision"]].seconds or 0.0
    if kinds:
        lines += ["trainings that take alike, each:", table(rows, "  "),
                  f"(tokens with prompts and padding; time on this machine with {counted(settings.cores(), 'thread')}, memory at least, from one "
                  "micro-batch and one recording of each kind alone; without starting, checkpoints and what methods add)"]
    for (model, _), forecast in tested.items():
        lines += [f"evaluation of {model} and each model trained from it:", textwrap.indent(forecast.text, "  ")]
    longest, once = max(seconds.values()), min(settings.workers, len(todo))
    whole = _makespan(list(seconds.values()), settings.workers)
    side_by_side = sum(sorted(memory.values(), reverse=True)[:once])
    if settings.ray is not None:
        at_once = f"one by one; Ray runs as many at once as it has {counted(settings.cores(), 'core')} and {settings.gpus:g} GPUs for"
    else:
        at_once = f"on {counted(settings.workers, 'worker')}"
    lines += [f"time: up to about {duration(longest)} for one cell, about {duration(whole)} for all {len(todo)} left, {at_once}",
              f"memory: at least {gib(side_by_side)} for the {counted(once, 'largest training')} side by side"]
    return Forecast("\n".join(lines), whole)


def _grid(cells: Sequence[Cell]) -> list[str]:
    """How many cells every arm has, and in what they differ."""
    trained = sum(cell.trains for cell in cells)
    lines = [f"{counted(len(cells), 'cell')}: {trained} trained, {len(cells) - trained} untrained to compare with"]
    for arm in dict.fromkeys(cell.arm for cell in cells):
        own = [cell.train for cell in cells if cell.arm == arm]
        values = {name: len({str(train[name]) for train in own}) for name in own[0] if name != "out"}
        crossed = " × ".join(f"{n} {name}" for name, n in values.items() if n > 1)
        method = f" (method {own[0]['method']})" if "method" in own[0] and own[0]["method"] != arm else ""
        lines.append(f"  {arm}{method}: {len(own)}{f' = {crossed}' if crossed else ''}")
    return lines


def _kind(cell: Cell) -> str:
    """What the measured time and memory of its training hang on."""
    method = type(TrainSettings(**cell.train).chosen_method())
    plain = all(getattr(method, stage) is getattr(Method, stage) for stage in ("files", "shares", "prepare"))
    alike = (*_TAKE_ALIKE, *(("method", "method_options") if plain else ()))
    return json.dumps({name: value for name, value in cell.train.items() if name not in alike})


@contextmanager
def _on_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of some jobs ends that begin in this order, each as soon as a worker is free.

    >>> _makespan([3, 1, 1, 2], workers=2)
    4.0
    """
    free = [0.0] * workers
    for takes in seconds:
        heapq.heapreplace(free, free[0] + takes)
    return max(free)
