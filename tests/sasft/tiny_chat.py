"""Tokenizers small enough to read (one token a byte, and the special tokens asked for), and a model that chats with them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sasft.chat import Chat

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(
    template: str | None = CHATML,
    *,
    specials: Sequence[str] = SPECIALS,
    eos: str = "<|im_end|>",
    pad: str | None = "<|endoftext|>",
    merges: Sequence[tuple[str, str]] = (),
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    """Special tokens have the first ids, in order; then come the 256 bytes, then the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet, *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad,
                                   name_or_path="tiny")
    made.chat_template = template
    return made


def chatty(seed: int = 0, *, end: float = 1.0) -> LlamaForCausalLM:
    """A two-layer Llama that writes lower-case letters and spaces, and ends its turn now and then (``end``: how readily)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=512, initializer_range=0.1,
        pad_token_id=0, bos_token_id=0, eos_token_id=2))
    letters = tokenizer()("abcdefghijklmnopqrstuvwxyz ").input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 5.0  # a feature that is always on, for the head to build on
        model.lm_head.weight[:, 0] = -3.0
        model.lm_head.weight[letters, 0] = 0.0
        model.lm_head.weight[2, 0] = 0.4 * end
    return model.eval()


def save_chatty(folder: Path, seed: int = 0, **kwargs) -> Path:
    """The model with its tokenizer, as a folder."""
    chatty(seed).save_pretrained(folder)
    tokenizer(**kwargs).save_pretrained(folder)
    return folder


def chat() -> Chat:
    """The tiny tokenizer's chat."""
    return Chat(tokenizer())
