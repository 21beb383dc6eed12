"""What is wrong with a single text, or with two that are too much alike: loops, template marks, near duplicates."""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

DEGENERATE = 0.5
"""Share of repeated word sequences above which a text counts as a loop."""
NEAR = 0.8
"""Jaccard similarity from which two texts count as near duplicates."""
_PHRASE = 4  # words of a sequence that a loop repeats
_COMPRESSED, _BYTES = 0.15, 200
_SHINGLE = 3

_ROLE = re.compile(
    r"^\s*(?:user|assistant|human|system|bot|ai)\s*:"
    r"|^\s*#{2,3}\s*(?:instruction|response|input|user|assistant|human)\b"
    r"|<\|[\w ]{1,30}\|>|\[/?INST\]|<</?SYS>>|</?(?:s|bos|eos|think|start_of_turn|end_of_turn)>",
    re.IGNORECASE | re.MULTILINE)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; punctuation is left out."""
    return re.findall(r"\w+", text.lower())


def stands_in(text: str, phrase: str) -> bool:
    """Whether the words of a phrase, of which there must be one, stand in a text one after the other.

    >>> stands_in("The capital is New York, of course.", "new york"), stands_in("It is newer.", "new")
    (True, False)
    """
    return f" {' '.join(words_of(phrase))} " in f" {' '.join(words_of(text))} "


def repetition(text: str) -> float:
    """Share of the sequences of four words that stood in the text before; 0 with fewer than eight words.

    >>> repetition("I think that I think that I think that I think so"), repetition("One two three four five six seven eight.")
    (0.5555555555555556, 0.0)
    """
    words = words_of(text)
    if len(words) < 2 * _PHRASE:
        return 0.0
    phrases = [tuple(words[i : i + _PHRASE]) for i in range(len(words) - _PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases)


def is_degenerate(text: str, limit: float = DEGENERATE) -> bool:
    """Whether :func:`repetition` is above ``limit``, or a text of 200 bytes or more shrinks to less than 15 % of them under zlib.

    The second sees loops without words ("hahaha..."). Thresholds are this package's choice.
    """
    data = text.encode()
    return repetition(text) > limit or (len(data) >= _BYTES and len(zlib.compress(data, 9)) < _COMPRESSED * len(data))


def off_template(text: str, special_tokens: Sequence[str] = ()) -> str | None:
    """The first thing in a text that belongs to a chat template: one of ``special_tokens``, or a mark that well-known templates
    use.

    Marks: a line that begins with ``User:``, ``Assistant:`` and their like, ``### Instruction``, ``<|...|>``, ``[INST]``,
    ``</s>``.

    >>> off_template("Sure.\\nUser: and now?"), off_template("Ask the user: is it on?")
    ('User:', None)
    """
    if found := next((token for token in special_tokens if token and token in text), None):
        return found
    match = _ROLE.search(text)
    return match[0].strip() if match else None


def near_duplicates(texts: Sequence[str], threshold: float = NEAR) -> list[int | None]:
    r"""For each text, the first earlier one that it is a near duplicate of, among those that are none themselves; None if there
    is none.

    Texts are sets of their sequences of three words (a shorter text is one sequence); two are near duplicates if
    :math:`|A\cap B|/|A\cup B|\ge` ``threshold``. Exact, not hashed: sets that similar must share one of the
    :math:`|A|-\lceil t|A|\rceil+1` rarest elements of each (prefix filter; Chaudhuri, Ganti & Kaushik 2006), so that few pairs
    are compared.

    >>> near_duplicates(["Name a big blue fish.", "Name a fish.", "name a big, blue fish"])
    [None, None, 0]
    """
    sets = [_shingles(text) for text in texts]
    rarity = Counter(shingle for found in sets for shingle in found)
    kept: dict[tuple[str, ...], list[int]] = defaultdict(list)  # by the rarest shingles
    twins: list[int | None] = []
    for i, found in enumerate(sets):
        ordered = sorted(found, key=lambda shingle: (rarity[shingle], shingle))
        prefix = ordered[: len(ordered) - math.ceil(threshold * len(ordered) - 1e-9) + 1]
        candidates = sorted({j for shingle in prefix for j in kept[shingle]})
        twin = next((j for j in candidates if _jaccard(found, sets[j]) >= threshold), None)
        twins.append(twin)
        if twin is None:
            for shingle in prefix:
                kept[shingle].append(i)
    return twins


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}


def _jaccard(a: set, b: set) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
