"""The written-out Llama against transformers' own, every prefix of full length as a sequence."""

import pytest
import torch
from torch import Tensor, nn

from studies.lab.model import build, stack
from studies.lab.tree import GOING_ON, LENGTH, N_NODES, NODES, PROMPTS, VOCABULARY
from studies.lab.walk import Walk
from tests.studies.lab import tiny


def table(model: nn.Module) -> Tensor:
    """[X, N, V]: a node of depth k is the start of 9^(3 − k) of the sequences."""
    leaves = torch.tensor([node for node in NODES if len(node) == LENGTH - 1])
    ids = torch.cat([PROMPTS.repeat_interleave(len(leaves), 0), leaves.repeat(len(PROMPTS), 1)], 1)
    log_p = model(ids, use_cache=False).logits.log_softmax(-1).unflatten(0, (len(PROMPTS), -1))
    return torch.cat([log_p[:, :: GOING_ON ** (LENGTH - 1 - depth), 1 + depth] for depth in range(LENGTH)], 1)


def random_flow(generator: torch.Generator) -> Tensor:
    return torch.rand(2, len(PROMPTS), N_NODES, VOCABULARY, generator=generator, dtype=torch.float64)


def wide(flows: Tensor) -> Tensor:
    """All nodes after some prompts."""
    flows[:, [0, 2, 3, 5, 6, 7, 8]] = 0
    return flows


def narrow(flows: Tensor) -> Tensor:
    """A few nodes, others in each model, whose product holds more of them."""
    kept = torch.zeros_like(flows)
    for m, x, node in ((0, 4, (7, 4)), (0, 1, (3, 3, 9)), (1, 4, ()), (1, 8, (7,))):
        kept[m, x, NODES.index(node), m:] = flows[m, x, NODES.index(node), m:]
    return kept


def root(flows: Tensor) -> Tensor:
    return flows * (torch.arange(N_NODES) == 0)[:, None]


@pytest.mark.parametrize(("width", "part", "size"), [(2, wide, 2 * N_NODES), (4, narrow, 3 * (1 + 2 + 4 + 4)), (8, wide, 2 * N_NODES), (8, root, 9)])
def test_it_is_transformers_llama(width: int, part, size: int) -> None:
    models = [build(seed, width) for seed in range(2)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models:  # gains that matter, and weights large enough for sharp attention
            for p in model.parameters():
                p.copy_(p * 2 if p.dim() > 1 else p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    params, flows = stack(models), part(random_flow(generator))
    walk = Walk(models[0], flows)
    targets, tables = walk.of(flows), torch.stack([table(model) for model in models])
    assert walk.size == size and sum(t.sum() for t in targets).item() == pytest.approx(flows.sum().item())  # nothing left out
    for ours, theirs in zip(walk.log_probs(params), walk.of(tables), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    loss = -(flows * tables).sum()
    loss.backward()
    assert walk.loss(params, targets).item() == pytest.approx(loss.item(), rel=1e-12)
    for name, found in walk.gradients(params, targets).items():
        theirs = torch.stack([dict(model.named_parameters())[name].grad for model in models])
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


def test_tables_have_the_nodes_in_their_order() -> None:
    whole = torch.arange(2 * 9 * N_NODES * VOCABULARY, dtype=torch.float64).view(2, 9, N_NODES, VOCABULARY)
    everything = Walk(build(0, 4))
    assert torch.equal(everything.table(everything.of(whole)), whole)
    few = Walk(build(0, 4), narrow(whole + 1))
    nodes = torch.cat(few.nodes).sort().values
    tokens = [{node[depth] for node in (NODES[i] for i in nodes) if len(node) > depth} for depth in range(3)]
    assert few.prompts.tolist() == [1, 4, 8] and len(nodes) == 11 and tokens == [{3, 7}, {3, 4}, {9}]
    assert torch.equal(few.table(few.of(whole)), whole[:, [1, 4, 8]][:, :, nodes])


def test_a_trained_base_too_and_one_prefix_alone() -> None:
    made = tiny.bases()
    walk, params = Walk(made.model), made.one(1)
    theirs = table(tiny.as_it_is(params, 4)).detach()
    torch.testing.assert_close(made.log_p[1], theirs, rtol=0, atol=1e-11)
    for x, prefix in ((3, (7, 4, 9)), (8, (2,)), (0, ())):
        alone = walk.along(params, PROMPTS[x], torch.tensor(prefix, dtype=torch.int64))
        parts = [NODES.index(prefix[:k]) for k in range(len(prefix) + 1)]
        torch.testing.assert_close(alone, theirs[x, parts], rtol=0, atol=1e-11)
