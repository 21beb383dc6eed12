"""What was lost and what was gained between two evaluations of the same items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sasft.errors import UsageError
from sasft.evaluation.intervals import LEVEL, Array, Estimate, chance_adjusted, is_share, mcnemar, ratio_parts, share_interval
from sasft.evaluation.summary import Record, cluster_of, read_records

Folder = Path | str


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss: NLL, KL and perplexities are, anything else is taken for a score.

    >>> lower_is_better("nll/model"), lower_is_better("acc")
    (True, False)
    """
    return metric.startswith(("nll", "kl/", "word_perplexity", "byte_perplexity", "bits_per_byte"))


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    r"""How one score changed over ``n`` items, from ``before`` to ``after``, over the pairs of evaluations (seeds) that were
    given.

    ``change`` = after − before; ``low`` to ``high`` is its paired interval (:meth:`Estimate.interval`: under other items, and
    other seeds if there are several; items of one passage or question go together; for items that are right or wrong
    :meth:`Estimate.of_flips`). ``drop``: the change for the worse, so −change, or change itself where lower is better (NLL, KL).
    For items that are right or wrong (None otherwise), means over the seeds, and their intervals
    (:func:`sasft.evaluation.intervals.share_interval`):

    - ``lost`` and ``gained``: shares of items that went 1→0 and 0→1; ``change = gained − lost``;
    - ``lost_unfinished``: the part of ``lost`` whose later answer the length cap has cut, so that it need not be forgotten;
    - ``lost_adjusted`` and ``gained_adjusted``: what of these is beyond guessing, for items of ``choices``
      (:func:`sasft.evaluation.intervals.chance_adjusted`);
    - ``p_values``: exact McNemar tests, one a seed.
    """

    suite: str
    metric: str
    n: int
    seeds: int
    before: float
    after: float
    change: float
    low: float
    high: float
    level: float
    drop: float
    choices: int | None = None
    lost: float | None = None
    lost_interval: tuple[float, float] | None = None
    gained: float | None = None
    gained_interval: tuple[float, float] | None = None
    lost_unfinished: float | None = None
    lost_adjusted: float | None = None
    lost_adjusted_interval: tuple[float, float] | None = None
    gained_adjusted: float | None = None
    p_values: tuple[float, ...] | None = None


def forgetting(before: Folder | Sequence[Folder], after: Folder | Sequence[Folder], suite: str, metric: str | None = None, *,
               choices: int | None = None, level: float = LEVEL) -> Forgetting:
    """Compare evaluations of the same items, folder by folder; ``metric`` None takes the suite's headline.

    ``after``: one folder, or one for each training seed; ``before``: as many, or one that all are compared with. ``choices``:
    how many each item has, where the records do not say so (those of lm-eval). Raises :class:`UsageError` if the folders do not
    hold the same items with the same prompts.
    """
    return compared(*paired(before, after, suite), suite, metric, choices=choices, level=level)[0]


Records = Sequence[Record]


def paired(before: Folder | Sequence[Folder], after: Folder | Sequence[Folder],
           suite: str) -> tuple[list[Records], list[Records]]:
    """The records of every seed before and after, one ``before`` repeated for all."""
    later = _listed(after)
    earlier = _listed(before) * (len(later) if len(_listed(before)) == 1 else 1)
    if not later or len(earlier) != len(later):
        raise UsageError(f"before must name one folder, or one for each of after: got {len(earlier)} and {len(later)}")
    read = {folder: _records(folder, suite) for folder in dict.fromkeys([*earlier, *later])}
    return [read[f] for f in earlier], [read[f] for f in later]


def compared(before: Sequence[Records], after: Sequence[Records], suite: str, metric: str | None = None, *,
             choices: int | None = None, level: float = LEVEL) -> tuple[Forgetting, Estimate]:
    """:func:`forgetting` on records in hand (``before[s]`` and ``after[s]`` are the items of seed s), and the change with the
    parts of its error."""
    pairs = [_aligned(b, a, before[0], suite) for b, a in zip(before, after, strict=True)]
    metric = metric or next(iter(before[0][0]["scores"]))
    old, new = (np.array([[_score(r, metric, suite) for r in pair[side]] for pair in pairs], dtype=float) for side in (0, 1))
    (was, parts_old), (now, parts_new) = (ratio_parts(scores[..., 0], scores[..., 1]) for scores in (old, new))
    clusters = [f"{suite}/{cluster_of(r)}" for r in before[0]]
    binary = all(is_share(scores[..., 0], scores[..., 1]) for scores in (old, new))
    change = (Estimate.of_flips(new[..., 0] - old[..., 0], clusters) if binary
              else Estimate.of(now - was, parts_new - parts_old, clusters))
    low, high = change.interval(level)
    flips = _flips(pairs, old[..., 0], new[..., 0], clusters, suite, choices, level) if binary else {}
    return Forgetting(suite=suite, metric=metric, n=old.shape[1], seeds=len(old), before=was, after=now, change=now - was,
                      low=low, high=high, level=level, drop=now - was if lower_is_better(metric) else was - now,
                      **flips), change


def _flips(pairs: Sequence[tuple[Records, Records]], old: Array, new: Array, clusters: Sequence[str], suite: str,
           choices: int | None, level: float) -> dict[str, Any]:
    """What there is to say of items that are right (1) or wrong (0), [S, I] before and after."""
    numbers = {choices or r.get("choices") for _, later in pairs for r in later}
    if len(numbers) > 1:
        raise UsageError(f"items of {suite} differ in their numbers of choices ({sorted(map(str, numbers))}), so that forgetting "
                         "has no one chance level; compare the parts of one number each")
    k = numbers.pop()
    cut = np.array([[r.get("finished") is False for r in later] for _, later in pairs])
    lost, gained = old * (1 - new), new * (1 - old)
    a, b = old.mean(1, keepdims=True), new.mean(1, keepdims=True)  # the accuracies of every seed
    found = {name: share_interval(share, clusters, level) for name, share in (("lost", lost), ("gained", gained))}
    guessed = ((1 - b) * (old - a) + (1 - a) * (new - b)) / (k - 1) if k else 0.0  # derivative of −(1 − a)(1 − b)/(k − 1)
    adjusted = {name: float(np.mean([chance_adjusted(f, x, y, k)
                                     for f, x, y in zip(share.mean(1), a[:, 0], b[:, 0], strict=True)]))
                for name, share in (("lost", lost), ("gained", gained))}
    parts = (lost - lost.mean() + guessed) / lost.size
    beyond = Estimate.of(adjusted["lost"], parts, clusters)
    taken_off = float(lost.mean()) - adjusted["lost"]
    bounds = beyond.interval(level) if k and not beyond.vanishes else [bound - taken_off for bound in found["lost"]]
    return {"choices": k, "lost": float(lost.mean()), "lost_interval": found["lost"], "gained": float(gained.mean()),
            "gained_interval": found["gained"], "lost_unfinished": float((lost * cut).mean()),
            "lost_adjusted": adjusted["lost"], "lost_adjusted_interval": (max(bounds[0], 0.0), max(bounds[1], 0.0)),
            "gained_adjusted": adjusted["gained"],
            "p_values": tuple(mcnemar(int(x.sum()), int(y.sum())) for x, y in zip(lost, gained, strict=True))}


def _listed(folders: Folder | Sequence[Folder]) -> list[Folder]:
    return [folders] if isinstance(folders, (str, Path)) else list(folders)


def _records(folder: Folder, suite: str) -> list[dict[str, Any]]:
    found = read_records(folder, suite)
    if not found:
        raise UsageError(f"{folder} holds no results of the suite {suite!r}; evaluate the model on it first")
    return found


def _aligned(before: Records, after: Records, first: Records, suite: str) -> tuple[list[Record], list[Record]]:
    """Both sides in the order of the first evaluation's items."""
    order = {r["id"]: r["prompt_sha256"] for r in first}
    sides = []
    for name, records in (("before", before), ("after", after)):
        there = {r["id"]: r for r in records}
        if there.keys() != order.keys():
            only = sorted(there.keys() ^ order.keys())
            raise UsageError(f"evaluations of {suite} are on different items: {len(only)} are not in both, such as {only[0]!r} "
                             f"({name}); evaluate both with the same limit")
        if other := [i for i, sha in order.items() if there[i]["prompt_sha256"] != sha]:
            raise UsageError(f"evaluations of {suite} are on different prompts ({len(other)} items, such as {other[0]!r}): "
                             "another chat template, tokenizer or set")
        sides.append([there[i] for i in order])
    return sides[0], sides[1]


def _score(record: Record, metric: str, suite: str) -> tuple[float, float]:
    if metric not in record["scores"]:
        raise UsageError(f"items of {suite} have no score {metric!r}; they have {', '.join(record['scores'])}")
    return tuple(record["scores"][metric])
