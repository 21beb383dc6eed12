"""Scores of one answer against its reference: exact match, ROUGE-L, the last number, the boxed result.

Each gives a number in [0, 1]. Nothing here knows a model or a benchmark's files.
"""

import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_ANSWER_IS = re.compile(r"answer\s+is\s*:?\s*(?=\S)", re.IGNORECASE)
# What changes how a formula is set, and not what it says.
_TYPESETTING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|[$\s]|\\?%|\^\\circ|\^\{\\circ\}")
_UPRIGHT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")


def normalised(text: str) -> str:
    """Lower case, without punctuation, white space collapsed (the normalisation of Super-NaturalInstructions).

    >>> normalised(" O,  R, 2731. ")
    'o r 2731'
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised references, else 0.

    >>> exact_match("True.", ["true"]), exact_match("It is true", ["true"])
    (1.0, 0.0)
    """
    return float(normalised(answer) in map(normalised, references))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    r"""ROUGE-L F1, the best over the references (Lin 2004, eq. 2-4 with :math:`\beta = 1`).

    With L the longest common subsequence of words: :math:`P = L / |a|`, :math:`R = L / |r|`, :math:`F = 2PR / (P + R)`;
    0 where either side has no word. Words are runs of letters and digits in lower case, without stemming. The common package
    rouge_score has the same words for ASCII, takes any other letter for a blank, and stems if asked to; the authors of
    Super-NaturalInstructions ask it to, so their scores are a little higher.

    >>> round(rouge_l("The cat sat on a mat", ["the cat lay on the mat"]), 3)  # L = 4: the, cat, on, mat
    0.667
    """
    said = _words(answer)
    return max((_f1(common_subsequence(said, words), len(said), len(words)) for words in map(_words, references)), default=0.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(common: int, n: int, m: int) -> float:
    return 2 * common / (n + m) if common else 0.0


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in O(\\|b\\|) operations on integers of \\|a\\| bits (Hyyrö 2004).

    Bit i of ``row`` is 0 where the table of lengths, in the current row of b, steps up at a[i].

    >>> common_subsequence("police killed the gunman".split(), "police kill the gunman".split())
    3
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = ones = (1 << len(a)) - 1
    for word in b:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & ones
    return len(a) - row.bit_count()


def gsm8k_scores(answer: str, reference: str) -> dict[str, float]:
    """GSM8K's two filters, as lm-evaluation-harness defines them: ``strict`` takes the first "#### n", ``flexible`` the last
    number anywhere (to be exact: the last run of at least two of ``$ , .`` and digits, or of digits; a closing "..." counts).

    Both compare what they took with the reference's "#### n" as text, commas, dollar signs and a closing full stop left out. An
    answer that says nothing a filter finds scores 0.

    >>> gsm8k_scores("So 40 + 32 = 72 clips. #### 72", "... #### 72"), gsm8k_scores("It is $72.", "... #### 72")
    ({'strict': 1.0, 'flexible': 1.0}, {'strict': 0.0, 'flexible': 1.0})
    """
    gold = _bare(gsm8k_gold(reference))
    strict, flexible = _STRICT.search(answer), _FLEXIBLE.findall(answer)
    return {"strict": float(strict is not None and _bare(strict[1]) == gold),
            "flexible": float(bool(flexible) and _bare(flexible[-1]) == gold)}


def gsm8k_gold(reference: str) -> str:
    """What stands after the last "####" of a worked reference.

    >>> gsm8k_gold("She has 24 + 48 = 72.\\n#### 72")
    '72'
    """
    return reference.rpartition("####")[2].strip()


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".").strip()


def final_answer(text: str) -> str:
    r"""The result that a worked solution states: its last ``\boxed{...}``, else what follows its last "answer is", else its
    last line.

    >>> final_answer(r"Thus x = \boxed{\frac{1}{2}}."), final_answer("The answer is 30.")
    ('\\frac{1}{2}', '30.')
    """
    _, found, rest = text.rpartition(r"\boxed{")
    if found:
        depth = 1
        for i, character in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return rest[:i]
    before, *said = _ANSWER_IS.split(text)
    lines = (said[-1] if said else before).strip().splitlines() or [""]
    return lines[0 if said else -1].strip()


def same_formula(answer: str, reference: str) -> float:
    r"""1 if the stated result and the reference are the same formula once typesetting is left out, else 0.

    A choice of ours, and a strict one: equal as text, not as mathematics, so that 1/2 and 0.5 differ.

    >>> same_formula(r"So it is \boxed{ \dfrac{1}{2} }", r"\frac{1}{2}"), same_formula("The answer is $(3, 4]$.", "(3,4]")
    (1.0, 1.0)
    """
    return float(_plain(final_answer(answer)) == _plain(reference))


def _plain(formula: str) -> str:
    return _TYPESETTING.sub("", _UPRIGHT.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", formula))).removesuffix(".")
