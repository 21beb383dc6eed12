r"""What an answer *says*, apart from how: the units that a change of style must keep, in order.

A text is read as tokens of four kinds: *spans* that must stay verbatim (code, URLs, e-mail
addresses, LaTeX), *numbers* with their sign, currency, separators and unit, *words*, and *symbols*
(Unicode category ``S``: ``+``, ``=``, emoji ...). Its content is every token but the function words
(closed classes: articles, pronouns, auxiliaries, prepositions, conjunctions, fillers). A
capitalised word inside a sentence is a *name* even if it is spelled like a function word ("Plan A",
"the IT department"). Negations are content.

Everything here is a rule on characters: no model, no randomness. The word lists are English; other
languages have no function words here, so all their words are content.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ARTICLES = frozenset("a an the".split())
AUXILIARIES = frozenset(
    "am is are was were be been being has have had having do does did will would shall should "
    "can could may might must".split())
PRONOUNS = frozenset(
    "i me my mine myself you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself we us our ours ourselves they them their theirs themselves this "
    "that these those who whom whose which what there here it's that's there's you're you've "
    "you'll you'd".split())
PREPOSITIONS = frozenset(
    "about above across after against along among amongst around at before behind below "
    "beneath beside between beyond by down during for from in inside into like near of off on "
    "onto out outside over past since through to toward towards under until unto up upon via "
    "while whilst with within".split())
CONJUNCTIONS = frozenset(
    "and or but if because although though unless as than whether when where".split())
FILLERS = frozenset(
    "very really quite just simply also then so thus indeed perhaps maybe yes well too "
    "rather".split())
#: What the archaic style puts in the place of function words.
ARCHAISMS = frozenset(
    "ye thou thee thy thine thyself thou'rt thou'st thou'lt thou'dst art hast hath hadst wilt "
    "shalt wouldst shouldst canst couldst mayst dost doth didst wert upon betwixt ere o'er "
    "perchance mayhap verily forsooth yea".split())
FUNCTION_WORDS = (
    ARTICLES | AUXILIARIES | PRONOUNS | PREPOSITIONS | CONJUNCTIONS | FILLERS | ARCHAISMS)
NEGATIONS = frozenset(
    "not no never none nothing nobody nowhere neither nor without cannot".split())

_TOKEN = re.compile(
    r"""
    (?P<span>
        ```[\s\S]*?(?:```|\Z)                        # fenced code; a cut answer leaves it open
      | `[^`\n]+`
      | ^(?:[ ]{4}|\t)[^\S\n]*(?!```)\S(?:(?!```).)*  # Markdown's indented code
      | \$\$[\s\S]+?\$\$ | \\\[[\s\S]+?\\\] | \\\([\s\S]+?\\\)
      | \\begin\{(?P<env>\w+\*?)\}[\s\S]*?\\end\{(?P=env)\}
      | \$(?=\S)[^$\n]*?(?<=[^\s$])\$(?!\d)          # $x$, but not "$5 and $10"
      | https?://[^\s<>"]*[^\s<>".,;:!?)\]}'*]
      | \w[\w.+-]*+@[\w-]+(?:\.[\w-]+)+
    )
  | (?P<number>
        (?:(?<![\w)\]}])[-−+])?[$€£¥₹]?(?:\d|(?<!\w)\.(?=\d))\d*+(?:[.,:/]\d+)*+%?\w*
    )
  | (?P<word> \w+(?:['’-]\w+)* )
  | (?P<symbol> [^\w\s] )
    """,
    re.VERBOSE | re.MULTILINE,
)
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st vs etc e.g i.e cf fig no vol approx inc ltd jr sr al".split())
_SPACE = re.compile(r"\s+")
# After one of these a capital does not make a name.
_OPENS = frozenset(":;\"“‘«([{—")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]*_]*\Z")
_LIST_MARKER = re.compile(r"(?:\A|[\n\r])[^\S\n]*(?:\d+|\w)\.\Z")
_LAST_WORD = re.compile(r"([\w.]*\w)\.\Z")


@dataclass(frozen=True)
class Token:
    """A stretch of text: ``kind`` is ``span``, ``number``, ``word`` or ``symbol``.

    :func:`read` tells words apart further.
    """

    kind: str
    text: str
    start: int
    end: int

    @property
    def folded(self) -> str:
        """The text without case, straight apostrophes for curly ones."""
        return self.text.casefold().replace("’", "'")


@dataclass(frozen=True)
class Unit:
    """One unit of content: a span, number, symbol or name as written, a word or negation folded."""

    kind: str
    text: str


@dataclass(frozen=True)
class Content:
    """The content units of a text, in order.

    >>> c = content("The café in Paris is not open before 9:30.")
    >>> c.numbers, c.names, c.negations, c.words
    (('9:30',), ('Paris',), ('not',), ('café', 'open'))
    """

    units: tuple[Unit, ...]

    def of(self, kind: str) -> tuple[str, ...]:
        """The texts of the units of one kind."""
        return tuple(u.text for u in self.units if u.kind == kind)

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.of("number")

    @property
    def names(self) -> tuple[str, ...]:
        return self.of("name")

    @property
    def words(self) -> tuple[str, ...]:
        return self.of("word")

    @property
    def negations(self) -> tuple[str, ...]:
        return self.of("negation")

    @property
    def spans(self) -> tuple[str, ...]:
        return self.of("span")


def tokenize(text: str) -> list[Token]:
    """The tokens of ``text``. What lies between them is white space and punctuation.

    >>> [(t.kind, t.text) for t in tokenize("Pay −$1,234.50 (10%) to `f(x)`!")]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('word', 'Pay'), ('number', '−$1,234.50'), ('number', '10%'), ('word', 'to'),
     ('span', '`f(x)`')]
    """
    return [Token(str(m.lastgroup), m.group(), m.start(), m.end()) for m in _TOKEN.finditer(text)
            if m.lastgroup != "symbol" or unicodedata.category(m.group()) in ("Sm", "Sc", "So")]


def sentences(text: str) -> list[str]:
    r"""Sentences and lines of ``text``; :func:`join_sentences` puts them together again, exactly.

    A piece ends at a line break, or after a full stop, ``!``, ``?`` or ``…`` unless what follows is
    lower-case or the stop belongs to an abbreviation, an initial or a list marker. Spans are never
    split. A single space between two pieces is left out; any other white space stays at the end of
    the piece before it.

    >>> sentences("Dr. Li came. She said:\n1. Go!\n\n2. Pay $3.50 now")
    ['Dr. Li came.', 'She said:\n', '1. Go!\n\n', '2. Pay $3.50 now']
    """
    pieces, begin = [], 0
    for start, end in _breaks(text):
        separator = text[start:end]
        pieces.append(text[begin:start] + ("" if separator == " " else separator))
        begin = end
    return [*pieces, text[begin:]]


def join_sentences(pieces: Sequence[str]) -> str:
    """The text that :func:`sentences` took apart.

    >>> join_sentences(sentences(" One.  Two. Three ")) == " One.  Two. Three "
    True
    """
    *head, last = pieces
    return "".join(p if p[-1:].isspace() else p + " " for p in head) + last


def _breaks(text: str) -> Iterator[tuple[int, int]]:
    cursor = 0
    spans = [(t.start, t.end) for t in tokenize(text) if t.kind == "span"]
    for span_start, span_end in [*spans, (len(text), len(text))]:
        for m in _SPACE.finditer(text, cursor, span_start):
            start, end = m.span()
            line_ends = "\n" in m[0] or "\r" in m[0]
            if start > 0 and end < len(text) and (line_ends or _ends_here(text, start, end)):
                yield start, end
        cursor = span_end


def _ends_here(text: str, start: int, end: int) -> bool:
    left = text[max(0, start - 40):start]
    if not _SENTENCE_END.search(left) or text[end].islower() or _LIST_MARKER.search(left):
        return False
    word = _LAST_WORD.search(left)
    initial = word is not None and len(word[1]) == 1 and word[1].isupper()
    return not (word is not None and (initial or word[1].casefold() in _ABBREVIATIONS))


def read(text: str) -> list[Token]:
    """The tokens of ``text``, a word's kind being name, negation, function or (plain) word.

    A word is a name if it has a capital inside, or begins with one where no sentence, clause or
    quotation begins.

    >>> [(t.text, t.kind) for t in read("The NASA team, you and I: Ann isn't in.")[1:]]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('NASA', 'name'), ('team', 'word'), ('you', 'function'), ('and', 'function'),
     ('I', 'function'), ('Ann', 'word'), ("isn't", 'negation'), ('in', 'function')]
    """
    tokens = []
    for sentence, offset in _with_offsets(sentences(text)):
        opens, cursor = True, 0
        for token in tokenize(sentence):
            opens = opens or not _OPENS.isdisjoint(sentence[cursor:token.start])
            cursor = token.end
            kind = token.kind
            if kind == "word":
                kind, opens = _word_kind(token, opens), False
            tokens.append(Token(kind, token.text, offset + token.start, offset + token.end))
    return tokens


def _word_kind(token: Token, opens: bool) -> str:
    if token.folded in NEGATIONS or token.folded.endswith("n't"):
        return "negation"
    inner = any(c.isupper() for c in token.text[1:])
    if token.folded.split("'")[0] != "i" and (inner or (not opens and token.text[0].isupper())):
        return "name"
    return "function" if token.folded in FUNCTION_WORDS else "word"


def _with_offsets(pieces: Sequence[str]) -> Iterator[tuple[str, int]]:
    offset = 0
    for piece in pieces:
        yield piece, offset
        offset += len(piece) + (not piece[-1:].isspace())


def content(text: str) -> Content:
    """The content of ``text``: its tokens without the function words, in order.

    >>> [u.text for u in content("You don't owe Ann $5; **she** owes you!").units]
    ["don't", 'owe', 'Ann', '$5', 'owes']
    """
    return Content(tuple(_unit(t) for t in read(text) if t.kind != "function"))


def _unit(token: Token) -> Unit:
    plain = token.folded if token.kind in ("word", "negation") else token.text
    return Unit(token.kind, plain.replace("’", "'") if token.kind == "name" else plain)


def compare(original: str, restyled: str) -> list[str]:
    """What ``restyled`` lost and added of the content of ``original``; empty if it is the same.

    The content of each text has to appear, in order, among the words of the other. (Among all words
    rather than the content alone: dropping a leading "The" makes the name after it the first word
    of its sentence.)

    >>> compare("Ann did not pay 30 dollars.", "Ann paid 30 dollars.")
    ["lost negation 'not'", "lost word 'pay'", "added word 'paid'"]
    >>> compare("The Alps are high.", "Alps high")
    []
    """
    return _missing(original, restyled, "lost") + _missing(restyled, original, "added")


def _missing(whole: str, part: str, verb: str) -> list[str]:
    found = tokenize(part)
    problems, cursor = [], 0
    for unit in content(whole).units:
        for k in range(cursor, len(found)):
            if _unit(Token(unit.kind, found[k].text, 0, 0)) == unit:
                cursor = k + 1
                break
        else:
            problems.append(f"{verb} {unit.kind} {unit.text!r}")
    return problems
