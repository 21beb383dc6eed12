"""A suite as it is asked for by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sasft.chat import Chat
from sasft.errors import UsageError
from sasft.sources import FIELDS

_BETWEEN = re.compile(rf",(?!\s*(?:{'|'.join(FIELDS)})=)")

Example = tuple[str, str]
"""A worked example: the question as it is put to the model, and the answer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """``name[:part][@shots]``, the folder of data, and the model's chat template."""

    spec: str
    part: str
    shots: int
    folder: Path | None
    chat: Chat

    def no_shots(self) -> None:
        """Refuse shots where a suite has none."""
        if self.shots:
            raise UsageError(f"suite {self.spec!r} has no worked examples to show; leave @{self.shots} out")

    def no_part(self) -> None:
        """Refuse a part where a suite has none."""
        if self.part:
            raise UsageError(f"suite {self.spec!r} has no parts; leave :{self.part} out")

    def one_of(self, parts: Sequence[str]) -> str:
        """The part, which must be one of these."""
        if self.part not in parts:
            name = self.spec.partition(":")[0].partition("@")[0]
            raise UsageError(f"suite {self.spec!r} needs one of its parts: {', '.join(f'{name}:{p}' for p in parts)}")
        return self.part

    def examples(self, pool: Sequence[Example], question: str) -> list[Example]:
        """The first ``shots`` of the worked examples that do not ask the item's own question (case and blanks aside)."""
        own = _same(question)
        others = (example for example in pool if _same(example[0]) != own)
        shown = list(islice(others, self.shots))
        if len(shown) < self.shots:
            raise UsageError(f"suite {self.spec!r} asks for {self.shots} shots, but there are {len(shown)} examples to show "
                             f"beside the question {question[:60]!r}")
        return shown


def taken_apart(text: str) -> list[str]:
    """Names separated by commas; the columns that follow a file's name stay with it.

    >>> taken_apart("gsm8k@5, answers:test.parquet:prompt=q,response=a,text")
    ['gsm8k@5', 'answers:test.parquet:prompt=q,response=a', 'text']
    """
    return [name.strip() for name in _BETWEEN.split(text) if name.strip()]


def _same(question: str) -> str:
    return " ".join(question.casefold().split())
