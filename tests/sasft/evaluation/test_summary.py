"""Scores and their standard errors by hand and against plain formulas; groups, hashes, contamination, the table."""

import hashlib
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from sasft.data import Row
from sasft.evaluation.contamination import contaminated
from sasft.evaluation.intervals import mean
from sasft.evaluation.summary import summarise, table


def record(i: int, acc: float, **fields) -> dict:
    return {"id": str(i), "prompt_sha256": f"p{i}", "scores": {"acc": (acc, 1.0)}, **fields}


def test_the_standard_error_of_a_mean_is_the_samples() -> None:
    scores = np.random.default_rng(0).random(40)
    assert mean([(s, 1.0) for s in scores]) == pytest.approx((scores.mean(), scores.std(ddof=1) / math.sqrt(40)))


def test_a_ratios_standard_error_by_hand() -> None:
    # 3 tokens of 1 nat and 1 token of 5 nats: 8 / 4 = 2; residuals −3 and 3; √(2/1 · 18) / 4.
    assert mean([(3.0, 3.0), (5.0, 1.0)]) == pytest.approx((2.0, 1.5))


def test_a_clusters_items_count_as_one() -> None:
    scores, clusters = [1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "d"]
    # The mean is ½; the clusters' residuals are 1, −1, ½, −½: √(4/3 · 2.5) / 6.
    assert mean([(s, 1.0) for s in scores], clusters) == pytest.approx((0.5, math.sqrt(4 / 3 * 2.5) / 6))
    assert mean([(s, 1.0) for s in scores], list("uvwxyz")) == pytest.approx(mean([(s, 1.0) for s in scores]))


def test_clusters_reach_the_summary() -> None:
    scores, clusters = [1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "", ""]
    records = [record(i, s, cluster=c) if c else record(i, s) for i, (s, c) in enumerate(zip(scores, clusters, strict=True))]
    found = summarise(records, ["acc"])
    error = math.sqrt(4 / 3 * 2.5) / 6
    assert found["scores"]["acc"] == pytest.approx({"score": 0.5, "stderr": error, "n": 6, "low": 0.0, "high": 1.0, "clusters": 4})
    assert "clusters" not in summarise([record(i, s) for i, s in enumerate(scores)], ["acc"])["scores"]["acc"]


def wilson(k: int, n: int) -> dict:
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return {"low": pytest.approx(interval.low, abs=1e-12), "high": pytest.approx(interval.high)}


def test_shares_have_an_interval_other_scores_none() -> None:
    nothing = summarise([record(i, 0) for i in range(4)], ["acc"])["scores"]["acc"]
    assert nothing == {"score": 0.0, "stderr": 0.0, "n": 4, **wilson(0, 4)} and nothing["high"] > 0.4
    assert set(summarise([record(0, 0.5), record(1, 1)], ["acc"])["scores"]["acc"]) == {"score", "stderr", "n"}
    tokens = [{**record(i, 0), "scores": {"acc": (1.0, 3.0)}} for i in range(2)]
    assert "low" not in summarise(tokens, ["acc"])["scores"]["acc"]


def test_groups_and_their_plain_mean() -> None:
    records = [record(i, s, group="big") for i, s in enumerate([1, 0, 1, 0])]
    records += [record(i, s, group="small") for i, s in ((4, 1), (5, 0.5))]
    found = summarise(records, ["acc"])
    big, small = math.sqrt(1 / 3 / 4), math.sqrt(0.125 / 2)
    assert found["groups"] == {"big": {"score": 0.5, "stderr": pytest.approx(big), "n": 4, **wilson(2, 4)},
                               "small": {"score": 0.75, "stderr": pytest.approx(small), "n": 2}}
    assert found["macro"] == {"score": 0.625, "stderr": pytest.approx(math.sqrt(big**2 + small**2) / 2), "n": 2}
    assert found["scores"]["acc"]["score"] == pytest.approx(3.5 / 6)
    lone = summarise([*records, record(6, 1, group="one")], ["acc"])
    assert lone["groups"]["one"]["stderr"] is None and lone["macro"]["stderr"] is None


def test_metrics_of_any_item_are_summarised_the_headline_first() -> None:
    records = [record(0, 1), {"id": "1", "prompt_sha256": "p1", "scores": {"f1": (0.5, 1.0)}}, record(2, 0)]
    found = summarise(records, ["acc"])
    assert list(found["scores"]) == ["acc", "f1"]
    assert (found["scores"]["acc"]["n"], found["scores"]["f1"]) == (2, {"score": 0.5, "stderr": None, "n": 1})


def test_the_hash_of_the_prompts_hangs_on_ids_and_prompts_not_on_order() -> None:
    records = [record(1, 1), record(0, 0)]
    told = hashlib.sha256(json.dumps([["0", "p0"], ["1", "p1"]]).encode()).hexdigest()
    assert summarise(records, ["acc"])["prompts_sha256"] == summarise(records[::-1], ["acc"])["prompts_sha256"] == told
    assert summarise([record(1, 0), record(0, 0, prompt_sha256="q")], ["acc"])["prompts_sha256"] != told


def test_what_went_wrong_in_answers_is_counted() -> None:
    records = [record(0, 1, answer="yes", finished=True, off_template=False, tokens=2),
               record(1, 0, answer="", finished=True, off_template=True, tokens=1),
               record(2, 0, answer="and on", finished=False, off_template=False, tokens=9)]
    assert summarise(records, ["acc"])["answers"] == {"unfinished": 1, "empty": 1, "off_template": 1, "tokens": 12}


def test_scores_without_the_items_found_in_training() -> None:
    records = [record(0, 1), record(1, 0), record(2, 0)]
    found = summarise(records, ["acc"], ["0"])["contaminated"]
    assert found == {"n": 1, "ids": ["0"], "scores_without": {"acc": {"score": 0.0, "stderr": 0.0, "n": 2, **wilson(0, 2)}}}
    assert "contaminated" not in summarise(records, ["acc"]) and summarise(records, ["acc"], [])["contaminated"]["n"] == 0
    assert summarise(records, ["acc"], ["0", "1", "2"])["contaminated"]["scores_without"] == {}


def row(prompt: str, response: str) -> Row:
    return Row("r", "task", ({"role": "user", "content": prompt},), response)


def test_questions_found_in_training_rows() -> None:
    long = " ".join(f"w{i}" for i in range(20))
    asked = {"whole": "What is 6 * 7?", "long": long, "response": "name the tallest known mountain", "short": "a b c",
             "absent": "What is 6 * 8?"}
    rows = [row("Tell me: what is 6 * 7? Thanks", "42"),
            row(" ".join(f"W{i}," if i == 3 else f"w{i}" for i in range(4, 17)), "x"),
            row("q", "First, name the tallest known mountain."), row("a b c", "a b c")]
    assert contaminated(asked, rows) == ["whole", "long", "response"]
    # Twelve words in a row of a longer question are not enough, thirteen are.
    assert contaminated({"long": long}, [row(" ".join(f"w{i}" for i in range(12)), "x")]) == []
    assert contaminated({"long": long}, [row("so " + " ".join(f"w{i}" for i in range(7, 20)), "x")]) == ["long"]
    # A question is not put together from two rows, nor across prompt and response.
    assert contaminated({"whole": "What is 6 * 7?"}, [row("What is", "6 * 7?")]) == []


def test_the_table_says_what_the_scores_hang_on() -> None:
    answers = [record(i, s, answer="a", finished=i < 2, off_template=False, tokens=1) for i, s in enumerate([1, 0, 1])]
    summary = {"identity": {"weights_sha256": "a" * 64, "chat_template_sha256": "b" * 64, "precision": "fp32",
                            "generation": {"temperature": 0.0, "seed": 0, "max_new_tokens": "suite's"},
                            "versions": {"python": "3.11.7"}},
               "suites": {"gsm8k@5": summarise(answers, ["acc"]), "one": summarise([record(0, 1)], ["acc"])}}
    lines = table(summary).splitlines()
    assert lines[0] == f"weights {'a' * 12}, chat template {'b' * 12}, fp32, greedy" and lines[1] == "python 3.11.7"
    prompts = [suite["prompts_sha256"][:8] for suite in summary["suites"].values()]
    assert lines[3].split() == ["suite", "metric", "score", "±", "s.e.", "95", "%", "interval", "n", "prompts", "unfinished", "off", "template"]
    assert lines[4].split() == ["gsm8k@5", "acc", "0.6667", "0.3333", "[0.2077,", "0.9385]", "3", prompts[0], "1", "0"]
    assert lines[5].split() == ["one", "acc", "1.0000", "[0.2065,", "1.0000]", "1", prompts[1]] and prompts[0] != prompts[1]
    summary["identity"]["generation"] |= {"temperature": 0.7, "seed": 5}
    assert "T = 0.7, seed 5" in table(summary)
