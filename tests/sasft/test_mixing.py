"""The mix is exact, seeded, and says what it is."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from sasft.chat import Encoded
from sasft.controls import match, shuffle_tokens, task_repeated
from sasft.errors import UsageError
from sasft.mixing import SELF, TASK, Plan, lay, make_plan, mix

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
    ({"lam": 0.5, "self_tokens": []}, "lam is 0.5, so self rows are needed, but there are none; write some with `sasft talk`"),
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


def test_plans_of_former_seeds_are_what_they_were() -> None:
    plans = [make_plan(TASK_TOKENS, SELF_TOKENS, steps=9, lam=lam, seed=4, **size)
             for lam in (0.0, 0.3, 0.5) for size in ({"rows_per_step": 5}, {"tokens_per_step": 21})]
    found = hashlib.sha256(json.dumps([plan.steps for plan in plans]).encode()).hexdigest()
    assert found == "414eddcca6215abb8fa2a7e01e6d0af1538f2c35fbdb781bbc6ec4e9114b9fc4"


# --- any number of sources ------------------------------------------------------------------------------------

TOKENS = {TASK: TASK_TOKENS, SELF: SELF_TOKENS, "web": [20, 31, 4] * 4, "chat": [1, 40]}
SHARES = {TASK: 0.55, SELF: 0.3, "web": 0.1, "chat": 0.05}
SOURCES = [(2, SHARES), (3, SHARES), (4, SHARES), (3, {TASK: 0.96, SELF: 0.02, "web": 0.02}), (1, {TASK: 7})]


def some(n: int, shares: dict) -> tuple[dict, dict]:
    return {s: TOKENS[s] for s in list(TOKENS)[:n]}, {s: shares[s] for s in list(TOKENS)[:n]}


@pytest.mark.parametrize("n, shares", SOURCES)
def test_counts_of_rows_stay_within_tijdeman_s_bound_after_every_row(n: int, shares: dict) -> None:
    tokens, shares = some(n, shares)
    plan = mix(tokens, shares, steps=60, rows_per_step=7, seed=1)
    read, whole = Counter(), sum(shares.values())
    for at, (source, _) in enumerate((key for step in plan for key in step), start=1):
        read[source] += 1
        worst = max(abs(read[s] - at * shares[s] / whole) for s in shares)
        assert worst <= (1 - 1 / (2 * n - 2) if n > 1 else 0) + 1e-9
    assert {len(step) for step in plan} == {7}


@pytest.mark.parametrize("n, shares", SOURCES)
def test_shares_of_tokens_stay_within_half_a_row_of_each(n: int, shares: dict) -> None:
    tokens, shares = some(n, shares)
    plan = mix(tokens, shares, by="tokens", steps=80, rows_per_step=7, seed=2)
    spent = Counter()
    for source, i in (key for step in plan for key in step):
        spent[source] += tokens[source][i]
        for a in shares:
            for b in shares:
                allowed = (max(tokens[a]) / shares[a] + max(tokens[b]) / shares[b]) / 2
                assert abs(spent[a] / shares[a] - spent[b] / shares[b]) <= allowed + 1e-9
    asked = shares[TASK] / sum(shares.values())
    assert plan.report()["shares"][TASK]["tokens"] == pytest.approx(asked, abs=0.03)


def test_a_budget_of_tokens_is_of_all_sources_together() -> None:
    plan = mix(*some(3, SHARES), by="tokens", steps=40, tokens_per_step=90, seed=1)
    total = 0
    for k, tokens in enumerate(plan.loss_tokens(), start=1):
        total += tokens
        assert abs(total - 90 * k) <= 31 / 2  # half of the longest row


def test_a_source_is_read_in_one_order_whatever_it_is_mixed_with() -> None:
    def order(plan: Plan) -> list[int]:
        return [i for step in plan for s, i in step if s == TASK][:20]

    two = make_plan(TASK_TOKENS, SELF_TOKENS, steps=10, lam=0.5, rows_per_step=8, seed=6)
    for by in ("rows", "tokens", "loss"):
        assert order(mix(*some(4, SHARES), by=by, steps=30, rows_per_step=8, seed=6)) == order(two)


def test_the_mix_of_two_sources_agrees_with_the_plan_of_task_and_self() -> None:
    for lam in (1 / 7, 1 / 3, 5 / 9):  # where rounding meets no tie, the counts are the same at every step
        a = make_plan(TASK_TOKENS, SELF_TOKENS, steps=30, rows_per_step=11, lam=lam, seed=2)
        b = mix({TASK: TASK_TOKENS, SELF: SELF_TOKENS}, {TASK: 1 - lam, SELF: lam}, steps=30, rows_per_step=11, seed=2)
        assert [sorted(step) for step in a] == [sorted(step) for step in b] and b.lam == pytest.approx(lam)


def test_weights_in_the_loss_are_ratios_of_rows_in_expectation() -> None:
    """Over whole epochs of every source, the weighted gradient at fixed weights is the same to the last digit."""
    torch.manual_seed(0)
    theta = torch.randn(5, dtype=torch.float64)
    features = {s: torch.randn(8, 5, dtype=torch.float64) for s in (TASK, SELF)}

    def gradient(plan: Plan) -> torch.Tensor:
        weights = theta.clone().requires_grad_()
        total = sum(plan.loss_weights.get(s, 1.0) * torch.log1p(torch.exp(features[s][i] @ weights)) for step in plan for s, i in step)
        return torch.autograd.grad(total / sum(map(len, plan)), weights)[0]

    tokens, shares = {TASK: [5] * 8, SELF: [3] * 8}, {TASK: 3, SELF: 1}
    by_rows = mix(tokens, shares, steps=8, rows_per_step=4)  # 24 task rows, 8 self rows
    expected = gradient(by_rows)
    for read in (None, {TASK: 1, SELF: 3}, shares):
        by_loss = mix(tokens, shares, by="loss", read=read, steps=8, rows_per_step=4)
        torch.testing.assert_close(gradient(by_loss), expected, rtol=1e-12, atol=0)
        assert by_loss.divisor == pytest.approx(by_rows.divisor)  # so the sum loss is scaled alike
    assert by_loss.loss_weights == {TASK: 1.0, SELF: 1.0}
    halves = mix(tokens, shares, by="loss", steps=8, rows_per_step=4)
    assert halves.loss_weights == {TASK: 1.5, SELF: 0.5} and halves.report()["rows"] == {TASK: 16, SELF: 16}
    found = halves.report()["shares"][SELF]
    assert (found["asked"], found["rows"], found["weighted_rows"]) == (0.25, 0.5, 0.25)
    assert (found["tokens"], found["weighted_tokens"]) == (48 / 128, 24 / 144)


def test_the_report_says_how_often_rows_repeat() -> None:
    report = mix({TASK: [1] * 10, "web": [1] * 3}, {TASK: 1, "web": 1}, steps=7, rows_per_step=2).report()
    assert report["epochs"] == {TASK: 0.7, "web": 7 / 3} and report["most_reads"] == {TASK: 1, "web": 3}


@pytest.mark.parametrize("kwargs, message", [
    ({"by": "words"}, "by must be rows, tokens or loss, got 'words'"),
    ({"shares": {TASK: 1}}, "shares must name every source once: they name task, the sources are task, self"),
    ({"shares": {TASK: 1, SELF: 0}}, "shares of self must be a number > 0, got 0"),
    ({"shares": {TASK: 1, SELF: float("nan")}}, "shares of self must be a number > 0, got nan"),
    ({"tokens": {TASK: [3], SELF: []}}, "the source self has no rows"),
    ({"read": {TASK: 1, SELF: 1}}, "read is for by='loss'"),
    ({"by": "loss", "read": {TASK: 1}}, "read must name every source once: they name task"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"rows_per_step": 0}, "rows_per_step must be at least 1, got 0"),
    ({"rows_per_step": None}, "give either rows_per_step or tokens_per_step"),
    ({"rows_per_step": None, "tokens_per_step": 2}, "would be empty: its share of tokens is less than half of the next row"),
])
def test_impossible_mixes_of_sources_are_refused(kwargs, message: str) -> None:
    given = {"tokens": {TASK: TASK_TOKENS, SELF: SELF_TOKENS}, "shares": {TASK: 1, SELF: 1}, "steps": 3, "rows_per_step": 4, **kwargs}
    with pytest.raises(UsageError, match=message):
        mix(given.pop("tokens"), given.pop("shares"), **given)


# --- controls -------------------------------------------------------------------------------------------------


def test_the_task_repeated_takes_the_plan_s_steps_and_tokens_or_rows() -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=25, rows_per_step=6, lam=0.5, seed=3)
    by_tokens, by_rows = task_repeated(plan, seed=3), task_repeated(plan, equal="rows", seed=3)
    assert len(by_tokens) == len(by_rows) == 25
    ahead = 0
    for mine, theirs in zip(by_tokens.loss_tokens(), plan.loss_tokens(), strict=True):
        ahead += mine - theirs
        assert abs(ahead) <= max(TASK_TOKENS) / 2
    assert [len(step) for step in by_rows] == [6] * 25
    mixed = [i for step in plan for s, i in step if s == TASK]
    for control in (by_tokens, by_rows):
        assert {s for step in control for s, _ in step} == {TASK} and control.lam == 0
        assert [i for step in control for _, i in step][: len(mixed)] == mixed


def test_another_mix_in_the_steps_of_a_plan() -> None:
    plan = make_plan(TASK_TOKENS, SELF_TOKENS, steps=25, tokens_per_step=30, lam=0.5, seed=3)
    other = match(plan, {TASK: TASK_TOKENS, "web": [2] * 9}, {TASK: 1, "web": 1}, by="tokens", seed=3)
    assert sum(other.loss_tokens()) == pytest.approx(sum(plan.loss_tokens()), abs=max(TASK_TOKENS) / 2)
    assert other.report()["shares"]["web"]["tokens"] == pytest.approx(0.5, abs=0.02)
    with pytest.raises(UsageError, match="equal must be tokens or rows, got 'steps'"):
        match(plan, {TASK: TASK_TOKENS}, {TASK: 1}, equal="steps")
    with pytest.raises(UsageError, match=r"source must be one of the plan's \(task, self\), got 'web'"):
        task_repeated(plan, source="web")


def test_shuffled_tokens_are_the_same_tokens_in_another_order() -> None:
    rows = [Encoded((1, 1, *range(5, 25), 2), (-100, -100, *range(5, 25), 2)),
            Encoded((1, *range(30, 50)), (-100, *range(30, 50)), finished=False)]
    done, again = shuffle_tokens(rows, seed=1), shuffle_tokens(rows, seed=1)
    assert done == again != shuffle_tokens(rows, seed=2)
    for before, after in zip(rows, done, strict=True):
        assert after.response_ids != before.response_ids and sorted(after.response_ids) == list(before.response_ids)
        assert (after.start, after.finished, after.loss_tokens) == (before.start, before.finished, before.loss_tokens)
    assert done[0].labels[-1] == 2


def test_steps_may_have_any_sizes() -> None:
    plan = lay({TASK: [1] * 9}, {TASK: 1}, by="rows", limits=[1, 4, 6], counted="rows")
    assert [len(step) for step in plan] == [1, 3, 2]
