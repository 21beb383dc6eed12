"""A quality report on self-dialogues before they are trained on, with limits that stop bad data.

Some models write user turns that are fragments, some never stop, some fall out of their template; none of that shows in a loss
curve. Stopping a run at limits far from what a model usually writes picks no rows, so it leaves the score identity
(docs/theory.md F1) alone.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sasft.chat import Chat
from sasft.data import Row
from sasft.errors import UsageError
from sasft.filters import prompt_text, row_text
from sasft.languages import language_of
from sasft.settings import option
from sasft.text_checks import is_degenerate, near_duplicates, off_template, words_of
from sasft.topics import LEXICONS

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Largest values that are let pass, shares of rows but for the last; None lets all pass.

    All of them are this package's choice, and wide: a model that is sampled at T = 1 and cut at 128 tokens should stay within them
    unless something is wrong.
    """

    unfinished: float | None = option(0.9, "answers that the length cap has cut")
    empty: float | None = option(0.05, "answers without a visible character")
    duplicates: float | None = option(0.1, "rows whose prompt and answer are, but for case and blanks, those of an earlier row")
    duplicate_prompts: float | None = option(0.5, "rows whose prompt is, but for case and blanks, that of an earlier row")
    near_duplicates: float | None = option(0.3, "rows that share 80 % of their three-word sequences with an earlier row")
    degenerate: float | None = option(0.2, "answers that repeat themselves (sasft.text_checks.is_degenerate)")
    off_template: float | None = option(0.05, "rows with a special token or role marker in the last user turn or in the answer")
    foreign: float | None = option(0.2, "rows in another language than expected, of those whose language can be told")
    nats_per_token: float | None = option(6.0, "minus the mean log-probability of the answers' tokens under their own model")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 0:
                raise UsageError(f"the limit {name} must be at least 0, or None, got {value}")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, and quantiles at 5, 50 and 95 %."""

    mean: float
    p5: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Quantiles by linear interpolation between order statistics."""
        if len(values) == 1:
            return cls(mean=values[0], p5=values[0], p50=values[0], p95=values[0])
        cuts = statistics.quantiles(values, n=20, method="inclusive")
        return cls(mean=statistics.fmean(values), p5=cuts[0], p50=cuts[9], p95=cuts[18])


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """What a set of rows is like.

    ``measures``: the values that :class:`QualityLimits` speaks of; ``flagged``: the ids of the rows that each counts.
    ``tokens``: length of answers in tokens without the end of turn (``unit`` tokens), or in words where rows carry no ids.
    ``nats_per_token``: minus the mean log-probability of the tokens of an answer, spread over answers, None if rows carry none.
    Its overall mean, among the measures, is over tokens: an unbiased estimate of the model's entropy per token if the sampler was
    exact. ``languages`` and ``topics``: shares of rows by :func:`sasft.languages.language_of` ("?" if it can't be told) and by
    the rules of :data:`sasft.topics.LEXICONS` on prompt and answer (a row may have several topics; "none" has none).
    """

    rows: int
    measures: Mapping[str, float]
    flagged: Mapping[str, tuple[str, ...]]
    tokens: Spread
    unit: str
    nats_per_token: Spread | None
    languages: Mapping[str, float]
    topics: Mapping[str, float]

    def check(self, limits: QualityLimits | None = None) -> None:
        """Raise :class:`UsageError` if a measure is above its limit; it names measure, value, limit and some rows."""
        limits = limits or QualityLimits()
        broken = []
        for setting in fields(limits):
            limit, value = getattr(limits, setting.name), self.measures.get(setting.name)
            if limit is not None and value is not None and value > limit:
                ids = self.flagged.get(setting.name, ())
                which = f" ({len(ids)} rows, such as {', '.join(ids[:_SHOWN])})" if ids else ""
                broken.append(f"{setting.name} is {value:.3g}, above the limit {limit:g}{which}: {setting.metadata['help']}")
        if broken:
            raise UsageError(f"the {self.rows} rows are not fit for training: " + "; ".join(broken) + ". Look at some of "
                             "them; mend how they are written (system prompt, template, sampler, length cap), filter them, or raise "
                             "the limit")

    def as_dict(self) -> dict[str, Any]:
        """All but the flagged rows, for a file."""
        return {name: value for name, value in asdict(self).items() if name != "flagged"}

    def __str__(self) -> str:
        lines = [f"{self.rows} rows"]
        lines += [f"  {name:<18}{value:8.3f}" for name, value in self.measures.items()]
        lines.append(f"  {self.unit + ' per answer':<18}{self.tokens.mean:8.1f}  "
                     f"(5 %: {self.tokens.p5:.0f}, half: {self.tokens.p50:.0f}, 95 %: {self.tokens.p95:.0f})")
        for name, shares in (("languages", self.languages), ("topics", self.topics)):
            lines.append(f"  {name:<18}" + ", ".join(f"{key} {share:.0%}" for key, share in shares.items()))
        return "\n".join(lines)


def inspect_rows(rows: Sequence[Row], chat: Chat | None = None, *, expected_language: str = "en") -> QualityReport:
    """The quality report on rows. With ``chat``, all special tokens of its tokenizer count as off the template.

    Costs about 1 ms a row. Raises :class:`UsageError` if there are no rows.
    """
    if not rows:
        raise UsageError("rows must hold at least one row to report on, got none")
    special = () if chat is None else special_tokens(chat)
    texts = [row_text(row) for row in rows]
    languages = [language_of(text) for text in texts]
    about = {topic: lexicon(texts) for topic, lexicon in LEXICONS.items()}
    flags: dict[str, list[bool]] = {
        "unfinished": [not row.finished for row in rows],
        "empty": [not row.response.strip() for row in rows],
        "duplicates": _repeats(texts),
        "duplicate_prompts": _repeats([prompt_text(row) for row in rows]),
        "near_duplicates": [twin is not None for twin in near_duplicates(texts)],
        "degenerate": [is_degenerate(row.response) for row in rows],
        "off_template": [any(off_template(text, special) for text in (row.prompt[-1]["content"], row.response)) for row in rows],
        "foreign": [found not in (expected_language, None) for found in languages],
    }
    measures = {name: statistics.fmean(found) for name, found in flags.items()}
    told = sum(found is not None for found in languages)
    measures["foreign"] = sum(flags["foreign"]) / told if told else 0.0
    logprobs = [row.meta["logprobs"] for row in rows if row.meta.get("logprobs")]
    if logprobs:
        measures["nats_per_token"] = -statistics.fmean(value for row in logprobs for value in row)
    sampled = all(row.response_ids is not None for row in rows)
    return QualityReport(
        rows=len(rows), measures=measures,
        flagged={name: tuple(row.id for row, flag in zip(rows, found, strict=True) if flag) for name, found in flags.items()},
        tokens=Spread.of([len(row.response_ids) if sampled else len(words_of(row.response)) for row in rows]),
        unit="tokens" if sampled else "words",
        nats_per_token=Spread.of([-statistics.fmean(row) for row in logprobs]) if logprobs else None,
        languages=_shares([found or "?" for found in languages]),
        topics={**{topic: float(found.mean()) for topic, found in about.items()},
                "none": statistics.fmean(not any(found) for found in zip(*about.values(), strict=True))})


def special_tokens(chat: Chat) -> tuple[str, ...]:
    """The texts of all special tokens of a tokenizer, longest first."""
    tokenizer = chat.tokenizer
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token)))


def _repeats(texts: Sequence[str]) -> list[bool]:
    """Whether each text is, but for case and blanks, that of an earlier row."""
    seen: set[str] = set()
    found = []
    for text in texts:
        key = " ".join(text.lower().split())
        found.append(key in seen)
        seen.add(key)
    return found


def _shares(values: Sequence[str]) -> dict[str, float]:
    return {value: values.count(value) / len(values) for value in sorted(set(values), key=lambda v: (-values.count(v), v))}
