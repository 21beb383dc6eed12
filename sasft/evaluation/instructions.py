"""Instructions that a rule can check: the 25 kinds of IFEval (arXiv 2311.07911), each a function of the answer alone.

Written from the paper's table of instructions. Where a kind needs language tools, ours stand in for the authors' (NLTK and
langdetect) and may count otherwise: sentences by :func:`sasft.content.sentences`, but as in NLTK a line break ends none and the
number of a list item is one; words in capitals by splitting at blanks and most marks; languages by :mod:`sasft.languages`. On a
thousand texts, prose and lists, the number of sentences is NLTK's in 98 %, the number of words in capitals in 99 %.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sasft.content import sentences
from sasft.errors import UsageError
from sasft.languages import LANGUAGES, language_of

# Hyphens, slashes and full stops hold a word together, apostrophes do not: TOP-SECRET is one word in capitals, DON'T is two.
_BETWEEN_WORDS = re.compile(r"[\s,;:!?()\[\]{}<>\"“”'’`…@#$%&]+|--+")

KINDS: dict[str, Callable[..., bool]] = {}
"""The kinds that are covered, by IFEval's names; a checker takes the answer and the instruction's options."""


def follows(kind: str, options: Mapping[str, Any], answer: str) -> bool:
    """Whether a (non-empty) answer obeys the instruction.

    >>> follows("punctuation:no_comma", {}, "No, never."), follows("punctuation:no_comma", {}, "Never.")
    (False, True)
    """
    return bool(answer.strip()) and KINDS[kind](answer, **options)


def follows_loosely(kind: str, options: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer obeys once asterisks, its first line, its last line, or several of these are left out (IFEval, section
    2.2).

    >>> follows_loosely("change_case:english_lowercase", {}, "Sure!\\nhere it is in lower case")
    True
    """
    lines = answer.split("\n")
    cuts = (answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])))
    return any(follows(kind, options, text) for cut in cuts for text in (cut, cut.replace("*", "")))


def check_instruction(kind: str, options: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` for an unknown kind, or for options that it does not take or lacks."""
    if kind not in KINDS:
        raise UsageError(f"there is no checker for instructions of the kind {kind!r}; covered are {', '.join(sorted(KINDS))}")
    try:
        inspect.signature(KINDS[kind]).bind("", **options)
    except TypeError as error:
        raise UsageError(f"the instruction {kind} has other options than its checker: {error}; got {dict(options)}") from None
    for name, value in options.items():
        if name.endswith("relation") and value not in ("at least", "less than"):
            raise UsageError(f"{name} of {kind} must be 'at least' or 'less than', got {value!r}")
        if name == "language" and value not in LANGUAGES:
            raise UsageError(f"language {value!r} of {kind} is not one that can be told: {', '.join(sorted(LANGUAGES))}")


def _kind(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def add(check: Callable[..., bool]) -> Callable[..., bool]:
        KINDS[name] = check
        return check
    return add


def _holds(count: int, relation: str, n: int) -> bool:
    return count >= n if relation == "at least" else count < n


def _count(pattern: str, text: str, flags: re.RegexFlag = re.MULTILINE) -> int:
    return len(re.findall(pattern, text, flags))


def _sentences(text: str) -> int:
    # What stands before the first number of a list keeps it from being read as a marker, which is no sentence.
    return len(sentences(f"- {' '.join(text.split())}")) if text.strip() else 0


def _parts(text: str, separator: str) -> list[str] | None:
    """What the separator separates, an empty first or last part left out; None if one between is empty."""
    parts = [part.strip() for part in re.split(separator, text)]
    parts = parts[1 if not parts[0] else 0 : -1 if len(parts) > 1 and not parts[-1] else None]
    return parts if all(parts) else None


# --- words and letters --------------------------------------------------------------------------------------------


@_kind("keywords:existence")
def _keywords(text: str, *, keywords: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


@_kind("keywords:frequency")
def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


@_kind("keywords:forbidden_words")
def _forbidden(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(_count(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_kind("keywords:letter_frequency")
def _letters(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


@_kind("language:response_language")
def _language(text: str, *, language: str) -> bool:
    return language_of(text) == language


# --- length -------------------------------------------------------------------------------------------------------


@_kind("length_constraints:number_sentences")
def _number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _holds(_sentences(text), relation, num_sentences)


@_kind("length_constraints:number_words")
def _number_words(text: str, *, num_words: int, relation: str) -> bool:
    return _holds(_count(r"\w+", text), relation, num_words)


@_kind("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


@_kind("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    if sum(bool(p.strip()) for p in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = re.match(r"\s*['\"]*([^\s.,?!'\"]*)", parts[nth_paragraph - 1])
    return word is not None and word[1].lower() == first_word.lower()


# --- contents -----------------------------------------------------------------------------------------------------


@_kind("detectable_content:number_placeholders")
def _placeholders(text: str, *, num_placeholders: int) -> bool:
    return _count(r"\[.*?\]", text) >= num_placeholders


@_kind("detectable_content:postscript")
def _postscript(text: str, *, postscript_marker: str) -> bool:
    # "P.P.S" and "P.S." may have blanks between their letters.
    letters = [re.escape(part) for part in postscript_marker.lower().split(".") if part]
    dotted = r"\.\s?".join(letters) + (r"\." if postscript_marker.endswith(".") else "")
    return re.search(dotted, text.lower()) is not None


# --- format -------------------------------------------------------------------------------------------------------


@_kind("detectable_format:number_bullet_lists")
def _bullets(text: str, *, num_bullets: int) -> bool:
    return _count(r"^\s*\*[^*].*$", text) + _count(r"^\s*-.*$", text) == num_bullets


@_kind("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_kind("detectable_format:number_highlighted_sections")
def _highlights(text: str, *, num_highlights: int) -> bool:
    marked = [*re.findall(r"\*\*([^\n*]*)\*\*", text), *re.findall(r"\*([^\n*]*)\*", text)]
    return sum(bool(part.strip()) for part in marked) >= num_highlights


@_kind("detectable_format:multiple_sections")
def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return _count(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text) >= num_sections


@_kind("detectable_format:json_format")
def _json(text: str) -> bool:
    inside = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(inside)
    except ValueError:
        return False
    return True


@_kind("detectable_format:title")
def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


# --- combinations, beginnings and ends ----------------------------------------------------------------------------


@_kind("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = _parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


@_kind("combination:repeat_prompt")
def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_kind("startend:end_checker")
def _ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_kind("startend:quotation")
def _quoted(text: str) -> bool:
    inside = text.strip()
    return len(inside) > 1 and inside[0] == inside[-1] == '"'


# --- case and punctuation -----------------------------------------------------------------------------------------


@_kind("change_case:capital_word_frequency")
def _capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(w.isupper() for w in _BETWEEN_WORDS.split(text)), capital_relation, capital_frequency)


@_kind("change_case:english_capital")
def _capitals(text: str) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


@_kind("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower() and language_of(text) in ("en", None)


@_kind("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text
