"""What is wrong with a single text, or with two that are too much alike: loops, template marks, language, near duplicates."""

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

_SCRIPTS = {
    "ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af\u1100-\u11ff", "zh": "\u4e00-\u9fff\u3400-\u4dbf", "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "el": "\u0370-\u03ff", "he": "\u0590-\u05ff", "hi": "\u0900-\u097f", "th": "\u0e00-\u0e7f",
}
_IN_SCRIPT = {code: re.compile(f"[{span}]") for code, span in _SCRIPTS.items()}
_STOP_WORDS = {code: frozenset(words.split()) for code, words in {
    "en": "the of and to is that it for you with this are was be have not they at from or which what how can your there would",
    "de": "der die das und ist nicht ein eine zu den mit von sie ich auf für dem sich auch wie wir es im werden oder aber kann",
    "fr": "le la les des et est que pour dans une qui pas vous sur avec ce il je nous par plus sont au du elle mais être cette",
    "es": "el la los las y que en un una es por con para se su del lo como más pero este está son muy qué hay al yo",
    "it": "il di che è la per un una non sono con del della gli le si da anche come più questo ma nel alla ci io delle",
    "pt": "o que e da em um uma para não é com os se por mais dos como mas foi ao você são na isso muito ele pelo sua",
    "nl": "de het een en van is dat niet te op voor met zijn je er ook aan maar als bij om dit naar hebben wat kan",
}.items()}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; punctuation is left out."""
    return re.findall(r"\w+", text.lower())


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


def language_of(text: str) -> str | None:
    """The language by a rule of scripts and stop words, as ISO 639-1; None if it can't be told (short texts, code, sums).

    If at least half of the letters are of one non-Latin script, it names the language that most writes it (Cyrillic: ``ru``).
    Else it is the one of English, German, French, Spanish, Italian, Portuguese and Dutch of which the text has most
    of some 28 frequent words: at least two, at least a tenth of its words, and more than of any other. A rule of thumb for
    flagging a file in the wrong language, no language identifier: languages without a list come out as a relative or as None.

    >>> [language_of(text) for text in ("What is the capital of France?", "Was ist die Hauptstadt?", "2 + 2 = 4")]
    ['en', 'de', None]
    """
    letters = sum(map(str.isalpha, text))
    if letters and not text.isascii():
        for code, script in _IN_SCRIPT.items():
            if 2 * len(script.findall(text)) >= letters:
                return code
    words = words_of(text)
    hits = sorted(((sum(word in stop for word in words), code) for code, stop in _STOP_WORDS.items()), reverse=True)
    (most, code), (second, _) = hits[:2]
    return code if most >= max(2, len(words) / 10) and most > second else None


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
