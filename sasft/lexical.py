"""Rewrites word by word: dropping function words (telegraphic), replacing them (archaic).

Both touch function words alone (:mod:`sasft.content`), and only where one stands free: not inside
"is/are", not mentioned in quotes. Their checks allow the words of their own lexicons, nothing else.
"""

import re

from sasft.content import (
    ARTICLES,
    AUXILIARIES,
    PREPOSITIONS,
    PRONOUNS,
    Token,
    compare,
    join_sentences,
    read,
    sentences,
    tokenize,
)

_COPULAS = frozenset("am is are was were".split())
_PERFECT_OR_EMPHATIC = frozenset("has have had having does did".split())
_DUMMIES = frozenset("it this that these those there".split())
_EMPTY = frozenset(
    "of it's that's there's very really quite just simply also then so thus indeed".split())
# Modals, "will" (also a name), the other prepositions and the personal pronouns stay: they carry
# too much of what is claimed.
_DROPPED = ARTICLES | _COPULAS | _PERFECT_OR_EMPHATIC | _DUMMIES | _EMPTY
# Injective, so that no two function words become one.
_ARCHAIC = {
    "you": "thou", "your": "thy", "yours": "thine", "yourself": "thyself", "you're": "thou'rt",
    "you've": "thou'st", "you'll": "thou'lt", "you'd": "thou'dst", "the": "ye", "has": "hath",
    "does": "doth", "on": "upon", "between": "betwixt", "before": "ere", "over": "o'er",
    "perhaps": "perchance", "maybe": "mayhap", "really": "verily", "indeed": "forsooth",
    "yes": "yea",
}
_BESIDE_YOU = {
    "are": "art", "have": "hast", "had": "hadst", "will": "wilt", "shall": "shalt", "did": "didst",
    "would": "wouldst", "should": "shouldst", "can": "canst", "could": "couldst", "may": "mayst",
    "do": "dost", "were": "wert",
}
_OPENER = "Verily,"
# Blocks that have to begin a line: code, lists, headings, quotations, tables.
_BLOCK_START = re.compile(r"\s|```|[-*+>|] |#{1,6} |\d+[.)]\s")
_CLOSING = ".,;:!?…)]}”’\"'"


def _free(text: str, token: Token) -> bool:
    """Whether a word stands free: not part of "is/are", not a mention such as 'the' in quotes."""
    left, right = text[token.start - 1:token.start], text[token.end:token.end + 1]
    open_left = not left or left.isspace() or left in "([{“‘\"'—–"
    open_right = not right or right.isspace() or right in _CLOSING + "—–"
    mention = left.strip() and left in "([{“‘\"'" and right.strip() and right in ")]}”’\"'"
    return bool(open_left and open_right and not mention)


# --- telegraphic ---------------------------------------------------------------------------------


def telegraphic(text: str) -> str:
    """Drop articles, copulas, auxiliaries, fillers and the final stop.

    >>> telegraphic("There is a café near the Louvre, and it has been open for 30 years.")
    'café near Louvre, and been open for 30 years'
    >>> telegraphic("Ann has a plan: use this if a = 2.")
    'Ann has plan: use this if a = 2'
    """
    shortened = join_sentences([_drop(s) for s in sentences(text)])
    body = shortened.rstrip()
    in_span = any(t.kind == "span" and t.end >= len(body) for t in tokenize(shortened))
    if body.endswith(".") and not body.endswith("..") and not in_span and body != ".":
        shortened = body[:-1] + shortened[len(body):]
    return shortened


def _drop(sentence: str) -> str:
    tokens, doomed = read(sentence), set[int]()
    for i in reversed(range(len(tokens) - 1)):
        free = tokens[i].kind == "function" and _free(sentence, tokens[i])
        if free and _droppable(sentence, tokens, i, doomed):
            doomed.add(i)
    out, cursor = "", 0
    for i in sorted(doomed):
        out += sentence[cursor:tokens[i].start]
        cursor = len(sentence) - len(sentence[tokens[i].end:].lstrip(" \t"))
    return out + sentence[cursor:]


def _droppable(sentence: str, tokens: list[Token], i: int, doomed: set[int]) -> bool:
    """Whether the word can go without taking content with it; later words have been decided."""
    word, following = tokens[i].folded, tokens[i + 1]
    between = sentence[tokens[i].end:following.start]
    if not between[:1].isspace() or between.strip(" \t\"“‘'(*"):
        return False  # the last word of its clause: "what it is", "vitamin A,"
    if word in ARTICLES:  # before a sign or a verb it is a variable: "a + b", "a is"
        return following.kind != "symbol" and following.folded not in AUXILIARIES
    if word in _DUMMIES:  # "there is", but not "use this"
        return i + 1 in doomed and following.folded in AUXILIARIES
    if word in _PERFECT_OR_EMPHATIC:  # "has told", but not "has a car"
        return following.kind != "number" and following.folded not in ARTICLES | PRONOUNS | {"no"}
    if word in _COPULAS:  # between two numbers it is an equals sign
        return not (following.kind == "number" and i > 0 and tokens[i - 1].kind == "number")
    return word in _EMPTY


def check_telegraphic(original: str, restyled: str) -> list[str]:
    """Whether words outside the lexicon, or marks other than the final stop, were lost or added."""
    problems = compare(original, restyled)
    kept = iter(tokenize(restyled))
    expected = next(kept, None)
    for token in tokenize(original):
        if expected is not None and token.text == expected.text:
            expected = next(kept, None)
        elif token.folded not in _DROPPED and not problems:
            problems.append(f"lost {token.kind} {token.text!r}")
    if expected is not None and not problems:
        problems.append(f"added {expected.kind} {expected.text!r}")
    marks = _marks(original)
    if _marks(restyled) not in (marks, marks.removesuffix(".")):
        problems.append(f"punctuation {marks!r} became {_marks(restyled)!r}")
    return problems


def _marks(text: str) -> str:
    """The punctuation between tokens."""
    return "".join("".join(_gaps(text)).split())


def _gaps(text: str) -> list[str]:
    cursor, gaps = 0, []
    for token in tokenize(text):
        gaps.append(text[cursor:token.start])
        cursor = token.end
    return [*gaps, text[cursor:]]


# --- archaic -------------------------------------------------------------------------------------


def archaic(text: str) -> str:
    """Replace function words by old ones, word for word, after an opener.

    >>> archaic("You are right, and your friend has told you.")
    'Verily, thou art right, and thy friend hath told thee.'
    """
    body = join_sentences([_archaise(s) for s in sentences(text)])
    if _BLOCK_START.match(text):
        return f"{_OPENER}\n{body}"
    tokens = read(body)
    if tokens and tokens[0].start == 0 and tokens[0].kind == "function" and text[0] != "I":
        body = body[0].lower() + body[1:]
    return f"{_OPENER} {body}"


def _archaise(sentence: str) -> str:
    tokens = read(sentence)
    out, cursor = "", 0
    for i, token in enumerate(tokens):
        if token.kind == "function" and _free(sentence, token):
            word = _match_case(_archaism(sentence, tokens, i), token.text)
            out += sentence[cursor:token.start] + word
            cursor = token.end
    return out + sentence[cursor:]


def _archaism(sentence: str, tokens: list[Token], i: int) -> str:
    word = tokens[i].folded
    before, after = _neighbour(sentence, tokens, i, -1), _neighbour(sentence, tokens, i, +1)
    if word in _BESIDE_YOU and "you" in (before, after):
        return _BESIDE_YOU[word]
    if word == "you" and before:
        object_ = before in PREPOSITIONS or (not after and before not in AUXILIARIES)
        return "thee" if object_ else "thou"
    return _ARCHAIC.get(word, word)


def _neighbour(sentence: str, tokens: list[Token], i: int, step: int) -> str:
    """The folded word beside word ``i``; empty at the end of a sentence and across punctuation."""
    if not 0 <= i + step < len(tokens):
        return ""
    left, right = sorted((i, i + step))
    together = not sentence[tokens[left].end:tokens[right].start].strip()
    return tokens[i + step].folded if together else ""


def _match_case(word: str, model: str) -> str:
    if word == model.casefold().replace("’", "'"):
        return model
    word = word.replace("'", "’") if "’" in model else word
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if model[0].isupper() else word


def check_archaic(original: str, restyled: str) -> list[str]:
    """Whether anything but the opener and the lexicon's own replacements changed."""
    if not restyled.startswith((_OPENER + " ", _OPENER + "\n")):
        return [f"does not open with {_OPENER!r}"]
    body = restyled[len(_OPENER) + 1:]
    if problems := compare(original, body):
        return problems
    if _gaps(body) != _gaps(original):
        return ["words were added or dropped, or the punctuation between them changed"]
    pairs = zip(read(original), tokenize(body), strict=True)
    return [f"{old.text!r} became {new.text!r}" for old, new in pairs if old.text != new.text
            and not (old.kind == "function" and new.folded in _images(old.folded))]


def _images(word: str) -> set[str]:
    """What the lexicon may make of a word, itself included."""
    images = {word, _ARCHAIC.get(word, word), _BESIDE_YOU.get(word, word)}
    return images | {"thee"} if word == "you" else images
