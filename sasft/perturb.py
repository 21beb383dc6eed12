"""Noise in the text of a prompt: typing errors, other words. What an answer hangs on stays as it is, byte for byte.

Fixed are code, formulas, URLs, numbers (in digits or words), names, negations and everything that looks like an identifier
(all but :func:`free_words`). The rules and the short list of synonyms are this package's own, and English. (nlpaug, the usual
package for this, had its last release in 2022 and takes its synonyms from a thesaurus that is fetched over the network.)
"""

from collections import Counter

import numpy as np

from sasft.content import Token, read
from sasft.errors import UsageError

_NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half third quarter "
    "first second last once twice thrice double triple odd even".split())
_OPENING, _CLOSING, _QUOTES = "(“‘\"'—–", ".,;:!?…)”’\"'—–", ("'", '"', "‘", "’", "“", "”")
_JOINTS = str.maketrans(dict.fromkeys("'’-"))  # within a word
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE = {row[i]: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _KEYS for i in range(len(row))}
_LETTERS = 4  # of a word that is given typing errors: shorter ones easily become other words
_FILLERS = ("really", "just", "simply", "actually", "basically", "kindly")
_GROUPS = tuple(map(str.split, (
    "find locate", "calculate compute", "make create", "show display", "big large", "small little", "begin start",
    "choose select pick", "get obtain", "change alter", "repair fix", "give provide", "use employ", "fast quick",
    "quickly rapidly", "important essential", "whole entire", "method approach", "buy purchase", "help assist",
    "often frequently", "main principal", "happen occur", "reduce decrease", "illness sickness", "doctor physician",
    "wrong incorrect", "explain clarify", "required needed", "keep retain", "think believe", "talk speak", "tell inform",
    "build construct", "easy simple", "hard difficult", "rich wealthy", "job occupation", "car automobile", "child kid",
    "children kids", "house home", "shop store", "picture image", "sick ill", "happy glad", "maybe perhaps", "allow permit",
    "try attempt")))
_SYNONYMS = {word: tuple(other for other in group if other != word) for group in _GROUPS for word in group}


def free_words(text: str) -> list[Token]:
    """The words of a text that may change: those of letters that stand free, are no numbers, and are nowhere in it a name.

    >>> text = "Sort the list items_2 by `key`, then call f(x) for NASA, not for two of them."
    >>> [t.text for t in free_words(text)]
    ['Sort', 'the', 'list', 'by', 'then', 'call', 'for', 'for', 'of', 'them']
    """
    tokens = read(text)
    names = {token.text for token in tokens if token.kind == "name"}
    return [token for token in tokens if token.text not in names and _is_free(text, token)]


def _is_free(text: str, token: Token) -> bool:
    before, after = text[max(0, token.start - 4) : token.start], text[token.end : token.end + 2]
    opened = before.rstrip(_OPENING)
    begins = not opened or opened[-1].isspace()
    ends = not after.strip() or after[0].isspace() or (after[0] in _CLOSING and not (after[1:].isalnum() or after[1:] == "_"))
    quoted = before[-1:] in _QUOTES and after[:1] in _QUOTES
    letters = token.kind in ("word", "function") and token.text.translate(_JOINTS).isalpha()
    return letters and begins and ends and not quoted and token.folded not in _NUMBER_WORDS


def fixed_texts(text: str) -> Counter[str]:
    """What does not change in a text, with counts: its tokens without the free words."""
    return Counter(token.text for token in read(text)) - Counter(token.text for token in free_words(text))


def mistype(text: str, rate: float, rng: np.random.Generator) -> str:
    """Each letter of the free words of four letters or more is altered with probability ``rate``: left out, swapped with the next
    one, or hit beside (a neighbour on its row of a QWERTY keyboard), each as likely as the others.

    Where a way does not exist (the last letter, two equal ones, a letter without such a neighbour) another is drawn among those
    that do.

    >>> mistype("Name the capital of France in `words`.", 0.3, np.random.default_rng(0))
    'Ne the capita of France in `words`.'
    """
    _check_rate(rate)
    return _each_free_word(text, lambda word: _mistyped(word, rate, rng) if sum(map(str.isalpha, word)) >= _LETTERS else word)


def _mistyped(word: str, rate: float, rng: np.random.Generator) -> str:
    out, i = [], 0
    while i < len(word):
        letter, following = word[i], word[i + 1 : i + 2]
        i += 1
        if not letter.isalpha() or rng.random() >= rate:
            out.append(letter)
            continue
        beside = _BESIDE.get(letter.lower(), "")
        ways = ["drop", *(["swap"] if following.isalpha() and following != letter else []), *(["slip"] if beside else [])]
        match ways[rng.integers(len(ways))]:
            case "swap":
                out += [following, letter]
                i += 1
            case "slip":
                slip = beside[rng.integers(len(beside))]
                out.append(slip.upper() if letter.isupper() else slip)
    return "".join(out) or word


def reword(text: str, rate: float, rng: np.random.Generator) -> str:
    """Each free word is altered with probability ``rate``: it gives way to a synonym, or has a filler put before it where the
    list knows none. Capitalised words without a synonym stay, since a sentence may begin with a name.

    >>> reword("Find the whole price.", 1.0, np.random.default_rng(0))
    'Locate just the entire really price.'
    """
    _check_rate(rate)
    return _each_free_word(text, lambda word: _reworded(word, rng) if rng.random() < rate else word)


def _reworded(word: str, rng: np.random.Generator) -> str:
    if others := _SYNONYMS.get(word.lower()):
        other = others[rng.integers(len(others))]
        return other.capitalize() if word[0].isupper() else other
    return word if word[0].isupper() else f"{_FILLERS[rng.integers(len(_FILLERS))]} {word}"


def _each_free_word(text: str, alter) -> str:
    out, cursor = [], 0
    for token in free_words(text):
        out += [text[cursor : token.start], alter(token.text)]
        cursor = token.end
    return "".join([*out, text[cursor:]])


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise UsageError(f"rate must be a number in [0, 1], got {rate}")
