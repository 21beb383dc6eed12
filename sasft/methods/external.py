"""Rows from elsewhere in the place of self rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Method, Workshop
from sasft.methods.checks import check_weights
from sasft.mixing import SELF, TASK
from sasft.settings import option
from sasft.sources import Source

EXTERNAL = "external"


@dataclass(frozen=True, kw_only=True)
class External(Method):
    r"""External data mixing: rows from elsewhere are mixed with the task's just as self rows are.

    Of the rows read, a share :math:`1-\lambda` are the task's, :math:`\lambda\sigma` external and :math:`\lambda(1-\sigma)` self
    rows, σ being ``share``; all have the ordinary loss. At σ = 1 the source of the other rows is all that differs from SA-SFT of
    the same λ. At σ = 0 it is SA-SFT. Source: the baseline of arXiv 2602.20162, with Alpaca or UltraChat; λσ + λ(1 − σ) is our
    way to have both. No cost. Measures on self rows stay those of the self-dialogues.

    Of a mix that ``sasft mix`` has written the shares are settled: with one, the method takes no file and only makes sure that
    the mix has a source besides the task and self rows.
    """

    name: ClassVar[str] = "external"
    paper: ClassVar[str] = "arXiv 2602.20162 (baseline)"

    file: str = option("", "external rows: FILE[:field=column,...] (JSONL or Parquet) or a hub dataset "
                           "ORG/NAME[:config][@revision][#split][:field=column,...]")
    share: float = option(1.0, "share of external rows among those that are not the task's, in [0, 1]; 0 is SA-SFT")

    def __post_init__(self) -> None:
        check_weights(0, 1, share=self.share)
        if self.file:
            Source.parse(self.file)

    def files(self) -> dict[str, str]:
        return {EXTERNAL: self.file} if self.file and self.share else {}

    def shares(self, lam: float) -> dict[str, float]:
        found = {TASK: 1 - lam, SELF: lam * (1 - self.share)}
        return {**found, EXTERNAL: lam * self.share} if lam * self.share else found

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        having = [source for source, rows in sources.items() if rows]
        if self.share and not set(having) - {TASK, SELF}:
            raise UsageError(f"external mixes in rows from elsewhere, but there are rows of {', '.join(having)} alone; name "
                             "their file, as file=web.jsonl, or mix them with `sasft mix`")
        return super().rows(sources, workshop)
