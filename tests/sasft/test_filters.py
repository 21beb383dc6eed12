"""Filters: what each drops, in which order it counts, and whether it may look at what it looks at."""

import warnings
from dataclasses import replace

import pytest

from sasft import filters
from sasft.data import Row
from sasft.errors import UsageError
from sasft.filters import BreaksScoreIdentity, Filter, apply_filters
from sasft.topics import LEXICONS


def row(name: str, prompt: str = "What is that over there?", response: str = "It is what you see there.", **kwargs) -> Row:
    return Row(name, "self", ({"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}), response,
               response_ids=tuple(range(len(response.split()))), **kwargs)


ROWS = [
    row("plain"),
    row("same prompt", response="I do not know."),
    row("german", prompt="Was ist das und wie kann ich es nicht sehen?"),
    row("answers in german", prompt="How do you say that?", response="Das ist nicht die Frage, aber ich kann es auch."),
    row("sum", prompt="What is 3 + 4?"),
    row("answers with a sum", prompt="Tell me of your day.", response="It was 3 + 4 = 7 o'clock."),
    row("cut", prompt="Go on and on.", response="And so it went on", finished=False),
    row("loop", prompt="Say it again, please.", response="I say it to you. " * 12),
    row("marks", prompt="Who is next?\nUser: me"),
    row("answers with marks", prompt="Who was that?", response="Me.\nUser: you?"),
    row("long", prompt=" ".join(f"word{i}" for i in range(40))),
    row("empty", prompt="Say nothing at all.", response=""),
]
ALL = [
    (filters.distinct(), ["same prompt"]),
    (filters.distinct(1.0, of="row"), []),
    (filters.language(), ["german"]),
    (filters.language(of="answer"), ["answers in german"]),
    (filters.without_topic(LEXICONS["mathematics"]), ["sum"]),
    (filters.without_topic(LEXICONS["mathematics"], of="row"), ["sum", "answers with a sum"]),
    (filters.finished(), ["cut"]),
    (filters.not_degenerate(), ["loop"]),
    (filters.on_template(), ["marks"]),
    (filters.on_template(of="answer"), ["answers with marks"]),
    (filters.on_template(["word3"]), ["marks", "long"]),
    (filters.prompt_words(3, 30), ["long"]),
    (filters.answer_tokens(1, 30), ["empty", "loop"]),
]
RANDOM = [filters.random_rows(5, seed=3)]


def kept(f: Filter, rows=ROWS) -> list[str]:
    return [r.id for r, keep in zip(rows, f.keeps(rows), strict=True) if keep]


@pytest.mark.parametrize("f, dropped", ALL, ids=[f"{f.name}-{i}" for i, (f, _) in enumerate(ALL)])
def test_what_each_filter_drops(f: Filter, dropped: list[str]) -> None:
    assert set(r.id for r in ROWS) - set(kept(f)) == set(dropped)


@pytest.mark.parametrize("f", [f for f, _ in ALL] + RANDOM, ids=lambda f: f.name)
def test_a_filter_that_says_so_does_not_look_at_answers(f: Filter) -> None:
    """Other answers to the same prompts: the same rows are kept, by filters that leave the score identity intact."""
    n = len(ROWS)
    moved = [[replace(r, response=ROWS[(i + k) % n].response, response_ids=ROWS[(i + k) % n].response_ids,
                      finished=ROWS[(i + k) % n].finished) for i, r in enumerate(ROWS)] for k in range(1, n)]
    same = all(kept(f, rows) == kept(f) for rows in moved)
    assert f.breaks_f1 == (f.reads == "answer")
    if not f.breaks_f1:
        assert same
    elif f.name != "distinct rows":  # of these, all differ in their prompts
        assert not same


def test_dropped_rows_are_counted_for_the_first_filter_that_drops_them() -> None:
    chosen = [filters.distinct(), filters.language(), filters.on_template(), filters.prompt_words(3, 30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of them looks at answers
        rows, report = apply_filters([*ROWS, *ROWS], chosen)
    assert (report.rows, report.kept) == (24, len(rows)) and not report.breaks_f1
    assert [(s.filter, s.rows, s.dropped) for s in report.filters] == [
        ("distinct prompts", 24, 13), ("en prompts", 11, 1), ("prompts on template", 10, 1), ("prompt length", 9, 1)]
    assert str(report).startswith("8 of 24 rows kept: distinct prompts dropped 13; en prompts dropped 1;")
    assert report.as_dict()["filters"][0]["dropped"] == 13


def test_a_look_at_answers_is_warned_of_if_it_drops_any() -> None:
    with pytest.warns(BreaksScoreIdentity, match="the filter 'finished answers' looked at answers and dropped 1 rows"):
        rows, report = apply_filters(ROWS, [filters.finished()])
    assert report.breaks_f1 and "(by the answer)" in str(report) and len(rows) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not apply_filters(rows, [filters.finished()])[1].breaks_f1


def test_random_rows_depend_on_the_seed_alone() -> None:
    a, b, c = (kept(filters.random_rows(5, seed=s)) for s in (0, 0, 1))
    assert a == b != c and len(a) == len(c) == 5
    assert kept(filters.random_rows(99)) == [r.id for r in ROWS]


@pytest.mark.parametrize("call, message", [
    (lambda: apply_filters(ROWS, [filters.language("de")] * 2), "different names, got 'de prompts' twice"),
    (lambda: apply_filters(ROWS, [filters.prompt_words(99)]), "'prompt length' drops all 12 rows that came to it"),
    (lambda: apply_filters(ROWS, [Filter("odd", "prompt", lambda rows: [True])]),
     "'odd' must say of each of 12 rows .* got 1 answers"),
    (lambda: filters.random_rows(0), "n .rows to keep. must be at least 1, got 0"),
    (lambda: apply_filters([replace(ROWS[0], response_ids=None)], [filters.answer_tokens()]), "row plain has no response_ids"),
])
def test_filters_that_make_no_sense_are_refused(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_nothing_to_filter() -> None:
    assert apply_filters([], [filters.distinct()])[1].kept == 0
