import json
import random
from pydoc_data.topics import topics

import pytest

from sasft import content, lexical
from sasft.content import compare, join_sentences, sentences, tokenize
from sasft.errors import UsageError
from sasft.restyle import (
    STYLES,
    ContentLost,
    Style,
    check_content,
    from_json,
    from_markdown,
    restyle,
)

LETTER = """Sure! Here's how you can do it:

1. First, you should check whether the file is there. If it isn't, create a new one.
2. Then open it with `open("a.txt")`, and read 1,000 lines.

```python
for x in the_list:
    print(x ** 2)  # the end
```
You are right: I have not been to New York since 2019 (see https://ex.am/ple?a=the&b=2.), and
$x = a_1$ costs −$5.50. 😀 "Quoted." «Ça»
- **Note**: The answer is A. Will is a friend of the IT department."""

NASTY = """The the a A an is are was it It you You your YOU do don't don’t not never cannot has of
Plan Paris O'Brien McDonald NASA IT who US$5 $5 $10. 5$ -5 −7.5 (3 1,234.56 10% 3/4 12:30 5-3 )-5 .5
1. 2) a) a. - * # ## > **bold** ** *x* __u__ _ `is` ` `` ``` $x=a$ $ \\(x\\) \\begin{x} the@is.of
https://ex.am/ple?a=the&b=2. http://x.y/(z) <b> ... … ! ?! !!! . , ; : — – / \\ | 😀 é e\u0301
a\u0301 ß ı İ ŉ ﬁ नमस्ते 你好。 “ ” ‘ ’ " ' ( ) [ ] { } e.g. Mr. etc. J. x + = == <= & % @ ~ ^ \x00
state-of-the-art the- -the is/are "the" 'a' (the) Verily, thou I I'm Will are½ ²""".split()
BLOCKS = [
    "\n", "\n\n", "\r\n", "\t", "  ", "\u2028", "\x0b", "\n- ", "\n  ", "## Answer\n\n", "you are",
    "to you.", "```py\nif a is None:\n    the = 2**3 ** 5\n```",
    "\n    the code is 5 **\n", "\n\tthe\n",
    "\n      - nested Name 4\n", "$$\\frac{1}\n{2}$$", "\\[ a is b\n\n \\]", "| a | the |",
    "\\begin{align}\na &= the\n\\end{align}", '{"answer": ["a"]}', "is the", "has a", "2 1 4",
]


def nasty_texts(n: int) -> list[str]:
    texts = []
    for seed in range(n):
        rng = random.Random(seed)
        parts = [rng.choice(NASTY if rng.random() < 0.8 else BLOCKS) + rng.choice(["", *"   "])
                 for _ in range(rng.randint(1, 25))]
        texts.append("".join(parts))
    return [t for t in texts if t.strip()]


def manual_paragraphs(n: int) -> list[str]:
    """Paragraphs of Python's own manual: prose, lists, grammar and code."""
    found = [p for topic in sorted(topics) for p in topics[topic].split("\n\n") if p.strip()]
    return random.Random(0).sample(found, n)


TEXTS = [LETTER, *nasty_texts(500), *manual_paragraphs(200)]


# --- exact rewrites ----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "restyled"), [
    ("The Louvre is in Paris.", "Louvre in Paris"),
    ("There are 3.5 million people, and that is not small!", "3.5 million people, and not small!"),
    ("It has not opened. Ann has a car.", "not opened. Ann has car"),
    ("You can do this, but it may be slow.", "You can do this, but it may be slow"),
    ("42 + 57 is 99. The sum is 99.", "42 + 57 is 99. sum 99"),
    ("a = 5 and a + b is 7.", "a = 5 and a + b 7"),
    ("Take vitamin A, the IT course and a walk.", "Take vitamin A, IT course and walk"),
    ("I know what it is.", "I know what it is"),
    ("Use is/are and \"the\" well.", "Use is/are and \"the\" well"),
    ("He was at the e-mail a.the@is.of or `the a`.", "He at e-mail a.the@is.of or `the a`"),
    ("And so on...", "And on..."),
    ("214", "214"),
    ("It is.", "It is"),
])
def test_telegraphic(text, restyled):
    assert restyle(text, "telegraphic") == restyled


@pytest.mark.parametrize(("text", "restyled"), [
    ("You are right.", "Verily, thou art right."),
    ("Are you sure? I will tell you.", "Verily, art thou sure? I will tell thee."),
    ("Paris has it on the list between us.", "Verily, Paris hath it upon ye list betwixt us."),
    ("You’re late; yours has gone.", "Verily, thou’rt late; thine hath gone."),
    ("The IT team on \"on\" duty", "Verily, ye IT team upon \"on\" duty"),
    ("I do not know.", "Verily, I do not know."),
    ("1. The cat\n2. Your dog", "Verily,\n1. Ye cat\n2. Thy dog"),
    ("`the` has", "Verily, `the` hath"),
])
def test_archaic(text, restyled):
    assert restyle(text, "archaic") == restyled


def test_capitals():
    assert restyle("Don't, ß é ı 3rd", "capitals") == "DON'T, SS É ı 3RD"


def test_json_holds_the_sentences():
    record = json.loads(restyle("One. Two?\n\n\"Three\" is 3.5 cm", "json"))
    assert record == {"answer": ["One.", "Two?\n\n", '"Three" is 3.5 cm']}


def test_markdown():
    text = "It took Ann Lee 30 days.\nWhy? **No** idea:\n```\na\n\nb\n```"
    assert restyle(text, "markdown") == (
        "## Answer\n\n- It took **Ann Lee** **30** days.\n\n- Why?\n- **No** idea:\n\n"
        "- ```\n  a\n\n  b\n  ```")


# --- content survives --------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_nasty_texts_pass_their_checks(style):
    for text in TEXTS:
        assert check_content(text, restyle(text, style), style) == []


@pytest.mark.parametrize("style", ["telegraphic", "archaic"])
def test_content_in_order_is_kept(style):
    """Independent of the checks: numbers, spans and negations, read by the content rules."""
    for text in manual_paragraphs(200):
        before = content.content(text)
        after = content.content(restyle(text, style).removeprefix("Verily,"))
        assert (after.numbers, after.spans) == (before.numbers, before.spans)
        assert after.negations == before.negations


@pytest.mark.parametrize("style", ["telegraphic", "archaic", "json", "markdown"])
@pytest.mark.parametrize("span", [
    "`if a is the`", "https://the.is/a?it=of#The", "the.is@of.it", "$a is the$", "\\(the a\\)",
    "\\begin{a}\nthe &= is\\\\\n\\end{a}", "```\nthe is\n\n  - a **x**\n```", "```py\nthe unclosed",
    "\n    the = is\n",
])
def test_spans_survive_to_the_byte(style, span):
    restyled = restyle(f"See Ann: {span}", style)
    if style == "json":
        restyled = from_json(restyled)
    if style == "markdown":
        restyled = from_markdown(restyled)
    assert span.rstrip("\n") in restyled


def test_rewrites_are_undone_exactly():
    for text in TEXTS:
        assert join_sentences(sentences(text)) == text
        assert from_json(restyle(text, "json")) == text
        assert restyle(text, "capitals").casefold() == text.casefold()
        if "**" not in text:
            assert from_markdown(restyle(text, "markdown")) == text


def test_own_bold_marks_are_all_that_markdown_loses():
    assert from_markdown(restyle("**Note**: `2**3` is 8.", "markdown")) == "Note: `2**3` is 8."


@pytest.mark.parametrize("style", STYLES)
def test_cut_answers_stay_cut(style):
    """Cut anywhere, the rewrite ends with the last character of the answer: nothing is added."""
    for end in range(1, len(LETTER), 2):
        cut = LETTER[:end].rstrip()
        restyled = restyle(cut, style)
        last = tokenize(cut)[-1]
        if style == "archaic" and last.end == len(cut):
            assert tokenize(restyled)[-1].folded in lexical._images(last.folded)
            continue
        if style == "json":
            assert restyled.endswith('"]}')
            restyled = json.loads(restyled)["answer"][-1]
        if style == "telegraphic" and cut.endswith(".") and last.end < len(cut):
            cut = cut.removesuffix(".")
        assert restyled.rstrip("*")[-1].casefold() == cut.rstrip("*")[-1].casefold()


def test_styles_change_ordinary_text():
    for style in STYLES:
        assert restyle(LETTER, style) != LETTER


def test_rewrites_are_deterministic():
    for style in STYLES:
        assert len({restyle(LETTER, style) for _ in range(3)}) == 1


# --- the checks see what is lost ---------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("old", "new"), [
    ("not", ""), ("30", "31"), ("30", ""), ("Bonn", "Rome"), ("paid", "owed"), ("+", "-"),
    ("Ann did not pay", "did not pay Ann"), ("today", "today today"), ("−4.5", "4.5"),
])
def test_corrupted_rewrites_are_caught(style, old, new):
    text = "The other day Ann did not pay 30 + −4.5 dollars in Bonn. Bob paid today!"
    corrupted = text.replace(old, new, 1)
    assert corrupted != text
    assert check_content(text, restyle(text, style), style) == []
    assert check_content(text, restyle(corrupted, style), style) != []


@pytest.mark.parametrize(("style", "restyled"), [
    ("telegraphic", "cat may be in Bonn"),  # modals are not its to drop
    ("telegraphic", "cat be Bonn"),
    ("archaic", "The cat could be in Bonn."),  # no opener
    ("archaic", "Verily, thy cat could be in Bonn."),  # not the image of "the"
    ("archaic", "Verily, the cat could be in bonn."),
    ("capitals", "THE CAT COULD be IN BONN."),
    ("json", '{"answer": ["The cat could be in Bonn."]'),
    ("json", '{"answer": "The cat could be in Bonn."}'),
    ("json", '{"answer": ["The cat could be in Bonn."], "more": 1}'),
    ("json", '["The cat could be in Bonn."]'),
    ("markdown", "- The cat could be in **Bonn**."),
    ("markdown", "## Answer\n\nThe cat could be in Bonn."),
])
def test_other_departures_are_caught(style, restyled):
    assert check_content("The cat could be in Bonn.", restyled, style) != []


def test_a_failing_rewrite_raises_and_names_the_loss(monkeypatch):
    careless = Style("careless", "drops negations", lambda t: t.replace("not ", ""), compare)
    monkeypatch.setitem(STYLES, "careless", careless)
    with pytest.raises(ContentLost, match="'careless' would change .* lost negation 'not'"):
        restyle("I do not know.", "careless")


@pytest.mark.parametrize("text", ["", " ", "\n\t\u00a0"])
def test_blank_text_is_refused(text):
    with pytest.raises(UsageError, match="a visible character is needed"):
        restyle(text, "json")


def test_unknown_style_names_the_styles():
    with pytest.raises(UsageError, match="'pirate' does not exist; use one of: archaic, capitals"):
        restyle("text", "pirate")
    with pytest.raises(UsageError, match="pirate"):
        check_content("text", "text", "pirate")


# --- lexicons ----------------------------------------------------------------------------------


def test_lexicons_touch_function_words_only():
    old = set(lexical._ARCHAIC) | set(lexical._BESIDE_YOU)
    new = set(lexical._ARCHAIC.values()) | set(lexical._BESIDE_YOU.values()) | {"thee"}
    assert old | new | lexical._DROPPED <= content.FUNCTION_WORDS
    assert not content.FUNCTION_WORDS & content.NEGATIONS


def test_archaic_lexicon_merges_no_two_words():
    images = [*lexical._ARCHAIC.values(), *lexical._BESIDE_YOU.values()]
    assert len(set(images)) == len(images)


# --- content -----------------------------------------------------------------------------------


def test_content_units():
    found = content.content(
        "It isn't the IT team’s 2nd try: “O’Brien” paid −$1,234.50 (10%) in 3.5 h.")
    assert found.numbers == ("2nd", "−$1,234.50", "10%", "3.5")
    assert found.names == ("IT", "O'Brien")
    assert found.negations == ("isn't",)
    assert found.words == ("team's", "try", "paid", "h")


def test_money_is_not_latex():
    assert content.content("It costs $5 and $10, or $x$.").spans == ("$x$",)


@pytest.mark.parametrize(("text", "pieces"), [
    ("Hi. Bye.", ["Hi.", "Bye."]),
    ("Mr. Li, e.g. J. Doe, etc. and no. 5.", ["Mr. Li, e.g. J. Doe, etc. and no. 5."]),
    ("1. One.\n2. Two", ["1. One.\n", "2. Two"]),
    ("Wait... what? \"No!\" Yes", ["Wait... what?", "\"No!\"", "Yes"]),
    ("A `b. C` d", ["A `b. C` d"]),
    ("```\na. B\n\nC\n```\nD", ["```\na. B\n\nC\n```\n", "D"]),
    (" Two  spaces.  Here ", [" Two  spaces.  ", "Here "]),
])
def test_sentences(text, pieces):
    assert sentences(text) == pieces
