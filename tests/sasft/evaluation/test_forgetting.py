"""Flips counted by hand, intervals against the bootstrap they stand for and by simulated coverage, gain against drop."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t

from sasft.errors import UsageError
from sasft.evaluation import curve, drop_at, figure, forgetting, gain_drop
from sasft.evaluation.forgetting import compared
from sasft.evaluation.intervals import Estimate, average, chance_adjusted, mcnemar, mean, ratio_parts


def write(folder: Path, suite: str, scores: Sequence[float | tuple[float, float]], metric: str = "acc",
          **fields: Sequence) -> Path:
    """An evaluation's folder with one record a score; ``fields`` have a value for each."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.jsonl").open("a") as file:
        for i, score in enumerate(scores):
            pair = score if isinstance(score, tuple) else (score, 1.0)
            file.write(json.dumps({"suite": suite, "id": str(i), "prompt_sha256": f"p{i}", "scores": {metric: pair},
                                   **{name: values[i] for name, values in fields.items()}}) + "\n")
    return folder


BEFORE, AFTER = [1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]


def test_flips_by_hand(tmp_path: Path) -> None:
    before = write(tmp_path / "b", "s", BEFORE)
    after = write(tmp_path / "a", "s", AFTER, finished=[True, False, False, False, False, True])
    found = forgetting(before, after, "s")
    assert (found.metric, found.n, found.seeds, found.before, found.after) == ("acc", 6, 1, pytest.approx(4 / 6), 0.5)
    assert (found.lost, found.gained, found.lost_unfinished) == pytest.approx((2 / 6, 1 / 6, 2 / 6))
    assert found.change == pytest.approx(-1 / 6) == pytest.approx(found.gained - found.lost)
    assert found.drop == pytest.approx(1 / 6)
    assert found.choices is None and (found.lost_adjusted, found.gained_adjusted) == pytest.approx((2 / 6, 1 / 6))
    assert found.p_values == (pytest.approx(binomtest(2, 3).pvalue),)
    # Half a pair more in each of the four cells: 2.5 of 8 lost, 1.5 of 8 gained.
    reach = t.ppf(0.975, 6) * math.sqrt((4 / 8 - (1 / 8) ** 2) / 8)
    assert (found.low, found.high) == pytest.approx((-1 / 8 - reach, -1 / 8 + reach))
    assert found.lost_interval == pytest.approx(tuple(binomtest(2, 6).proportion_ci(method="wilson")))


def test_scores_that_are_no_shares_have_students_interval(tmp_path: Path) -> None:
    old, new = np.array([0.2, 0.9, 1.0, 0.0, 0.5]), np.array([0.1, 0.3, 1.0, 0.2, 0.0])
    found = forgetting(write(tmp_path / "b", "s", old.tolist()), write(tmp_path / "a", "s", new.tolist()), "s")
    reach = t.ppf(0.975, 4) * (new - old).std(ddof=1) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx(((new - old).mean() - reach, (new - old).mean() + reach))


def test_flips_beyond_guessing(tmp_path: Path) -> None:
    four = [4] * 6
    before, after = write(tmp_path / "b", "s", BEFORE, choices=four), write(tmp_path / "a", "s", AFTER, choices=four)
    found = forgetting(before, after, "s")
    assert found.choices == 4
    assert found.lost_adjusted == pytest.approx(2 / 6 - (2 / 6) * (3 / 6) / 3)
    assert found.gained_adjusted == pytest.approx(1 / 6 - (2 / 6) * (3 / 6) / 3)
    assert forgetting(before, after, "s", choices=2).lost_adjusted == pytest.approx(2 / 6 - (2 / 6) * (3 / 6))
    write(tmp_path / "mixed", "s", BEFORE, choices=[4, 4, 4, 4, 4, 5])
    with pytest.raises(UsageError, match="differ in their numbers of choices"):
        forgetting(before, tmp_path / "mixed", "s")


def test_a_model_that_only_guesses_has_forgotten_nothing_in_the_mean() -> None:
    """k = 4, 60 % known to both, the rest guessed anew: items are lost, none beyond chance."""
    rng = np.random.default_rng(0)
    found, raw = [], []
    for _ in range(200):
        known = rng.random(500) < 0.6
        before, after = (known | (rng.random(500) < 0.25) for _ in range(2))
        raw.append((before & ~after).mean())
        found.append(raw[-1] - (1 - before.mean()) * (1 - after.mean()) / 3)
    assert np.mean(raw) > 0.07
    # Ignorance is not independent here (the same items are unknown), which is what the formula supposes; it takes off 0.3²/3.
    assert np.mean(found) == pytest.approx(0.4 * 0.25 * 0.75 - 0.3**2 / 3, abs=0.004)
    assert chance_adjusted(0.1, 0.25, 0.25, 4) == 0


def test_guessing_on_independent_ignorance_is_taken_off_exactly() -> None:
    """What is known before and after are independent: what flips by guessing is (1 − a)(1 − a')/(k − 1), and no more."""
    rng = np.random.default_rng(1)
    n, k = 400_000, 4
    knows, still = rng.random(n) < 0.5, rng.random(n) < 0.5
    before, after = knows | (rng.random(n) < 1 / k), still | (rng.random(n) < 1 / k)
    by_guessing = (~knows & before & ~still & ~after).mean()
    assert (1 - before.mean()) * (1 - after.mean()) / (k - 1) == pytest.approx(by_guessing, abs=0.002)


def test_mcnemar_as_the_binomial_test() -> None:
    for lost, gained in ((8, 1), (1, 8), (3, 3), (0, 0), (20, 9)):
        exact = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert mcnemar(lost, gained) == pytest.approx(exact)


def test_losses_drop_upwards_and_weights_count(tmp_path: Path) -> None:
    before = write(tmp_path / "b", "s", [(2.0, 1.0), (6.0, 3.0)], metric="nll/model")
    after = write(tmp_path / "a", "s", [(3.0, 1.0), (9.0, 3.0)], metric="nll/model")
    found = forgetting(before, after, "s")
    assert (found.before, found.after, found.change, found.drop) == (2.0, 3.0, 1.0, 1.0) and found.lost is None


def test_seeds_are_averaged_and_widen_the_interval(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "s", [1] * 8)
    same = [write(tmp_path / f"same{s}", "s", [1, 1, 1, 1, 1, 1, 0, 0]) for s in range(3)]
    apart = [write(tmp_path / f"apart{s}", "s", [1] * (8 - n) + [0] * n) for s, n in enumerate((0, 2, 4))]
    alike, spread = forgetting(base, same, "s"), forgetting(base, apart, "s")
    assert alike.change == spread.change == pytest.approx(-0.25) and spread.seeds == 3
    assert spread.high - spread.low > alike.high - alike.low
    assert spread.p_values == (1.0, pytest.approx(0.5), pytest.approx(0.125))
    with pytest.raises(UsageError, match="one folder, or one for each of after: got 2 and 3"):
        forgetting([base, base], apart, "s")
    assert forgetting([base] * 3, apart, "s") == spread


def test_evaluations_that_cannot_be_compared(tmp_path: Path) -> None:
    base = write(tmp_path / "b", "s", [1, 0])
    with pytest.raises(UsageError, match="no results of the suite 't'"):
        forgetting(base, base, "t")
    with pytest.raises(UsageError, match="no score 'f1'; they have acc"):
        forgetting(base, base, "s", "f1")
    with pytest.raises(UsageError, match="different items: 1 are not in both, such as '2'"):
        forgetting(base, write(tmp_path / "more", "s", [1, 0, 1]), "s")
    other = write(tmp_path / "other", "s", [1, 0], prompt_sha256=["p0", "another"])
    with pytest.raises(UsageError, match="different prompts .1 items, such as '1'"):
        forgetting(base, other, "s")


# --- intervals ----------------------------------------------------------------------------------------------------


def resampled(old: np.ndarray, new: np.ndarray, clusters: np.ndarray, over: str, draws: int = 3000) -> np.ndarray:
    """The paired bootstrap of a difference of ratios, [S, I, 2] each, over seeds or over clusters: how often each is drawn."""
    sums = np.stack([np.concatenate([x[:, clusters == name].sum(1) for x in (old, new)], -1) for name in np.unique(clusters)], 1)
    kept = sums.sum(1) if over == "seeds" else sums.sum(0)  # [members, 4]
    n = len(kept)
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=draws) @ kept
    return drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]


def test_variances_are_those_of_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(5)
    n_seeds, n_items = 8, 120
    clusters = np.repeat(np.arange(40), 3)
    weights = rng.integers(1, 20, n_items) * np.ones((n_seeds, 1))
    hard = rng.normal(size=n_items) + rng.normal(size=40)[clusters]
    old = np.stack([weights * (hard + rng.normal(size=(n_seeds, n_items))), weights], -1)
    new = np.stack([weights * (hard + rng.normal(size=(n_seeds, 1)) + rng.normal(size=(n_seeds, n_items))), weights], -1)
    (was, p_old), (now, p_new) = (ratio_parts(x[..., 0], x[..., 1]) for x in (old, new))
    found = Estimate.of(now - was, p_new - p_old, [str(c) for c in clusters])
    by_item, by_seed = (resampled(old, new, clusters, over).var() for over in ("clusters", "seeds"))
    assert found.stderr**2 == pytest.approx(by_item * 40 / 39, rel=0.08)
    assert float((found.by_seed**2).sum()) == pytest.approx(by_seed, rel=0.08)
    low, high = found.interval()
    v_s, v_i = (found.by_seed**2).sum() * 8 / 7, found.stderr**2
    freedom = (v_s + v_i) ** 2 / (v_s**2 / 7 + v_i**2 / 39)
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(v_s + v_i))


def covered(draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, Sequence[str]]], truth: float,
            runs: int = 600) -> float:
    """The share of simulated studies whose 95 % interval holds the truth."""
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(runs):
        old, new, clusters = draw(rng)
        ones = np.ones_like(old)
        (was, p_old), (now, p_new) = ratio_parts(old, ones), ratio_parts(new, ones)
        low, high = Estimate.of(now - was, p_new - p_old, clusters).interval()
        hits += low <= truth <= high
    return hits / runs


def right_or_wrong(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """100 items of one seed, 20 % of the known ones lost and 10 % of the unknown gained: −0.2 · 0.7 + 0.1 · 0.3 = −0.11."""
    before = rng.random((1, 100)) < 0.7
    after = np.where(before, rng.random((1, 100)) > 0.2, rng.random((1, 100)) < 0.1)
    return before.astype(float), after.astype(float), [str(i) for i in range(100)]


def under_seeds(n_seeds: int) -> Callable:
    """Each seed shifts all items, each item has its own drop, and seeds differ item by item a little; mean −0.5."""
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
        old = np.repeat(rng.normal(size=(1, 60)), n_seeds, axis=0)
        shift = -0.5 + rng.normal(scale=0.3, size=(n_seeds, 1)) + rng.normal(scale=1.0, size=(1, 60))
        return old, old + shift + rng.normal(scale=0.3, size=(n_seeds, 60)), [str(i) for i in range(60)]
    return draw


def in_passages(named: bool) -> Callable:
    """30 passages of 5 questions that are lost together; ``named``: the interval is told so."""
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
        passage = np.repeat(np.arange(30), 5)
        lost = (rng.random(30) < 0.3)[passage] ^ (rng.random(150) < 0.05)
        clusters = [str(p) for p in passage] if named else [str(i) for i in range(150)]
        return np.ones((1, 150)), 1.0 - lost[None].astype(float), clusters
    return draw


def test_intervals_cover() -> None:
    """95 % ± three standard errors of 600 simulations; two seeds are too few for Satterthwaite's freedom."""
    assert 0.87 < covered(under_seeds(2), -0.5) < 0.98
    assert 0.92 < covered(right_or_wrong, -0.11) < 0.98
    assert 0.92 < covered(under_seeds(3), -0.5) < 0.98
    assert 0.92 < covered(under_seeds(10), -0.5) < 0.98
    assert 0.92 < covered(in_passages(named=True), -0.32) < 0.98  # 0.3 · 0.95 + 0.7 · 0.05
    assert covered(in_passages(named=False), -0.32) < 0.75


def test_the_share_lost_and_what_of_it_is_beyond_chance_cover() -> None:
    """k = 4: 150 items, half known before; of these 30 % unlearned; the rest guessed. Runs that hold the true values."""
    rng = np.random.default_rng(2)
    truth_lost = 0.5 * 0.3 * 0.75 + 0.5 * 0.25 * 0.75
    a, b = 0.5 + 0.5 * 0.25, 0.35 + 0.65 * 0.25
    hits = np.zeros(2)
    for _ in range(200):
        known = rng.random(150) < 0.5
        before = known | (rng.random(150) < 0.25)
        after = (known & (rng.random(150) > 0.3)) | (rng.random(150) < 0.25)
        records = ([{"id": str(i), "prompt_sha256": "", "scores": {"acc": (float(s), 1.0)}, "choices": 4} for i, s in enumerate(x)]
                   for x in (before, after))
        found, _ = compared(*([one] for one in records), "s")
        for i, (interval, truth) in enumerate(((found.lost_interval, truth_lost),
                                               (found.lost_adjusted_interval, truth_lost - (1 - a) * (1 - b) / 3))):
            hits[i] += interval[0] <= truth <= interval[1]
    assert (hits / 200 > 0.90).all() and (hits < 200).all()


def test_the_interval_of_what_is_beyond_chance_is_the_bootstraps(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    n, k = 300, 3
    before = rng.random(n) < 0.6
    after = np.where(before, rng.random(n) < 0.6, rng.random(n) < 0.2)
    found = forgetting(*(write(tmp_path / name, "s", x.astype(float).tolist(), choices=[k] * n)
                         for name, x in (("b", before), ("a", after))), "s")
    shares = rng.multinomial(n, [1 / n] * n, size=4000) @ np.stack([before & ~after, before, after], 1) / n
    drawn = shares[:, 0] - (1 - shares[:, 1]) * (1 - shares[:, 2]) / (k - 1)
    low, high = found.lost_adjusted_interval
    assert (high - low) / (2 * t.ppf(0.975, n - 1)) == pytest.approx(drawn.std() * math.sqrt(n / (n - 1)), rel=0.04)
    assert (low + high) / 2 == pytest.approx(found.lost_adjusted)


def test_one_cluster_has_no_interval_and_no_change_a_point() -> None:
    assert math.isnan(mean([(1.0, 1.0), (0.0, 1.0)], ["a", "a"])[1])
    low, high = Estimate.of(0.5, np.array([[0.1]]), ["a"]).interval()
    assert math.isnan(low) and math.isnan(high)
    assert Estimate.of(0.0, np.zeros((2, 3)), list("abc")).interval() == (0.0, 0.0)


# --- gain against drop --------------------------------------------------------------------------------------------


def study(tmp_path: Path) -> list[dict]:
    def run(name: str, task: Sequence[float], one: Sequence[float], nll: Sequence[float]) -> Path:
        folder = write(tmp_path / name, "task", task)
        write(folder, "one", one)
        return write(folder, "nll", nll, metric="nll/model")

    base = run("base", [0, 0, 0, 1], [1, 1, 1, 1], [1.0, 2.0, 3.0, 4.0])
    mild = [run("mild0", [0, 0, 1, 1], [1, 1, 1, 0], [1.0, 2.0, 3.0, 4.4]),
            run("mild1", [0, 1, 1, 1], [1, 1, 1, 1], [1.0, 2.0, 3.0, 4.4])]
    hard = [run("hard0", [1, 1, 1, 1], [0, 0, 1, 1], [1.8, 2.0, 3.0, 5.0]),
            run("hard1", [1, 1, 1, 1], [0, 0, 0, 1], [2.0, 2.0, 3.0, 5.0])]
    self_data = [run("self", [1, 1, 0, 1], [1, 1, 1, 1], [1.0, 2.0, 3.0, 4.0])]
    return gain_drop(base, {"sft": {1e-5: mild, 1e-4: hard}, "sa-sft": self_data}, "task", ["one", ("nll", "nll/model")])


def test_the_table_of_gains_and_drops(tmp_path: Path) -> None:
    rows = study(tmp_path)
    assert [(r["method"], r["setting"], r["kind"], r.get("suite")) for r in rows] == [
        (method, setting, kind, suite) for method, setting in (("sft", 1e-5), ("sft", 1e-4), ("sa-sft", None))
        for kind, suite in (("gain", "task"), ("drop", "one"), ("drop", "nll"), ("mean drop", None))]
    assert [r["value"] for r in rows[:4]] == pytest.approx([0.375, 0.125, 0.1, 0.1125])  # an NLL that rises is a drop
    assert [r["value"] for r in rows[4:8]] == pytest.approx([0.75, 0.625, 0.475, 0.55])
    assert all(r["value_low"] <= r["value"] <= r["value_high"] for r in rows)
    drop = rows[1]
    assert (drop["value_low"], drop["value_high"]) == pytest.approx((-drop["high"], -drop["low"]))
    loss = rows[2]
    assert (loss["value_low"], loss["value_high"]) == pytest.approx((loss["low"], loss["high"]))


def test_a_mean_drop_reckons_with_shared_seeds() -> None:
    """Two suites that the same seed harms alike: the mean is as uncertain as either; with opposite harms it is certain."""
    rng = np.random.default_rng(0)
    seeds, items = rng.normal(size=(5, 1)), np.zeros((1, 30))
    one = Estimate.of(0.0, (seeds - seeds.mean() + items) / 150, [f"one/{i}" for i in range(30)])
    two = Estimate.of(0.0, (seeds - seeds.mean() + items) / 150, [f"two/{i}" for i in range(30)])
    minus = Estimate.of(0.0, -(seeds - seeds.mean() + items) / 150, [f"two/{i}" for i in range(30)])
    assert (average([one, two]).by_seed**2).sum() == pytest.approx((one.by_seed**2).sum())
    assert average([one, minus]).interval() == pytest.approx((0.0, 0.0), abs=1e-15)


def test_a_mean_drop_of_different_items_is_surer_than_one_of_the_same() -> None:
    parts = np.random.default_rng(0).normal(size=(1, 30)) / 30
    one, same, other = (Estimate.of(0.0, parts, [f"{name}/{i}" for i in range(30)]) for name in ("one", "one", "two"))
    assert average([one, same]).stderr == pytest.approx(one.stderr)
    assert average([one, other]).stderr == pytest.approx(one.stderr / math.sqrt(2))


def test_the_curve_and_the_drop_at_one_gain(tmp_path: Path) -> None:
    points = curve(study(tmp_path))
    assert [(p["method"], p["setting"]) for p in points] == [("sft", 1e-5), ("sft", 1e-4), ("sa-sft", None)]
    expected = np.array([(0.375, 0.1125), (0.75, 0.55), (0.5, 0.0)])
    assert np.array([(p["gain"], p["drop"]) for p in points]) == pytest.approx(expected)
    assert all(p["drop_low"] <= p["drop"] <= p["drop_high"] and p["gain_low"] <= p["gain"] <= p["gain_high"] for p in points)
    at = drop_at(points, 0.5)
    assert at == {"sft": pytest.approx(0.1125 + (0.55 - 0.1125) / 3), "sa-sft": pytest.approx(0.0)}
    assert drop_at(points, 0.1875)["sft"] == pytest.approx(0.05625)  # half-way from the base
    assert drop_at(points, 0.6) == {"sft": pytest.approx(0.1125 + 0.6 * (0.55 - 0.1125)), "sa-sft": None}


def test_the_figure_shows_the_points_and_their_intervals(tmp_path: Path) -> None:
    points = curve(study(tmp_path))
    drawn = figure(points, gain="exact match", drop="mean drop")
    [axis] = drawn.axes
    bars = {bar.get_label(): bar for bar in axis.containers}
    assert bars.keys() == {"sft", "sa-sft"}
    data, _, (horizontal, vertical) = bars["sft"].lines
    assert np.column_stack(data.get_data()) == pytest.approx(np.array([[0.1125, 0.375], [0.55, 0.75]]))
    assert horizontal.get_segments()[1][:, 0] == pytest.approx([points[1]["drop_low"], points[1]["drop_high"]])
    assert vertical.get_segments()[0][:, 1] == pytest.approx([points[0]["gain_low"], points[0]["gain_high"]])
    assert "exact match" in axis.get_ylabel() and {text.get_text() for text in axis.texts} == {"1e-05", "0.0001"}
