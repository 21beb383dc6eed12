"""LfU against the model run by hand, row by row, with the ascent step put into its states or its weights."""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from sasft.chat import IGNORE
from sasft.methods import Costs, method, response_loss
from sasft.mixing import SELF, TASK
from tests.sasft.methods import cases

KEYS = [(TASK, 0), (SELF, 1), (TASK, 5)]


def states(model, ids, weights=None, steer=None):
    """Outputs of the blocks [K, T, d] and log-probabilities, one row; ``steer``: a vector added to each output."""
    found, hooks = [], []
    for number, block in enumerate(model.model.layers):
        def hook(module, args, output, number=number):
            output = output if steer is None else output + steer[number]
            found.append(output)
            return output
        hooks.append(block.register_forward_hook(hook))
    logits = functional_call(model, weights or {}, (torch.tensor([ids]),)).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack([h[0] for h in found]), torch.log_softmax(logits, -1)


def plain(model, row, objective, weight: float, alpha: float, variant: str) -> torch.Tensor:
    labels = torch.tensor(row.labels)
    at = (labels != IGNORE).nonzero().squeeze(-1)
    blocks = len(model.model.layers)
    steer = [torch.zeros(model.config.hidden_size, requires_grad=True) for _ in range(blocks)]
    h, out = states(model, row.input_ids, steer=steer)
    nll = -out[at - 1, labels[at]].sum()
    if variant == "steering":
        g = torch.autograd.grad(nll, steer, retain_graph=True)
        size = torch.stack([x.square().sum() for x in g]).sum().sqrt()
        shifted, _ = states(model, row.input_ids, steer=[alpha * x / size for x in g])
    else:
        names = {id(m): n for n, m in model.named_modules()}
        layers = [(names[id(module)] + ".weight", a) for module, a in objective.places]
        assert {n for n, _ in layers} == {n for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n}
        g = torch.autograd.grad(nll, [model.get_parameter(n) for n, _ in layers], retain_graph=True)
        of_b = [gradient @ a.T for gradient, (_, a) in zip(g, layers, strict=True)]  # of B in W + B A, at B = 0
        size = torch.stack([x.square().sum() for x in of_b]).sum().sqrt()
        moved = {n: model.get_parameter(n) + alpha * x / size @ a for x, (n, a) in zip(of_b, layers, strict=True)}
        shifted, _ = states(model, row.input_ids, weights=moved)
    return nll + weight * (h.detach() - shifted)[:, at - 1].square().sum() / blocks


@pytest.mark.parametrize("variant", ["steering", "lora"])
def test_states_are_held_under_an_ascent_step(variant: str) -> None:
    model, data = cases.wander(cases.tiny()), cases.rows()
    costs = Costs()
    objective = method("lfu", variant=variant, alpha=0.2, weight=3.0, rank=3).objective(model, data, 0, costs)
    loss = objective.loss(model, cases.batch_of(data, KEYS))
    wanted = sum(plain(model, data[s][i], objective, 3.0, 0.2, variant) for s, i in KEYS)
    only = response_loss(model, cases.batch_of(data, KEYS))
    assert loss.item() > only.item() + 0.1 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found, without = cases.gradients(model, loss), cases.gradients(model, only)
    assert cases.apart(found, cases.gradients(model, wanted)) < 1e-4 and cases.apart(found, without) > 1e-2
    assert costs.backward_tokens == 2 * sum(len(data[s][i].input_ids) for s, i in KEYS)
    assert not any(m._forward_hooks for m in model.modules())


def test_with_one_block_the_consistency_of_steering_is_alpha_squared() -> None:
    """And its gradient is 2 dᵀ∂h/∂θ a position: without the stop-gradient it would be 0."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.1)).eval()
    data = cases.rows()
    batch = cases.batch_of(data, [(TASK, 1)])
    objective = method("lfu", variant="steering", alpha=0.3, weight=1.0).objective(model, data, 0, Costs())
    rest = objective.loss(model, batch) - response_loss(model, batch)
    row = data[TASK][1]
    assert rest.item() == pytest.approx(0.09 * row.loss_tokens, rel=1e-4)
    found = cases.gradients(model, rest)
    steer = [torch.zeros(16, requires_grad=True)]
    h, out = states(model, row.input_ids, steer=steer)
    labels = torch.tensor(row.labels)
    at = (labels != IGNORE).nonzero().squeeze(-1)
    g, = torch.autograd.grad(-out[at - 1, labels[at]].sum(), steer, retain_graph=True)
    wanted = 2 * (h[0, at - 1] @ (0.3 * g / g.norm())).sum()
    assert cases.apart(found, cases.gradients(model, wanted)) < 1e-3 and max(v.abs().max() for v in found.values()) > 1e-2


@pytest.mark.parametrize("variant", ["steering", "lora"])
def test_it_moves_the_adapters_of_an_adapted_model(variant: str, tmp_path: Path) -> None:
    model, data = cases.wander(cases.tiny(tmp_path, lora=True)), cases.rows()
    objective = method("lfu", variant=variant).objective(model, data, 0, Costs())
    if variant == "lora":
        assert len(objective.places) == 14  # seven layers a block, each once
    gradients = cases.gradients(model, objective.loss(model, cases.batch_of(data, KEYS)))
    assert all("lora_" in n for n in gradients) and all(g.any() for g in gradients.values())
