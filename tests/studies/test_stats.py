"""Intervals that cover, effects that add up, verdicts by rule."""

import json

import numpy as np
import pytest
from scipy.stats import t as student

from studies.claims import Prediction
from studies.stats import Effect, Scores, config_hash, factorial, judge, judge_range, over_seeds, over_seeds_and_items, verdict


def draw(rng: np.random.Generator, seeds: int, items: int, mean: float, seed_noise: np.ndarray, item_noise: np.ndarray) -> Scores:
    tokens = np.full(items, 10.0)
    rate = mean + seed_noise[:, None] + item_noise[None] + 0.02 * rng.normal(size=(seeds, items))
    return Scores(rate * tokens, tokens)


def prediction(predicted, sesoi: float) -> Prediction:
    return Prediction(id="C2/demo/a", claim="C2", statement="text", predicted=predicted, sesoi=sesoi, unit="nats", study="demo")


def test_pairing_takes_out_what_arms_share() -> None:
    rng = np.random.default_rng(0)
    seed_noise, item_noise = rng.normal(size=3), rng.normal(size=20)
    arms = {"a": draw(rng, 3, 20, 1.0, seed_noise, item_noise), "b": draw(rng, 3, 20, 1.5, seed_noise, item_noise)}
    effect = over_seeds_and_items(lambda m: m["b"] - m["a"], arms, draws=1000)
    alone = over_seeds_and_items(lambda m: m["b"], {"b": arms["b"]}, draws=1000)
    assert effect.value == pytest.approx(0.5, abs=0.02) and effect.high - effect.low < 0.05
    assert alone.high - alone.low > 0.5


@pytest.mark.parametrize(("seeds", "items", "by_seed", "by_item", "left"), [
    (3, 12, 0.3, 0.0, 0.0), (3, 12, 0.3, 0.3, 0.1), (3, 8, 0.02, 0.3, 0.1), (12, 30, 0.3, 0.3, 0.0)])
def test_the_interval_of_crossed_seeds_and_items_covers(seeds: int, items: int, by_seed: float, by_item: float, left: float) -> None:
    rng = np.random.default_rng(1)
    hits, repeats = 0, 400
    for _ in range(repeats):
        gap = by_seed * rng.normal(size=(seeds, 1)) + by_item * rng.normal(size=items) + left * rng.normal(size=(seeds, items))
        arms = {"a": Scores(np.zeros((seeds, items)), np.ones(items)), "b": Scores(1 + gap, np.ones(items))}
        effect = over_seeds_and_items(lambda m: m["b"] - m["a"], arms, draws=100, seed=int(rng.integers(2**31)))
        hits += effect.low <= 1.0 <= effect.high
    assert 0.92 <= hits / repeats <= 0.985


def test_the_interval_of_a_mean_is_students_where_items_do_not_differ() -> None:
    rate = np.array([1.0, 2.0, 4.0])
    effect = over_seeds_and_items(lambda m: m["a"], {"a": Scores(np.repeat(rate[:, None], 5, 1), np.ones(5))}, draws=20_000)
    assert effect.high - effect.value == pytest.approx(4.3027 * rate.std(ddof=1) / 3**0.5, rel=0.03)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_the_error_over_seeds_is_the_spread_of_every_draw(n: int) -> None:
    x = np.random.default_rng(3).exponential(size=n)
    rng = np.random.default_rng(5)
    draws = [np.median(x[np.sort(rng.integers(n, size=n))]) for _ in range(60)]
    effect = over_seeds(lambda seeds: np.median(x[seeds]), n, draws=60, seed=5)
    assert effect.high - effect.value == pytest.approx(student.ppf(0.975, n - 1) * np.std(draws) * (n / (n - 1)) ** 0.5, rel=1e-12)
    assert effect.value == np.median(x) and effect.value - effect.low == pytest.approx(effect.high - effect.value)


def test_one_seed_has_no_interval() -> None:
    effect = over_seeds_and_items(lambda m: m["a"], {"a": Scores(np.ones((1, 5)), np.ones(5))})
    assert effect.value == 1.0 and np.isnan(effect.low) and judge(effect, sesoi=0.1) == "inconclusive"


def test_arms_that_do_not_share_items_are_refused() -> None:
    arms = {"a": Scores(np.zeros((3, 4)), np.ones(4)), "b": Scores(np.zeros((3, 5)), np.ones(5))}
    with pytest.raises(ValueError, match="paired arms must share seeds and items"):
        over_seeds_and_items(lambda m: m["b"] - m["a"], arms)


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
    written = verdict(prediction(predicted, 0.1), Effect(0.3, low, high), n=3, items=16)
    assert written["verdict"] == expected and written["low"] is low and written["sesoi"] == 0.1
    assert written["prediction"] == "C2/demo/a" and written["n"] == 3 and written["conditions"] == {"items": 16}


@pytest.mark.parametrize("low, high, predicted, expected", [
    (0.0, 9e-9, "-", "supported"), (-1.0, -0.5, "-", "supported"), (0.0, 2e-8, "-", "inconclusive"), (2e-8, 3e-8, "-", "contradicted"),
    (-9e-9, 1.0, "+", "supported"), (-1.0, -2e-8, "+", "contradicted"),
])
def test_a_negative_sesoi_bounds_what_should_be_about_zero(low: float, high: float, predicted, expected: str) -> None:
    assert verdict(prediction(predicted, -1e-8), Effect(low, low, high), n=1)["verdict"] == expected


def test_verdicts_need_repetitions_and_the_agreed_level() -> None:
    with pytest.raises(ValueError, match="level 0.95 or more, got 0.5 for C2/demo/a"):
        verdict(prediction("+", 0.1), Effect(1.0, 1.0, 1.0, 0.5), n=3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0 for C2/demo/a"):
        verdict(prediction("+", 0.1), Effect(1.0, 1.0, 1.0), n=0)


@pytest.mark.parametrize("low, high, expected", [
    (0.95, 1.05, "supported"), (0.9, 1.0, "inconclusive"), (0.5, 0.94, "contradicted"), (1.06, 2.0, "contradicted"),
    (0.5, 2.0, "inconclusive"), (float("nan"), 1.0, "inconclusive"),
])
def test_a_range_is_judged_by_rule(low: float, high: float, expected: str) -> None:
    assert judge_range(Effect(1.0, low, high), 0.95, 1.05) == expected


def test_the_configuration_hash_survives_a_file_and_leaves_versions_out() -> None:
    provenance = {"styles": ("a", "b"), "steps": {2: 1, 10: 3}, "lr": 3e-5, "versions": {"torch": "2"}}
    assert config_hash(provenance) == config_hash(json.loads(json.dumps({**provenance, "versions": {"torch": "3"}})))
    assert config_hash(provenance) != config_hash({**provenance, "lr": 3e-4})
