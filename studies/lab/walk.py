r"""The lab's Llama on a tree of prefixes, written out for many models side by side: what everything here that is exact runs on.

transformers' own forward pass is what it is tested against. It is many times as fast because of its layout: the nodes of one depth are the last,
long dimension of every tensor, no prefix is read twice, ancestors' keys and values are broadcast and not copied, norms' gains and rotary
positions are multiplied into the weights. A state is [M, width, N], positions side by side; node n's parent is n mod N', of the N' nodes one token shorter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from studies.lab.tree import DEPTHS, GOING_ON, LENGTH, N_NODES, NODES, PROMPTS

Stacked = Mapping[str, Tensor]  # weights of M models, [M, ...] each


class Walk:
    """Next-token log-probabilities of models of one shape, at the nodes that flows [..., X, N, V] pass through (all, if None).

    The tree is pruned to a product: at each depth, every token that some node has there. ``prompts`` [X'] are the numbers of the prompts
    with any flow; ``nodes``, one tensor a depth, those of the nodes.
    """

    def __init__(self, model: nn.Module, flows: Tensor | None = None) -> None:
        config = model.config
        self.layers, self.heads, self.eps = config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps
        self.dim = config.hidden_size // self.heads
        used = torch.ones(len(PROMPTS), N_NODES, dtype=torch.bool) if flows is None else (flows != 0).any(-1).reshape(-1, len(PROMPTS), N_NODES).any(0)
        self.prompts = used.any(1).nonzero().squeeze(1)
        prefixes = [NODES[i] for i in used.any(0).nonzero().squeeze(1).tolist()]
        self.tokens = [torch.tensor(sorted({p[depth] for p in prefixes if len(p) > depth})) for depth in range(max(map(len, prefixes)))]
        self.nodes = [torch.zeros(1, dtype=torch.int64)]
        for depth, tokens in enumerate(self.tokens):  # a node's children are numbered together, within their depth
            within = self.nodes[-1] - sum(DEPTHS[:depth])
            self.nodes.append((tokens[:, None] - 1 + GOING_ON * within).flatten() + sum(DEPTHS[: depth + 1]))
        x = torch.zeros(1, dtype=torch.float64)
        cos, sin = model.model.rotary_emb(x, torch.arange(PROMPTS.shape[1] + LENGTH - 1)[None])
        half, one = self.dim // 2, torch.eye(self.dim, dtype=torch.float64)
        turned = torch.cat([-one[half:], one[:half]])
        self.rotary = cos[0, :, :, None] * one + sin[0, :, :, None] * turned  # [positions, dim, dim]

    @property
    def size(self) -> int:
        """How many prefixes are read for each model."""
        return len(self.prompts) * sum(map(len, self.nodes))

    def of(self, flow: Tensor) -> list[Tensor]:
        """A flow [M, X, N, V] as the walk has it: one tensor a depth, [M, V, nodes]."""
        return [flow[:, self.prompts][:, :, nodes].permute(0, 3, 2, 1).flatten(2).contiguous() for nodes in self.nodes]

    def table(self, found: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`of`, [M, X', N', V], in the order of the nodes' numbers."""
        parts = [part.unflatten(2, (-1, len(self.prompts))).permute(0, 3, 2, 1) for part in found]
        return torch.cat(parts, 2)[:, :, torch.cat(self.nodes).argsort()]

    def log_probs(self, params: Stacked) -> Sequence[Tensor]:
        """One tensor a depth, [M, V, nodes]; differentiable."""
        return self._read(params, PROMPTS[self.prompts], self.tokens)

    def along(self, params: Mapping[str, Tensor], prompt: Tensor, prefix: Tensor) -> Tensor:
        """[T + 1, V] of one model after each part of one prefix [T], from none of it to the whole; for ``torch.func.vmap`` over prefixes."""
        found = self._read({name: p[None] for name, p in params.items()}, prompt[None], list(prefix[:, None]))
        return torch.stack([log_p[0, :, 0] for log_p in found])

    def loss(self, params: Stacked, flow: Sequence[Tensor]) -> Tensor:
        """Expected losses of the M models, summed: each one's gradient is its own."""
        return -sum((f * log_p).sum() for f, log_p in zip(flow, self.log_probs(params), strict=True))

    def gradients(self, params: Stacked, flow: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of the M expected losses, stacked as the weights are."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            return dict(zip(leaves, torch.autograd.grad(self.loss(leaves, flow), list(leaves.values())), strict=True))

    def _read(self, params: Stacked, prompts: Tensor, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        table, counts = params["model.embed_tokens.weight"].transpose(1, 2), [len(prompts)] * prompts.shape[1]
        states = [table[:, :, column] for column in prompts.T]
        for some in tokens:
            states.append(table[:, :, some, None].expand(-1, -1, -1, counts[-1]).flatten(2))
            counts.append(counts[-1] * len(some))
        h = torch.cat(states, 2)
        for i in range(self.layers):
            p = {name: params[f"model.layers.{i}.{name}.weight"] for name in (
                "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
            h = h + p["self_attn.o_proj"] @ self._mixed(self._normed(h).split(counts, 2), p)
            into = torch.cat([p["mlp.gate_proj"], p["mlp.up_proj"]], 1) * p["post_attention_layernorm"][:, None]
            gate, up = (into @ self._normed(h)).chunk(2, 1)
            h = h + p["mlp.down_proj"] @ (nn.functional.silu(gate) * up)
        head = params["lm_head.weight"] * params["model.norm.weight"][:, None]
        return (head @ self._normed(h)).log_softmax(1).split(counts, 2)[prompts.shape[1] - 1 :]

    def _normed(self, h: Tensor) -> Tensor:
        return h * (h.square().mean(1, keepdim=True) + self.eps).rsqrt()

    def _mixed(self, states: Sequence[Tensor], p: Stacked) -> Tensor:
        """What attention reads at each position, all positions side by side."""
        gain = p["input_layernorm"][:, None]
        q, k, v = (p[f"self_attn.{name}_proj"] * gain for name in "qkv")
        keys, values, found = [], [], []
        for position, h in enumerate(states):
            turn = self.rotary[position]
            made = torch.cat([self._turned(q, turn) / self.dim**0.5, self._turned(k, turn), v], 1) @ h
            query, key, value = made.unflatten(1, (3, self.heads, self.dim)).unbind(1)  # [M, heads, dim, N]
            keys.append(key)
            values.append(value)
            lengths = [x.shape[-1] for x in keys]
            scores = torch.stack([(self._by(query, n) * key.unsqueeze(3)).sum(2).flatten(2) for key, n in zip(keys, lengths, strict=True)], 2)
            weights = scores.softmax(2).unsqueeze(2).unbind(3)
            found.append(sum((self._by(w, n) * value.unsqueeze(3)).flatten(3) for w, value, n in zip(weights, values, lengths, strict=True)).flatten(1, 2))
        return torch.cat(found, 2)

    def _turned(self, weight: Tensor, turn: Tensor) -> Tensor:
        return (turn @ weight.unflatten(1, (self.heads, self.dim))).flatten(1, 2)

    @staticmethod
    def _by(x: Tensor, n: int) -> Tensor:
        """[..., N] as [..., N / n, n]: descendants of each of n nodes."""
        return x.unflatten(-1, (-1, n))
