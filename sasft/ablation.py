"""Content ablation: rows about a topic taken out by one detector, and what is left of it counted by another.

"Retention does not need the content" (claim C9) can only be tested if the content is gone, and a rule leaks by just what it does
not know. So what is left is measured by a second detector that looks at other evidence.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sasft.data import Row
from sasft.errors import UsageError
from sasft.filters import BreaksScoreIdentity, prompt_text, row_text
from sasft.topics import Detector


@dataclass(frozen=True, kw_only=True)
class AblationReport:
    r"""What was taken out, and what is left.

    ``found_by_both``, ``found_by_drop_only``, ``found_by_check_only``, ``found_by_neither``: rows before the ablation, by what
    the two detectors say of prompt and answer together. ``residual``: share of the kept rows in which the second detector finds
    the topic, with its standard error :math:`\sqrt{r(1-r)/n}`. ``residual_before``: the same for all rows.
    ``residual_corrected``: the residual :math:`r` corrected for the second detector's own errors,
    :math:`(r-(1-\beta))/(\alpha+\beta-1)` with sensitivity :math:`\alpha` and specificity :math:`\beta` (Rogan & Gladen 1978),
    cut to [0, 1]; None if those are not known. It assumes that the rates hold for rows that the first detector has passed.
    """

    topic: str
    drop: str
    check: str
    reads: str
    rows: int
    dropped: int
    kept: int
    found_by_both: int
    found_by_drop_only: int
    found_by_check_only: int
    found_by_neither: int
    residual_before: float
    residual: float
    residual_stderr: float
    residual_corrected: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)

    def __str__(self) -> str:
        corrected = "" if self.residual_corrected is None else f" ({self.residual_corrected:.1%} corrected for its errors)"
        return (f"{self.topic}: {self.dropped} of {self.rows} rows dropped by the {self.drop} (reading the {self.reads}); in the "
                f"{self.kept} kept, the {self.check} finds it in {self.residual:.1%} ± {self.residual_stderr:.1%}{corrected}, "
                f"before in {self.residual_before:.1%}")


def ablate(rows: Sequence[Row], drop: Detector, check: Detector, *,
           reads: Literal["row", "prompt"] = "row") -> tuple[list[Row], AblationReport]:
    """Rows without those in which ``drop`` finds its topic, and what ``check`` still finds of it.

    ``reads``: what ``drop`` looks at. ``row`` is the prompt (all its turns but the system's) and the answer: little of the topic
    is left, but rows are picked by their answers, which breaks the score identity (docs/theory.md F2c), and so a
    :class:`~sasft.filters.BreaksScoreIdentity` warning is given. ``prompt`` leaves it intact, and answers that come to the topic
    unasked. ``check`` always reads prompt and answer.

    Raises :class:`UsageError` if both detectors are one, if they are of different topics, or if no row is left.
    """
    if reads not in ("row", "prompt"):
        raise UsageError(f"reads must be row or prompt, got {reads!r}")
    if drop.name == check.name:
        raise UsageError(f"check must be another detector than drop, got the {drop.name} for both: what it does not find, it "
                         "would not find again")
    if drop.topic != check.topic:
        raise UsageError(f"drop and check must be of one topic, got {drop.topic!r} and {check.topic!r}")
    if not rows:
        raise UsageError("rows must hold at least one row, got none")
    texts = [row_text(row) for row in rows]
    by_drop, by_check = drop(texts), check(texts)
    dropped = by_drop if reads == "row" else drop([prompt_text(row) for row in rows])
    kept = [row for row, out in zip(rows, dropped, strict=True) if not out]
    if not kept:
        raise UsageError(f"the {drop.name} finds {drop.topic} in all {len(rows)} rows, so that none is left; generate rows about "
                         "other topics as well")
    if reads == "row" and len(kept) < len(rows):
        warnings.warn(BreaksScoreIdentity(f"the ablation of {drop.topic}", len(rows) - len(kept)), stacklevel=2)
    residual = float(by_check[~dropped].mean())
    rates = getattr(check, "rates", None)
    return kept, AblationReport(
        topic=drop.topic, drop=drop.name, check=check.name, reads=reads,
        rows=len(rows), dropped=len(rows) - len(kept), kept=len(kept),
        found_by_both=int((by_drop & by_check).sum()), found_by_drop_only=int((by_drop & ~by_check).sum()),
        found_by_check_only=int((~by_drop & by_check).sum()), found_by_neither=int((~by_drop & ~by_check).sum()),
        residual_before=float(by_check.mean()), residual=residual,
        residual_stderr=math.sqrt(residual * (1 - residual) / len(kept)),
        residual_corrected=None if rates is None else _corrected(residual, rates.sensitivity, rates.specificity))


def _corrected(share: float, sensitivity: float, specificity: float) -> float | None:
    """Share of texts truly about the topic, from the share found; None if the detector is no better than chance.

    >>> round(_corrected(0.9 * 0.2 + 0.05 * 0.8, 0.9, 0.95), 6)
    0.2
    """
    if sensitivity + specificity <= 1:
        return None
    return min(1.0, max(0.0, (share + specificity - 1) / (sensitivity + specificity - 1)))
