"""Intervals of items that are right or wrong: they have width where no item differs, and cover (summed over all outcomes)."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest, multinomial, norm, t

from sasft.evaluation import forgetting, gain_drop
from sasft.evaluation.intervals import Estimate, average, share_interval
from tests.sasft.evaluation.test_forgetting import write

N = 20
NAMES = [str(i) for i in range(N)]


def hits(k: int, n: int) -> np.ndarray:
    return np.array([[1.0] * k + [0.0] * (n - k)])


def flips(lost: int, gained: int, n: int) -> np.ndarray:
    return np.array([[-1.0] * lost + [1.0] * gained + [0.0] * (n - lost - gained)])


def plain(values: np.ndarray, clusters: list[str]) -> Estimate:
    return Estimate.of(values.mean(), (values - values.mean()) / values.size, clusters)


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 4), (0, 1), (3, 10), (117, 240)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_a_share_of_independent_items_has_wilsons_interval(k: int, n: int, level: float) -> None:
    expected = binomtest(k, n).proportion_ci(level, method="wilson")
    assert share_interval(hits(k, n), [str(i) for i in range(n)], level) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 4), (4, 0, 4), (2, 1, 6), (0, 1, 1)])
def test_a_change_has_the_interval_of_a_table_with_half_a_pair_more_in_each_cell(lost: int, gained: int, n: int) -> None:
    kept, n10, n01 = n - lost - gained + 1, lost + 0.5, gained + 0.5  # kept: both cells
    share10, share01 = n10 / (kept + n10 + n01), n01 / (kept + n10 + n01)
    reach = t.ppf(0.975, n) * math.sqrt((share10 + share01 - (share01 - share10) ** 2) / (n + 2))
    found = Estimate.of_flips(flips(lost, gained, n), [str(i) for i in range(n)])
    assert found.value == pytest.approx((gained - lost) / n)
    assert found.interval() == pytest.approx((max(share01 - share10 - reach, -1), min(share01 - share10 + reach, 1)))


def test_shares_cover_summed_over_all_outcomes() -> None:
    k, shares = np.arange(N + 1), np.linspace(0.01, 0.99, 99)
    chances = np.stack([binom.pmf(k, N, p) for p in shares])

    def coverage(interval: Callable) -> np.ndarray:
        low, high = np.array([interval(hits(int(i), N)) for i in k]).T
        return (chances * ((low <= shares[:, None]) & (shares[:, None] <= high))).sum(1)

    found = coverage(lambda x: share_interval(x, NAMES))
    assert 0.945 < found.mean() < 0.965 and found.min() > 0.92
    assert coverage(lambda x: plain(x, NAMES).interval()).mean() < 0.88  # without it


def test_changes_cover_summed_over_all_outcomes() -> None:
    """The shares lost and gained on a grid up to 58 %."""
    outcomes = np.array([(lost, gained, N - lost - gained) for lost in range(N + 1) for gained in range(N + 1 - lost)])
    grid = [(a, b) for a in np.arange(0.01, 0.6, 0.03) for b in np.arange(0.01, 0.6, 0.03) if a + b < 1]
    chances = np.stack([multinomial.pmf(outcomes, N, [a, b, 1 - a - b]) for a, b in grid])
    truth = np.array([b - a for a, b in grid])[:, None]

    def coverage(interval: Callable) -> np.ndarray:
        low, high = np.array([interval(flips(lost, gained, N)) for lost, gained, _ in outcomes]).T
        return (chances * ((low <= truth) & (truth <= high))).sum(1)

    found = coverage(lambda x: Estimate.of_flips(x, NAMES).interval())
    assert 0.95 < found.mean() < 0.965 and found.min() > 0.91
    assert coverage(lambda x: plain(x, NAMES).interval()).min() < 0.65  # without it, where hardly an item flips


def test_items_in_clusters_and_several_seeds_keep_their_formula() -> None:
    passages = [str(i // 4) for i in range(N)]
    mixed = np.random.default_rng(0).permuted(flips(3, 9, N), axis=1)
    for values, clusters in ((mixed, passages), (np.repeat(mixed, 2, axis=0), NAMES)):
        assert Estimate.of_flips(values, clusters).interval() == plain(values, clusters).interval()
        assert share_interval(np.abs(values), clusters) == plain(np.abs(values), clusters).interval()


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_no_cluster_differs_each_counts_as_one_item(seeds: int) -> None:
    passages = [str(i // 4) for i in range(N)]
    assert share_interval(np.zeros((seeds, N)), passages) == pytest.approx(share_interval(hits(0, 5), NAMES[:5]))
    found, expected = Estimate.of_flips(np.zeros((seeds, N)), passages), Estimate.of_flips(flips(0, 0, 5), NAMES[:5])
    assert found.interval() == pytest.approx(expected.interval())
    half = np.tile([1.0, 0.0], (seeds, N // 2))  # one of two is right in every passage
    low, high = share_interval(half, passages)
    assert 0.5 - low == pytest.approx(norm.ppf(0.975) * math.sqrt(low * (1 - low) / 5)) and low + high == pytest.approx(1)
    assert share_interval(np.ones((seeds, 4)), ["one passage"] * 4) == pytest.approx(share_interval(hits(1, 1), ["0"]))


def test_intervals_hold_nothing_that_cannot_be() -> None:
    passages = ["a", "a", "a", "b"]
    assert share_interval(hits(3, 4), passages) == (0.0, 1.0) and plain(hits(3, 4), passages).interval()[1] > 1
    for lost, clusters in ((flips(4, 0, 4), NAMES[:4]), (flips(3, 0, 4), passages)):
        assert Estimate.of_flips(lost, clusters).interval()[0] == -1
    scores = Estimate.of(0.5, np.array([[3.0, -3.0]]), ["a", "b"])
    assert scores.interval()[1] > 1 and average([scores, scores]).interval()[1] > 1  # other scores know no bound


@pytest.mark.parametrize("choices", [None, 4])
def test_four_items_that_stay_right_leave_room_for_forgetting(tmp_path: Path, choices: int | None) -> None:
    before, after = (write(tmp_path / name, "s", [1, 1, 1, 1], choices=[choices] * 4) for name in "ba")
    found = forgetting(before, after, "s")
    assert (found.change, found.lost, found.lost_adjusted) == (0, 0, 0)
    assert -0.5 < found.low < -0.4 and found.high == pytest.approx(-found.low)
    wilson = pytest.approx(tuple(binomtest(0, 4).proportion_ci(method="wilson")), abs=1e-12)
    assert found.lost_interval == found.gained_interval == found.lost_adjusted_interval == wilson
    gain, drop, mean = gain_drop(before, {"sft": [after]}, "s", ["s"])
    assert all((row["value_low"], row["value_high"]) == pytest.approx((found.low, found.high)) for row in (gain, drop, mean))


def test_a_drop_and_a_gain_have_the_interval_of_the_change(tmp_path: Path) -> None:
    before, after = write(tmp_path / "b", "s", [1, 1, 1, 0]), write(tmp_path / "a", "s", [0, 0, 1, 0])
    found = forgetting(before, after, "s")
    gain, drop, mean = gain_drop(before, {"sft": [after]}, "s", ["s"])
    assert (gain["value_low"], gain["value_high"]) == (found.low, found.high)
    for row in (drop, mean):
        assert (row["value_low"], row["value_high"]) == pytest.approx((-found.high, -found.low))


def test_two_suites_that_lose_nothing_have_a_mean_drop_that_is_surer_than_either(tmp_path: Path) -> None:
    folders = [write(write(tmp_path / name, "s", [1] * 9), "t", [1] * 9) for name in "ba"]
    *_, one, mean = gain_drop(folders[0], {"sft": [folders[1]]}, "s", ["s", "t"])
    assert mean["value_high"] == pytest.approx(one["value_high"] / math.sqrt(2), rel=0.1)
