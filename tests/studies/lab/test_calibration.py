"""The calibration's own arithmetic, and that it finds out an estimator that is wrong."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from drift import alignment
from studies.lab import calibration
from studies.lab.calibration import GROUPS, SLOW, calibrate
from studies.lab.place import Case, Found, Place, Pool, bare, within
from studies.lab.tree import N_RESPONSES
from tests.studies.lab import tiny


def row(find: Callable[[int], Found], exact: float, repeats: int) -> dict:
    return calibration._row(Case("quantity", "estimator", 5, exact, find, seconds=0.5), repeats)


def test_bias_has_an_error_and_intervals_that_miss_on_either_side_are_counted() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 10.0]
    found = row(lambda k: (values[k], values[k] - 2, values[k] + 2), 4.0, 5)
    assert (found["mean"], found["bias"], found["undefined"], found["seconds"], found["of_pass"]) == (4.0, 0.0, 0, 0.5, None)
    assert found["bias_error"] == pytest.approx(np.std(values, ddof=1) / 5**0.5) and found["spread"] == pytest.approx(np.std(values, ddof=1))
    assert found["coverage"] == 3 / 5  # 1 ± 2 lies below 4, 10 ± 2 above it, and 2 ± 2 just holds it
    wilson = binomtest(3, 5).proportion_ci(method="wilson")
    assert (found["coverage_low"], found["coverage_high"]) == (wilson.low, wilson.high)


def test_what_is_undefined_is_counted_and_left_out() -> None:
    found = row(lambda k: within(math.nan, 1.0, 3) if k < 2 else (float(k), 1.0, math.nan) if k == 2 else (float(k), 3.5, 9.0), 4.0, 6)
    assert found["undefined"] == 2 and found["mean"] == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert found["coverage"] == 1.0 and found["coverage_low"] < 0.5  # of three intervals
    found = row(lambda k: bare(float(k)), 4.0, 6)
    assert found["coverage"] is None and found["coverage_low"] is None and found["undefined"] == 0


def gradients(names: tuple[str, ...], repeats: int, n: int = 8) -> dict[str, dict]:
    """Rows of cases of gradients that are looked at, by the estimator and its quantity's first letters."""
    cases = calibration.gradients(Place(tiny.bases()), repeats, n)
    return {c.estimator: calibration._row(c, repeats) for c in cases if c.estimator in names and "self" not in c.quantity and "⟨" not in c.quantity}


def test_a_wrong_estimator_and_a_wrong_interval_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "cost", lambda self, batch, call: {})
    right, wrong = "alignment.mean_inner", "uncorrected: ‖mean g‖²"
    found = gradients((right, wrong), 200)
    assert abs(found[right]["bias"]) < 4 * found[right]["bias_error"] and found[wrong]["bias"] > 5 * found[wrong]["bias_error"]
    assert found[right]["exact"] == found[wrong]["exact"] > 0 and found[right]["rows"] == 8
    inner, error = alignment.mean_inner, alignment.mean_inner_error
    monkeypatch.setattr(alignment, "mean_inner", lambda *args: 1.1 * inner(*args))
    monkeypatch.setattr(alignment, "mean_inner_error", lambda *args: error(*args) / 4)
    changed = gradients((right,), 200)[right]
    assert changed["bias"] > 4 * changed["bias_error"] and changed["coverage_high"] < 0.8 < found[right]["coverage"]


def test_exact_powers_are_means_over_rows() -> None:
    place = Place(tiny.bases())
    numbers = Pool(place, ("external",), 1, 4000, 0).drawn["external"][0]
    squares = calibration.exact.row_gradients(place.bases.model, place.bases.one(0), numbers // N_RESPONSES, numbers % N_RESPONSES).square().sum(1)
    assert calibration._expected_power(place, "external") == pytest.approx(squares.mean().item(), abs=4 * squares.std().item() / 4000**0.5)


def test_answers_are_drawn_given_their_prompts() -> None:
    rows = torch.zeros(9, N_RESPONSES, dtype=torch.float64)
    rows[2, 5], rows[2, 7], rows[4, 11] = 0.3, 0.1, 0.6
    prompts = torch.tensor([4, 2] * 2000)
    x, r = np.divmod(calibration._answers(rows, prompts, torch.Generator().manual_seed(0)).numpy(), N_RESPONSES)
    assert (x == prompts.numpy()).all() and (r[::2] == 11).all()
    assert set(r[1::2]) == {5, 7} and (r[1::2] == 5).mean() == pytest.approx(0.75, abs=0.04)


def test_decompositions_in_a_basis_of_the_rows_span_are_those_of_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[Found]:
        return [case.find(k) for case in calibration.decompositions(Place(tiny.bases()), 2, 12, timed=False) for k in range(2)]

    reduced = found()
    monkeypatch.setattr(np.linalg, "qr", lambda matrix: (np.eye(len(matrix)), None))
    np.testing.assert_allclose(reduced, found(), rtol=1e-8)
    assert np.isfinite(np.array(reduced)[:, 0]).all()


def test_groups_that_need_few_repeats_exist() -> None:
    assert set(SLOW) < set(GROUPS)
    rows = calibrate(tiny.bases(), "seed intervals", 20)
    assert [r["rows"] for r in rows] == [3, 3, 10, 10, 12, 12, 100, 100] and {r["exact"] for r in rows} == {0.0, 1.0}
