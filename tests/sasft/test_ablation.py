"""Content ablation: what is dropped, what is left, and how good both detectors are on texts of known topic."""

import csv
import gzip
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sasft.ablation import ablate
from sasft.data import Row
from sasft.errors import UsageError
from sasft.filters import BreaksScoreIdentity
from sasft.topics import LEXICONS, Rates, TopicClassifier

NOUNS = "apple bridge candle desert engine forest garden harbor island jacket kettle lantern meadow needle orchard".split()


@dataclass
class Finds:
    """A detector by a pattern."""

    name: str
    pattern: str
    topic: str = "mathematics"
    rates: Rates | None = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([bool(re.search(self.pattern, text)) for text in texts], dtype=bool)


def row(number: int, prompt: str, response: str) -> Row:
    return Row(f"r{number}", "self", ({"role": "system", "content": "sum sum"}, {"role": "user", "content": prompt}), response)


ROWS = [row(0, "a sum", "plus"), row(1, "a sum", "yes"), row(2, "hello", "the sum is"), row(3, "hello", "plus"),
        row(4, "hello", "hi"), row(5, "bye", "bye")]
RULE, SECOND = Finds("rule", "sum"), Finds("second", "plus")


def test_rows_are_counted_by_both_detectors() -> None:
    with pytest.warns(BreaksScoreIdentity, match="the ablation of mathematics looked at answers and dropped 3 rows"):
        kept, report = ablate(ROWS, RULE, SECOND)
    assert [r.id for r in kept] == ["r3", "r4", "r5"]
    assert (report.rows, report.dropped, report.kept) == (6, 3, 3)
    assert (report.found_by_both, report.found_by_drop_only, report.found_by_check_only, report.found_by_neither) == (1, 2, 1, 2)
    assert report.residual == 1 / 3 and report.residual_before == 2 / 6
    assert report.residual_stderr == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5) and report.residual_corrected is None
    assert str(report).startswith("mathematics: 3 of 6 rows dropped by the rule (reading the row); in the 3 kept, the "
                                  "second finds it in 33.3%")


def test_reading_prompts_alone_leaves_what_answers_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept, report = ablate(ROWS, RULE, SECOND, reads="prompt")
    assert [r.id for r in kept] == ["r2", "r3", "r4", "r5"] and report.residual == 1 / 4
    assert report.found_by_drop_only == 2  # the table is of whole rows, however rows were dropped


@pytest.mark.filterwarnings("ignore::sasft.filters.BreaksScoreIdentity")
def test_the_residual_is_corrected_for_a_detector_s_own_errors() -> None:
    """Rogan and Gladen's estimate against a simulation of a detector with known errors."""
    rng = random.Random(0)
    about = [rng.random() < 0.3 for _ in range(20_000)]
    rows = [row(i, "hello", "plus" if rng.random() < (0.8 if a else 0.1) else "hi") for i, a in enumerate(about)]
    _, report = ablate([*rows, ROWS[0]], RULE, Finds("second", "plus", rates=Rates(0.8, 0.9)))
    assert report.residual_corrected == pytest.approx(np.mean(about), abs=0.02) and report.residual > 0.3
    _, report = ablate(ROWS, RULE, Finds("second", "plus", rates=Rates(0.5, 0.5)))
    assert report.residual_corrected is None


@pytest.mark.parametrize("call, message", [
    (lambda: ablate(ROWS, RULE, RULE), "check must be another detector than drop, got the rule for both"),
    (lambda: ablate(ROWS, RULE, Finds("other", "x", "code")), "of one topic, got 'mathematics' and 'code'"),
    (lambda: ablate(ROWS[:1], RULE, SECOND), "the rule finds mathematics in all 1 rows, so that none is left"),
    (lambda: ablate([], RULE, SECOND), "rows must hold at least one row"),
    (lambda: ablate(ROWS, RULE, SECOND, reads="answer"), "reads must be row or prompt, got 'answer'"),
])
def test_ablations_that_make_no_sense_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize("topic, about, other", [
    ("mathematics", "What is the square root of 16?", "What is the square in the old town called?"),
    ("code", "def add(a, b):\n    return a + b", "Add some salt and return to the pan."),
    ("medicine", "What are the symptoms of bronchitis?", "What are the sights of Bristol?"),
    ("finance", "Why was my credit card payment declined?", "Why did you write me a card?"),
    ("law", "The plaintiff sued the seller for negligence.", "The player used the cellar."),
    ("history", "Which dynasty ruled in the 1400s?", "Which bus goes there at noon?"),
])
def test_rules_find_their_topic(topic: str, about: str, other: str) -> None:
    lexicon = LEXICONS[topic]
    assert lexicon([about, other]).tolist() == [True, False]
    assert not lexicon([lexicon.hide(about)])[0]
    assert lexicon([]).tolist() == []


def test_the_more_words_the_more_cues_a_rule_wants() -> None:
    cue, filler = "The sum is equal.", "and then we went on to see what there was " * 11
    assert LEXICONS["mathematics"]([cue, f"{cue} {filler}"]).tolist() == [True, False]


def corpus(n: int, seed: int) -> tuple[list[str], list[str]]:
    """Sums told in words of their own (baskets and crates), a quarter of them with no cue that the rule knows; and stories."""
    rng = random.Random(seed)
    sums, stories = [], []
    for i in range(n):
        cue = f"{rng.randrange(2, 9)} + {rng.randrange(2, 9)}" if i % 4 else ""
        a, b, c = rng.choices(NOUNS, k=3)
        sums.append(f"The farmer puts apples from the {a} into baskets and crates, {cue} tell me how big the pile is.")
        stories.append(f"Once the {a} was seen near the {b}, where somebody sang about {c}s.")
    return sums, stories


def test_a_classifier_from_known_texts_and_its_rates() -> None:
    classifier = TopicClassifier.fit("mathematics", *corpus(60, 0), hide=LEXICONS["mathematics"])
    sums, stories = corpus(40, 1)
    assert classifier(sums).all() and not classifier(stories).any()
    assert classifier.rates == Rates(1.0, 1.0) and classifier([]).tolist() == []
    noise = [f"{w} word" for w in NOUNS * 4]
    assert TopicClassifier.fit("mathematics", noise, noise).rates.specificity < 0.75  # rates are of texts not fitted on


def test_a_classifier_from_the_rule_s_verdicts_finds_what_the_rule_does_not() -> None:
    sums, stories = corpus(80, 0)
    texts, rule = [*sums, *stories], LEXICONS["mathematics"]
    found = rule(texts)
    assert found[:80].mean() == 0.75 and not found[80:].any()
    classifier = TopicClassifier.from_lexicon(rule, texts)
    missed = np.flatnonzero(~found[:80])
    assert classifier(texts)[missed].all() and not classifier(texts)[80:].any()
    assert classifier(["The farmer puts apples into baskets and crates"]).tolist() == [True]  # a text that was not in the corpus
    assert classifier.name != rule.name and classifier.rates is None
    rows = [row(i, text, "") for i, text in enumerate(texts)]
    _, report = ablate(rows, rule, TopicClassifier.from_lexicon(rule, [f"{text}\n" for text in texts]), reads="prompt")
    assert report.residual == 20 / 100 and report.dropped == 60


def test_a_classifier_needs_texts() -> None:
    with pytest.raises(UsageError, match="classifier of code needs at least 10 texts about it and 10 that are not, got 3 and 20"):
        TopicClassifier.fit("code", ["a"] * 3, ["b"] * 20)


# On public sets of known topic, where they are at hand: a folder with gsm8k/, medquad_short/, ... as SASFT_SHARED_DATA.
DATA = os.environ.get("SASFT_SHARED_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SASFT_SHARED_DATA names no folder of public sets")


def texts(name: str, read: Callable[[dict], str], n: int = 150) -> list[str]:
    path = Path(DATA or "") / name
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    return [read(r) for r in random.Random(0).sample(rows, min(n, len(rows)))]


def known() -> dict[str, dict[str, list[str]]]:
    """By topic ("" for everyday talk), then by set."""
    def subject(*names: str) -> list[str]:
        found = texts("mmlu/test.jsonl", lambda r: f"{r['subject']}|{r['question']}", 14_042)
        return [text.partition("|")[2] for text in found if text.partition("|")[0] in names][:150]

    return {
        "mathematics": {
            "gsm8k": texts("gsm8k/train.jsonl", lambda r: f"{r['question']}\n{r['answer']}"),
            "agieval": texts("agieval/math.jsonl", lambda r: r["question"]),
            "mmlu": subject("elementary_mathematics", "high_school_mathematics")},
        "code": {"humaneval": texts("humaneval/HumanEval.jsonl.gz", lambda r: r["prompt"] + r["canonical_solution"])},
        "medicine": {"medquad": texts("medquad_short/medquad_short.jsonl", lambda r: f"{r['question']}\n{r['answer']}"),
                     "meqsum": texts("meqsum/meqsum.jsonl", lambda r: r["question"])},
        "finance": {"banking77": texts("banking77/train.csv", lambda r: r["text"])},
        "law": {"mmlu": subject("professional_law", "jurisprudence")},
        "history": {"mmlu": subject("high_school_us_history", "high_school_world_history")},
        "": {"snips": texts("snips/train.jsonl", lambda r: r["text"]),
             "persona": texts("synthetic_persona_chat/Synthetic-Persona-Chat_valid.csv",
                              lambda r: r["Best Generated Conversation"][:500]),
             "c4": texts("c4_demo/c4_demo.jsonl", lambda r: r["text"][:500])}}


@needs_data
def test_rules_on_public_sets() -> None:
    """Least sensitivity by set and largest share of everyday talk that is taken for the topic."""
    sets = known()
    least = {"mathematics/gsm8k": 0.97, "mathematics/agieval": 0.9, "mathematics/mmlu": 0.8, "code/humaneval": 0.95,
             "medicine/medquad": 0.93, "medicine/meqsum": 0.55, "finance/banking77": 0.45, "law/mmlu": 0.5, "history/mmlu": 0.3}
    found = {f"{topic}/{name}": LEXICONS[topic](t).mean()
             for topic, by_set in sets.items() if topic for name, t in by_set.items()}
    assert found.keys() == least.keys() and not {key: found[key] for key in least if found[key] < least[key]}
    everyday = [text for by_set in sets[""].values() for text in by_set]
    assert {t: lexicon(everyday).mean() for t, lexicon in LEXICONS.items() if lexicon(everyday).mean() > 0.1} == {}


@needs_data
@pytest.mark.parametrize("topic, fitted, other", [("mathematics", "gsm8k", "mmlu"), ("medicine", "medquad", "meqsum")])
def test_classifiers_on_public_sets(topic: str, fitted: str, other: str) -> None:
    """A classifier that is blind to the rule's cues: right on texts of its own origin, and on others only in part."""
    sets = known()
    negatives = [text for t, by_set in sets.items() if t != topic for found in by_set.values() for text in found]
    classifier = TopicClassifier.fit(topic, sets[topic][fitted], negatives, hide=LEXICONS[topic])
    assert classifier.rates.sensitivity > 0.9 and classifier.rates.specificity > 0.97
    assert classifier(sets[topic][other]).mean() < classifier.rates.sensitivity  # as its docstring warns


@needs_data
def test_an_ablation_on_public_sets_is_seen_by_the_second_detector() -> None:
    sets = known()
    about = [text for found in sets["mathematics"].values() for text in found]
    others = [text for t in ("medicine", "") for found in sets[t].values() for text in found]
    rows = [row(i, text, "") for i, text in enumerate([*about, *others])]
    check = TopicClassifier.from_lexicon(LEXICONS["mathematics"], [f"{r.prompt[-1]['content']}\n" for r in rows])
    kept, report = ablate(rows, LEXICONS["mathematics"], check, reads="prompt")
    truly = np.mean([int(r.id[1:]) < len(about) for r in kept])
    assert report.residual_before > 0.3 > 0.06 > report.residual
    assert abs(report.residual - truly) < 0.05
