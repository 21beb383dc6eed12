"""The lab's language model, transformers' Llama in float64, and weights of one or of many side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import stack_module_state
from transformers import LlamaConfig, LlamaForCausalLM

from studies.lab.tree import VOCABULARY
from studies.lab.walk import Walk

Params = Mapping[str, Tensor]
WIDTH = 8


def build(seed: int, width: int = WIDTH) -> LlamaForCausalLM:
    """A Llama of two layers with random weights. Its norms are torch's, because transformers' round to float32."""
    heads = min(2, width // 2)  # rotary positions need heads of even width
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=8, tie_word_embeddings=False, initializer_range=0.3, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=0, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(width, eps=child.variance_epsilon, dtype=torch.float64))
    return model


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stack(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The weights of several models side by side, [S, ...] each."""
    return {name: p.detach() for name, p in stack_module_state(list(models))[0].items()}


def flat(params: Params) -> Tensor:
    """Weights, or gradients, as one vector [P] (of stacked ones: call it under vmap, or see :func:`flat_stacked`)."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def flat_stacked(params: Params) -> Tensor:
    """Stacked weights as rows of a matrix [S, P]."""
    return torch.cat([p.flatten(1) for p in params.values()], 1)


def unflat(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """The inverse of :func:`flat`."""
    pieces = vector.split([p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def log_probs(model: nn.Module, params: Params) -> Tensor:
    """Log-probabilities of all next tokens at all nodes, [X, N, V], of a model with the weights ``params``; differentiable."""
    walk = Walk(model)
    return walk.table(walk.log_probs({name: p[None] for name, p in params.items()}))[0]


def pretrain(models: Sequence[nn.Module], flows: Tensor, *, steps: int, lr: float) -> dict[str, Tensor]:
    """Train models side by side on their teachers' expected cross-entropy with Adam at a falling rate; returns the stacked weights.

    ``flows`` [S, X, N, V].
    """
    walk = Walk(models[0], flows)
    targets = walk.of(flows)
    params = {name: p.clone().requires_grad_() for name, p in stack(models).items()}
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for p, g in zip(params.values(), walk.gradients(params, targets).values(), strict=True):
            p.grad = g
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in params.items()}
