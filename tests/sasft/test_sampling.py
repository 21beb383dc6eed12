"""Draws follow the distribution they name, and a row depends on its own seed alone."""

import math
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
)

from sasft.errors import UsageError
from sasft.sampling import EXACT, PAPER, Sampler, draw, row_seed, row_uniforms, sample
from tests.drift import zoo

STOP, PAD = 2, 0


def draws(logits: torch.Tensor, sampler: Sampler, n: int = 20_000) -> np.ndarray:
    u = torch.from_numpy(np.random.default_rng(0).random(n))
    return np.bincount(draw(logits.expand(n, -1), u, sampler).numpy(), minlength=len(logits))


def truncated(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """The nucleus distribution, sorted and cut in plain Python."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    kept, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += p[token]
    q = np.array([v if t in kept else 0.0 for t, v in enumerate(p)])
    return q / q.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9), (1.5, 0.5)])
def test_draws_follow_the_named_distribution(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(12)
    counts = draws(logits, Sampler(temperature=temperature, top_p=top_p))
    expected = truncated(logits, temperature, top_p)
    assert (counts[expected == 0] == 0).all()
    assert stats.chisquare(counts[expected > 0], 20_000 * expected[expected > 0]).pvalue > 1e-4


def test_a_nucleus_wider_than_the_first_look_is_still_whole() -> None:
    logits = torch.zeros(1, 5000)  # 0.9 of it needs 4,500 tokens, more than are sorted at first
    u = torch.tensor([0.999999], dtype=torch.float64)
    drawn = {draw(logits, torch.tensor([x], dtype=torch.float64), PAPER).item() for x in np.linspace(0, 0.9999, 3000)}
    assert len(drawn) > 2000 and draw(logits, u, PAPER).item() in range(5000)


def test_no_token_of_no_probability_is_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        assert draw(logits, torch.tensor([u], dtype=torch.float64), EXACT).item() in (1, 3)


def write(prompts, seeds, sampler=EXACT, **kwargs):
    return sample(zoo.llama().double(), prompts, seeds, sampler, stop_id=STOP, pad_id=PAD, **kwargs)


PROMPTS = [[5], [6, 7, 8], [9, 4], [3, 3, 3, 3, 3], [11, 30]]


def test_a_row_does_not_depend_on_its_company() -> None:
    model = zoo.llama()
    together = sample(model, PROMPTS, range(5), Sampler(temperature=1, top_p=0.95, max_new_tokens=30), stop_id=STOP, pad_id=PAD)
    alone = [sample(model, [p], [s], Sampler(temperature=1, top_p=0.95, max_new_tokens=30), stop_id=STOP, pad_id=PAD)[0]
             for s, p in enumerate(PROMPTS)]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({r.finished for r in together}) == 2 or all(len(r.ids) > 1 for r in together)


def test_log_probabilities_are_those_of_the_whole_model() -> None:
    """Whatever the sampler: under the untruncated model at T = 1, end-of-turn token included."""
    model = zoo.llama()
    for prompt, row in zip(PROMPTS, sample(model, PROMPTS, range(5), Sampler(max_new_tokens=40), stop_id=STOP, pad_id=PAD),
                           strict=True):
        said = [*row.ids, STOP] if row.finished else list(row.ids)
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([[*prompt, *said]])).logits[0], -1)
        expected = [log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(said)]
        assert row.logprobs == pytest.approx(expected, abs=1e-4)
        assert row.finished == (len(row.ids) < 40)


def test_samples_of_a_model_have_its_probabilities() -> None:
    """First tokens of many rows against the model's own next-token distribution."""
    model = zoo.llama()
    n = 4000
    rows = sample(model, [[5, 6]] * n, range(n), Sampler(temperature=1, top_p=1, max_new_tokens=1), stop_id=STOP, pad_id=PAD)
    first = [row.ids[0] if row.ids else STOP for row in rows]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[5, 6]])).logits[0, -1].double(), -1).numpy()
    assert stats.chisquare(np.bincount(first, minlength=32), n * p / p.sum()).pvalue > 1e-4


def gpt2() -> GPT2LMHeadModel:
    """Positions are learnt, not rotations."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def mistral() -> MistralForCausalLM:
    """Attends to the last six tokens only."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, sliding_window=6, initializer_range=0.2)).eval()


LONG = Sampler(temperature=1, top_p=0.95, max_new_tokens=24)


def many(n: int = 24) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 32) for _ in range(rng.randrange(1, 14))] for _ in range(n)]


BEGINNING = [7, 30, 4, 4, 9, 12, 3, 8]  # longer than mistral's window


@cache
def one_by_one(make, beginning: bool = False, stop: int = STOP) -> list:
    model = make()
    return [sample(model, [BEGINNING * beginning + p], [s], LONG, stop_id=stop, pad_id=PAD)[0] for s, p in enumerate(many())]


def assert_same(rows, alone) -> None:
    assert [r.ids for r in rows] == [r.ids for r in alone] and [r.finished for r in rows] == [r.finished for r in alone]
    for a, b in zip(alone, rows, strict=True):
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 8, 100])
@pytest.mark.parametrize("make", [zoo.llama, gpt2, mistral])
def test_a_row_does_not_depend_on_who_takes_its_neighbours_places(make, slots: int) -> None:
    alone, prompts = one_by_one(make), many()
    assert_same(sample(make(), prompts, range(len(prompts)), LONG, stop_id=STOP, pad_id=PAD, slots=slots), alone)
    assert {r.finished for r in alone} == {True, False}


def test_a_row_does_not_depend_on_the_order_of_all_rows() -> None:
    model, prompts = zoo.llama(), many()
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    straight = sample(model, prompts, range(len(prompts)), LONG, stop_id=STOP, pad_id=PAD, slots=5)
    mixed = sample(model, [prompts[i] for i in order], order, LONG, stop_id=STOP, pad_id=PAD, slots=5)
    assert [straight[i].ids for i in order] == [r.ids for r in mixed]


def watch(model: PreTrainedModel) -> tuple[list[torch.Size], set[int]]:
    """Rows and columns of all forward passes, and for how many tokens their caches have places."""
    passes: list[torch.Size] = []
    places: set[int] = set()

    def note(_, args, kwargs, out) -> None:
        passes.append(kwargs["input_ids"].shape)
        places.update(len(x) - 1 for layer in kwargs["past_key_values"].layers for x in (layer.keys, layer.values))

    model.register_forward_hook(note, with_kwargs=True)
    return passes, places


@pytest.mark.parametrize("make", [zoo.llama, mistral])
def test_what_all_prompts_begin_with_is_computed_once(make) -> None:
    model, prompts = make(), [BEGINNING + p for p in many()]
    passes, _ = watch(model)
    assert_same(sample(model, prompts, range(len(prompts)), LONG, stop_id=STOP, pad_id=PAD, slots=100), one_by_one(make, True))
    assert passes[0] == (1, len(BEGINNING)) and {width for _, width in passes[1:]} == {1, max(map(len, many()))}


def test_prompts_that_are_all_the_same_are_computed_once() -> None:
    model = zoo.llama()
    passes, _ = watch(model)
    rows = sample(model, [[5, 6, 7]] * 9, range(9), LONG, stop_id=STOP, pad_id=PAD, slots=9)
    assert passes[0] == (1, 2) and {width for _, width in passes[1:]} == {1}
    assert_same(rows, [sample(model, [[5, 6, 7]], [s], LONG, stop_id=STOP, pad_id=PAD)[0] for s in range(9)])


def test_rows_that_must_give_way_go_on_where_they_were() -> None:
    """No answer ends before the cap, so that more rows begin than there are places for at the end."""
    model, prompts = mistral(), [BEGINNING + p for p in many()]
    passes, _ = watch(model)
    rows = sample(model, prompts, range(len(prompts)), LONG, stop_id=99, pad_id=PAD, slots=3)
    assert max(width for _, width in passes) > max(map(len, many()))  # a prompt with some of its answer, begun again
    assert_same(rows, one_by_one(mistral, True, stop=99))


@pytest.mark.parametrize("slots", [1, 16])
def test_refilled_rows_stay_within_the_memory_of_a_padded_batch_and_seldom_wait(slots: int) -> None:
    n, cap, given = 60 if slots == 1 else 200, 80, []
    model, prompts = zoo.llama(), many(n)
    passes, places = watch(model)
    rows = sample(model, prompts, range(n), Sampler(temperature=1, top_p=1, max_new_tokens=cap), stop_id=STOP, pad_id=PAD,
                  slots=slots, on_tokens=given.append)
    assert places == {slots * (max(map(len, prompts)) + cap)}
    assert max(n for n, width in passes if width > 1) <= slots < max(n for n, _ in passes) <= 4 * slots
    assert sum(given) == sum(len(r.ids) for r in rows)
    lengths = [len(r.ids) + r.finished for r in rows]
    assert sum(n for n, _ in passes) < 1.1 * sum(lengths)  # hardly a row gives way
    padded = sum(max(lengths[i : i + slots]) for i in range(0, n, slots))  # passes, if every batch goes on until its longest row ends
    assert len(passes) < 0.5 * padded


def test_all_rows_are_told_as_they_end_and_once() -> None:
    model, prompts, told = zoo.llama(), many(), []
    rows = sample(model, prompts, range(len(prompts)), LONG, stop_id=STOP, pad_id=PAD, slots=4,
                  on_done=lambda done: told.append(dict(done)))
    assert sorted(i for done in told for i in done) == list(range(len(prompts))) and len(told) > 5
    assert {i: row for done in told for i, row in done.items()} == dict(enumerate(rows))


def test_places_that_cannot_be_refilled_are_refused() -> None:
    recurrent = SimpleNamespace(config=Qwen3NextConfig(num_hidden_layers=4))
    with pytest.raises(UsageError, match="slots cannot be refilled in a SimpleNamespace: its cache has LinearAttentionLayer"):
        sample(recurrent, [[5]], [0], LONG, stop_id=STOP, pad_id=PAD, slots=2)
    with pytest.raises(UsageError, match="slots .* must be at least 1, got 0"):
        write([[5]], [0], slots=0)


def test_greedy_takes_the_most_probable() -> None:
    model = zoo.llama()
    row = sample(model, [[5, 6]], [0], Sampler(max_new_tokens=1), stop_id=STOP, pad_id=PAD, greedy=True)[0]
    with torch.no_grad():
        best = model(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()
    assert (row.ids[0] if row.ids else STOP) == best


def test_seeds_are_their_own_streams() -> None:
    assert len({row_seed(s, kind, k) for s in range(3) for kind in ("user", "assistant") for k in range(50)}) == 300
    assert (row_uniforms(3, 100) == row_uniforms(3, 200)[:100]).all()
    assert stats.kstest(np.concatenate([row_uniforms(row_seed(0, k), 5) for k in range(2000)]), "uniform").pvalue > 1e-4


def test_mode_is_put_back() -> None:
    model = zoo.llama().train()
    sample(model, [[5]], [0], Sampler(max_new_tokens=2), stop_id=STOP, pad_id=PAD)
    assert model.training


def test_nothing_to_do_is_no_error() -> None:
    assert write([], []) == []


@pytest.mark.parametrize("options, message", [
    ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ({"temperature": -1.0}, "temperature must be > 0"),
    ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
    ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
])
def test_impossible_samplers_are_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampler(**options)


def test_prompts_and_seeds_must_fit() -> None:
    with pytest.raises(UsageError, match="seeds must have one entry a prompt: got 2 for 1"):
        write([[5]], [0, 1])
    with pytest.raises(UsageError, match="prompts must not be empty"):
        write([[5], []], [0, 1])


@pytest.mark.parametrize("slots", [None, 2])
def test_answers_that_would_outgrow_the_models_positions_are_refused(slots: int | None) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=12))
    prompts, room = [[3] * 5, [4] * 7], {"stop_id": -1, "pad_id": PAD, "slots": slots}
    fitting = sample(model, prompts, [0, 1], Sampler(max_new_tokens=6), **room)  # the last token needs no position
    assert [len(answer.ids) for answer in fitting] == [6, 6]
    with pytest.raises(UsageError, match="a prompt of 7 tokens and an answer of up to 7 are more than the 12 tokens"):
        sample(model, prompts, [0, 1], Sampler(max_new_tokens=7), **room)
