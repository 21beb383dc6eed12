"""Long jobs side by side, each in a process of its own or on Ray: one that fails, or takes its process with it, stops no other."""

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from sasft.errors import UsageError

_LONGEST = 2000  # characters of an error that are told; the whole of it is in the job's log


@dataclass(frozen=True)
class Job:
    """``function(*arguments)``, a function of a module; what it prints goes to the file ``log``, and paths are relative to ``folder``."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: Path
    folder: Path = field(default_factory=Path.cwd)


Ended = Generator[tuple[Job, str | None], None, None]
"""Jobs as they end, each with what went wrong (None: nothing)."""


def in_processes(jobs: Sequence[Job], workers: int, threads: int) -> Ended:
    """Run up to ``workers`` jobs at once on this machine, with ``threads`` threads each; its GPUs are dealt out to them in turn.

    Every job has a process of its own: it gives back all memory at its end, and a job that is killed takes no other with it. Jobs that
    are running when the iterator is closed, by Ctrl-C for instance, are ended; so they are when this process is killed.
    """
    # Forked from a server that has imported what the jobs need, and done nothing else: a second instead of ten to start each.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload(sorted({job.function.__module__ for job in jobs}))
    gpus = _gpus()
    waiting, places = deque(jobs), list(reversed(range(workers)))
    running: dict[int, tuple[Any, connection.Connection, int, Job]] = {}
    try:
        while waiting or running:
            while waiting and places:
                job, place = waiting.popleft(), places.pop()
                told, tell = context.Pipe(duplex=False)
                process = context.Process(target=_apart, args=(tell, job, threads, gpus[place % len(gpus)] if gpus else None))
                process.start()
                tell.close()
                running[process.sentinel] = process, told, place, job
            for sentinel in connection.wait(list(running)):
                process, told, place, job = running.pop(sentinel)
                process.join()
                places.append(place)
                yield job, _told(told, process.exitcode)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()


def on_ray(jobs: Sequence[Job], address: str, *, cpus: int, gpus: float) -> Ended:
    """Run jobs on a Ray cluster, as many at once as there are ``cpus`` and ``gpus`` for; ``address`` as ``ray.init`` takes it ("local": one here).

    Its machines must have this package and see the same files. Raises :class:`UsageError` if Ray is not installed or not reached.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("ray is not installed: pip install 'sasft[ray]', or leave ray out to use processes of this machine") from None
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"no Ray was reached at {address!r}: {error}; name `local`, or the address of a cluster that runs") from error
    # A worker for every job: its memory is given back, and what a job leaves in its process meets no other.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(call)
    running = {remote.remote(job, cpus): job for job in jobs}
    try:
        while running:
            [done], _ = ray.wait(list(running))
            job = running.pop(done)
            try:
                error = ray.get(done)
            except ray.exceptions.RayError as lost:
                error = f"Ray lost its process: {str(lost)[:_LONGEST]}"
            yield job, error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def call(job: Job, threads: int) -> str | None:
    """Run a job here, with its output in its log; what went wrong, or None."""
    torch.set_num_threads(threads)
    os.chdir(job.folder)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with _output_in(job.log):
        try:
            job.function(*job.arguments)
        except Exception as error:
            os.write(2, traceback.format_exc().encode())
            return f"{type(error).__name__}: {error}"[:_LONGEST]
    return None


def _apart(tell: connection.Connection, job: Job, threads: int, gpu: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    tell.send(call(job, threads))


def end_with_parent() -> None:
    """End this process when the one that has started it is no more; runs in a thread of its own."""
    parent_process().join()
    os._exit(1)  # a killed parent can't stop its workers, and nobody would wait for what they do


def _told(told: connection.Connection, exit_code: int) -> str | None:
    try:
        return told.recv()
    except EOFError:
        died = f"was killed by {signal.Signals(-exit_code).name}, for lack of memory perhaps" if exit_code < 0 else f"ended with exit code {exit_code}"
        return f"its process {died}"


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [gpu for gpu in visible.split(",") if gpu] if visible is not None else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Standard output and error of the process, those of its libraries too, go to the end of a file inside the block."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for descriptor, former in zip((1, 2), kept, strict=True):
                os.dup2(former, descriptor)
                os.close(former)
