"""The mix is exact, seeded, and says what it is."""

import json
from pathlib import Path

import pytest

from sasft.errors import UsageError
from sasft.mixing import SELF, TASK, make_plan

TASK_TOKENS, SELF_TOKENS = [7, 3, 5, 9, 4, 6] * 5, [11, 2, 8, 10] * 6


def counts(plan, source: str) -> list[int]:
    return [sum(s == source for s, _ in step) for step in plan]


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.77])
def test_rows_are_off_by_less_than_one_at_every_step(lam: float) -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=40, rows_per_step=7, lam=lam, seed=3)
    task = self_ = 0
    for k, (t, s) in enumerate(zip(counts(plan, TASK), counts(plan, SELF), strict=True), start=1):
        task, self_ = task + t, self_ + s
        assert t + s == 7 and abs(self_ - lam * 7 * k) <= 0.51
    assert plan.report()["lambda_rows"] == pytest.approx(lam, abs=0.51 / (40 * 7))


def test_budgets_of_tokens_are_kept_on_running_totals() -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=30, tokens_per_step=20, lam=0.5, seed=1)
    spent = 0
    for k, tokens in enumerate(plan.loss_tokens(TASK), start=1):
        spent += tokens
        assert abs(spent - 20 * k) <= max(TASK_TOKENS) / 2
    assert abs(sum(counts(plan, TASK)) - sum(counts(plan, SELF))) <= 1


def test_the_report_is_recounted_from_the_rows() -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=10, rows_per_step=4, lam=0.5, seed=0)
    task = sum(TASK_TOKENS[i] for step in plan for s, i in step if s == TASK)
    own = sum(SELF_TOKENS[i] for step in plan for s, i in step if s == SELF)
    report = plan.report()
    assert report["loss_tokens"] == {TASK: task, SELF: own} and report["rows"] == {TASK: 20, SELF: 20}
    assert report["lambda_tokens"] == own / (task + own) and report["lambda_asked"] == 0.5
    assert report["epochs"] == {TASK: 20 / 30, SELF: 20 / 24}


def test_every_row_is_read_once_before_any_twice() -> None:
    plan = make_plan([1] * 10, [], steps=5, rows_per_step=4, seed=0)
    read = [i for step in plan for _, i in step]
    assert sorted(read[:10]) == list(range(10)) and sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]


def test_seeds_and_sources_have_their_own_orders() -> None:
    def order(source: str, **kwargs) -> list[int]:
        plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=5, **{"rows_per_step": 4, "seed": 0, **kwargs})
        return [i for step in plan for s, i in step if s == source]

    assert order(TASK, lam=0.5) == order(TASK, lam=0.5) != order(TASK, lam=0.5, seed=1)
    # mixing self rows in leaves the task's order alone, so that arms see the same rows in the same order
    assert order(TASK, lam=0.5, rows_per_step=8) == order(TASK, lam=0.0)


def test_the_plan_on_disk_is_the_plan(tmp_path: Path) -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=3, rows_per_step=4, lam=0.25)
    plan.save(tmp_path / "plan.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert [tuple(map(tuple, line["rows"])) for line in lines] == list(plan) and lines[0]["step"] == 1


@pytest.mark.parametrize("kwargs, message", [
    ({"lam": 1.0}, r"lam \(the share of self rows\) must lie in \[0, 1\), got 1.0"),
    ({"lam": -0.1}, r"must lie in \[0, 1\), got -0.1"),
    ({"lam": float("nan")}, r"must lie in \[0, 1\), got nan"),
    ({"lam": 0.5, "self_tokens": []}, "lam is 0.5, so self rows are needed, but there are none; write some with `sasft generate`"),
    ({"task_tokens": []}, "there are no task rows to train on"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"rows_per_step": None}, "give either rows_per_step or tokens_per_step, got None and None"),
    ({"tokens_per_step": 9}, "give either rows_per_step or tokens_per_step, got 4 and 9"),
    ({"rows_per_step": 2, "lam": 0.9}, "leaves steps without a task row; use at least 10 rows a step"),
    ({"rows_per_step": None, "tokens_per_step": 5}, r"tokens_per_step=5 is less than the longest task answer \(9 loss tokens\)"),
])
def test_impossible_mixes_are_refused(kwargs, message: str) -> None:
    given = {"task_tokens": TASK_TOKENS, "self_tokens": SELF_TOKENS, "steps": 3, "rows_per_step": 4, **kwargs}
    with pytest.raises(UsageError, match=message):
        make_plan(given.pop("task_tokens"), given.pop("self_tokens"), **given)
