"""Long work in units that are kept on disk and done side by side: what a stopped run has finished is not done again."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sasft.files import write_json


@dataclass(frozen=True)
class Unit:
    """``function(*arguments)``, a function of a module, whose result is kept as ``name``: .json for plain data, .pt for tensors."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def load(path: Path) -> Any:
    """A result that is on disk."""
    return torch.load(path) if path.suffix == ".pt" else json.loads(path.read_text(encoding="utf-8"))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is on disk at ``path``, or what ``make`` gives, kept there whole or not at all."""
    if path.exists():
        return load(path)
    found = make()
    if path.suffix == ".pt":
        part = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(found, part)
        part.replace(path)
    else:
        write_json(path, found)
    return load(path)  # as it will be read the next time


def work(units: Sequence[Unit], folder: Path, workers: int, what: str) -> list[Any]:
    """The units' results in their order. One thread a worker: operations this small gain nothing from a second, and lose much on a busy machine."""
    todo = [unit for unit in units if not (folder / unit.name).exists()]
    began = time.monotonic()
    if todo:
        processes = pool(min(workers, len(todo)))
        try:
            running = {processes.submit(_do, unit, folder): unit for unit in todo}
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in [f for f in running if f in done]:  # in their order, whichever came first
                    unit = running.pop(future)
                    if error := future.exception():
                        error.add_note(f"in {unit.name} ({what})")
                        raise error
                    spent, finished = time.monotonic() - began, len(todo) - len(running)
                    left = f"about {spent / finished * len(running):.0f} s left" if running else f"{spent:.0f} s"
                    print(f"{what}: {finished} of {len(todo)} ({Path(unit.name).stem}), {left}", file=sys.stderr)
        except BaseException:
            for process in list(processes._processes.values()):  # a unit may take minutes: do not wait for it on Ctrl-C
                process.terminate()
            raise
        finally:
            processes.shutdown(cancel_futures=True)
    return [load(folder / unit.name) for unit in units]


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each."""
    start = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again, which takes seconds; elsewhere forks are not safe
    return ProcessPoolExecutor(workers, mp_context=get_context(start), initializer=_worker)


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends the others
    torch.set_num_threads(1)


def _do(unit: Unit, folder: Path) -> None:
    kept(folder / unit.name, lambda: unit.function(*unit.arguments))
