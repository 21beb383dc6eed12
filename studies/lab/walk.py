r"""The lab's Llama on the whole tree of prefixes, written out for many models side by side: what training runs on.

transformers' own forward pass (:func:`studies.lab.model.log_probs`) is what it is tested against. It is several times as fast because of its layout: the
nodes of one depth are the last, long dimension of every tensor, ancestors' keys and values are broadcast and not copied, norms' gains and rotary
positions are multiplied into the weights. A state is [M, width, N]; node n's parent is n mod N', of the N' nodes one token shorter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from studies.lab.tree import GOING_ON, LENGTH, PROMPTS, VOCABULARY

Stacked = Mapping[str, Tensor]  # weights of M models, [M, ...] each


class Walk:
    """All next-token log-probabilities of models of one shape, after the prompts ``prompts`` [X, 2]."""

    def __init__(self, model: nn.Module, prompts: Tensor = PROMPTS) -> None:
        config = model.config
        self.layers, self.heads, self.eps = config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps
        self.prompts, self.n_positions = prompts, prompts.shape[1] + LENGTH - 1
        self.dim = config.hidden_size // self.heads
        x = torch.zeros(1, dtype=torch.float64)
        cos, sin = model.model.rotary_emb(x, torch.arange(self.n_positions)[None])
        half, one = self.dim // 2, torch.eye(self.dim, dtype=torch.float64)
        turned = torch.cat([-one[half:], one[:half]])
        self.rotary = cos[0, :, :, None] * one + sin[0, :, :, None] * turned  # [positions, dim, dim]

    def of(self, flow: Tensor) -> list[Tensor]:
        """A flow [M, X, N, V] as the walk has it: one tensor a depth, [M, V, nodes]."""
        found, start = [], 0
        for depth in range(LENGTH):
            count = GOING_ON**depth
            part = flow[:, :, start : start + count].unflatten(2, (GOING_ON,) * depth) if depth else flow[:, :, start]
            order = (0, part.dim() - 1, *reversed(range(2, 2 + depth)), 1)
            found.append(part.permute(order).flatten(2).contiguous())
            start += count
        return found

    def log_probs(self, params: Stacked) -> list[Tensor]:
        """One tensor a depth, [M, V, nodes]; differentiable."""
        states = self._embedded(params["model.embed_tokens.weight"])
        for i in range(self.layers):
            p = {name: params[f"model.layers.{i}.{name}.weight"] for name in (
                "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
            mixed = self._attention([self._normed(h) for h in states], p)
            into = torch.cat([p["mlp.gate_proj"], p["mlp.up_proj"]], 1) * p["post_attention_layernorm"][:, None]
            states = [self._mlp(h + a, into, p["mlp.down_proj"]) for h, a in zip(states, mixed, strict=True)]
        head = params["lm_head.weight"] * params["model.norm.weight"][:, None]
        return [(head @ self._normed(h)).log_softmax(1) for h in states[self.prompts.shape[1] - 1 :]]

    def loss(self, params: Stacked, flow: list[Tensor]) -> Tensor:
        """Expected losses of the M models, summed: each one's gradient is its own."""
        return -sum((f * log_p).sum() for f, log_p in zip(flow, self.log_probs(params), strict=True))

    def _embedded(self, weight: Tensor) -> list[Tensor]:
        table = weight.transpose(1, 2)
        states = [table[:, :, column] for column in self.prompts.T]
        n = len(self.prompts)
        for _ in range(LENGTH - 1):
            states.append(table[:, :, 1:VOCABULARY, None].expand(-1, -1, -1, n).flatten(2))
            n *= GOING_ON
        return states

    def _normed(self, h: Tensor) -> Tensor:
        return h * (h.square().mean(1, keepdim=True) + self.eps).rsqrt()

    def _mlp(self, h: Tensor, into: Tensor, down: Tensor) -> Tensor:
        gate, up = (into @ self._normed(h)).chunk(2, 1)
        return h + down @ (nn.functional.silu(gate) * up)

    def _attention(self, states: list[Tensor], p: Stacked) -> list[Tensor]:
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
            mixed = sum((self._by(w, n) * value.unsqueeze(3)).flatten(3) for w, value, n in zip(weights, values, lengths, strict=True))
            found.append(p["self_attn.o_proj"] @ mixed.flatten(1, 2))
        return found

    def _turned(self, weight: Tensor, turn: Tensor) -> Tensor:
        return (turn @ weight.unflatten(1, (self.heads, self.dim))).flatten(1, 2)

    @staticmethod
    def _by(x: Tensor, n: int) -> Tensor:
        """[..., N] as [..., N / n, n]: descendants of each of n nodes."""
        return x.unflatten(-1, (-1, n))
