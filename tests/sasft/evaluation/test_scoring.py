"""Scores of one answer: exact values by hand, ROUGE-L by the recursion and by the common package, both of GSM8K's filters."""

import functools
import importlib

import numpy as np
import pytest

from sasft.evaluation.scoring import common_subsequence, exact_match, final_answer, gsm8k_scores, rouge_l, same_formula


def test_the_longest_common_subsequence_by_its_recursion() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 3, 8, 70, 130):  # beyond one and two machine words
        for _ in range(12):
            a, b = (tuple(rng.choice(list("abcd"), size=rng.integers(0, n + 1))) for _ in range(2))

            @functools.cache
            def longest(i: int, j: int, a=a, b=b) -> int:
                if i == len(a) or j == len(b):
                    return 0
                return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

            assert common_subsequence(a, b) == longest(0, 0)


@pytest.mark.parametrize(("answer", "references", "score"), [
    ("the cat sat", ["the cat sat"], 1),
    ("The CAT, sat!", ["the cat sat"], 1),  # neither case nor marks
    ("cat the sat", ["the cat sat"], 2 / 3),  # L = 2
    ("a b c d", ["a c"], 2 * 2 / (4 + 2)),
    ("a c", ["x", "a b c d"], 2 * 2 / (2 + 4)),  # the best of the references
    ("snow_ball", ["snow ball"], 1),
    ("", ["a"], 0), ("?!", ["a"], 0), ("a", ["..."], 0), ("a", [], 0)])
def test_rouge_l_by_hand(answer: str, references: list[str], score: float) -> None:
    assert rouge_l(answer, references) == pytest.approx(score, abs=1e-12)


def test_rouge_l_as_the_common_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(1)
    words = ["The", "cat", "sat.", "on", "a", "mat,", "3.5", "don't", "END", "-", "re-do", "snow_ball"]
    for _ in range(100):
        answer, *references = (" ".join(rng.choice(words, size=rng.integers(0, 12))) for _ in range(3))
        theirs = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
        assert rouge_l(answer, references) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("answer", "reference", "score"), [
    ("True.", "true", 1), (" New   York\n", "new york", 1), ("newyork", "new york", 0), ("It is true", "true", 0),
    ("U.S.", "us", 1), ("", "...", 1), ("3.5", "35", 1)])  # the last two are what the definition gives
def test_exact_match_by_the_normalisation_of_natural_instructions(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, ["something else", reference]) == score


@pytest.mark.parametrize(("answer", "gold", "strict", "flexible"), [
    ("So 3 + 4.\n#### 7", "7", 1, 1),
    ("It is 7.", "7", 0, 1),
    ("#### 7, or rather 8", "7", 1, 0),  # strict takes the first, and the comma that stands at it is left out
    ("#### 8\n#### 7", "7", 0, 1),
    ("I do not know", "7", 0, 0),
    ("", "7", 0, 0),
    ("It costs $1,007", "7", 0, 0),
    ("It costs $1,007.", "1007", 0, 1), ("#### 1,007", "1007", 1, 1), ("#### 1007", "1,007", 1, 1),
    ("#### $72", "72", 0, 1),  # strict knows no dollar sign
    ("####72", "72", 0, 1), ("###  72", "72", 0, 1),  # and wants exactly one blank
    ("#### -3", "-3", 1, 1), ("#### 3", "-3", 0, 0), ("from 5-3", "-3", 0, 1),  # a minus before digits counts as a sign
    ("#### 72.", "72", 1, 1), ("#### 72.0", "72", 0, 0),  # compared as text
    ("72 apples (that is 6 dozen)", "72", 0, 0),  # the last number
    ("72 apples, and so on ...", "72", 0, 0),  # the last run of marks is taken for a number
    ("72 apples, hurrah!", "72", 0, 1),  # one mark alone is not
    ("Half of 9 is 4.5", "4.5", 0, 1), ("#### .5", ".5", 1, 1),
    ("#### 72 clips", "72", 1, 1), ("The answer is **72**", "72", 0, 1)])
def test_both_filters_of_gsm8k(answer: str, gold: str, strict: int, flexible: int) -> None:
    found = gsm8k_scores(answer, f"She adds 3 + 4 = <<3+4=7>>7, not #### 5.\n#### {gold}")
    assert found == {"strict": strict, "flexible": flexible}


def test_gsm8k_as_lm_eval_scores_it() -> None:
    """Its filters and its metric, with the settings of its gsm8k.yaml, version 3."""
    extraction, selection = (pytest.importorskip(f"lm_eval.filters.{name}") for name in ("extraction", "selection"))
    match = importlib.import_module("lm_eval.api.metrics").exact_match_hf_evaluate
    filters = {"strict": extraction.RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)"),
               "flexible": extraction.RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)}
    rng = np.random.default_rng(0)
    pieces = ["#### ", "####", "72", "-72", "1,007", "$", ".", "...", " ", "\n", "72.0", ", ", "is ", "-", "7"]
    for _ in range(300):
        answer = "".join(rng.choice(pieces, size=rng.integers(0, 8)))
        gold = str(rng.choice(["72", "7", "1,007", "-72"]))
        for name, taken in filters.items():
            found = selection.TakeFirstFilter().apply(taken.apply([[answer]], [{}]), [{}])
            theirs = match(predictions=list(found), references=[f"So.\n#### {gold}"], ignore_case=True, ignore_punctuation=False,
                           regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"])["exact_match"]
            assert gsm8k_scores(answer, f"So.\n#### {gold}")[name] == theirs, (answer, gold, name)


@pytest.mark.parametrize(("text", "found"), [
    (r"\boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{3 is not closed", r"\boxed{3 is not closed"),
    ("The answer is 3. No: the answer is 4\nBye", "4"),  # the last one, to the end of its line
    ("The answer is: $(3, 4]$", "$(3, 4]$"), ("The final answer is\n12", "12"),
    ("First\n  x = 2  \n", "x = 2"), ("", "")])
def test_the_result_that_a_solution_states(text: str, found: str) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(("answer", "reference", "same"), [
    (r"\boxed{ \dfrac{1}{2} }", r"\frac{1}{2}", 1), (r"\boxed{\left( 3, 4 \right]}", "(3,4]", 1),
    (r"\boxed{5\text{ cm}}", "5cm", 1), (r"\boxed{50\%}", "50", 1), (r"\boxed{90^\circ}", "90", 1), (r"\boxed{x\,y}", "xy", 1),
    (r"\boxed{x \leftarrow y}", r"x \rightarrow y", 0), (r"\boxed{0.5}", r"\frac{1}{2}", 0), (r"\boxed{3,4}", "(3,4)", 0),
    ("", "3", 0)])
def test_formulas_that_differ_in_their_typesetting_alone(answer: str, reference: str, same: int) -> None:
    assert same_formula(answer, reference) == same
