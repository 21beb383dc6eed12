"""What the instruments and the training core cost, beside the plain way of doing the same, in the same run.

``make bench``. Every test times one thing with pytest-benchmark and keeps ``ratio`` = its median time over that of the plain way
in the report's extra info (and prints it). The model has SmolLM2-135M's shape and random weights, so nothing is fetched.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import drift
from drift.divergence import token_divergences
from sasft.chat import Encoded, collate
from sasft.mixing import SELF, TASK, make_plan
from sasft.sampling import Sampler, sample
from sasft.train import FitSettings, fit, response_loss

ROUNDS = 3


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048)).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 49_152, (16, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def median(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median seconds of a call, after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(benchmark, function: Callable[[], object], plain: Callable[[], object], what: str) -> None:
    plain_seconds = median(plain)
    benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / plain_seconds
    benchmark.extra_info.update(ratio=ratio, plain_seconds=plain_seconds, plain=what)
    print(f"\n{benchmark.name}: {benchmark.stats.stats.median:.3g} s, {ratio:.3g} x {what} ({plain_seconds:.3g} s)")


def step(model: nn.Module, batch) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def test_gram_of_all_rows_beside_one_step(benchmark, model, batch) -> None:
    compare(benchmark, lambda: drift.gradient_gram(model, batch), lambda: step(model, batch),
            "one forward and backward pass of the same batch")


def test_gram_of_all_rows_beside_a_backward_pass_a_row(benchmark, model, batch) -> None:
    def one_by_one() -> None:
        for row in range(16):
            step(model, {k: v[row : row + 1] for k, v in batch.items()})

    compare(benchmark, lambda: drift.gradient_gram(model, batch), one_by_one, "one pass a row, Gram matrix not included")


def test_drift_of_135_million_parameters(benchmark, model, batch) -> None:
    reference = drift.Reference.snapshot(model)
    compare(benchmark, lambda: drift.parameter_drift(model, reference), lambda: step(model, batch), "one step of 1,024 tokens")


def test_lora_norm_from_factors(benchmark) -> None:
    a, b = torch.randn(16, 4096), torch.randn(4096, 16)
    compare(benchmark, lambda: drift.lowrank.norm(a, b), lambda: (b @ a).norm(), "the norm of the product, formed")


def test_divergences_over_a_vocabulary(benchmark) -> None:
    base = 3 * torch.randn(1024, 49_152)
    other, targets = base + 0.1 * torch.randn_like(base), torch.zeros(1024, dtype=torch.long)

    def plain() -> None:
        log_p, log_q = torch.log_softmax(base, -1), torch.log_softmax(other, -1)
        p, q = log_p.exp(), log_q.exp()
        for weight, of in ((p, log_p - log_q), (q, log_q - log_p), (p, log_p), (q, log_q)):
            (weight * of).sum(-1)

    compare(benchmark, lambda: token_divergences(base, other, targets), plain, "two softmaxes over all positions at once")


def test_sampling_beside_generate(benchmark, model) -> None:
    prompts, n = [[5, 6, 7, 8]] * 64, 24
    config = GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    ids = torch.tensor(prompts)
    compare(benchmark, lambda: sample(model, prompts, range(64), Sampler(temperature=1, top_p=1, max_new_tokens=n), stop_id=-1, pad_id=0),
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config),
            "transformers' generate, same rows and tokens")


def test_training_beside_a_bare_loop(benchmark, model, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(16):
        ids = torch.randint(3, 49_152, (64,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), tuple([-100] * 24 + ids[24:])))
    plan = make_plan([40] * 16, steps=3, rows_per_step=16)
    settings = FitSettings(lr=1e-9, schedule="constant", save_every=0, precision="fp32")

    def bare() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
        model.train()
        for step_rows in plan:
            loss = response_loss(model, collate([rows[i] for _, i in step_rows], 0)) / 640
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    compare(benchmark, lambda: fit(model, {TASK: rows, SELF: []}, plan, settings, pad_id=0, out=tmp_path, progress=False), bare,
            "a bare loop over the same batches")
