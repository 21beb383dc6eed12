"""Definitions of the scores against slow ones, and an evaluation that goes on where it was."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from sasft import load_model
from sasft.errors import UsageError
from sasft.evaluation import MeasureSettings, evaluate, forgetting
from sasft.evaluation.forgetting import chance_adjusted, mcnemar
from sasft.evaluation.scoring import common_subsequence, gsm8k_scores
from tests.sasft import tiny_chat


def test_the_longest_common_subsequence_by_its_recursion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (tuple(rng.choice(list("abc"), size=rng.integers(0, 8))) for _ in range(2))

        @functools.cache
        def longest(i: int, j: int, a=a, b=b) -> int:
            if i == len(a) or j == len(b):
                return 0
            return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        assert common_subsequence(a, b) == longest(0, 0)


@pytest.mark.parametrize(("answer", "strict", "flexible"), [
    ("So 3 + 4.\n#### 7", 1, 1), ("It is 7.", 0, 1), ("#### 7, or rather 8", 1, 0), ("I do not know", 0, 0), ("It costs $1,007", 0, 0)])
def test_both_filters_of_gsm8k(answer: str, strict: int, flexible: int) -> None:
    found = gsm8k_scores(answer, "3 + 4 = 7\n#### 7")
    assert (found["strict"], found["flexible"]) == (strict, flexible)


def test_forgetting_beyond_chance_and_mcnemar() -> None:
    before, after = np.array([1, 1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 1, 0], bool)
    assert chance_adjusted(before, after, 4) == pytest.approx(2 / 6 - (2 / 6) * (3 / 6) / 3)
    assert chance_adjusted(before, after, None) == pytest.approx(2 / 6)
    assert mcnemar(8, 1) == pytest.approx(binomtest(8, 9).pvalue)


def test_an_evaluation_goes_on_and_refuses_another_run(tmp_path: Path) -> None:
    tiny_chat.save_chatty(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    settings = MeasureSettings(limit=4, max_new_tokens=4)
    whole = evaluate(model, tokenizer, ["task:sums", "instructions"], tmp_path / "whole", settings, progress=False)
    evaluate(model, tokenizer, ["task:sums", "instructions"], tmp_path / "cut", settings, progress=False)
    items = (tmp_path / "cut" / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(items) == 8
    (tmp_path / "cut" / "items.jsonl").write_text("".join(items[:3]))
    again = evaluate(model, tokenizer, ["task:sums", "instructions"], tmp_path / "cut", settings, progress=False)
    assert again == whole
    assert sorted((tmp_path / "cut" / "items.jsonl").read_text().splitlines()) == sorted(line.rstrip("\n") for line in items)
    same = forgetting(tmp_path / "whole", tmp_path / "cut", "task:sums")
    assert same.change == 0 and same.lost == same.gained == 0 and json.loads(items[0])
    with pytest.raises(UsageError):
        evaluate(model, tokenizer, ["task:sums"], tmp_path / "cut", MeasureSettings(limit=4, max_new_tokens=5), progress=False)
    with pytest.raises(UsageError):
        evaluate(model, tokenizer, ["no such suite"], tmp_path / "other", settings, progress=False)
