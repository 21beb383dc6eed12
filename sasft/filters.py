"""Filters of self-dialogues: which rows are kept, how many each filter drops, and whether it leaves the score identity intact.

Self-data exert no force at the start as long as a row is kept for its *prompt* (docs/theory.md F1). A filter that looks at the
answer pulls the model towards the answers that it keeps (F2c); it may be worth that, so such filters warn instead of refusing.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sasft.data import Row
from sasft.errors import UsageError
from sasft.languages import language_of
from sasft.text_checks import DEGENERATE, NEAR, is_degenerate, near_duplicates, off_template
from sasft.topics import Detector

Keeps = Sequence[bool] | np.ndarray


class BreaksScoreIdentity(UserWarning):
    """Rows were dropped for their answers, so that the rest exert a force at the start."""

    def __init__(self, what: str, dropped: int) -> None:
        super().__init__(f"{what} looked at answers and dropped {dropped} rows: the rest are no sample of the model's "
                         "distribution, and training on them pulls towards what was kept even at the start (docs/theory.md, F2c)")


def prompt_text(row: Row) -> str:
    """All that stands before the answer but the system's message, one message a line."""
    return "\n".join(message["content"] for message in row.prompt if message["role"] != "system")


def row_text(row: Row) -> str:
    """The prompt's text and the answer."""
    return f"{prompt_text(row)}\n{row.response}"


@dataclass(frozen=True)
class Filter:
    """A named choice of rows. ``keeps(rows)`` says of each row whether it stays; ``reads`` what that looks at.

    ``prompt`` and ``nothing`` leave the score identity intact, ``answer`` does not.
    """

    name: str
    reads: Literal["nothing", "prompt", "answer"]
    keeps: Callable[[Sequence[Row]], Keeps]

    @property
    def breaks_f1(self) -> bool:
        """Whether the rows left exert a force at the start."""
        return self.reads == "answer"


@dataclass(frozen=True)
class Dropped:
    """What one filter did to the rows that came to it."""

    filter: str
    breaks_f1: bool
    rows: int
    dropped: int


@dataclass(frozen=True)
class FilterReport:
    """What each filter did, in their order; a row counts for the first that drops it."""

    rows: int
    kept: int
    filters: tuple[Dropped, ...]

    @property
    def breaks_f1(self) -> bool:
        """Whether a row was dropped for its answer."""
        return any(step.breaks_f1 and step.dropped for step in self.filters)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)

    def __str__(self) -> str:
        steps = "; ".join(f"{step.filter} dropped {step.dropped}{' (by the answer)' if step.breaks_f1 else ''}"
                          for step in self.filters)
        return f"{self.kept} of {self.rows} rows kept" + (f": {steps}" if steps else "")


def apply_filters(rows: Sequence[Row], filters: Sequence[Filter]) -> tuple[list[Row], FilterReport]:
    """The rows that every filter keeps, in their order; each filter sees what those before it have left.

    Gives a :class:`BreaksScoreIdentity` warning for every filter that dropped rows for their answers. Raises :class:`UsageError`
    if two filters have one name, or if no row is left (which filter took the last ones).

    >>> row = Row("1", "self", ({"role": "user", "content": "Hi!"},), "Hello.")
    >>> print(apply_filters([row, row], [distinct()])[1])
    1 of 2 rows kept: distinct prompts dropped 1
    """
    names = [f.name for f in filters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"filters must have different names, got {twice!r} twice")
    left, steps = list(rows), []
    for f in filters:
        keeps = list(f.keeps(left))
        if len(keeps) != len(left):
            raise UsageError(f"the filter {f.name!r} must say of each of {len(left)} rows whether to keep it, got "
                             f"{len(keeps)} answers")
        kept = [row for row, keep in zip(left, keeps, strict=True) if keep]
        steps.append(Dropped(f.name, f.breaks_f1, len(left), len(left) - len(kept)))
        if left and not kept:
            raise UsageError(f"the filter {f.name!r} drops all {len(left)} rows that came to it; loosen it, or look at "
                             "the quality report")
        if f.breaks_f1 and len(kept) < len(left):
            warnings.warn(BreaksScoreIdentity(f"the filter {f.name!r}", len(left) - len(kept)), stacklevel=2)
        left = kept
    return left, FilterReport(len(rows), len(left), tuple(steps))


def _each(name: str, reads: Literal["prompt", "answer"], keep: Callable[[Row], bool]) -> Filter:
    return Filter(name, reads, lambda rows: [keep(row) for row in rows])


def random_rows(n: int, *, seed: int = 0) -> Filter:
    """``n`` rows drawn without replacement, from ``seed`` alone; all of them if there are no more."""
    if n < 1:
        raise UsageError(f"n (rows to keep) must be at least 1, got {n}")

    def keeps(rows: Sequence[Row]) -> Keeps:
        chosen = np.zeros(len(rows), dtype=bool)
        chosen[np.random.default_rng(seed).permutation(len(rows))[:n]] = True
        return chosen

    return Filter(f"{n} random rows", "nothing", keeps)


def prompt_words(least: int = 1, most: int | None = None) -> Filter:
    """Last user turns of at least ``least`` and at most ``most`` words."""
    return _each("prompt length", "prompt", lambda row: least <= len(row.prompt[-1]["content"].split()) <= (most or float("inf")))


def answer_tokens(least: int = 1, most: int | None = None) -> Filter:
    """Sampled answers of at least ``least`` and at most ``most`` tokens, without the end of turn."""
    return _each("answer length", "answer", lambda row: least <= len(_ids(row)) <= (most or float("inf")))


def finished() -> Filter:
    """Answers that the length cap has not cut."""
    return _each("finished answers", "answer", lambda row: row.finished)


def distinct(near: float = NEAR, *, of: Literal["prompt", "row"] = "prompt") -> Filter:
    """Rows whose prompt, or whole text, is no near duplicate of an earlier kept one (:func:`sasft.text_checks.near_duplicates`).

    Of prompts, the identity stays: which of equal prompts is kept is settled by their order. Of whole rows, rare answers are
    favoured.
    """
    text = {"prompt": prompt_text, "row": row_text}[of]
    return Filter("distinct prompts" if of == "prompt" else "distinct rows", "prompt" if of == "prompt" else "answer",
                  lambda rows: [twin is None for twin in near_duplicates([text(row) for row in rows], near)])


def language(expected: str = "en", *, of: Literal["prompt", "answer"] = "prompt") -> Filter:
    """Rows whose prompt, or answer, is in the language or in none that can be told (:func:`sasft.languages.language_of`)."""
    def text(row: Row) -> str:
        return prompt_text(row) if of == "prompt" else row.response

    return _each(f"{expected} {of}s", of, lambda row: language_of(text(row)) in (expected, None))


def not_degenerate(limit: float = DEGENERATE) -> Filter:
    """Answers that do not repeat themselves (:func:`sasft.text_checks.is_degenerate`)."""
    return _each("answers without loops", "answer", lambda row: not is_degenerate(row.response, limit))


def on_template(special_tokens: Sequence[str] = (), *, of: Literal["prompt", "answer"] = "prompt") -> Filter:
    """Rows whose last user turn, or answer, has no special token or role marker (:func:`sasft.text_checks.off_template`)."""
    def text(row: Row) -> str:
        return row.prompt[-1]["content"] if of == "prompt" else row.response

    return _each(f"{of}s on template", of, lambda row: not off_template(text(row), special_tokens))


def without_topic(detector: Detector, *, of: Literal["prompt", "row"] = "prompt") -> Filter:
    """Rows in which a detector does not find its topic; :func:`sasft.ablation.ablate` also says how much of it is left."""
    text = {"prompt": prompt_text, "row": row_text}[of]
    return Filter(f"no {detector.topic} in the {of}", "prompt" if of == "prompt" else "answer",
                  lambda rows: ~detector([text(row) for row in rows]))


def _ids(row: Row) -> tuple[int, ...]:
    if row.response_ids is None:
        raise UsageError(f"row {row.id} has no response_ids, so its answer cannot be counted in tokens; the filter "
                         "is for sampled rows")
    return row.response_ids


NAMED: Mapping[str, str] = {
    "distinct": "prompts that are no near duplicate of an earlier one (=SIMILARITY from which two are: 0.8)",
    "prompt_words": "=LEAST-MOST words in the last user turn, as prompt_words=3-60",
    "language": "prompts in English, or =CODE of another language",
    "on_template": "user turns without special tokens or role markers",
    "random": "=N rows, whichever",
    "finished": "answers that the length cap has not cut",
    "answer_tokens": "=LEAST-MOST tokens in the answer",
    "answer_language": "answers in English, or =CODE",
    "answer_on_template": "answers without special tokens or role markers",
    "no_loops": "answers that do not repeat themselves (=SHARE of repeated phrases that is let pass: 0.5)",
    "distinct_rows": "rows that are no near duplicate of an earlier one (=SIMILARITY)",
}
"""Filters by name, with what each keeps: the first five leave the score identity intact, the others look at answers."""


def named_filter(text: str, *, special_tokens: Sequence[str] = (), seed: int = 0) -> Filter:
    """The filter that ``name`` or ``name=value`` of :data:`NAMED` asks for.

    Raises :class:`UsageError` for a name that there is not, and for a value that the filter does not take or lacks.

    >>> named_filter("prompt_words=3-60").breaks_f1, named_filter("finished").breaks_f1
    (False, True)
    """
    name, equals, value = text.partition("=")
    makers: dict[str, Callable[[], Filter]] = {
        "distinct": lambda: distinct(float(value or NEAR)),
        "prompt_words": lambda: prompt_words(*_span(value)),
        "language": lambda: language(value or "en"),
        "on_template": lambda: on_template(special_tokens),
        "random": lambda: random_rows(int(value), seed=seed),
        "finished": finished,
        "answer_tokens": lambda: answer_tokens(*_span(value)),
        "answer_language": lambda: language(value or "en", of="answer"),
        "answer_on_template": lambda: on_template(special_tokens, of="answer"),
        "no_loops": lambda: not_degenerate(float(value or DEGENERATE)),
        "distinct_rows": lambda: distinct(float(value or NEAR), of="row"),
    }
    if name not in makers:
        raise UsageError(f"there is no filter {name!r}; there are: " + "; ".join(f"{n}: {what}" for n, what in NAMED.items()))
    if bool(equals) != bool(value) or (value and "=" not in NAMED[name]):
        raise UsageError(f"the filter {name} is given {text!r}; it keeps {NAMED[name]}")
    try:
        return makers[name]()
    except UsageError:
        raise
    except ValueError:  # no number
        raise UsageError(f"the filter {name} can't take {repr(value) if value else 'no value'}; it keeps {NAMED[name]}") from None


def _span(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    return int(least), int(most)
