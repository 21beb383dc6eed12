r"""The number that a free text states as its result.

A model answers "42 + 57 is 99, and 99 + 115 = 214." Which of the six numbers is its answer? The
text is read as numbers, operators, equality cues ("=", "is", "gives", "answer:" ...) and words.
Numbers joined by operators are expressions; expressions joined by cues are chains. Then:

1. A chain *claims* its right sides if it holds no expression ("The answer is 214"), and any result
   if it holds the question's own expression, the terms in any order.
2. Any other chain is a *step* (99 above). If nothing is claimed, the last step counts.
3. Without claims and steps, a number that stands alone counts.

Hedged numbers ("not 214", "about 214", "214?") never count. Numbers of the question give way to any
other, since a text may restate them. Two different claims contradict each other: such a text states
nothing. A claim outweighs later steps, so "The sum of 42 and 57 is 99, and 99 + 115 is 214" is read
as 99: an answer is rather missed than made up.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

_MINUS = str.maketrans(dict.fromkeys("−–—‒", "-"))
# Emphasis, quotes, brackets and LaTeX delimiters around a number say nothing about it.
_DRESS = re.compile(r"\*\*|__|[`$\"“”(){}\[\]]|\\[()\[\],;!]|\\text|\\left|\\right")
_GROUP = "[,\u00a0\u2009\u202f]"  # between thousands
_TOKEN = re.compile(
    rf"""
    (?P<number> (?<![^\W_])(?<!\d\.) (?>(?:\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?)
        (?![^\W_]|\s?%) )
  | (?P<cue> => | =+ | → | \\boxed
      | \b(?:(?:equal|comes?|adds?|amounts?|sums?|works?|evaluates|simplifies)(?:\ (?:up|out))?\ to
          |is|are|was|be|becomes?|equals?|gives?|giving|makes?|making|totals|yields?|gets?|got
          |leaves?|leaving)\b
      | \b(?:answer|result|total|sum|difference|solution)\s*: )
  | (?P<operator> [-+*/×÷·] | \\(?:times|cdot|div)\b | \b(?:plus|minus|negative|times)\b )
  | (?P<or> \bor\b )
  | (?P<hedge> \b(?:not|than|about|around|approximately|roughly|nearly|almost|between|least|most)\b
      | \w+n['’]t\b | [≈~<>≠] )
  | (?P<newline> \n )
  | (?P<filler> [:*] | \b(?:exactly|then|therefore|thus|just|simply|also|now|actually|indeed)\b )
  | (?P<other> \w+ | [^\w\s] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SEPARATORS = re.compile(_GROUP)
_QUESTION = re.compile(r"\s*\?")
_SYMBOLS = {"plus": "+", "minus": "-", "negative": "-"}

# Terms as (operator, value); a subtracted term is the addition of a negative one.
_Expression = tuple[tuple[str, Decimal], ...]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    value: Decimal = Decimal(0)


def stated_number(
    text: str, *, expression: Sequence[int] = (), restated: Collection[int | Decimal] = ()
) -> Decimal | None:
    """The one number that ``text`` states as its result, or None.

    ``expression`` holds the signed terms of the question, if it is a sum; ``restated`` any other
    numbers that the question names. The cost is linear in the length of the text.

    >>> stated_number("42 + 57 = 99, and 99 + 115 = **214**.", expression=(42, 57, 115))
    Decimal('214')
    >>> stated_number("It is 214. No, it is 215.") is None
    True
    >>> stated_number("What is 42 + 57 + 115?", expression=(42, 57, 115)) is None
    True
    """
    question = Counter(("+", Decimal(t)) for t in expression)
    known = {abs(Decimal(t)) for t in (*expression, *restated)}
    claims: list[Decimal] = []
    steps: list[Decimal] = []
    alone: list[Decimal] = []
    for left, *right in _chains(_clean(text)):
        chain = (left, *right)
        asked = bool(question) and any(Counter(e) == question for e in chain)
        results = [e[0][1] for e in (chain if asked else right) if len(e) == 1]
        if not right:
            alone += [value for _, value in left] if len(left) == 1 else []
        elif asked or all(len(e) < 2 for e in chain):
            claims += results
        else:
            steps += results[-1:]
    if claims:
        return _only(claims, known)
    return steps[-1] if steps else _only(alone, known)


def numbers(text: str) -> list[Decimal]:
    """Every number in ``text``; a minus sign counts unless it subtracts.

    >>> [str(x) for x in numbers("1,214 and −5, or 3 - 2 (10%)")]
    ['1214', '-5', '3', '2']
    """
    return [t.value for t in _clean(text) if t.kind in ("number", "hedged")]


def _only(candidates: list[Decimal], known: set[Decimal]) -> Decimal | None:
    """The single value among the candidates, those that the question names set aside."""
    distinct = set(candidates)
    if len(distinct) > 1:
        distinct = {x for x in distinct if abs(x) not in known}
    return distinct.pop() if len(distinct) == 1 else None


def _chains(tokens: list[_Token]) -> Iterator[list[_Expression]]:
    """Expressions joined by cues; the first is empty where a cue opens the chain."""
    i = 0
    while i < len(tokens):
        left, j = _expression(tokens, i)
        chain = [left]
        while j < len(tokens) and (
                tokens[j].kind == "cue" or (tokens[j].kind == "or" and len(chain) > 1)):
            right, j = _expression(tokens, j + 1)
            chain += [right] if right else []
        if any(chain):
            yield chain
        i = max(j, i + 1)


def _expression(tokens: list[_Token], i: int) -> tuple[_Expression, int]:
    terms: list[tuple[str, Decimal]] = []
    operator = "+"
    while i < len(tokens) and tokens[i].kind == "number":
        value = tokens[i].value
        terms.append(("+", -value) if operator == "-" else (operator, value))
        if i + 1 == len(tokens) or tokens[i + 1].kind != "operator":
            return tuple(terms), i + 1
        operator, i = tokens[i + 1].text, i + 2
    return tuple(terms), i


def _clean(text: str) -> list[_Token]:
    """Tokens in order, signs joined to their numbers, hedged numbers marked.

    An operator is kept only between two numbers of one line. Numbers side by side ("2 1 4") are
    marked as hedged: the text means neither.
    """
    plain = _DRESS.sub(" ", text.translate(_MINUS))
    out = [_Token("newline", "")]
    operators: list[re.Match[str]] = []
    last = 0  # where the last number ended
    for match in _TOKEN.finditer(plain):
        kind, word, before = match.lastgroup, match[0].lower(), out[-1]
        if kind == "operator":
            operators.append(match)
        elif kind == "number":
            if before.kind in ("number", "hedged"):
                if operators:
                    out.append(_Token("operator", _symbol(operators.pop(0))))
                elif not plain[last:match.start()].strip():
                    out[-1] = replace(before, kind="hedged")
                    kind = "hedged"
            if before.kind == "hedge" or _QUESTION.match(plain, match.end()):
                kind = "hedged"
            value = Decimal(_SEPARATORS.sub("", match[0]))
            negative = _is_negative(operators, match.start(), before.kind)
            out.append(_Token(kind, word, -value if negative else value))
            operators, last = [], match.end()
        elif kind != "filler":
            operators = []
            # "does not equal 5": the hedge holds for the number.
            if not (kind in ("cue", "or") and before.kind == "hedge"):
                out.append(_Token(str(kind), word))
    return [t for t in out if t.kind != "newline"]


def _symbol(operator: re.Match[str]) -> str:
    return _SYMBOLS.get(operator[0].lower(), operator[0])


def _is_negative(operators: Sequence[re.Match[str]], start: int, before: str) -> bool:
    """Whether the last operator is a sign: glued to its number, a word, or right after a cue.

    A free dash elsewhere is the bullet of a list, or prose.
    """
    if not operators or _symbol(operators[-1]) != "-":
        return False
    return operators[-1].end() == start or operators[-1][0] != "-" or before == "cue"
