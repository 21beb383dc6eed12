"""A suite as it is asked for by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasft.chat import Chat
from sasft.errors import UsageError


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

    def examples(self, pool: Sequence[Any]) -> Sequence[Any]:
        """The first ``shots`` of the examples there are."""
        if len(pool) < self.shots:
            raise UsageError(f"suite {self.spec!r} asks for {self.shots} shots, but there are {len(pool)} examples to show")
        return pool[: self.shots]
