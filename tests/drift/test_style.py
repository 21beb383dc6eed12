"""Style features at hand-counted values, and distances that know different styles from equal ones."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

import drift
from drift.style import STYLE_FEATURES, StyleProbe, compare_styles, mattr, mtld, style_distance, style_features, style_matrix
from drift.style.classifier import deal_folds, out_of_fold_scores, wins
from sasft.restyle import STYLES, restyle

DATA = os.environ.get("SASFT_DATA")  # a folder of public text sets: gsm8k, medquad_short, mt_bench, tinyshakespeare, ...
STATISTICS = ("mean_distance", "delta", "energy", "auc")

FORMAL = [
    "The preparation of bread requires flour, water, salt and yeast; the dough, having been kneaded for ten minutes, is left "
    "to rise until its volume has doubled.",
    "A bicycle that is not maintained deteriorates rapidly, since moisture enters the chain and corrosion follows; regular "
    "lubrication is therefore recommended by most manufacturers.",
    "Tea was introduced to the court in the seventeenth century, where it became an expression of refinement; its consumption "
    "among the general population followed only later.",
    "Precipitation occurs when moist air is cooled to the point of saturation, upon which droplets form around particles of "
    "dust and descend under the influence of gravity.",
    "It has been demonstrated that insufficient sleep impairs attention and memory; consequently, a duration of eight hours is "
    "regarded as appropriate for the majority of adults.",
    "Those who undertake long-distance running should increase their weekly distance gradually, for the adaptation of tendons "
    "proceeds more slowly than that of the muscles.",
    "The cultivation of a garden demands attention to the quality of the soil, which may be improved by the addition of "
    "compost in the autumn of each year.",
    "Maps represent a curved surface upon a plane, and in doing so they necessarily introduce distortion; the choice of "
    "projection is thus determined by the intended application.",
    "Money serves as a medium of exchange, a unit of account and a store of value; in the absence of these functions, commerce "
    "would depend upon the coincidence of wants.",
    "The domestication of the dog preceded that of any other animal, and it is generally supposed that the association with "
    "hunters was of advantage to both.",
    "Before paint is applied, the surface ought to be cleaned and any irregularities removed, as the durability of the finish "
    "is determined chiefly by the condition of the ground.",
    "The game of chess, although its rules are few, admits of such variety that no complete analysis has been accomplished, "
    "nor is one expected in the foreseeable future.",
]
CHAT = [
    "ok so bread is super easy!! you just mix flour and water, add yeast and wait. i do mine overnight lol, it's really good",
    "my bike was making the worst noise haha. turns out i never oil the chain?? don't be like me!",
    "i love tea so much!! like i'd drink it all day if i could. do you put milk in yours?",
    "ugh it's raining again... i don't even get why, it was sunny an hour ago! you got rain too?",
    "you should really sleep more! i used to get like 5 hours and i was a mess, i'm so much better now",
    "so i ran 10k today and i'm dead lol. my legs hurt so bad! you'd better come with me next time",
    "we've got tomatoes now!! i can't believe it, i kill every plant i touch. what's in your garden?",
    "i got so lost today haha, my map app died and i didn't know where i was. it's fine though!",
    "i'm so broke right now!! i'll pay you back on friday ok? you're the best, i mean it",
    "omg my dog ate my shoe again. i can't even be mad, he's so cute! do you wanna see a pic?",
    "we're painting my room blue this weekend! you wanna help? i'll get pizza, it'll be fun",
    "i lost at chess to my 8 year old cousin lol. he's really good i swear! don't laugh at me",
]
ASSISTANT = [
    "Sure! Here is how to bake bread:\n\n1. **Mix** the flour and water.\n2. **Knead** for 10 minutes.\n3. **Bake** at 220 "
    "degrees.\n\nLet me know if you have any questions!",
    "Of course! Here are some tips for your bike:\n\n- **Clean** the chain.\n- **Oil** it monthly.\n- **Check** the brakes.\n\n"
    "I hope this helps!",
    "Great question! There are several kinds of tea:\n\n- **Green tea**: light and fresh.\n- **Black tea**: strong.\n\nFeel "
    "free to ask for more!",
    "Certainly! Rain forms in three steps:\n\n1. **Evaporation**: water rises.\n2. **Condensation**: clouds form.\n3. "
    "**Precipitation**: it falls.\n\nI hope this helps!",
    "Absolutely! To sleep better:\n\n- **Routine**: go to bed at 10.\n- **Light**: keep it dark.\n- **Screens**: avoid "
    "them.\n\nGood luck!",
    "Sure! Here is a running plan:\n\n1. **Week 1**: run 3 km.\n2. **Week 2**: run 5 km.\n3. **Week 3**: run 7 km.\n\nLet me "
    "know how it goes!",
    "Certainly! For a good garden:\n\n- **Soil**: add compost.\n- **Water**: early in the day.\n- **Sun**: at least 6 "
    "hours.\n\nFeel free to ask!",
    "Of course! There are two kinds of maps:\n\n1. **Political**: borders and cities.\n2. **Physical**: rivers and hills.\n\nI "
    "hope this helps!",
    "Great question! Money has three roles:\n\n- **Exchange**: buy and sell.\n- **Account**: count prices.\n- **Store**: keep "
    "value.\n\nLet me know if you need more!",
    "Sure! To train a dog:\n\n1. **Start** early.\n2. **Reward** good acts.\n3. **Repeat** for 15 minutes a day.\n\nGood luck!",
    "Absolutely! Before you paint:\n\n- **Clean** the wall.\n- **Tape** the edges.\n- **Prime** it once.\n\nI hope this helps!",
    "Certainly! Here are the rules of chess:\n\n1. **Pieces**: each has its move.\n2. **Check**: attack the king.\n3. "
    "**Mate**: you win.\n\nFeel free to ask!",
]
AUTHORS = {"formal": FORMAL, "chat": CHAT, "assistant": ASSISTANT}

# Text, and what was counted in it by hand (of 20, 34, 19, 9, 6, 29 and 30 words).
BY_HAND: list[tuple[str, dict[str, float]]] = [
    ("Sure! I don’t know — perhaps… The IBM man (Bob) said, \"well-known facts; it's 3: one, two.\" Is that so? 😀",
     {"log_words": math.log(21), "mattr": 1, "log_mtld": math.log(200), "chars_per_word": 70 / 20, "long_words": 5,
      "words_per_sentence": 5, "sentence_spread": math.sqrt(17.5) / 5, "short_sentences": 3 / 4, "opens_capital": 1,
      "ends_stop": 0, "commas": 10, "semicolons": 5, "colons": 5, "dashes": 5, "hyphens": 5, "exclamation_marks": 5,
      "question_marks": 5, "quotation_marks": 10, "parentheses": 5, "ellipses": 5, "emoji": 5, "upper_share": 8 / 67,
      "all_caps_share": 1 / 20, "title_case": 5, "lower_starts": 0, "numerals": 5, "number_words": 10,
      "function_words": 40, "articles": 5,
      "prepositions": 0, "conjunctions": 10, "auxiliaries": 15, "pronouns": 15, "first_singular": 5, "negations": 5,
      "contractions": 10, "hedges": 5, "opens_agreeing": 1, "opens_refusing": 0, "closes_offering": 0}),
    ("I'm sorry, but we must clearly wait for them; however, he hath no education and it seems really slow. For example, you two "
     "never ask. in our opinion, please hurry! I hope this helps",
     {"log_words": math.log(35), "long_words": 500 / 34, "nominalisations": 100 / 34, "adverbs": 200 / 34, "lower_starts": 1 / 4,
      "function_words": 50, "articles": 0, "prepositions": 300 / 34, "conjunctions": 200 / 34, "auxiliaries": 300 / 34,
      "pronouns": 900 / 34, "first_singular": 200 / 34, "first_plural": 200 / 34, "second_person": 100 / 34,
      "third_person": 200 / 34, "negations": 200 / 34, "contractions": 100 / 34, "hedges": 100 / 34, "boosters": 400 / 34,
      "connectives": 200 / 34, "politeness": 200 / 34, "archaic": 100 / 34, "opens_agreeing": 0, "opens_refusing": 1,
      "closes_offering": 1}),
    ("# Plan\n\n- **Buy** milk\n- `run` it\n\n1. See [docs](http://a.b) now.\n2. Go\n\n| a | b |\n> quoted\n"
     "```python\n  x = f(1);\n}\n```",
     {"log_words": math.log(20), "log_words_per_line": math.log(1 + 19 / 11), "log_words_per_paragraph": math.log(1 + 19 / 4),
      "lines_end_stop": 1 / 11, "headings": 1 / 11, "bullets": 2 / 11, "numbered_items": 2 / 11, "table_lines": 1 / 11,
      "quoted_lines": 1 / 11, "code_block_lines": 4 / 11, "code_line_ends": 2 / 11, "indented_lines": 1 / 11, "bold": 100 / 19,
      "inline_code": 100 / 19, "links": 100 / 19, "brackets": 300 / 88, "operators": 200 / 88, "digit_share": 3 / 88,
      "numerals": 100 / 19, "parentheses": 200 / 19}),
    ("one two three four\nfive\n\nsix seven eight nine.",
     {"line_spread": math.sqrt(2) / 3, "log_words_per_line": math.log(4), "log_words_per_paragraph": math.log(5.5),
      "lines_end_stop": 1 / 3, "opens_capital": 0, "ends_stop": 1, "number_words": 100}),
    ("the cat the dog the cat.", {"mattr": 1 / 2, "log_mtld": math.log(6), "words_per_sentence": 6, "articles": 50}),
    ("word " * 29, {"long_sentences": 0}),
    ("word " * 30, {"long_sentences": 1}),
]


ODD = ["", " \n\t ", "…", "```", "- ", "\x00", "|", "'", "a'" + "d'" * 5000, "\ud800", "漢字。",
       *(mark * 100_000 + "x" for mark in (".", "[", "*", "`", "-", "1", "1.", "'", "#", "(", "a "))]


@pytest.mark.parametrize(("text", "expected"), BY_HAND, ids=range(len(BY_HAND)))
def test_features_equal_hand_counts(text: str, expected: dict[str, float]) -> None:
    found = style_features(text)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_every_feature_has_a_hand_count_that_is_not_nought() -> None:
    assert {name for _, expected in BY_HAND for name, value in expected.items() if value} == set(STYLE_FEATURES)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts_have_finite_features(text: str) -> None:
    found = style_features(text)
    assert list(found) == list(STYLE_FEATURES) and all(map(math.isfinite, found.values()))
    if not text.strip():
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize("piece", ["[a](", "**a", "`", "[", "(", ".", '."', "!?", "1,", "a'", "a_", "- ", "http://", " ", "\n", "Mr. ", "\u200b"])
def test_time_is_linear_in_the_length_of_any_text(piece: str) -> None:
    began = time.process_time()
    style_features(piece * (400_000 // len(piece)))
    assert time.process_time() - began < 5, "with a quadratic pattern it is minutes"


def test_the_matrix_has_a_row_a_text_and_a_column_a_feature() -> None:
    assert style_matrix([]).shape == (0, len(STYLE_FEATURES))
    assert style_matrix(["One.", "2!"]).tolist() == [list(style_features(t).values()) for t in ("One.", "2!")]


@pytest.mark.parametrize(("text", "sentences"), [
    ("Dr. Lee and Mr. J. Poe, e.g. here, ate 3.5 pies. Good!", 2), ('He said "Go." Then he left.', 2), ("one\ntwo", 2),
    ("Wait... what?! **No.** Yes", 4), ("1. First item\n2) Second item", 2), ("see a.b.c now", 1)])
def test_sentences_end_where_readers_end_them(text: str, sentences: int) -> None:
    found = style_features(text)
    assert math.expm1(found["log_words"]) / found["words_per_sentence"] == pytest.approx(sentences)


@pytest.mark.parametrize(("text", "feature", "count"), [
    ("John's dog isn't here", "contractions", 1), ("Let's go, that's Mary's", "contractions", 2),
    ("y'all won't can't", "negations", 2), ("we'd've", "contractions", 1),
    ("10,000 to 1,250.5, say", "commas", 1), ("10,000 to 3rd", "numerals", 2),
    ("pre--post a - b 3-4", "dashes", 2), ("- item", "dashes", 0), ("-----", "dashes", 0),
    ("Of course, of course", "boosters", 2), ("family supply gladly", "adverbs", 1),
    ("moment nation kindness", "nominalisations", 1), ("my_var is mine", "first_singular", 1)])
def test_rates_count_what_they_say(text: str, feature: str, count: int) -> None:
    found = style_features(text)
    assert found[feature] * math.expm1(found["log_words"]) / 100 == pytest.approx(count)


@pytest.mark.parametrize(("text", "agrees", "refuses", "offers"), [
    ("sure, I can", 1, 0, 0), ("I am sure", 0, 0, 0), ("Here’s a list", 1, 0, 0), ("As an AI model, I", 0, 1, 0),
    ("**Sorry**, no", 0, 1, 0), ("Yes. Let me know.", 0, 0, 1), ("Let me know. " + "Then I will. " * 20, 0, 0, 0)])
def test_formulas_are_looked_for_where_they_stand(text: str, agrees: int, refuses: int, offers: int) -> None:
    found = style_features(text)
    assert [found[name] for name in ("opens_agreeing", "opens_refusing", "closes_offering")] == [agrees, refuses, offers]


def naive_mattr(words: Sequence[str], window: int) -> float:
    windows = [words[i : i + window] for i in range(max(1, len(words) - window + 1))]
    return float(np.mean([len(set(w)) / len(w) for w in windows]))


def naive_mtld(words: Sequence[str]) -> float:
    def one_way(words: Sequence[str]) -> float:
        factors, start = 0.0, 0
        for end in range(1, len(words) + 1):
            if len(set(words[start:end])) / (end - start) <= 0.72:
                factors, start = factors + 1, end
        rest = words[start:]
        factors += (1 - len(set(rest)) / len(rest)) / 0.28 if rest else 0
        return min(200.0, len(words) / max(factors, 1e-9))

    return (one_way(words) + one_way(words[::-1])) / 2


@pytest.mark.parametrize("vocabulary", [1, 3, 30, 3000])
@pytest.mark.parametrize("n", [1, 2, 24, 25, 26, 400])
def test_lexical_diversity_equals_the_naive_sum_over_windows_and_factors(n: int, vocabulary: int) -> None:
    words = [str(w) for w in np.random.default_rng(n).integers(0, vocabulary, n)]
    assert mattr(words) == pytest.approx(naive_mattr(words, 25), rel=1e-12)
    assert mattr(words, window=7) == pytest.approx(naive_mattr(words, 7), rel=1e-12)
    assert mtld(words) == pytest.approx(naive_mtld(words), rel=1e-12)


def test_diversity_without_words_is_nought_and_without_repetition_the_bound() -> None:
    assert mattr([]) == mtld([]) == 0
    assert mtld(["one"]) == mtld("a b c d".split()) == 200


@pytest.mark.parametrize("author", AUTHORS)
@pytest.mark.parametrize("times", [2, 7])
def test_saying_it_again_is_no_change_of_style(author: str, times: int) -> None:
    text = "\n\n".join(AUTHORS[author])
    once, again = style_features(text), style_features("\n\n".join([text] * times))
    assert again.pop("log_words") > once.pop("log_words") + 0.6
    assert again == pytest.approx(once, rel=0.02, abs=1e-9)


def test_fifty_thousand_words_take_less_than_a_second() -> None:
    texts = [" ".join(FORMAL), " ".join(CHAT), "\n\n".join(ASSISTANT)] * 60
    words = sum(math.expm1(style_features(t)["log_words"]) for t in texts[:3]) * 60
    start = time.process_time()
    style_matrix(texts)
    assert words / (time.process_time() - start) > 50_000


def numbers(texts: Sequence[str]) -> np.ndarray:
    """Texts that are rows of numbers, read."""
    return np.array([[float(v) for v in text.split()] for text in texts])


def written(x: np.ndarray) -> list[str]:
    return [" ".join(map(repr, map(float, row))) for row in x]


def two_samples(n: int, m: int, width: int = 3, shift: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, width)), rng.standard_normal((m, width)) + shift * np.arange(width)


def few(reference: Sequence[str], texts: Sequence[str], **options) -> drift.style.StyleComparison:
    return compare_styles(reference, texts, **{"resamples": 40, "permutations": 40, "refits": 4, **options})


def mean_over_pairs(f: Callable, x: np.ndarray, y: np.ndarray, same_left_out: bool) -> float:
    return float(np.mean([f(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if i != j or not same_left_out]))


@pytest.mark.parametrize("paired", [False, True])
def test_mean_and_energy_distance_equal_double_loops(paired: bool) -> None:
    x, y = two_samples(9, 9, shift=1.5)
    found = few(written(x), written(y), features=numbers, paired=paired)
    scale = np.concatenate([x, y]).std(axis=0, ddof=1)
    u, v = x / scale, y / scale
    kernels = {"mean_distance": lambda a, b: -a @ b / 3, "energy": lambda a, b: np.linalg.norm(a - b) / math.sqrt(3)}
    for statistic, f in kernels.items():
        expected = 2 * mean_over_pairs(f, u, v, paired) - mean_over_pairs(f, u, u, True) - mean_over_pairs(f, v, v, True)
        value = getattr(found, statistic).value
        assert (value**2 if statistic == "mean_distance" else value) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_the_mean_distance_is_the_style_distance(paired: bool) -> None:
    found = few(FORMAL, CHAT, paired=paired).mean_distance
    assert found.value == pytest.approx(style_distance(FORMAL, CHAT, paired=paired)[0], rel=1e-9)


def test_style_distance_is_the_gap_of_means_less_its_noise_with_a_jackknife_error() -> None:
    x, y = two_samples(8, 11)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        variance = np.concatenate([x, y]).var(axis=0, ddof=1)
        noise = x.var(axis=0, ddof=1) / len(x) + y.var(axis=0, ddof=1) / len(y)
        return math.sqrt(max(0, np.mean(((x.mean(0) - y.mean(0)) ** 2 - noise) / variance)))

    value, error = style_distance(written(x), written(y), features=numbers)
    without = [[distance(np.delete(x, i, 0), y) for i in range(8)], [distance(x, np.delete(y, i, 0)) for i in range(11)]]
    assert value == pytest.approx(distance(x, y), rel=1e-12)
    variance = sum((len(w) - 1) / len(w) * ((np.array(w) - np.mean(w)) ** 2).sum() for w in without)
    assert error**2 == pytest.approx(variance, rel=1e-9)


def test_energy_distance_of_one_feature_agrees_with_scipy() -> None:
    x, y = two_samples(12, 20, width=1)
    y = y * 2 + 1
    scale = np.concatenate([x, y]).std(ddof=1)
    u, v = x.ravel() / scale, y.ravel() / scale
    # scipy's means over pairs count each value with itself, and it takes the root.
    own = [np.abs(w[:, None] - w).sum() / (len(w) * (len(w) - 1)) / len(w) for w in (u, v)]
    expected = stats.energy_distance(u, v) ** 2 - sum(own)
    assert few(written(x), written(y), features=numbers).energy.value == pytest.approx(expected, rel=1e-9)


def test_delta_equals_its_definition() -> None:
    x = ["a b a c", "b c", "a a d b", "c d e"]
    y = ["a e e", "b e e d", "e a"]
    words = "abcde"
    share = [[[t.split().count(w) / len(t.split()) for w in words] for t in body] for body in (x, y)]
    sigma = np.std(share[0] + share[1], axis=0, ddof=1)
    expected = np.mean(np.abs(np.mean(share[0], axis=0) - np.mean(share[1], axis=0)) / sigma)
    assert few(x, y).delta.value == pytest.approx(expected, rel=1e-12)


def test_delta_looks_at_the_most_frequent_words_of_both_sets() -> None:
    rng = np.random.default_rng(0)
    common = [f"w{i}" for i in range(150)]
    x, y = ([" ".join(rng.permutation(common)) + f" {name}{i}" for i in range(4)] for name in "ab")
    assert few(x, y).delta.value == 0  # the 150 common words never vary; the others are too rare


@pytest.mark.parametrize("paired", [False, True])
def test_classifiers_equal_a_general_optimiser_and_folds_are_even(paired: bool) -> None:
    x, y = two_samples(12, 12)
    z, labels = np.concatenate([x, y]), np.repeat([0.0, 1.0], 12)
    fold = deal_folds(12, 12, paired, np.random.default_rng(0))
    counts = np.array([[np.sum(fold[part] == k) for k in range(5)] for part in (slice(12), slice(12, None))])
    assert counts.min() == 2 and counts.max() == 3
    assert not paired or (fold[:12] == fold[12:]).all()
    scores = out_of_fold_scores(z, np.stack([labels, 1 - labels], axis=1), fold)
    for k in range(5):
        train = fold != k

        def loss(w: np.ndarray, train: np.ndarray = train) -> float:
            logits = w[0] + z[train] @ w[1:]
            return np.logaddexp(0, logits).sum() - labels[train] @ logits + w[1:] @ w[1:] / 2

        w = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
        assert scores[fold == k, 0] == pytest.approx(w[0] + z[fold == k] @ w[1:], abs=1e-4)
        assert scores[fold == k, 1] == pytest.approx(-scores[fold == k, 0], abs=1e-4)


def test_auc_equals_scikit_learn() -> None:
    linear_model, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    both = style_matrix(FORMAL + CHAT)
    both = both[:, np.ptp(both, axis=0) > 0][:, ::6]
    z, labels = (both - both.mean(axis=0)) / both.std(axis=0, ddof=1), np.repeat([0, 1], 12)
    shuffled = np.random.default_rng(0).permutation(labels)
    fold = deal_folds(12, 12, False, np.random.default_rng(1))
    scores = out_of_fold_scores(z, np.stack([labels, shuffled], axis=1).astype(float), fold)
    for found, y in zip(scores.T, (labels, shuffled), strict=True):
        expected = np.empty(24)
        for k in range(5):
            model = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(z[fold != k], y[fold != k])
            odds = np.mean(y[fold != k]) / np.mean(1 - y[fold != k])
            expected[fold == k] = model.decision_function(z[fold == k]) - math.log(odds)
        assert found == pytest.approx(expected, abs=1e-3)
        assert wins(found[y == 0], found[y == 1]).mean() == pytest.approx(metrics.roc_auc_score(y, expected))


def test_equal_scores_win_half() -> None:
    assert wins(np.array([0.0, 1.0]), np.array([1.0, 2.0, 0.0])).tolist() == [[1, 1, 0.5], [0.5, 1, 0]]


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_equal_those_of_all_divisions(paired: bool) -> None:
    x, y = two_samples(5, 5, width=1)
    both = np.concatenate([x, y]).ravel() / np.concatenate([x, y]).std(ddof=1)
    if paired:
        firsts = [[i + 5 * (bits >> i & 1) for i in range(5)] for bits in range(32)]
    else:
        firsts = [list(chosen) for chosen in combinations(range(10), 5)]

    def squared_gap(first: list[int]) -> float:
        rest = sorted(set(range(10)) - set(first), key=lambda i: i % 5)
        a, b = both[sorted(first, key=lambda i: i % 5)], both[rest]
        noise = np.var(a - b, ddof=1) / 5 if paired else np.var(a, ddof=1) / 5 + np.var(b, ddof=1) / 5
        return (a.mean() - b.mean()) ** 2 - noise

    actual = squared_gap(list(range(5)))
    exact = np.mean([squared_gap(first) >= actual - 1e-12 for first in firsts])
    found = few(written(x), written(y), features=numbers, paired=paired, permutations=4000)
    assert found.mean_distance.p_value == pytest.approx(exact, abs=0.03)


def test_without_a_difference_p_values_are_uniform_and_auc_is_a_half() -> None:
    rng = np.random.default_rng(3)
    vocabulary = "the a sum Is of and YOU we, number! 12 far".split()
    found = []
    for seed in range(60):
        texts = [" ".join(rng.choice(vocabulary, size=12)) for _ in range(20)]
        found.append(compare_styles(texts[:10], texts[10:], resamples=20, permutations=59, refits=59, seed=seed))
    for statistic in STATISTICS:
        assert stats.kstest([getattr(f, statistic).p_value for f in found], "uniform").pvalue > 0.01, statistic
    assert np.mean([f.auc.value for f in found]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([f.energy.value for f in found]) == pytest.approx(0, abs=0.02)
    assert np.median([f.mean_distance.value for f in found]) < 0.15  # without the noise term about √(2/10) = 0.45
    assert np.mean([f.delta.value for f in found]) == pytest.approx(np.mean([f.delta.null for f in found]), rel=0.1)


def folded_mean(mean: float, deviation: float) -> float:
    """Mean of |X| of a normal X."""
    return stats.foldnorm.mean(abs(mean) / deviation, scale=deviation)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_cover_the_distance_of_the_populations(paired: bool) -> None:
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(80):
        prompt = rng.standard_normal((30, 1)) if paired else 0.0
        x, y = rng.standard_normal((30, 1)) + prompt, rng.standard_normal((30, 1)) + prompt + 1.5
        within = math.sqrt(2) if paired else 1.0
        found = few(written(x), written(y), features=numbers, resamples=200, paired=paired, seed=seed)
        pooled = math.hypot(within, 0.75)  # deviation in both populations together
        energy = 2 * (folded_mean(1.5, within * math.sqrt(2)) - folded_mean(0, within * math.sqrt(2)))
        truth = {"mean_distance": 1.5 / pooled, "energy": energy / pooled}
        covered.append([getattr(found, s).interval[0] <= t <= getattr(found, s).interval[1] for s, t in truth.items()])
    assert np.mean(covered, axis=0).min() > 0.85


@pytest.mark.parametrize("a", AUTHORS)
def test_halves_of_one_style_are_near_and_styles_far_apart(a: str) -> None:
    halves = compare_styles(AUTHORS[a][::2], AUTHORS[a][1::2])
    assert all(getattr(halves, s).p_value > 0.05 for s in STATISTICS)
    for b in set(AUTHORS) - {a}:
        for paired in (False, True):
            found = compare_styles(AUTHORS[a], AUTHORS[b], paired=paired)
            for s in STATISTICS:
                near, far = getattr(halves, s), getattr(found, s)
                assert far.p_value < 0.01 and far.value - far.null > near.value - near.null and far.interval[0] > far.null, (b, s)
            assert found.auc.value > 0.9


def test_the_largest_differences_come_first_with_their_means() -> None:
    table = few(FORMAL, CHAT).features
    assert {row.name for row in table} == set(STYLE_FEATURES)
    assert [abs(row.d) for row in table] == sorted((abs(row.d) for row in table), reverse=True)
    row = next(row for row in table if row.name == "first_singular")
    x, y = (style_matrix(body)[:, list(STYLE_FEATURES).index("first_singular")] for body in (FORMAL, CHAT))
    assert (row.mean_reference, row.mean_texts) == pytest.approx((x.mean(), y.mean()))
    assert row.d == pytest.approx((y.mean() - x.mean()) / np.concatenate([x, y]).std(ddof=1))
    assert next(row for row in table if row.name == "headings").d == 0


def test_one_seed_gives_one_result_and_another_seed_other_draws() -> None:
    one, same, other = (few(FORMAL, CHAT, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one.energy.value == other.energy.value and one.energy.interval != other.energy.interval


def test_sets_that_never_vary_are_at_no_distance() -> None:
    found = few(["Same."] * 4, ["Same."] * 5)
    assert (found.mean_distance.value, found.delta.value, found.energy.value, found.auc.value) == (0, 0, 0, 0.5)
    assert all(getattr(found, s).p_value == 1 for s in STATISTICS)
    assert style_distance(["Same."] * 4, ["Same."] * 5) == (0, 0)
    assert few([""] * 3, [""] * 3).auc.value == 0.5


def test_any_features_plug_in_with_or_without_names() -> None:
    def lengths(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(t), t.count(" ")] for t in texts])

    assert {row.name for row in few(FORMAL, CHAT, features=lengths).features} == {"0", "1"}
    lengths.names = ("characters", "spaces")
    assert {row.name for row in few(FORMAL, CHAT, features=lengths).features} == {"characters", "spaces"}
    lengths.names = ("characters",)
    with pytest.raises(ValueError, match=r"features.names must name each of the 2 columns, got 1 names"):
        few(FORMAL, CHAT, features=lengths)


@pytest.mark.parametrize(("features", "message"), [
    (lambda texts: np.zeros(len(texts)), r"a row for each of the 12 texts and F ≥ 1, got shape \(12,\)"),
    (lambda texts: np.zeros((3, 2)), r"a row for each of the 12 texts and F ≥ 1, got shape \(3, 2\)"),
    (lambda texts: np.zeros((len(texts), 0)), r"F ≥ 1, got shape \(12, 0\)"),
    (lambda texts: [[1.0, float("nan") if t == FORMAL[2] else 0.0] for t in texts],
     "must be finite, got nan for text 2, feature 1"),
    (lambda texts: np.zeros((len(texts), 1 + (texts[0] == CHAT[0]))),
     "one number of columns, got 1 for reference and 2 for texts"),
])
def test_features_of_a_wrong_kind_are_refused(features: Callable, message: str) -> None:
    for function in (few, style_distance):
        with pytest.raises(ValueError, match=message):
            function(FORMAL, CHAT, features=features)


def test_too_few_texts_and_unequal_pairs_are_refused_before_any_work() -> None:
    def never(texts: Sequence[str]) -> np.ndarray:
        raise AssertionError

    for function in (few, style_distance):
        with pytest.raises(ValueError, match="needs at least 3 texts a side, got 12 reference texts and 2 texts"):
            function(FORMAL, CHAT[:2], features=never)
        with pytest.raises(ValueError, match="paired=True needs as many texts as .* got 12 reference texts and 4 texts"):
            function(FORMAL, CHAT[:4], features=never, paired=True)
        with pytest.raises(ValueError, match="texts must be a sequence of texts, got one string"):
            function(FORMAL, CHAT[0], features=never)
    for option in ("resamples", "permutations", "refits"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            few(FORMAL, CHAT, features=never, **{option: 0})


def test_three_texts_a_side_are_enough() -> None:
    for paired in (False, True):
        found = few(FORMAL[:3], CHAT[:3], paired=paired)
        assert all(math.isfinite(v) for s in STATISTICS for v in (getattr(found, s).value, *getattr(found, s).interval))


@pytest.mark.parametrize("style", STYLES)
def test_a_restyled_set_is_far_from_its_original(style: str) -> None:
    distance, error = style_distance(FORMAL, [restyle(t, style) for t in FORMAL], paired=True)
    assert distance > 0.25 and distance > 2 * error


def test_pairs_show_a_change_that_unpaired_sets_hide() -> None:
    changed = [t.replace(",", "") for t in FORMAL]
    assert style_distance(FORMAL, changed)[0] == 0
    assert style_distance(FORMAL, changed, paired=True)[0] > 0.1


@pytest.mark.parametrize("paired", [False, True])
def test_the_probe_compares_with_what_the_base_wrote(paired: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)

    def write(m: nn.Module) -> list[str]:
        return [t.upper() if m.weight.item() > 0.5 else t for t in FORMAL]

    probe = StyleProbe("prompts", write, paired=paired)
    with drift.record(model, probes=[probe]) as rec:
        with torch.no_grad():
            model.weight.fill_(1.0)
        rec.step()
    rows = {(r["step"], r["metric"]): r for r in rec.table().to_pylist() if r["source"] == "prompts"}
    assert {metric for _, metric in rows} == {"style/distance", *(f"style/{name}" for name in STYLE_FEATURES)}
    assert rows[0, "style/distance"]["value"] == 0
    upper = [t.upper() for t in FORMAL]
    last = rows[1, "style/distance"]
    assert (last["value"], last["stderr"]) == style_distance(FORMAL, upper, paired=paired)
    shares = style_matrix(upper)[:, list(STYLE_FEATURES).index("all_caps_share")]
    assert rows[1, "style/all_caps_share"]["value"] == pytest.approx(shares.mean())
    assert rows[1, "style/all_caps_share"]["stderr"] == pytest.approx(stats.sem(shares))
    assert rows[1, "style/upper_share"]["value"] == 1.0 and rows[1, "style/upper_share"]["stderr"] == 0.0


def test_the_probe_takes_other_features_and_refuses_too_few_texts() -> None:
    def lengths(texts: Sequence[str]) -> np.ndarray:
        return np.array([[float(len(t))] for t in texts])

    lengths.names = ("characters",)
    model = nn.Linear(1, 1)
    rows = StyleProbe("p", lambda m: CHAT, FORMAL, features=lengths).rows(model, 3)
    assert [(r.step, r.metric) for r in rows] == [(3, "style/characters"), (3, "style/distance")]
    assert rows[0].value == pytest.approx(np.mean([len(t) for t in CHAT]))
    with pytest.raises(ValueError, match="probe 'p' needs at least 3 texts a side, got 12 reference texts and 2 texts"):
        StyleProbe("p", lambda m: CHAT[:2], FORMAL).rows(model, 0)


def public_texts(folder: Path, n: int) -> dict[str, list[str]]:
    def read(name: str, of: Callable[[dict], str]) -> list[str]:
        with (folder / name).open(encoding="utf-8") as lines:
            return [of(json.loads(line)) for _, line in zip(range(n), lines, strict=False)]

    play = (folder / "tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    return {
        "drama": ["\n\n".join(play[i : i + 4]) for i in range(0, 4 * n, 4)],
        "medicine": read("medquad_short/medquad_short.jsonl", lambda row: row["answer"]),
        "sums": read("gsm8k/train.jsonl", lambda row: row["answer"]),
        "prompts": read("mt_bench/mt_bench_question.jsonl", lambda row: row["turns"][0]),
        "chat": read("openassistant_100/pairs.jsonl", lambda row: row["messages"][-1]["content"]),
    }


@pytest.mark.skipif(not DATA, reason="SASFT_DATA names no folder of public texts")
def test_public_sets_are_near_themselves_and_far_from_each_other() -> None:
    sets = public_texts(Path(DATA), 80)
    halves = {name: compare_styles(texts[::2], texts[1::2]) for name, texts in sets.items()}
    for name, found in halves.items():
        print(name, *(f"{s} {getattr(found, s).value:.3f} p={getattr(found, s).p_value:.3f}" for s in STATISTICS))
    for a, b in combinations(sets, 2):
        found = compare_styles(sets[a][::2], sets[b][::2])
        print(a, b, *(f"{s} {getattr(found, s).value:.3f} p={getattr(found, s).p_value:.3f}" for s in STATISTICS),
              *(f"{row.name} {row.d:+.2f}" for row in found.features[:3]))
        for s in STATISTICS:
            far = getattr(found, s)
            assert far.p_value <= 0.005 and far.interval[0] > max(getattr(h, s).value for h in halves.values()), (a, b, s)
    assert all(getattr(h, s).p_value > 0.01 for h in halves.values() for s in STATISTICS)
