"""The written-out Llama against transformers' own."""

import pytest
import torch
from torch.func import grad, vmap

from studies.lab.model import build, log_probs, stack
from studies.lab.tree import N_NODES, PROMPTS, VOCABULARY
from studies.lab.walk import Walk
from tests.studies.lab import tiny


@pytest.mark.parametrize(("width", "chosen"), [(2, [0]), (4, [0, 1, 2]), (8, [4, 1])])
def test_it_is_transformers_llama(width: int, chosen: list[int]) -> None:
    models = [build(seed, width) for seed in range(2)]
    params = stack(models)
    generator = torch.Generator().manual_seed(0)
    for name, p in params.items():  # gains that matter, and weights large enough for sharp attention
        params[name] = p * 2 if p.dim() > 2 else p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    prompts = PROMPTS[chosen]
    flows = torch.rand(2, len(prompts), N_NODES, VOCABULARY, generator=generator, dtype=torch.float64)
    walk = Walk(models[0], prompts)
    for ours, theirs in zip(walk.log_probs(params), walk.of(vmap(lambda p: log_probs(models[0], p, prompts))(params)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    ours = torch.autograd.grad(walk.loss(leaves, walk.of(flows)), list(leaves.values()))
    theirs = vmap(grad(lambda p, f: -(f * log_probs(models[0], p, prompts)).sum()))(params, flows)
    for mine, name in zip(ours, params, strict=True):
        torch.testing.assert_close(mine, theirs[name], rtol=1e-9, atol=1e-9)


def test_a_trained_base_too() -> None:
    made = tiny.bases()
    walk = Walk(made.model)
    for ours, theirs in zip(walk.log_probs(made.params), walk.of(made.log_p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
