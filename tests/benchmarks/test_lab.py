"""What the exact lab gains by running models side by side and siblings of a prefix together, beside plain loops in the same run. ``make bench``."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from studies.lab.descent import descend
from studies.lab.experiment import Arm, Bases, Setup, cell, mixed, self_rows
from studies.lab.model import WIDTH, flat, flat_stacked, log_probs
from studies.lab.tree import LENGTH, N_NODES, NODES, PROMPTS
from tests.benchmarks.timing import compare
from tests.studies.lab.tiny import as_it_is

LR, MODELS = 0.004, 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the lab's workers have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases() -> Bases:
    """As many models as are trained together, of the lab's size; hardly trained, which costs the same."""
    return Bases.make(Setup(seeds=MODELS, pretrain_steps=2))


def read(model: torch.nn.Module, prompts: Tensor, tails: list[tuple[int, ...]]) -> Tensor:
    """Log-probabilities [X, n, length + 1, V] at the positions of the same n tails after each prompt, as a batch of sequences."""
    tail_ids = torch.tensor(tails, dtype=torch.int64).view(len(tails), -1)
    ids = torch.cat([prompts.repeat_interleave(len(tails), 0), tail_ids.repeat(len(prompts), 1)], 1)
    return model(ids, use_cache=False).logits[:, 1:].log_softmax(-1).unflatten(0, (len(prompts), len(tails)))


def one_by_one(bases: Bases, flows: Tensor, steps: int) -> Tensor:
    """Each model alone in torch's own loop, on the sequences that its flow needs; weights [M, P] at the end."""
    found = []
    for seed, flow in enumerate(flows):
        x, nodes = flow.any(-1).any(1).nonzero().squeeze(1), flow.any(-1).any(0).nonzero().squeeze(1).tolist()
        used = {NODES[i] for i in nodes}
        tails = [node for node in used if len(node) == max(map(len, used))]
        place = {(i, t): tail[:t] for i, tail in enumerate(tails) for t in range(LENGTH)}
        once = {prefix: at for at, prefix in place.items()}  # a prefix of several tails counts in one of them
        rows, positions = (list(x) for x in zip(*(once[NODES[i]] for i in nodes), strict=True))
        target = flow[x][:, nodes]
        model = as_it_is(bases.one(seed), WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -(target * read(model, PROMPTS[x], tails)[:, rows, positions]).sum()
            loss.backward()
            optimizer.step()
        named = dict(model.named_parameters())
        found.append(flat({name: named[name].detach() for name in bases.params}))
    return torch.stack(found)


@pytest.mark.parametrize("arm, steps, at_most", [(mixed(0.5, self_rows), 3, 0.25), (cell("foreign", "new"), 40, 0.6)],
                         ids=["self-data, all prefixes", "the task, few prefixes"])
def test_descent_side_by_side(benchmark, bases: Bases, arm: Arm, steps: int, at_most: float) -> None:
    flows = torch.stack([arm(bases, seed) for seed in range(MODELS)])

    def together() -> Tensor:
        return descend(bases.model, bases.params, flows, lr=LR, record=(steps,))[0]

    moved = together() - flat_stacked(bases.params)
    torch.testing.assert_close(one_by_one(bases, flows, steps) - flat_stacked(bases.params), moved, rtol=0, atol=1e-11)
    assert moved.norm(dim=1).min() > 1e-3
    ratio = compare(benchmark, together, lambda: one_by_one(bases, flows, steps), f"{MODELS} models, one by one")
    assert ratio <= at_most


@torch.no_grad()
def test_the_tree_walk(benchmark, bases: Bases) -> None:
    """One model's whole table: a pass a depth, siblings side by side, against every prefix of full length as a sequence of its own."""
    leaves = [node for node in NODES if len(node) == LENGTH - 1]
    params = bases.one(0)
    model = as_it_is(params, WIDTH)
    found = log_probs(bases.model, params)
    torch.testing.assert_close(read(model, PROMPTS, leaves)[:, :, -1], found[:, N_NODES - len(leaves) :], rtol=0, atol=1e-12)
    ratio = compare(benchmark, lambda: log_probs(bases.model, params), lambda: read(model, PROMPTS, leaves), "each prefix as a sequence")
    assert ratio <= 0.6
