"""Two processes that work together on a CPU, started by a test."""

import gc
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

PATIENCE = 300  # seconds


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """``work(rank, folder)`` in each of two processes, which ``torch.distributed`` and ``accelerate`` find ready to be joined."""
    # Forked from a server that has imported torch and the packages: once, and not by each process of each test.
    get_context("forkserver").set_forkserver_preload(["sasft", work.__module__])
    with socket.socket() as free:  # the system deals out ports at random: tests side by side get different ones
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = start_processes(_start, (work, folder, port), nprocs=2, join=False, start_method="forkserver")
    until = time.monotonic() + PATIENCE
    while not processes.join(timeout=5):
        if time.monotonic() > until:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"two processes wait for each other; they have left {sorted(map(str, folder.rglob('*')))}")


def _start(rank: int, work: Callable[[int, Path], None], folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    work(rank, folder)
