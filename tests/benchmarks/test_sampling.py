"""Tokens a second of refilled rows beside plain padded ``generate`` in the same memory for keys and values, in the same run. ``make bench``.

The model has the widths of SmolLM2-135M and a sixth of its layers, random weights, and ends its answers with the same chance after every
token. All prompts begin with the same ``SYSTEM`` tokens, as those of one chat template do. ``generate`` takes them as they come, ``PLACES``
at once; refilled rows have the places of as many of the longest prompts with the longest answers, which is what ``generate`` fills.
"""

import math
import statistics
import time

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

from sasft.sampling import Sampler, sample
from tests.benchmarks.timing import smollm_135m

PLACES, ROWS, LAYERS, ROUNDS, SYSTEM, CAP, STOP, PAD = 8, 48, 5, 3, 24, 96, 1, 0


def stopping(mean: float) -> LlamaForCausalLM:
    """Writes answers of ``mean`` tokens on average, were there no cap."""
    model = smollm_135m().eval()
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        hidden = model.model(torch.randint(3, 49_152, (1, 256), generator=torch.Generator().manual_seed(0))).last_hidden_state
        head.weight[STOP] = 0.0  # the same logit everywhere
        head.bias[STOP] = head(hidden).logsumexp(-1).mean() - math.log(mean - 1)
    model.lm_head = head
    return model


@pytest.mark.parametrize("mean", [24, 96], ids=["long-tailed", "even"])
def test_refilled_rows_beside_padded_generate(benchmark, mean: int) -> None:
    """A mean of 24 leaves a long tail; at one of 96 a third are cut, and the others are long too."""
    model, generator = stopping(mean), torch.Generator().manual_seed(0)
    system = torch.randint(3, 49_152, (SYSTEM,), generator=generator).tolist()
    prompts = [system + torch.randint(3, 49_152, (n,), generator=generator).tolist()
               for n in torch.randint(10, 60, (ROWS,), generator=generator).tolist()]
    config = GenerationConfig(max_new_tokens=CAP, do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=STOP)
    lengths: dict[str, list[int]] = {"refilled": [], "padded": []}

    def refilled() -> None:
        sampler = Sampler(temperature=1, top_p=1, max_new_tokens=CAP)
        seeds = range(len(lengths["refilled"]), len(lengths["refilled"]) + ROWS)
        lengths["refilled"] += [len(row.ids) + row.finished for row in
                                sample(model, prompts, seeds, sampler, stop_id=STOP, pad_id=PAD, slots=PLACES)]

    def padded() -> None:
        for i in range(0, ROWS, PLACES):
            batch = prompts[i : i + PLACES]
            width = max(map(len, batch))
            ids = torch.tensor([[PAD] * (width - len(p)) + p for p in batch])
            new = model.generate(ids, attention_mask=(ids != PAD).long(), generation_config=config)[:, width:].tolist()
            lengths["padded"] += [row.index(STOP) + 1 if STOP in row else CAP for row in new]

    speeds: dict[str, list[float]] = {"refilled": [], "padded": []}

    def in_turn() -> None:
        for write in (refilled, padded):
            before, start = sum(lengths[write.__name__]), time.perf_counter()
            write()
            speeds[write.__name__].append((sum(lengths[write.__name__]) - before) / (time.perf_counter() - start))

    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.tensor([prompts[0]]))  # to warm up
    benchmark.pedantic(in_turn, rounds=ROUNDS)
    speed, plain = (statistics.median(speeds[name]) for name in ("refilled", "padded"))
    waiting = statistics.fmean(max(lengths["padded"][i : i + PLACES]) for i in range(0, len(lengths["padded"]), PLACES))
    means = {name: statistics.fmean(found) for name, found in lengths.items()}
    benchmark.extra_info.update(ratio=speed / plain, tokens_per_second=speed, plain_tokens_per_second=plain, mean_tokens=means["refilled"],
                                plain_mean_tokens=means["padded"], longest_over_mean=waiting / means["padded"])
    print(f"\n{benchmark.name}: {speed:.1f} tokens/s, {speed / plain:.2f} x plain padded generate ({plain:.1f}); {means['refilled']:.1f} and "
          f"{means['padded']:.1f} tokens a row, the longest of a batch {waiting / means['padded']:.2f} x the mean; "
          f"each round {', '.join(f'{a / b:.2f}' for a, b in zip(speeds['refilled'], speeds['padded'], strict=True))}")
    assert speed >= 2 * plain
