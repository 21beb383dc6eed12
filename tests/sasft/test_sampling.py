"""Draws follow the distribution they name, and a row depends on its own seed alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

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
