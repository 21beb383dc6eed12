"""Noise in prompts: what it changes, how much, and what it must not touch."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sasft import perturb
from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods import Costs, method, parse_method
from sasft.methods.perturbation import refused
from sasft.mixing import SELF, TASK
from sasft.perturb import fixed_texts, free_words, mistype, reword
from tests.sasft.methods.workshops import task_rows, workshop

PROMPT = ("Write a function that returns the largest of three numbers, 3.5, 1,200 and -7. Call it find_max, not `biggest`; it must not "
          "print \"done\" in the Paris office. See https://example.org/some/page and self.items[i].\n\n```python\ndef old(values):\n"
          "    return values\n```\n\nExplain every important step of the method in simple words.")
FIXED = ["three", "3.5", "1,200", "-7", "find_max", "not", "`biggest`", "done", "Paris", "https://example.org/some/page", "items",
         "```python\ndef old(values):\n    return values\n```"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_what_an_answer_hangs_on_is_fixed() -> None:
    assert all(fixed_texts(PROMPT)[text] for text in FIXED)
    free = [t.text for t in free_words(PROMPT)]
    assert {"Write", "function", "largest", "print", "office", "important"} <= set(free) and not set(free) & set(FIXED)


def test_a_name_is_one_at_the_beginning_of_a_sentence_too() -> None:
    text = "Natalia sold clips. How many did Natalia sell?"
    assert fixed_texts(text) == {"Natalia": 2} and mistype(text, 1.0, rng()).count("Natalia") == 2


@pytest.mark.parametrize("alter", [mistype, reword])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_fixed_stays_byte_for_byte_and_in_its_order(alter, seed: int) -> None:
    noisy = alter(PROMPT, 1.0, rng(seed))
    assert noisy != PROMPT
    cursor = 0
    for text in FIXED:
        cursor = noisy.index(text, cursor) + len(text)
    outside = [part for part in PROMPT.split() if not any(c.isalpha() for c in part)]
    assert [part for part in noisy.split() if not any(c.isalpha() for c in part)] == outside


@pytest.mark.parametrize("alter", [mistype, reword])
def test_noise_follows_from_the_seed_and_rate_0_is_none(alter) -> None:
    assert alter(PROMPT, 0.3, rng(3)) == alter(PROMPT, 0.3, rng(3)) != alter(PROMPT, 0.3, rng(4))
    assert alter(PROMPT, 0.0, rng()) == PROMPT and alter("", 0.5, rng()) == ""


def test_a_letter_is_dropped_swapped_or_slipped_at_the_rate_asked_for() -> None:
    """One word again and again, small enough a rate that no two errors meet; every error is one of all that there can be."""
    word, n, rate = "planet", 4000, 0.05
    one_off = Counter({"drop": 0, "swap": 0, "slip": 0})
    kinds = {"drop": {word[:i] + word[i + 1 :] for i in range(6)},
             "swap": {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(5)},
             "slip": {word[:i] + c + word[i + 1 :] for i in range(6) for c in {"p": "o", "l": "k", "a": "s", "n": "bm", "e": "wr", "t": "ry"}[word[i]]}}
    words = mistype(" ".join([word] * n), rate, rng()).split()
    assert len(words) == n
    for found in words:
        for kind, forms in kinds.items():
            one_off[kind] += found in forms
    assert set().union(*kinds.values()) <= set(words)
    whole = sum(found == word for found in words)
    assert abs(whole / n - 0.95**6) < 4 * math.sqrt(0.95**6 * (1 - 0.95**6) / n)
    single = one_off.total()
    expected = {"drop": 5 / 3 + 1 / 2, "swap": 5 / 3, "slip": 5 / 3 + 1 / 2}  # the last letter has no next one
    for kind, weight in expected.items():
        p = weight / sum(expected.values())
        assert abs(one_off[kind] / single - p) < 4 * math.sqrt(p * (1 - p) / single) + 0.01  # a swap spares its second letter


def test_short_words_and_capitals_in_typing_errors() -> None:
    assert mistype("so is it on me", 1.0, rng()) == "so is it on me"
    slips = {mistype("Öäüß", 1.0, rng(s)) for s in range(30)}  # no neighbours on the keyboard: dropped or swapped
    assert all(set(slip) <= set("Öäüß") for slip in slips) and all(slips)
    assert any(found[0] in "QE" for found in (mistype("Water", 0.4, rng(s)) for s in range(60)))  # beside W, as a capital
    assert mistype("aaaa", 1.0, rng(0)) != ""


def test_words_give_way_to_synonyms_or_are_filled_in() -> None:
    groups = [set(words) for words in perturb._GROUPS]
    assert sum(map(len, groups)) == len(set().union(*groups))  # no word in two groups
    for seed in range(20):
        first, *rest = reword("Choose the whole ticket", 1.0, rng(seed)).split()
        assert first in ("Select", "Pick") and rest[-1] == "ticket" and rest[-2] in perturb._FILLERS and rest[-3] == "entire"
    assert reword("Ann waits", 1.0, rng()) in {f"Ann {filler} waits" for filler in perturb._FILLERS}
    n = 3000
    found = reword(" ".join(["word"] * n), 0.1, rng()).split()
    assert abs((len(found) - n) / n - 0.1) < 4 * math.sqrt(0.1 * 0.9 / n)


@pytest.mark.parametrize("alter", [mistype, reword])
def test_a_rate_that_is_no_share_is_refused(alter) -> None:
    with pytest.raises(UsageError, match=r"rate must be a number in \[0, 1\], got 1.5"):
        alter("word", 1.5, rng())


# --- the method -----------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    found = task_rows([(f"{PROMPT} Number {i}.", f"answer {i}") for i in range(6)])
    talk = ({"role": "system", "content": "Be very kind always."}, {"role": "user", "content": "Which city did people visit yesterday?"},
            {"role": "assistant", "content": "They visited several different places."}, {"role": "user", "content": "Where exactly, please tell?"})
    return [*found, Row("talk", "task", talk, "there", response_ids=(9, 9), finished=False)]


@pytest.mark.parametrize("level", ["char", "word"])
def test_the_users_turns_change_and_nothing_else(level: str, tmp_path: Path) -> None:
    shop, before = workshop(tmp_path), rows()
    own = [before[0]]
    after = method("perturbed", level=level, rate=0.5).rows({TASK: before, SELF: own}, shop)
    assert after[SELF] == own and shop.costs == Costs()
    for old, new in zip(before, after[TASK], strict=True):
        assert replace(new, prompt=old.prompt) == old  # answer, ids, whether it is finished, meta
        for was, now in zip(old.prompt, new.prompt, strict=True):
            assert (was["content"] != now["content"]) == (was["role"] == "user") and was["role"] == now["role"]
    assert before == rows()
    report = json.loads((tmp_path / "perturbed.json").read_text())
    assert report == {"rows": 7, "changed": 7, "level": level, "rate": 0.5, "refused": {}}


def test_a_rows_noise_follows_from_seed_and_id(tmp_path: Path) -> None:
    chosen = method("perturbed")

    def noisy(task, seed=0):
        return {row.id: row for row in chosen.rows({TASK: task}, workshop(tmp_path, seed=seed))[TASK]}

    assert noisy(rows()) == noisy(rows()[::-1]) != noisy(rows(), seed=1)
    same = [Row(i, "task", ({"role": "user", "content": PROMPT},), "y") for i in "ab"]
    assert noisy(same)["a"].prompt != noisy(same)["b"].prompt


@pytest.mark.parametrize("level, rate", [("char", 0.05), ("word", 0.1)])
def test_the_rates_of_the_levels(level: str, rate: float, tmp_path: Path) -> None:
    given, asked = ({TASK: method("perturbed", level=level, **options).rows({TASK: rows()}, workshop(tmp_path))[TASK]}
                    for options in ({}, {"rate": rate}))
    assert given == asked


@pytest.mark.parametrize("level", ["char", "word", "sentence"])
def test_rate_0_leaves_everything_as_it_is(level: str, tmp_path: Path) -> None:
    shop = replace(workshop(tmp_path), writer=None)
    assert method("perturbed", level=level, rate=0.0).rows({TASK: rows(), SELF: []}, shop) == {TASK: rows(), SELF: []}


def test_paraphrases_take_the_place_of_prompts_where_they_keep_what_is_fixed(tmp_path: Path) -> None:
    says = {"How much do 3 pens cost at 2 euros each?": "At 2 euros apiece, what is the price of 3 pens?",
            "How many are 4 times 5?": "What is 4 times 6, please?", "Does Ann not like it?": "Is it true that Ann likes it?",
            "Tell me about the weather here.": "Weather."}
    pairs = [(asked, "y") for asked in says]
    seen = []

    def answer(asked: str) -> str:
        seen.append(asked)
        return next(other for text, other in says.items() if text in asked)

    shop = workshop(tmp_path, answer)
    after = method("perturbed", level="sentence").rows({TASK: task_rows(pairs), SELF: []}, shop)[TASK]
    assert [row.prompt[-1]["content"] for row in after] == [says[pairs[0][0]], *(x for x, _ in pairs[1:])]
    assert [row.response for row in after] == ["y"] * 4 and len(seen) == 4 and all("Do not answer it" in asked for asked in seen)
    report = json.loads((tmp_path / "perturbed.json").read_text())
    assert report["changed"] == 1 and report["refused"] == {"fixed text lost": 2, "length": 1}
    assert shop.costs.generated_tokens == sum(len(text) + 1 for text in says.values())  # one token a byte, and the end of turn


def test_a_share_of_the_rows_is_paraphrased(tmp_path: Path) -> None:
    task = task_rows([(f"please say something about topic {'abcdefgh'[i]} now", "y") for i in range(8)])
    seen = []
    shop = workshop(tmp_path, lambda asked: seen.append(asked) or asked.rpartition("\n\n")[2] + " so")
    after = method("perturbed", level="sentence", rate=0.5).rows({TASK: task}, shop)[TASK]
    changed = [row.id for row, old in zip(after, task, strict=True) if row.prompt != old.prompt]
    assert len(seen) == len(changed) and 0 < len(changed) < 8


@pytest.mark.parametrize("said, reason", [
    (Row("1", "x", (), "How many pens do 3 people need", finished=False), "unfinished"),
    (Row("1", "x", (), "3"), "length"),
    (Row("1", "x", (), "How many pens does a group need?"), "fixed text lost"),
    (Row("1", "x", (), "How many pens, say 10, do 3 people need?"), "numbers or code made up"),
    (Row("1", "x", (), "Tell how many pens 3 people need."), "question or none"),
    (Row("1", "x", (), "Do 3 people need a pen each, twelve pens in all?"), "answer given away"),
    (Row("1", "x", (), "What number of pens do 3 people need?"), None),
])
def test_why_a_paraphrase_is_refused(said: Row, reason: str | None) -> None:
    assert refused(said, "How many pens are needed by 3 people?", "Twelve pens!") == reason
    assert refused(said, said.response, "3 people") == (None if said.finished else "unfinished")  # the original says so itself


@pytest.mark.parametrize("text, message", [
    ("level=letter", "level must be one of char, word, sentence, got 'letter'"),
    ("rate=2", r"rate must be a number in \[0, 1\], got 2.0"),
    ("rate=few", "rate must be a number, got 'few'"),
    ("temperature=0", "temperature must be > 0, got 0.0"),
    ("max_new_tokens=0", "max_new_tokens must be at least 1, got 0"),
])
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method("perturbed", text)
