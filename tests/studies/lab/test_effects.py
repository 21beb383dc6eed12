"""Effects against arithmetic on tables made by hand."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import spearmanr

from studies.lab import effects as module
from studies.lab.effects import ACCOUNTS, Race, at_equal_gain, at_gain, column, effects
from studies.lab.experiment import LAMBDAS, TASK_ONLY
from studies.lab.predictions import PREDICTIONS
from studies.stats import judge, over_seeds
from tests.studies.lab import hand
from tests.studies.lab.hand import SPREAD, N

MEAN = SPREAD * (N - 1) / 2  # what seeds add, on average


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "over_seeds", partial(over_seeds, draws=50))


# --- from rows to numbers ------------------------------------------------------------------------------------------------


def test_a_column_has_one_number_a_seed_in_their_order() -> None:
    rows = [{"seed": s, "arm": a, "kl": 10 * s + len(a)} for s in (1, 2, 0) for a in ("x", "long")]
    assert column(rows, "kl", 3, arm="long").tolist() == [4, 14, 24]
    with pytest.raises(ValueError, match=r"kl must be there once for each of 4 seeds where \{'arm': 'x'\}; seeds found: \[0, 1, 2\]"):
        column(rows, "kl", 4, arm="x")
    with pytest.raises(ValueError, match=r"seeds found: \[0, 0, 1, 1, 2, 2\]"):
        column(rows, "kl", 3)


def rows_of(arm: str, seed: int, gains: list[float], lost: list[float]) -> list[dict]:
    return [{"arm": arm, "seed": seed, "step": k, "gain": g, "kl": f} for k, (g, f) in enumerate(zip(gains, lost, strict=True))]


def test_forgetting_where_a_gain_is_first_reached() -> None:
    rows = rows_of("a", 0, [0, 0.2, 0.6], [0, 1, 5]) + rows_of("a", 1, [0, 0.4, 0.3, 0.5], [0, 2, 3, 9]) + rows_of("b", 0, [0, 9, 9], [9, 9, 9])
    rows.reverse()  # rows are in no order
    for gain, expected in (([0.1, 0.2], [0.5, 1.0]), ([0.4, 0.35], [5**0.5, 1.75]), ([0.2, 0.4], [1.0, 2.0]), ([0.6, 0.45], [5.0, 3**0.25 * 9**0.75]),
                           ([0.0, 0.0], [0.0, 0.0])):
        assert at_gain(rows, "kl", "a", np.array(gain), 2) == pytest.approx(expected)
    never = at_gain(rows, "kl", "a", np.array([0.61, -0.1]), 2)
    assert np.isnan(never).all()
    assert at_gain(rows_of("flat", 0, [0, 0, 0.1], [0, 4, 5]), "kl", "flat", np.array([0.0]), 1) == [0]  # before it loses anything


def test_at_equal_gain_the_richer_arm_is_met_on_its_way() -> None:
    rows = []
    for seed, (mixed, alone) in enumerate((((0.5, 1.0), (1.0, 8.0)), ((0.9, 3.0), (0.3, 6.0)))):
        rows += rows_of("mix", seed, [0, mixed[0]], [0, mixed[1]]) + rows_of(TASK_ONLY, seed, [0, alone[0]], [0, alone[1]])
    # Seed 0: the mix ends at 0.5, where the task alone, half way, has lost 4. Seed 1: the task alone ends at 0.3, a third of the mix's way.
    assert at_equal_gain(rows, "kl", 2, "mix") == pytest.approx([4 - 1, 6 - 1])
    assert at_equal_gain(rows, "kl", 2, TASK_ONLY, "mix") == pytest.approx([-3, -5])


# --- the effects of the predictions ------------------------------------------------------------------------------------------


def test_every_prediction_s_effect_by_hand() -> None:
    found = effects(hand.tables(), N)
    assert list(found) == [p.id for p in PREDICTIONS]
    kl = {arm: hand.END[arm][0] + MEAN * (arm != "own/old") for arm in hand.END}
    said = {arm: hand.END[arm][1] + MEAN * (arm != "own/old") for arm in hand.END}

    def share(cell: dict[str, float]) -> float:
        style = (cell["foreign/old"] - cell["own/old"] + cell[TASK_ONLY] - cell["own/new"]) / 2
        content = (cell["own/new"] - cell["own/old"] + cell[TASK_ONLY] - cell["foreign/old"]) / 2
        return style / (style + content)

    def spared(ends: dict[str, float]) -> float:  # SA-SFT ends at half of the task's gain, where the task alone has lost half
        return ends[TASK_ONLY] / 2 - ends["SA-SFT 0.5"]

    expected = {
        "C1/lab/exact": 1e-15 * (1 + MEAN), "C1/lab/paper": 0.3 * (1 + MEAN), "C1/lab/paper below task": 0.3 * (1 + MEAN), "C1/lab/mean loss": 0.1 * (1 + MEAN),
        "C1/lab/deduplicated": 0.05 * (1 + MEAN), "C2/lab/kl": kl["foreign/old"], "C2/lab/content": said["foreign/old"],
        "C3/lab/kl": share(kl), "C3/lab/content": share(said), "C4/lab/coherence": 0.4 - MEAN, "C4/lab/shared": 0.6, "C5/lab/kl": 2.0,
        "C6/lab/slope": 0.02, "C6/lab/push": 0.5 + MEAN, "C6/lab/against the task": -0.2 - MEAN,
        "C7/lab/selective": 0.75 - 0.5, "C7/lab/dose, early": math.log(1.1), "C7/lab/dose, end": 10.0, "C7/lab/dose, end, Gauss-Newton": math.log(1.2),
        "C8/lab/kl": 0.6, "C8/lab/content": -0.05, "C8/lab/order": 1.0, "C9/lab/kl": 0.9 / 1.0, "C9/lab/content": 0.3 / 0.6,
        "C2/lab/kl, sampled": kl["foreign/old"], "C3/lab/kl, sampled": share(kl), "C5/lab/kl, ends": 2.0, "C8/lab/kl, as varied": 0.4,
        "C7/lab/selective, equal dose": np.mean([(0.1 + d) / (0.4 + d) - (0.3 + d) / (0.8 + d) for d in SPREAD * np.arange(N)]),
        "C10/lab/kl, sampled": spared(kl), "C11/lab/paper, sampled": -0.5, "C10/lab/kl": spared(kl), "C10/lab/content": spared(said), "C11/lab/exact": 0.1, "C11/lab/paper": -0.5}
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-9), name
        assert found[name].low <= found[name].value <= found[name].high, name
    assert set(found) - set(expected) == {"C5/lab/content"}
    verdicts = {p.id: judge(found[p.id], sesoi=p.sesoi, predicted=p.predicted) for p in PREDICTIONS}
    assert {name for name, v in verdicts.items() if v != "supported"} == {
        "C3/lab/content", "C7/lab/selective, equal dose", "C7/lab/dose, end", "C8/lab/content", "C9/lab/content"}
    assert verdicts["C9/lab/content"] == verdicts["C7/lab/dose, end"] == "contradicted"


def test_intervals_are_over_seeds_that_the_arms_share() -> None:
    found = effects(hand.tables(), N)
    # What seeds add to both arms cancels in their difference; to one of them, it is the spread of a mean of N.
    assert found["C8/lab/kl"].high - found["C8/lab/kl"].low < 1e-9
    width = found["C2/lab/kl"].high - found["C2/lab/kl"].low
    assert 0 < width < 10 * SPREAD


def test_a_forecast_that_is_no_number_is_no_support() -> None:
    tables = hand.tables()
    for row in tables["dose"]:
        row["kl_foretold"] = math.inf
    assert effects(tables, N)["C7/lab/dose, end"].value == 10
    for row in tables["dose"]:
        row["kl_foretold"] = math.nan
    assert math.isnan(effects(tables, N)["C7/lab/dose, end"].value)


def test_the_smallest_drift_on_the_line_is_the_one_that_counts() -> None:
    tables = hand.tables()
    for row in tables["push"]:
        if row["course"] != "line":
            row |= {"drift": 1e-9, "slope": 77.0}
    assert effects(tables, N)["C6/lab/slope"].value == pytest.approx(0.02)


# --- the race of accounts ------------------------------------------------------------------------------------------------


def test_the_race_is_spearman_s_over_arms_steps_and_seeds() -> None:
    tables = hand.tables()
    rng = np.random.default_rng(0)
    for r in tables["accounts"]:
        r["spectral"] = rng.random()
        if r["step"] == 0 or r["arm"] == "own/old":  # of no account: nothing was forgotten there
            r["fisher"], r["l2"] = 1e6, 1e6
    race = Race(tables, "kl", N)
    assert set(race.accounts) == set(ACCOUNTS) - {"kl"} and set(Race(tables, "content", N).accounts) == set(ACCOUNTS)
    everyone = np.arange(N)
    assert race.correlation("fisher", everyone) == pytest.approx(1) and race.correlation("l2", everyone) == pytest.approx(-1)
    assert race.correlation("fisher_diagonal", everyone) == pytest.approx(1)  # ranks alone count
    chosen = np.array([2, 2, 0])  # a draw of the bootstrap: a seed may come twice
    rows = {(r["arm"], r["seed"], r["step"]): r for r in tables["accounts"]}
    pairs = [(rows[r["arm"], s, r["step"]]["spectral"], r["kl"]) for s in chosen for r in tables["arms"] if r["seed"] == s and r["step"] > 0 and r["arm"] != "own/old"]
    assert race.correlation("spectral", chosen) == pytest.approx(spearmanr(*np.array(pairs).T).statistic)


def test_early_is_what_the_first_step_forgot() -> None:
    race = Race(hand.tables(), "content", N)
    steps, arms = len(hand.STEPS) - 1, race.outcome.shape[1] // (len(hand.STEPS) - 1)
    early, kl = (race.accounts[name].reshape(N, arms, steps) for name in ("early", "kl"))
    assert (early == kl[:, :, :1]).all() and len(LAMBDAS) < arms
