"""Intervals that cover, effects that add up, verdicts by rule."""

import numpy as np
import pytest

from studies.stats import Effect, Scores, bootstrap, factorial, judge, verdict


def draw(rng: np.random.Generator, seeds: int, items: int, mean: float, seed_noise: np.ndarray, item_noise: np.ndarray) -> Scores:
    tokens = np.full(items, 10.0)
    rate = mean + seed_noise[:, None] + item_noise[None] + 0.02 * rng.normal(size=(seeds, items))
    return Scores(rate * tokens, tokens)


def test_pairing_takes_out_what_arms_share() -> None:
    rng = np.random.default_rng(0)
    seed_noise, item_noise = rng.normal(size=3), rng.normal(size=20)
    arms = {"a": draw(rng, 3, 20, 1.0, seed_noise, item_noise), "b": draw(rng, 3, 20, 1.5, seed_noise, item_noise)}
    effect = bootstrap(lambda m: m["b"] - m["a"], arms, draws=1000)
    alone = bootstrap(lambda m: m["b"], {"b": arms["b"]}, draws=1000)
    assert effect.value == pytest.approx(0.5, abs=0.02) and effect.high - effect.low < 0.05
    assert alone.high - alone.low > 0.5


def test_coverage_is_near_the_nominal_with_many_seeds() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        gap = 0.3 * rng.normal(size=20)
        arms = {"a": Scores(np.zeros((20, 30)), np.ones(30)),
                "b": Scores(1.0 + gap[:, None] + 0.3 * rng.normal(size=30)[None] + np.zeros((20, 30)), np.ones(30))}
        effect = bootstrap(lambda m: m["b"] - m["a"], arms, draws=300, seed=int(rng.integers(2**31)))
        hits += effect.low <= 1.0 <= effect.high
    assert 0.88 <= hits / 200 <= 0.98


def test_arms_that_do_not_share_items_are_refused() -> None:
    arms = {"a": Scores(np.zeros((3, 4)), np.ones(4)), "b": Scores(np.zeros((3, 5)), np.ones(5))}
    with pytest.raises(ValueError, match="paired arms must share seeds and items"):
        bootstrap(lambda m: m["b"] - m["a"], arms)


def test_main_effects_add_up_to_the_gap() -> None:
    rng = np.random.default_rng(2)
    for oo, on, fo, fn in rng.normal(size=(50, 4)):
        effects = factorial(oo, on, fo, fn)
        assert effects["style"] + effects["content"] == pytest.approx(fn - oo)
        assert effects["share"] == pytest.approx(effects["style"] / (fn - oo))
    assert factorial(1.0, 1.0, 3.0, 3.0) == {"style": 2.0, "content": 0.0, "interaction": 0.0, "share": 1.0}
    assert np.isnan(factorial(1.0, 2.0, 0.0, 1.0)["share"])


@pytest.mark.parametrize("low, high, predicted, expected", [
    (0.11, 0.5, "+", "supported"), (0.09, 0.5, "+", "inconclusive"), (-0.5, 0.09, "+", "contradicted"),
    (-0.5, -0.11, "-", "supported"), (-0.09, 0.5, "-", "contradicted"), (-0.5, 0.5, "-", "inconclusive"),
    (float("nan"), 0.5, "+", "inconclusive"),
])
def test_verdicts_follow_the_rule(low: float, high: float, predicted, expected: str) -> None:
    assert judge(Effect((low + high) / 2, low, high), sesoi=0.1, predicted=predicted) == expected
    written = verdict("C0", "text", Effect(0.3, low, high), sesoi=0.1, unit="nats", predicted=predicted)
    assert written["verdict"] == expected and written["low"] is low and written["smallest_effect_of_interest"] == 0.1
