"""Tokenizers small enough to read: one token a byte, and the special tokens that are asked for."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
