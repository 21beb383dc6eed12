"""Tiny models of the families that people fine-tune, with random weights, from their configurations alone."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

V = 40
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
_SHAPE = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, **_IDS}


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=True))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0,
                                      resid_pdrop=0.0, **_IDS))


def _gemma() -> nn.Module:
    return GemmaForCausalLM(GemmaConfig(**_SHAPE, head_dim=4))


def _gemma3() -> nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SHAPE, head_dim=4, sliding_window=64))


def _opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
                                    max_position_embeddings=32, word_embed_proj_dim=8, **_IDS))


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0,
                                            experts_implementation="eager"))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama, "gpt2": _gpt2, "gemma": _gemma, "gemma3": _gemma3, "opt": _opt, "mixtral": _mixtral}


def make(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of the family in training mode; norms' and biases' weights are moved off their initial constants."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()
