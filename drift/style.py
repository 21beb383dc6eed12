"""Style features of texts: how something is said, as numbers that do not look at what is said."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from drift.modes import measuring
from drift.table import Row
from drift.weights import Reference

STYLE_FEATURES: dict[str, str] = {
    "words_per_sentence": "words divided by sentences (runs ended by . ! ? or a line break)",
    "chars_per_word": "mean length of a word, in characters",
    "upper_share": "upper-case letters, share of all letters",
    "all_caps_share": "words of two or more letters, all upper-case, share of words",
    "digit_share": "digits, share of all characters that are not white space",
    "punctuation_per_word": "punctuation characters divided by words",
    "commas_per_word": "commas divided by words",
    "breaks_per_100_words": "line breaks for every 100 words",
    "markdown_per_100_words": "markdown marks (headings, bullets, numbered items, bold, code) for every 100 words",
    "brackets_per_100_chars": "braces, square brackets and double quotes for every 100 characters",
    "function_word_share": "articles, prepositions, pronouns, auxiliaries, conjunctions: share of words",
    "article_share": "a, an, the: share of words",
    "contraction_share": "words with an apostrophe inside (don't, it's), share of words",
    "first_person_share": "I, me, my, mine, we, us, our, ours: share of words",
    "second_person_share": "you, your, yours: share of words",
    "archaic_share": "thou, thee, thy, hath, doth and their like: share of words",
    "distinct_words": "distinct words in windows of 25 words, as a share, averaged over windows (text shorter than that: one window)",
    "opens_capital": "1 if the first letter is upper-case, else 0",
    "ends_stop": "1 if the last character is . ! or ?, else 0",
    "log_words": "natural logarithm of 1 + number of words",
}

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)|\n+")
_MARKDOWN = re.compile(r"^\s*(?:#{1,6} |[-*+] |\d+[.)] )|\*\*|__|`+", re.MULTILINE)
_FUNCTION_WORDS = frozenset(
    "a an the and or but nor so yet if then than that which who whom whose this these those of in on at by for with from to into "
    "onto over under about between through during before after i me my mine we us our ours you your yours he him his she her hers "
    "it its they them their theirs is am are was were be been being do does did have has had will would shall should can could may "
    "might must not no as there here when while because".split())
_FIRST, _SECOND = frozenset("i me my mine we us our ours".split()), frozenset("you your yours".split())
_ARCHAIC = frozenset("thou thee thy thine ye hath doth art wilt shalt hast dost verily forsooth whence thence hither thither ere "
                     "oft tis twas nay yea unto wherefore prithee methinks".split())
_WINDOW = 25


def style_features(text: str) -> dict[str, float]:
    """All of :data:`STYLE_FEATURES` for one text. Shares and ratios over nothing (an empty text) are 0.

    Pure string work: no model, no word list beyond a few closed classes of English.

    >>> f = style_features("THE CAT SAT. It sat!")
    >>> f["words_per_sentence"], f["all_caps_share"], f["ends_stop"]
    (2.5, 0.6, 1.0)
    """
    words = _WORD.findall(text)
    lower = [w.lower().replace("’", "'") for w in words]
    letters = [c for c in text if c.isalpha()]
    visible = [c for c in text if not c.isspace()]
    sentences = sum(bool(_WORD.search(part)) for part in _SENTENCE.split(text))
    punctuation = [c for c in visible if not c.isalnum()]
    stripped = text.strip()

    def share(hits: int, of: int, scale: float = 1.0) -> float:
        return scale * hits / of if of else 0.0

    n = len(words)
    return {
        "words_per_sentence": share(n, sentences),
        "chars_per_word": share(sum(map(len, words)), n),
        "upper_share": share(sum(c.isupper() for c in letters), len(letters)),
        "all_caps_share": share(sum(len(w) > 1 and w.isupper() for w in words), n),
        "digit_share": share(sum(c.isdigit() for c in visible), len(visible)),
        "punctuation_per_word": share(len(punctuation), n),
        "commas_per_word": share(text.count(","), n),
        "breaks_per_100_words": share(stripped.count("\n"), n, 100),
        "markdown_per_100_words": share(len(_MARKDOWN.findall(text)), n, 100),
        "brackets_per_100_chars": share(sum(c in '{}[]"' for c in text), len(text), 100),
        "function_word_share": share(sum(w in _FUNCTION_WORDS for w in lower), n),
        "article_share": share(sum(w in ("a", "an", "the") for w in lower), n),
        "contraction_share": share(sum("'" in w for w in lower), n),
        "first_person_share": share(sum(w.split("'")[0] in _FIRST for w in lower), n),
        "second_person_share": share(sum(w.split("'")[0] in _SECOND for w in lower), n),
        "archaic_share": share(sum(w in _ARCHAIC for w in lower), n),
        "distinct_words": _distinct(lower),
        "opens_capital": float(bool(letters) and letters[0].isupper()),
        "ends_stop": float(stripped[-1:] in (".", "!", "?") and bool(stripped)),
        "log_words": math.log1p(n),
    }


def _distinct(words: Sequence[str]) -> float:
    if not words:
        return 0.0
    if len(words) <= _WINDOW:
        return len(set(words)) / len(words)
    windows = range(len(words) - _WINDOW + 1)
    return float(np.mean([len(set(words[i : i + _WINDOW])) / _WINDOW for i in windows]))


def style_matrix(texts: Sequence[str]) -> NDArray[np.float64]:
    """Features of every text, [n, features], columns in the order of :data:`STYLE_FEATURES`.

    >>> style_matrix(["One.", "Two."]).shape == (2, len(STYLE_FEATURES))
    True
    """
    return np.array([[features[name] for name in STYLE_FEATURES] for features in map(style_features, texts)])


def style_distance(reference: Sequence[str], texts: Sequence[str]) -> tuple[float, float]:
    r"""Distance between two bodies of text in mean style, with its standard error.

    :math:`d=\sqrt{\max(0, \frac1F\sum_f z_f^2 - b)}` where :math:`z_f` is the difference of the means of feature f in units of its
    standard deviation over all texts of both bodies (features that never vary are left out), and :math:`b` the value that
    :math:`\frac1F\sum z_f^2` is expected to have from sampling alone, :math:`\frac1F\sum_f(s_{f,1}^2/n_1+s_{f,2}^2/n_2)/s_f^2`. Without that
    correction few texts would look distant from themselves. 0: no difference beyond noise; 1: means one standard deviation
    apart in a typical feature. The standard error is a jackknife over the texts of both bodies; near 0 it is not reliable.
    Raises ``ValueError`` for fewer than 3 texts a side.

    >>> plain = ["The sum is four.", "It comes to nine.", "That makes seven.", "You get two."]
    >>> style_distance(plain, [t.upper() for t in plain])[0] > style_distance(plain, plain)[0] == 0
    True
    """
    if len(reference) < 3 or len(texts) < 3:
        raise ValueError(f"style_distance needs at least 3 texts a side, got {len(reference)} and {len(texts)}")
    x, y = style_matrix(reference), style_matrix(texts)
    variance = 0.0
    for body, other, first in ((x, y, True), (y, x, False)):
        left_out = np.array([_distance(*((np.delete(body, i, 0), other) if first else (other, np.delete(body, i, 0))))
                             for i in range(len(body))])
        variance += (len(body) - 1) / len(body) * float(((left_out - left_out.mean()) ** 2).sum())
    return _distance(x, y), math.sqrt(variance)


def _distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    pooled = np.concatenate([x, y]).var(axis=0, ddof=1)
    varies = pooled > 0
    if not varies.any():
        return 0.0
    gap = (x.mean(0) - y.mean(0)) ** 2
    noise = x.var(0, ddof=1) / len(x) + y.var(0, ddof=1) / len(y)
    return math.sqrt(max(0.0, float(((gap - noise)[varies] / pooled[varies]).mean())))


class StyleProbe:
    """Style of what the model now writes, against reference texts (usually what the base wrote to the same prompts).

    ``write(model)`` returns texts; make it draw with fixed seeds, so that only the model changes between recordings. With
    ``reference_texts=None`` the base's own texts, written by ``write`` with θ₀ in the model, are the reference. Table rows:
    ``style/<feature>`` (mean over texts, standard error of that mean) and ``style/distance`` (:func:`style_distance`).
    """

    def __init__(self, name: str, write: Callable[[nn.Module], list[str]], reference_texts: Sequence[str] | None = None, *,
                 every: Callable[[int], bool] | int | None = None) -> None:
        self.name, self.write, self.every = name, write, every
        self.reference_texts = None if reference_texts is None else list(reference_texts)

    def prepare(self, model: nn.Module, reference: Reference) -> None:
        """Write the reference texts with θ₀, if none were given."""
        if self.reference_texts is None:
            with measuring(model), reference.swapped_into(model):
                self.reference_texts = self.write(model)

    def rows(self, model: nn.Module, step: int) -> list[Row]:
        """Table rows of the model's style now."""
        with measuring(model):
            texts = self.write(model)
        features = style_matrix(texts)
        errors = features.std(axis=0, ddof=1) / math.sqrt(len(texts))
        rows = [Row(step=step, metric=f"style/{name}", source=self.name, value=float(value), stderr=float(error))
                for name, value, error in zip(STYLE_FEATURES, features.mean(axis=0), errors, strict=True)]
        distance, error = style_distance(self.reference_texts, texts)
        return [*rows, Row(step=step, metric="style/distance", source=self.name, value=distance, stderr=error)]
