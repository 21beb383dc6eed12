"""Small models that are awkward to measure: tied weights, reuse, frozen branches, dropout, norms, LoRA."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

V, D = 13, 6


class Base(nn.Module):
    """Token ids [B, T] to logits [B, T, V] through ``body``; rows do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = self.make_body()
        self.head = nn.Linear(D, V, bias=False)

    def make_body(self) -> nn.Module:
        return nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Reused(Base):
    """One layer called twice."""

    def make_body(self) -> nn.Module:
        return nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(torch.tanh(self.body(self.embed(ids)))))


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.body[0].requires_grad_(False)


class Dropout(Base):
    def make_body(self) -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D))


class Norms(Base):
    def make_body(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D), nn.LayerNorm(D, bias=False))


class Padded(Base):
    """An embedding whose padding row gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=3)


class Unused(Base):
    """A trainable layer that is called but does not reach the loss, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.idle = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        self.aside(hidden)
        return self.head(self.body(hidden))


class Flattened(Base):
    """Layers that see tokens as [B*T, D], as mixture-of-experts layers do."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids).flatten(0, 1)
        return self.head(self.body(hidden)).unflatten(0, ids.shape)


class Functional(Base):
    """A weight that is also used outside its module: only a part of its gradient is taken apart."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids))
        return self.head(hidden) + nn.functional.linear(hidden.tanh(), self.head.weight)


ZOO: list[Callable[[], nn.Module]] = [Base, Tied, Reused, Frozen, Dropout, Norms, Padded, Unused, Flattened]


def make(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model with seeded weights."""
    torch.manual_seed(seed)
    return kind().double()


def forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits of a zoo model."""
    return model(batch["input_ids"])


def batch(rows: int = 5, tokens: int = 7, vocabulary: int = V, seed: int = 1) -> dict[str, Tensor]:
    """Random rows of different lengths with a hidden prompt, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :2] = -100
    for row in range(rows):
        keep = tokens - row % 3
        mask[row, keep:], labels[row, keep:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def llama(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A two-layer Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=tied, attn_implementation="eager",
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


def lora(model: nn.Module, *, rank: int = 2, nonzero: bool = True, **settings) -> nn.Module:
    """The model with LoRA adapters; ``nonzero`` gives B random values, as after training."""
    from peft import LoraConfig, get_peft_model

    settings.setdefault("target_modules", ["q_proj", "down_proj"])
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=3.0, **settings))
    if nonzero:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.normal_()
    return wrapped
