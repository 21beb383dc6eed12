"""What the lab's tests share: bases trained for a moment only, the model as transformers runs it, and loops in place of fast paths."""

import math
from functools import cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from studies.lab import exact
from studies.lab.experiment import Bases, Setup
from studies.lab.model import Params, log_probs, unflat
from studies.lab.start import Start
from studies.lab.tree import NODES, PROMPTS, RESPONSES, VOCABULARY, flow
from studies.lab.world import foreign_new, own_old, prompts_of, pure

TOPIC = prompts_of([0])
ALL = prompts_of([0, 1, 2])


@cache
def bases(width: int = 4) -> Bases:
    """Two bases; of width 4 a model has 420 weights, so that whole Hessians are cheap."""
    made = Bases.make(Setup(seeds=2, width=width, pretrain_steps=150))
    assert made.log_p.dtype == torch.float64
    return made


def task_flow(seed: int = 0) -> Tensor:
    """The task: new facts in a foreign style."""
    return flow(foreign_new(TOPIC, bases().truth(seed), pure(9)))


@cache
def self_flow(seed: int = 0) -> Tensor:
    """Self-data of the task's topic, from the exact sampler."""
    return flow(own_old(bases().own[seed], TOPIC))


@cache
def self_fisher(seed: int = 0) -> Tensor:
    """F on the task's topic."""
    return exact.fisher(bases().model, bases().one(seed), TOPIC)


@cache
def start() -> Start:
    """What is known at the first base's θ₀."""
    return Start.of(bases(), 0)


def as_it_is(params: Params, width: int, *, swapped: bool = True) -> LlamaForCausalLM:
    """transformers' Llama with these weights and its own attention (sdpa, which keeps float64); its norms in float64 if ``swapped``, else its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8, tie_word_embeddings=False, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=0, pad_token_id=None)
    model = LlamaForCausalLM(config).double().eval()
    model.load_state_dict(dict(params))
    if swapped:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(parent, name, ExactNorm(child))
    return model


class ExactNorm(nn.Module):
    """LlamaRMSNorm's formula without its rounding to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())


def next_token(model: nn.Module, prompt: int, prefix: tuple[int, ...]) -> Tensor:
    """Log-probabilities [V] after one prefix, run alone."""
    ids = torch.tensor([[*PROMPTS[prompt].tolist(), *prefix]])
    return model(ids, use_cache=False).logits[0, -1].log_softmax(-1)


def response_log_prob(model: nn.Module, prompt: int, response: tuple[int, ...]) -> Tensor:
    """Log-probability of one response, run alone."""
    ids = torch.tensor([[*PROMPTS[prompt].tolist(), *response]])
    log_p = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(log_p[1 + t, v] for t, v in enumerate(response))


def along(params: Params, direction: Tensor) -> Tensor:
    """The tables' derivative [X, N, V] along a direction [P]."""
    model = bases().model
    return torch.func.jvp(lambda p: log_probs(model, p), (dict(params),), (unflat(direction, params),))[1]


def random_direction(params: Params, seed: int) -> Tensor:
    """A unit vector [P]."""
    n = sum(p.numel() for p in params.values())
    v = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


def moved(params: Params, drift: Tensor) -> dict[str, Tensor]:
    """Weights after a drift [P]."""
    return {name: p + d for (name, p), d in zip(params.items(), unflat(drift, params).values(), strict=True)}


def random_tables(*lead: int, seed: int = 0) -> Tensor:
    """Log-probabilities [..., N, V] of a language model that is none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, len(NODES), VOCABULARY, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(-1)


def reach(log_p: Tensor) -> Tensor:
    """Probability [N] that a response passes through a node, under one table [N, V]: products along each prefix, in a loop."""
    table, number = log_p.exp().tolist(), {node: i for i, node in enumerate(NODES)}
    return torch.tensor([math.prod(table[number[node[:t]]][node[t]] for t in range(len(node))) for node in NODES], dtype=torch.float64)


def foreseen(log_p: Tensor, values: Tensor) -> Tensor:
    """E[value of the response | node, next token] [N, V] under one table [N, V]: from the leaves back to the root, in a loop.

    ``values`` [R]: any function of a whole response.
    """
    table, value_of = log_p.exp().tolist(), dict(zip(RESPONSES, values.tolist(), strict=True))
    number, found = {node: i for i, node in enumerate(NODES)}, {}
    for node in reversed(NODES):
        found[node] = [value_of[(*node, v)] if (*node, v) in value_of
                       else sum(p * a for p, a in zip(table[number[(*node, v)]], found[(*node, v)], strict=True))
                       for v in range(VOCABULARY)]
    return torch.tensor([found[node] for node in NODES], dtype=torch.float64)
