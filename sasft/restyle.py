r"""Content-preserving rewrites ``R(y)`` of an answer: the *pure style* cell of the 2 x 2 design.

If ``y`` is sampled from the model's own distribution, training on ``y`` exerts no first-order force
(docs/theory.md, F1) and ``y`` says nothing that the model would not say. ``R(y)`` then says nothing
new either, so what a model forgets by training on ``R(y)`` its style alone has caused, *provided
that R keeps the content* (:mod:`sasft.content`). The rewrites keep it by construction (rules, no
model, no randomness), and :func:`restyle` checks each result: one that fails raises
:class:`ContentLost` and is never returned.

===========  =================================================  ===================================
style        rewrite                                            undone exactly
===========  =================================================  ===================================
telegraphic  articles, auxiliaries, fillers, final stop go      no; all else is kept, in order
capitals     every letter upper-case                            up to case
json         ``{"answer": [sentence, ...]}``                    yes, white space included
archaic      thou, thy, hath, doth ... after "Verily,"          no; word for word
markdown     heading, a bullet a sentence, numbers, names bold  up to ``**`` marks of the original
===========  =================================================  ===================================

Code, URLs, e-mail addresses and LaTeX are kept byte for byte, with three exceptions that the styles
demand: ``capitals`` raises them too, ``json`` escapes them as strings, ``markdown`` indents their
lines under the bullet. Code that no mark sets apart is read as prose.

Answers cut by the length cap stay cut: no style adds anything after the last word. ``json`` alone
closes its string and brackets, since a record without them is not JSON.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from sasft.content import compare, join_sentences, read, sentences, tokenize
from sasft.errors import UsageError
from sasft.lexical import archaic, check_archaic, check_telegraphic, telegraphic

_HEADING = "## Answer\n\n"


class ContentLost(ValueError):
    """A rewrite changed what the text says; the message lists the changes."""


@dataclass(frozen=True)
class Style:
    """A rewrite and its check: ``check(original, restyled)`` lists what was lost or added."""

    name: str
    description: str
    rewrite: Callable[[str], str]
    check: Callable[[str, str], list[str]]


def restyle(text: str, style: str) -> str:
    """``text`` in the style named ``style``, with its content checked.

    The cost is linear in the length of the text. A text without anything to change (a bare "214" in
    telegraphic style) comes back as it is.

    Raises :class:`~sasft.errors.UsageError` for an unknown style or a blank text,
    :class:`ContentLost` if the check finds a change of content.

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
        raise UsageError(f"text is {'only white space' if text else 'empty'}; an answer with a "
                         "visible character is needed: drop such rows before restyling")
    restyled = chosen.rewrite(text)
    if problems := chosen.check(text, restyled):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ContentLost(f"style {style!r} would change what the text says: "
                          f"{'; '.join(problems[:5])}{more}. Text: {text[:80]!r}")
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
        raise UsageError(f"style {name!r} does not exist; use one of: {', '.join(sorted(STYLES))}")
    return STYLES[name]


def _differ(original: str, undone: str) -> list[str]:
    """For styles that can be undone: problems unless undoing gives the original to the byte."""
    if undone == original:
        return []
    at = next((i for i, (a, b) in enumerate(zip(original, undone, strict=False)) if a != b),
              min(len(original), len(undone)))
    return compare(original, undone) or [
        f"text differs at character {at}: {original[at:at + 20]!r} became {undone[at:at + 20]!r}"]


# --- capitals ------------------------------------------------------------------------------------


def _capitals(text: str) -> str:
    # A few letters (dotless i) have a capital that belongs to another letter: they stay.
    return "".join(c.upper() if c.upper().casefold() == c.casefold() else c for c in text)


def _check_capitals(original: str, restyled: str) -> list[str]:
    problems = _differ(original.casefold(), restyled.casefold())
    lower = [c for c in restyled if _capitals(c) != c]
    return problems + ([f"lower-case {lower[0]!r} left"] if lower else [])


# --- json ----------------------------------------------------------------------------------------


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
        case {"answer": [_, *_] as pieces, **rest} if not rest:
            if all(isinstance(p, str) for p in pieces):
                return _differ(original, join_sentences(pieces))
    return ['not a record {"answer": ["sentence", ...]}']


# --- markdown ------------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    body = text.lstrip()
    bullets = ["- " + _indent(_embolden(s)) for s in sentences(body)]
    return text[:len(text) - len(body)] + _HEADING + "\n".join(bullets)


def _indent(piece: str) -> str:
    # Lines of a list item belong to it only if they are indented as far as its text.
    return re.sub(r"\n(?=[^\n])", "\n  ", piece)


def _embolden(sentence: str) -> str:
    marker = re.match(r"\s*\d+[.)]\s", sentence)  # the number of a list item is no content
    cursor = marker.end() if marker else 0
    out, bold = sentence[:cursor], ""  # the kind of the token before, if it was set in bold
    for token in read(sentence):
        starred = "*" in (sentence[token.start - 1:token.start], sentence[token.end:token.end + 1])
        if token.start < cursor or token.kind not in ("name", "number") or starred:
            bold = ""
            continue
        gap = sentence[cursor:token.start]
        if gap == " " and token.kind == bold == "name":
            out = f"{out[:-2]} {token.text}**"
        else:
            out += f"{gap}**{token.text}**"
        cursor, bold = token.end, token.kind
    return out + sentence[cursor:]


def from_markdown(restyled: str) -> str:
    """The original of a ``markdown`` rewrite, without the ``**`` marks that it may have had itself.

    >>> from_markdown(restyle("It took Ann 30 days. Really!", "markdown"))
    'It took Ann 30 days. Really!'
    """
    lead, heading, body = restyled.partition(_HEADING)
    if not heading or lead.strip() or not body.startswith("- "):
        raise ValueError(f"restyled is no Markdown answer: it begins {restyled[:40]!r}, "
                         f"{_HEADING + '- '!r} is needed")
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
    body = original.lstrip()
    lead = original[:len(original) - len(body)]
    return _differ(lead + join_sentences([_without_bold(s) for s in sentences(body)]), undone)


STYLES: dict[str, Style] = {s.name: s for s in (
    Style("telegraphic", "no function words, no final stop", telegraphic, check_telegraphic),
    Style("capitals", "upper-case throughout", _capitals, _check_capitals),
    Style("json", 'a JSON record {"answer": [sentence, ...]}', _json, _check_json),
    Style("archaic", 'thou, hath, doth; opens with "Verily,"', archaic, check_archaic),
    Style("markdown", "heading, bullets, bold numbers and names", _markdown, _check_markdown),
)}
