"""All prefixes at once against transformers, one sequence at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from studies.lab.experiment import tables
from studies.lab.model import build, flat, flat_stacked, log_probs, params_of, pretrain, stack, unflat
from studies.lab.tree import NODES, PROMPTS, RESPONSES, flow, response_probabilities
from tests.studies.lab import tiny

SOME = sorted({*range(12), 91, 500, 819, *np.random.default_rng(0).integers(0, len(NODES), 15).tolist()})


@pytest.mark.parametrize("width", [4, 8])
@torch.no_grad()
def test_the_tree_walk_is_transformers_one_prefix_at_a_time(width: int) -> None:
    made = tiny.bases(width)
    params = made.one(1)
    exact, rounding = tiny.as_it_is(params, width), tiny.as_it_is(params, width, swapped=False)
    fast = log_probs(made.model, params)
    for x in (0, 4, 8):
        for n in SOME:
            slow = tiny.next_token(exact, x, NODES[n])
            torch.testing.assert_close(fast[x, n], slow, rtol=0, atol=1e-12)
            # As transformers comes its norms round to float32: a relative error of 6e-8 at each of five norms.
            torch.testing.assert_close(tiny.next_token(rounding, x, NODES[n]), slow, rtol=0, atol=2e-5)


def test_the_norms_are_transformers_in_exact_arithmetic() -> None:
    norms = [m for m in tiny.bases().model.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 5
    theirs = next(m for m in tiny.as_it_is(tiny.bases().one(0), 4, swapped=False).modules() if type(m).__name__ == "LlamaRMSNorm")
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-2  # small, so that eps counts
    with torch.no_grad():
        norms[0].weight.copy_(theirs.weight)
        torch.testing.assert_close(norms[0](x), tiny.ExactNorm(theirs)(x), rtol=1e-14, atol=0)
        torch.testing.assert_close(theirs(x), tiny.ExactNorm(theirs)(x), rtol=1e-6, atol=0)


def test_many_models_side_by_side_are_one_by_one() -> None:
    made = tiny.bases()
    weights = torch.cat([flat_stacked(made.params), flat_stacked(made.params) + 0.1])
    side_by_side = tables(made.model, weights, made.params)
    for m, row in enumerate(weights):
        torch.testing.assert_close(side_by_side[m], log_probs(made.model, unflat(row, made.one(0))), rtol=0, atol=1e-12)
    assert (side_by_side[0] - side_by_side[1]).abs().max() > 0.1


def test_weights_as_a_vector_and_back() -> None:
    params = tiny.bases().one(0)
    back = unflat(flat(params), params)
    assert list(back) == list(params) and all(torch.equal(back[n], params[n]) for n in params)


def test_a_seed_is_a_model_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (params_of(build(seed, 4)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(first), flat(second)) and not torch.equal(flat(first), flat(other))


def test_pretraining_side_by_side_is_adam_on_each_model() -> None:
    made = tiny.bases()
    flows = torch.stack([flow(w.teacher()) for w in made.worlds])
    models = [build(seed, 4) for seed in range(2)]
    found = pretrain(models, flows, steps=4, lr=0.03)
    assert all(torch.equal(stack(models)[n][0], params_of(build(0, 4))[n]) for n in found)  # the models stay as they were
    for seed, world in enumerate(made.worlds):
        alone = tiny.as_it_is(params_of(build(seed, 4)), 4)
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        rows = world.teacher()
        said = rows.nonzero().tolist()
        ids = torch.tensor([[*PROMPTS[x].tolist(), *RESPONSES[r], 0][:6] for x, r in said])  # the shorter of two lengths is padded, and not read there
        weights = torch.tensor([[rows[x, r].item() * (t < len(RESPONSES[r])) for t in range(4)] for x, r in said], dtype=torch.float64)
        for _ in range(4):
            optimizer.zero_grad()
            log_p = alone(ids, use_cache=False).logits[:, 1:-1].log_softmax(-1).gather(2, ids[:, 2:, None]).squeeze(2)
            loss = -(weights * log_p).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
        for name, p in alone.named_parameters():
            torch.testing.assert_close(found[name][seed], p.detach(), rtol=0, atol=1e-9)


def test_bases_have_learned_their_worlds() -> None:
    made = tiny.bases(8)
    for seed, world in enumerate(made.worlds):
        teacher = 9 * world.teacher()
        learned = response_probabilities(made.log_p[seed])
        divergence = (teacher * (teacher.clamp(min=1e-300) / learned).log()).sum(1).mean()
        untrained = response_probabilities(log_probs(made.model, params_of(build(seed, 8))))
        assert divergence < 0.5 < 2 < (teacher * (teacher.clamp(min=1e-300) / untrained).log()).sum(1).mean()
