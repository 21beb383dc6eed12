"""The lab's language model: transformers' Llama in float64, run on all prefixes at once, for one model or many side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from studies.lab.tree import DEPTHS, LENGTH, NODES, PROMPTS, VOCABULARY

Params = Mapping[str, Tensor]
WIDTH = 8


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain softmax attention: transformers' own rounds to float32 on the way."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("lab", _attention)


def build(seed: int, width: int = WIDTH) -> LlamaForCausalLM:
    """A Llama of two layers with random weights. Its norms are torch's, because transformers' round to float32."""
    heads = min(2, width // 2)  # rotary positions need heads of even width
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=8, tie_word_embeddings=False, initializer_range=0.3, attn_implementation="lab",
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


def log_probs(model: nn.Module, params: Params, prompts: Tensor = PROMPTS) -> Tensor:
    r"""Log-probabilities of all next tokens at all nodes, [X, N, V], of ``model`` with the weights ``params``.

    One pass a depth of the tree, siblings side by side: they share their parent's cache, and see themselves and it. So no prefix is read
    twice. Differentiable, and batched by ``torch.func.vmap``.
    """
    cache, found = DynamicCache(config=model.config), []
    ids, past = prompts, 0
    for depth in range(LENGTH):
        new = ids.shape[1]
        seen = torch.zeros(new, past, dtype=torch.bool), torch.ones(new, new, dtype=torch.bool).triu(1) if depth == 0 else ~torch.eye(new, dtype=torch.bool)
        mask = torch.zeros(new, past + new, dtype=torch.float64).masked_fill(torch.cat(seen, 1), -torch.inf)
        positions = torch.arange(new) if depth == 0 else torch.full((new,), past)
        inputs = {"input_ids": ids, "attention_mask": mask[None, None], "position_ids": positions[None], "past_key_values": cache, "use_cache": True}
        logits = functional_call(model, dict(params), (), inputs).logits
        logits = logits[:, -1:] if depth == 0 else logits
        found.append(logits.log_softmax(-1).reshape(len(prompts), -1, VOCABULARY))
        if depth + 1 < LENGTH:
            if depth > 0:
                cache = _each_its_own(cache, past, model.config)
            past += new if depth == 0 else 1
            ids = torch.arange(1, VOCABULARY).expand(len(prompts) * DEPTHS[depth], -1)
    return torch.cat(found, 1)


def _each_its_own(cache: DynamicCache, past: int, config: LlamaConfig) -> DynamicCache:
    """The cache of siblings side by side [B, ..., past + n] as one row each [B·n, ..., past + 1]."""
    apart = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        keys, values = (torch.cat([x[:, :, :past].repeat_interleave(x.shape[2] - past, 0), x[:, :, past:].transpose(1, 2).flatten(0, 1).unsqueeze(2)], 2)
                        for x in (layer.keys, layer.values))
        apart.update(keys, values, i)
    return apart


class Support:
    """The nodes that a flow [..., X, N, V] passes through: where it is narrow, the rest of the tree need not be run."""

    def __init__(self, flow: Tensor) -> None:
        used = (flow != 0).any(-1).reshape(-1, *flow.shape[-3:-1]).any(0)  # [X, N], over all leading dimensions
        self.prompts = used.any(1).nonzero().squeeze(1)
        self.nodes = used.any(0).nonzero().squeeze(1)
        prefixes = [NODES[i] for i in self.nodes.tolist()]
        inner = {p[:k] for p in prefixes for k in range(len(p))}
        leaves = [p for p in prefixes if p not in inner]
        self._ends = torch.tensor([len(p) for p in prefixes])
        self._leaf = torch.tensor([next(i for i, leaf in enumerate(leaves) if leaf[: len(p)] == p) for p in prefixes])
        width = max(map(len, leaves))
        self._tails = torch.tensor([[*leaf, *[1] * (width - len(leaf))] for leaf in leaves], dtype=torch.int64).view(len(leaves), width)

    @property
    def fills_the_tree(self) -> bool:
        """Whether running the whole tree is cheaper than running these nodes one by one."""
        return len(self.nodes) > len(NODES) // 2

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of prompts and of nodes."""
        return len(self.prompts), len(self.nodes)

    def of(self, flow: Tensor) -> Tensor:
        """The part of a flow that is not zero by design, [..., X', N', V]."""
        return flow[..., self.prompts, :, :][..., self.nodes, :]

    def log_probs(self, model: nn.Module, params: Params) -> Tensor:
        """As :func:`log_probs`, [X', N', V] at the support's prompts and nodes."""
        prompts, n_leaves = PROMPTS[self.prompts], len(self._tails)
        ids = torch.cat([prompts.repeat_interleave(n_leaves, 0), self._tails.repeat(len(prompts), 1)], 1)
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(ids.shape[1])[None], "use_cache": False}
        logits = functional_call(model, dict(params), (), inputs).logits.unflatten(0, (len(prompts), n_leaves))
        return logits[:, self._leaf, self._ends + prompts.shape[1] - 1].log_softmax(-1)


def pretrain(models: Sequence[nn.Module], flows: Tensor, *, steps: int, lr: float) -> dict[str, Tensor]:
    """Train models side by side on their teachers' expected cross-entropy with Adam at a falling rate; returns the stacked weights.

    ``flows`` [S, X, N, V].
    """
    support, model = Support(flows), models[0]
    targets = support.of(flows)
    gradient = vmap(grad(lambda params, target: -(target * support.log_probs(model, params)).sum()))
    params = {name: p.clone().requires_grad_() for name, p in stack(models).items()}
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for p, g in zip(params.values(), gradient({n: p.detach() for n, p in params.items()}, targets).values(), strict=True):
            p.grad = g
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in params.items()}
