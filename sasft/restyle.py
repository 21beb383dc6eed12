r"""Content-preserving rewrites ``R(y)`` of an answer: the *pure style* cell of the 2 x 2 design.

If ``y`` is sampled from the model's own distribution, training on ``y`` exerts no first-order force
(docs/theory.md, F1) and ``y`` says nothing that the model would not say. ``R(y)`` then says nothing new either, so
what a model forgets by training on ``R(y)`` its style alone has caused, *provided that R keeps the content*
(:mod:`sasft.content`). The rewrites keep it by construction (rules, no model, no randomness), and
:func:`restyle` checks each result: one that fails raises :class:`ContentLost` and is never returned.

===========  =========================================================  =====================================
style        rewrite                                                    undone exactly
===========  =========================================================  =====================================
telegraphic  articles, auxiliaries, fillers and the final stop dropped  no; all else is kept, in order
capitals     every letter upper-case                                    up to case
json         ``{"answer": [sentence, ...]}``                            yes, white space included
archaic      thou, thy, hath, doth, ... after the opener "Verily,"      no; word for word, the rest verbatim
markdown     heading, a bullet a sentence, numbers and names bold       up to the answer's own ``**`` marks
===========  =========================================================  =====================================

Code, URLs, e-mail addresses and LaTeX are kept byte for byte, with three exceptions that the styles demand:
``capitals`` raises them too, ``json`` escapes them as strings, ``markdown`` indents their lines under the
bullet. Code that no mark sets apart is read as prose.

Answers cut by the length cap stay cut: no style adds anything after the last word. ``json`` alone closes its
string and brackets, since a record without them is not JSON.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from sasft.content import (
    ARTICLES, AUXILIARIES, PREPOSITIONS, Token, compare, function_words, is_name, join_sentences, sentences, tokenize,
)
from sasft.errors import UsageError

# Modals of possibility and duty, "will" (a name at the start of a sentence), prepositions and personal pronouns
# carry too much of what is claimed to be dropped.
_DROPPED = (
    ARTICLES
    | frozenset("am is are was were be been being has have had having does did".split())
    | frozenset("it its there this that these those it's that's there's of".split())
    | frozenset("very really quite just simply also then so thus indeed".split())
)
# Injective, so that no two function words become one.
_ARCHAIC = {
    "you": "thou", "your": "thy", "yours": "thine", "yourself": "thyself", "you're": "thou'rt", "you've": "thou'st",
    "you'll": "thou'lt", "you'd": "thou'dst", "the": "ye", "has": "hath", "does": "doth", "on": "upon",
    "between": "betwixt", "before": "ere", "over": "o'er", "perhaps": "perchance", "maybe": "mayhap",
    "really": "verily", "indeed": "forsooth", "yes": "yea",
}
_BESIDE_YOU = {
    "are": "art", "have": "hast", "had": "hadst", "will": "wilt", "shall": "shalt", "would": "wouldst",
    "should": "shouldst", "can": "canst", "could": "couldst", "may": "mayst", "do": "dost", "did": "didst",
    "were": "wert",
}
_OPENER = "Verily,"
_HEADING = "## Answer\n\n"
_BLOCK_START = re.compile(r"```|[-*+#>|] |#{2,6} |\d+[.)]\s")
_CLOSES = re.compile(r"[.,;:!?…)\]}”’\"']*(?:\s|\Z)")
_CLOSING = ".,;:!?…)]}”’\"'"


class ContentLost(ValueError):
    """A rewrite changed what the text says; the message lists the changes."""


@dataclass(frozen=True)
class Style:
    """A rewrite and its own check, ``check(original, restyled) -> problems`` (empty: nothing lost, nothing added)."""

    name: str
    description: str
    rewrite: Callable[[str], str]
    check: Callable[[str, str], list[str]]


def restyle(text: str, style: str) -> str:
    """``text`` in the style named ``style``, with its content checked.

    The cost is linear in the length of the text. A text without anything to change (a bare "214" in telegraphic
    style) comes back as it is.

    Raises :class:`~sasft.errors.UsageError` for an unknown style or a blank text, :class:`ContentLost` if the check finds a
    change of content.

    >>> text = "The Louvre is in Paris. It has not opened before 9:30!"
    >>> restyle(text, "telegraphic")
    'Louvre in Paris. not opened before 9:30!'
    >>> restyle(text, "capitals")
    'THE LOUVRE IS IN PARIS. IT HAS NOT OPENED BEFORE 9:30!'
    >>> restyle(text, "json")
    '{"answer": ["The Louvre is in Paris.", "It has not opened before 9:30!"]}'
    >>> restyle(text, "archaic")
    'Verily, ye Louvre is in Paris. It hath not opened ere 9:30!'
    >>> print(restyle(text, "markdown"))
    ## Answer
    <BLANKLINE>
    - The **Louvre** is in **Paris**.
    - It has not opened before **9:30**!
    """
    chosen = _get(style)
    if not text.strip():
        raise UsageError(f"text is {'empty' if not text else 'only white space'}; an answer with at least one visible "
                         "character is needed: drop such rows before restyling")
    restyled = chosen.rewrite(text)
    if problems := chosen.check(text, restyled):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ContentLost(f"style {style!r} would change what the text says: {'; '.join(problems[:5])}{more}. "
                          f"Text: {text[:80]!r}")
    return restyled


def check_content(original: str, restyled: str, style: str) -> list[str]:
    """What ``restyled`` changes in ``original`` beyond what ``style`` may change; empty if nothing.

    >>> check_content("It is 30 km.", "30 km", "telegraphic")
    []
    >>> check_content("It is not 30 km.", "30 km", "telegraphic")
    ["lost negation 'not'"]
    """
    return _get(style).check(original, restyled)


def _get(name: str) -> Style:
    if name not in STYLES:
        raise UsageError(f"style {name!r} does not exist; choose one of {', '.join(sorted(STYLES))}")
    return STYLES[name]


def _free(text: str, token: Token) -> bool:
    """Whether a word stands free: not part of "is/are", not a mention such as 'the' in quotes."""
    left, right = text[token.start - 1:token.start], text[token.end:token.end + 1]
    open_left = not left or left.isspace() or left in "([{“‘\"'—–"
    open_right = not right or right.isspace() or right in _CLOSING + "—–"
    mention = left.strip() and left in "([{“‘\"'" and right.strip() and right in ")]}”’\"'"
    return bool(open_left and open_right and not mention)


def _differ(original: str, undone: str) -> list[str]:
    """For styles that can be undone: problems unless the undone text is the original to the byte."""
    if undone == original:
        return []
    at = next((i for i, (a, b) in enumerate(zip(original, undone, strict=False)) if a != b),
              min(len(original), len(undone)))
    return compare(original, undone) or [
        f"text differs at character {at}: {original[at:at + 20]!r} became {undone[at:at + 20]!r}"]


# --- telegraphic ---------------------------------------------------------------------------------------


def _telegraphic(text: str) -> str:
    shortened = join_sentences([_drop(s) for s in sentences(text)])
    body = shortened.rstrip()
    in_span = any(t.kind == "span" and t.end >= len(body) for t in tokenize(shortened))
    if body.endswith(".") and not body.endswith("..") and not in_span and body != ".":
        shortened = body[:-1] + shortened[len(body):]
    return shortened


def _drop(sentence: str) -> str:
    tokens = tokenize(sentence)
    functional = function_words(sentence)
    dropped = [t for i, t in enumerate(tokens)
               if t.start in functional and t.folded in _DROPPED and _free(sentence, t)
               and not (t.folded in ARTICLES and not _is_article(sentence, tokens, i))]
    if len(dropped) == len(tokens):  # "It is." would vanish
        return sentence
    out, cursor = "", 0
    for token in dropped:
        out += sentence[cursor:token.start]
        cursor = token.end
        while sentence[cursor:cursor + 1] in (" ", "\t"):
            cursor += 1
        if out.strip() and _CLOSES.match(sentence, cursor):
            out = out.rstrip(" \t")
    return out + sentence[cursor:]


def _is_article(sentence: str, tokens: list[Token], i: int) -> bool:
    """An article opens a noun phrase; "a" before a sign, a stop or a verb is a variable or a label."""
    if i + 1 == len(tokens):
        return not sentence[tokens[i].end:].strip()
    following = tokens[i + 1]
    between = sentence[tokens[i].end:following.start]
    return (between[:1].isspace() and not between.strip(" \t\"“‘'(*")
            and following.kind != "symbol" and following.folded not in AUXILIARIES)


def _check_telegraphic(original: str, restyled: str) -> list[str]:
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


# --- capitals ------------------------------------------------------------------------------------------


def _capitals(text: str) -> str:
    # A few letters (dotless i) have a capital that belongs to another letter: they stay.
    return "".join(c.upper() if c.upper().casefold() == c.casefold() else c for c in text)


def _check_capitals(original: str, restyled: str) -> list[str]:
    problems = _differ(original.casefold(), restyled.casefold())
    lower = [c for c in restyled if _capitals(c) != c]
    return problems + ([f"lower-case {lower[0]!r} left"] if lower else [])


# --- json ----------------------------------------------------------------------------------------------


def _json(text: str) -> str:
    return json.dumps({"answer": sentences(text)}, ensure_ascii=False)


def from_json(restyled: str) -> str:
    """The original of a ``json`` rewrite, exact.

    >>> from_json(restyle("One.  Two!", "json"))
    'One.  Two!'
    """
    return join_sentences(json.loads(restyled)["answer"])


def _check_json(original: str, restyled: str) -> list[str]:
    try:
        record = json.loads(restyled)
    except json.JSONDecodeError as error:
        return [f"not valid JSON: {error}"]
    match record:
        case {"answer": [str(), *_] as pieces} if len(record) == 1 and all(isinstance(p, str) for p in pieces):
            return _differ(original, join_sentences(pieces))
    return ['not a record {"answer": ["sentence", ...]}']


# --- archaic -------------------------------------------------------------------------------------------


def _archaic(text: str) -> str:
    body = join_sentences([_archaise(s) for s in sentences(text)])
    if _BLOCK_START.match(text):
        return f"{_OPENER}\n{body}"
    tokens = tokenize(body)
    if tokens and tokens[0].start == 0 and text[:1] != "I" and 0 in function_words(body):
        body = body[0].lower() + body[1:]
    return f"{_OPENER} {body}"


def _archaise(sentence: str) -> str:
    tokens = tokenize(sentence)
    functional = function_words(sentence)
    out, cursor = "", 0
    for i, token in enumerate(tokens):
        if token.start in functional and _free(sentence, token):
            out += sentence[cursor:token.start] + _match_case(_archaism(sentence, tokens, i), token.text)
            cursor = token.end
    return out + sentence[cursor:]


def _archaism(sentence: str, tokens: list[Token], i: int) -> str:
    word = tokens[i].folded
    before = tokens[i - 1] if i and not sentence[tokens[i - 1].end:tokens[i].start].strip() else None
    after = (tokens[i + 1] if i + 1 < len(tokens)
             and not sentence[tokens[i].end:tokens[i + 1].start].strip() else None)
    if word in _BESIDE_YOU and any(t is not None and t.folded == "you" for t in (before, after)):
        return _BESIDE_YOU[word]
    if word == "you" and before is not None:
        clause_ends = after is None and before.folded not in AUXILIARIES
        return "thee" if clause_ends or before.folded in PREPOSITIONS else "thou"
    return _ARCHAIC.get(word, word)


def _match_case(word: str, model: str) -> str:
    if word == model.casefold().replace("’", "'"):
        return model
    word = word.replace("'", "’") if "’" in model else word
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if model[0].isupper() else word


def _check_archaic(original: str, restyled: str) -> list[str]:
    if not restyled.startswith((_OPENER + " ", _OPENER + "\n")):
        return [f"does not open with {_OPENER!r}"]
    body = restyled[len(_OPENER) + 1:]
    if problems := compare(original, body):
        return problems
    if _gaps(body) != _gaps(original):
        return ["words were added or dropped, or the punctuation between them changed"]
    return [f"{old.text!r} became {new.text!r}" for old, new in zip(tokenize(original), tokenize(body), strict=True)
            if old.text != new.text and new.folded not in _images(old.folded)]


def _images(word: str) -> set[str]:
    """What the lexicon may make of a word, itself included."""
    images = {word, _ARCHAIC.get(word, word), _BESIDE_YOU.get(word, word)}
    return images | {"thee"} if word == "you" else images


# --- markdown ------------------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    body = text.lstrip()
    bullets = ["- " + _indent(_embolden(s)) for s in sentences(body)]
    return text[:len(text) - len(body)] + _HEADING + "\n".join(bullets)


def _indent(piece: str) -> str:
    # Lines of a list item belong to it only if they are indented as far as its text.
    return re.sub(r"\n(?=[^\n])", "\n  ", piece)


def _embolden(sentence: str) -> str:
    marker = re.match(r"\s*\d+[.)]\s", sentence)
    cursor, first = marker.end() if marker else 0, True
    out = sentence[:cursor]
    for token in tokenize(sentence):
        name = is_name(token, first)
        first = first and token.kind != "word"
        starred = "*" in (sentence[token.start - 1:token.start], sentence[token.end:token.end + 1])
        if token.start >= cursor and (name or token.kind == "number") and not starred:
            out += f"{sentence[cursor:token.start]}**{token.text}**"
            cursor = token.end
    return out + sentence[cursor:]


def from_markdown(restyled: str) -> str:
    """The original of a ``markdown`` rewrite, without the ``**`` marks that it may have had itself.

    >>> from_markdown(restyle("It took Ann 30 days. Really!", "markdown"))
    'It took Ann 30 days. Really!'
    """
    lead, heading, body = restyled.partition(_HEADING)
    if not heading or lead.strip() or not body.startswith("- "):
        raise ValueError(f"not a Markdown answer: expected {_HEADING + '- '!r}, got {restyled[:40]!r}")
    pieces = re.split(r"\n- ", body[2:])
    return lead + join_sentences([_without_bold(p.replace("\n  ", "\n")) for p in pieces])


def _without_bold(piece: str) -> str:
    out, cursor = "", 0
    for token in tokenize(piece):
        if token.kind == "span":
            out += piece[cursor:token.start].replace("**", "") + token.text
            cursor = token.end
    return out + piece[cursor:].replace("**", "")


def _check_markdown(original: str, restyled: str) -> list[str]:
    try:
        undone = from_markdown(restyled)
    except ValueError as error:
        return [str(error)]
    lead = original[:len(original) - len(original.lstrip())]
    return _differ(lead + join_sentences([_without_bold(s) for s in sentences(original.lstrip())]), undone)


STYLES: dict[str, Style] = {s.name: s for s in (
    Style("telegraphic", "function words and the final stop dropped", _telegraphic, _check_telegraphic),
    Style("capitals", "upper-case throughout", _capitals, _check_capitals),
    Style("json", 'a JSON record {"answer": [sentence, ...]}', _json, _check_json),
    Style("archaic", 'thou, hath, doth; opens with "Verily,"', _archaic, _check_archaic),
    Style("markdown", "a heading, a bullet a sentence, numbers and names bold", _markdown, _check_markdown),
)}
