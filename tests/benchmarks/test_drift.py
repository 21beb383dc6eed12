"""What the instruments cost beside the plain way of doing the same, in the same run. ``make bench``.

Every test keeps ``ratio`` = its time over that of the plain way in the report's extra info, prints it, and holds it to the figure that the
project claims.
"""

import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import drift
from drift.divergence import Projected, token_divergences
from drift.style import style_matrix
from tests.benchmarks.timing import compare, compare_in_turn, median, peak_memory, random_batch, report, smollm_135m, step

TAGS = torch.arange(16) % 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return smollm_135m().eval()


@pytest.fixture(scope="module")
def long_batch() -> dict[str, torch.Tensor]:
    return random_batch(16, 128)


# --- gradients of sources -----------------------------------------------------------------------------------------


def test_split_by_source_at_every_step(benchmark, model, long_batch) -> None:
    """2,048 tokens, two sources of two folds; a step is forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def bare() -> None:
        model(**long_batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()

    with drift.SourceGradients(model, ["task", "self"]) as sources:

        def split() -> None:
            sources.tag(TAGS)
            bare()
            assert sources.step().coverage == 1.0

        with FlopCounterMode(display=False) as plain:
            bare()
        with FlopCounterMode(display=False) as measured:
            split()
        flops = measured.get_total_flops() / plain.get_total_flops()
        ratio = compare_in_turn(benchmark, split, bare, "the bare step")
    benchmark.extra_info["flops"] = flops
    print(f"floating point operations: {flops:.4f} x the bare step's")
    assert flops <= 1.01 and ratio <= 1.15


def test_steps_off_the_schedule(benchmark, model) -> None:
    """With ``every=10`` nine steps of ten are these. What they cost does not depend on the batch, so a small one shows it best."""
    batch = random_batch(16, 16)
    with drift.SourceGradients(model, ["task", "self"], every=10**9) as sources:

        def unmeasured() -> None:
            sources.tag(TAGS)
            step(model, batch)
            assert sources.step() is None

        ratio = compare_in_turn(benchmark, unmeasured, lambda: step(model, batch), "the bare pass", rounds=15)
    assert ratio <= 1.02


def test_two_backward_passes(benchmark, model, long_batch) -> None:
    """The usual way: the step, and a pass over each source for its gradient (inner products not included)."""
    halves = [{k: v[s == TAGS] for k, v in long_batch.items()} for s in (0, 1)]

    def separate() -> None:
        step(model, long_batch)
        for half in halves:
            step(model, half)

    compare(benchmark, separate, lambda: step(model, long_batch), "the bare pass")


def test_torchjds_gramian(benchmark, model, long_batch) -> None:
    """A peer: the Gramian of the rows' losses, from which sources' products follow; the training gradient is not included."""
    engine = pytest.importorskip("torchjd.autogram").Engine(model, batch_dim=0)
    inputs = {k: v for k, v in long_batch.items() if k != "labels"}

    def gramian() -> None:
        logits = model(**inputs).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), long_batch["labels"][:, 1:], reduction="none").mean(1)
        engine.compute_gramian(losses)

    plain_seconds = median(lambda: step(smollm_135m(), long_batch), rounds=1)
    benchmark.pedantic(gramian, rounds=1)
    seconds = benchmark.stats.stats.median
    report(benchmark, seconds / plain_seconds, seconds, plain_seconds, "the bare pass")


def test_memory_of_the_split(benchmark) -> None:
    """Peak of a training process: at most the bare one's, the largest layer (113 MB) and 5 %."""
    code = """
        import torch, drift
        from tests.benchmarks.timing import smollm_135m, random_batch
        model, batch = smollm_135m(), random_batch(16, 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        sources = drift.SourceGradients(model, ["task", "self"], every={every})
        # measured
        with sources:
            for _ in range(2):
                sources.tag(torch.arange(16) % 2)
                model(**batch).loss.backward()
                optimizer.step(), optimizer.zero_grad()
                sources.step()
        """
    peaks = benchmark.pedantic(lambda: [peak_memory(code.replace("{every}", every)) for every in ("10**9", "1")], rounds=1)
    print(f"\npeak of the bare loop {peaks[0]:.0f} MB, with the split {peaks[1]:.0f} MB")
    benchmark.extra_info.update(bare=peaks[0], split=peaks[1])
    assert peaks[1] <= 1.05 * peaks[0] + 49_152 * 576 * 4 / 2**20


def test_products_of_all_rows(benchmark, model) -> None:
    batch = random_batch(16, 64)
    compare(benchmark, lambda: drift.gradient_gram(model, batch), lambda: step(model, batch), "one forward and backward pass")


def test_products_of_all_rows_beside_a_pass_a_row(benchmark, model) -> None:
    batch = random_batch(16, 64)

    def one_by_one() -> None:
        for row in range(16):
            step(model, {k: v[row : row + 1] for k, v in batch.items()})

    compare(benchmark, lambda: drift.gradient_gram(model, batch), one_by_one, "a pass a row, products not included")


# --- weights ------------------------------------------------------------------------------------------------------


def test_drift_of_135_million_parameters(benchmark, model) -> None:
    reference = drift.Reference.snapshot(model)
    batch = random_batch(16, 64)
    compare(benchmark, lambda: drift.parameter_drift(model, reference), lambda: step(model, batch), "one pass of 1,024 tokens")
    assert benchmark.stats.stats.median <= 0.3


def test_drift_of_135_million_parameters_from_files(benchmark, model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    reference = drift.Reference.open(tmp_path)
    batch = random_batch(16, 64)
    compare(benchmark, lambda: drift.parameter_drift(model, reference), lambda: step(model, batch), "one pass of 1,024 tokens")
    assert benchmark.stats.stats.median <= 0.3


def test_lora_norm_from_factors(benchmark) -> None:
    """Forming the product is mostly waiting for fresh memory: 50 to 300 times as long, with huge pages and without."""
    a, b = torch.randn(16, 4096), torch.randn(4096, 16)
    ratio = compare(benchmark, lambda: drift.lowrank.norm(a, b), lambda: (b.double() @ a.double()).norm(),
                    "the norm of the formed product, as exact", rounds=30)
    single = median(lambda: (b @ a).norm(), 30)
    off = float(abs((b @ a).norm() / drift.lowrank.norm(a, b) - 1))
    print(f"the product formed in float32: {single:.3g} s, {off:.0e} off; {benchmark.stats.stats.median / single:.3g} x that")
    assert ratio <= 0.02


# --- predictions --------------------------------------------------------------------------------------------------

_STATES = """
        import torch
        from drift.divergence import Projected, token_divergences
        torch.manual_seed(0)
        n, d, v = 4096, 576, 49_152
        states, moved = torch.randn(n, d), torch.randn(n, d)
        head, head_now = torch.randn(v, d) / d**0.5, torch.randn(v, d) / d**0.5
        targets = torch.zeros(n, dtype=torch.long)
"""
_PLAIN = """
        log_p, log_q = torch.log_softmax(states @ head.T, -1), torch.log_softmax(moved @ head_now.T, -1)
        p, q = log_p.exp(), log_q.exp()
        sums = [(p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1), (p * log_p).sum(-1), (q * log_q).sum(-1)]
"""
_CHUNKED = """
        token_divergences(Projected(states, head), Projected(moved, head_now), targets)
"""


def test_divergences_over_a_vocabulary(benchmark) -> None:
    """4,096 positions and a vocabulary of 49,152, from both models' last states: time, and peak memory beyond states and heads."""
    names: dict = {}
    exec("\n".join(line.strip() for line in _STATES.splitlines()), names)
    states, moved, head, head_now, targets = (names[k] for k in ("states", "moved", "head", "head_now", "targets"))

    def plain() -> None:
        log_p, log_q = torch.log_softmax(states @ head.T, -1), torch.log_softmax(moved @ head_now.T, -1)
        p, q = log_p.exp(), log_q.exp()
        for weight, of in ((p, log_p - log_q), (q, log_q - log_p), (p, log_p), (q, log_q)):
            (weight * of).sum(-1)

    ratio = compare(benchmark, lambda: token_divergences(Projected(states, head), Projected(moved, head_now), targets), plain,
                    "two softmaxes over all positions at once")
    nothing, ours, theirs = (peak_memory(_STATES + "        # measured\n" + code) for code in ("        pass\n", _CHUNKED, _PLAIN))
    print(f"peak memory beyond states and heads: {ours - nothing:.0f} MB, plain {theirs - nothing:.0f} MB; whole process {ours:.0f} and {theirs:.0f} MB")
    benchmark.extra_info.update(peak_mb=ours, plain_peak_mb=theirs, empty_mb=nothing)
    assert ratio <= 1 and ours <= theirs / 4


# --- texts --------------------------------------------------------------------------------------------------------


def test_style_features(benchmark) -> None:
    text = "The moon goes round the earth in a month, and we see it grow and shrink. I think that's why people counted by it! 12 moons make a year.\n"
    texts = [text * 4] * 250
    words = sum(len(t.split()) for t in texts)
    seconds = []

    def timed() -> None:
        start = time.process_time()
        style_matrix(texts)
        seconds.append(time.process_time() - start)

    benchmark.pedantic(timed, rounds=5)
    speed = words / statistics.median(seconds)
    print(f"\n{speed:,.0f} words a second")
    benchmark.extra_info["words_per_second"] = speed
    assert speed >= 50_000
