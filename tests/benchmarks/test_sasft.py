"""What the training core costs beside the plain way of doing the same, in the same run. ``make bench``."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

from sasft.chat import Encoded, collate
from sasft.methods import response_loss
from sasft.mixing import SELF, TASK, make_plan
from sasft.sampling import Sampler, sample
from sasft.trainer import FitSettings, fit
from tests.benchmarks.timing import compare, smollm_135m


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return smollm_135m().eval()


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
