"""Timing one thing beside another in the same run, and the peak memory of a piece of code in a process of its own."""

import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROUNDS = 3


def smollm_135m() -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights, so that nothing is fetched."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048))


def random_batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 49_152, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def step(model: nn.Module, batch) -> None:
    """One forward and backward pass."""
    model(**batch).loss.backward()
    model.zero_grad()


def median(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median seconds of a call, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(benchmark, ratio: float, seconds: float, plain_seconds: float, what: str) -> None:
    benchmark.extra_info.update(ratio=ratio, plain_seconds=plain_seconds, plain=what)
    print(f"\n{benchmark.name}: {seconds:.3g} s, {ratio:.3g} x {what} ({plain_seconds:.3g} s)")


def compare(benchmark, function: Callable[[], object], plain: Callable[[], object], what: str, rounds: int = ROUNDS) -> float:
    """Time ``function`` with pytest-benchmark and ``plain`` beside it; returns the ratio of the medians."""
    plain_seconds = median(plain, rounds)
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / plain_seconds
    report(benchmark, ratio, benchmark.stats.stats.median, plain_seconds, what)
    return ratio


def compare_in_turn(benchmark, function: Callable[[], object], plain: Callable[[], object], what: str, rounds: int = 5) -> float:
    """As :func:`compare`, in pairs, each way first in turn, and the median of the pairs' ratios: for differences below the machine's own drift."""
    function(), plain()
    ratios, plain_times, times = [], [], []

    def timed() -> None:
        pair = [(function, times), (plain, plain_times)]
        for call, found in pair if len(ratios) % 2 else reversed(pair):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        ratios.append(times[-1] / plain_times[-1])

    benchmark.pedantic(timed, rounds=rounds)
    ratio = statistics.median(ratios)
    report(benchmark, ratio, statistics.median(times), statistics.median(plain_times), what)
    return ratio


def peak_memory(code: str) -> float:
    """Peak resident memory, in MB, of a fresh process while it runs what follows ``# measured`` in ``code``.

    Tensors are mapped one by one: in glibc's heap the holes between them come and go by hundreds of megabytes, with or without an
    instrument, and would be measured instead.
    """
    before, measured = textwrap.dedent(code).split("# measured\n")
    script = f"""
import re
def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
{before}
peak(reset=True)
{measured}
print("PEAK", peak())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split("PEAK")[1]) / 1024
