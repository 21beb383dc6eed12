"""What was lost and what was gained between two evaluations of the same items, and gain against drop over methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sasft.errors import UsageError
from sasft.evaluation.summary import Record, read_records

Folder = Path | str
LEVEL = 0.95


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

    ``change`` = after − before, with ``low`` to ``high`` its paired bootstrap interval. ``drop``: the change for the worse, so
    −change, or change itself where lower is better (NLL, KL). For items that are right or wrong (None otherwise), means over
    the seeds:

    - ``lost`` and ``gained``: shares of items that went 1→0 and 0→1; ``change = gained − lost``;
    - ``lost_unfinished``: the part of ``lost`` whose later answer the length cap has cut, so that it need not be forgotten;
    - ``chance_adjusted``: :math:`\max\big(n_{1\to0}/n - (1-a_{before})(1-a_{after})/(k-1),\ 0\big)` for items of k choices: a
      model that guesses where it does not know is right on one in k, and loses such items without having known them (arXiv
      2510.17776 and its code post-forget). Without choices, k is infinite and nothing is taken off;
    - ``p_values``: exact McNemar tests, one a seed (:func:`mcnemar`).
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
    gained: float | None = None
    lost_unfinished: float | None = None
    chance_adjusted: float | None = None
    p_values: tuple[float, ...] | None = None


def forgetting(before: Folder | Sequence[Folder], after: Folder | Sequence[Folder], suite: str, metric: str | None = None, *,
               choices: int | None = None, draws: int = 2000, level: float = LEVEL, seed: int = 0) -> Forgetting:
    """Compare evaluations of the same items, folder by folder; ``metric`` None takes the suite's headline.

    ``after``: one folder, or one for each training seed; ``before``: as many, or one that all are compared with. ``choices``:
    how many each item has, where the records do not say so (those of lm-eval). Raises :class:`UsageError` if the folders do not
    hold the same items with the same prompts.
    """
    later = _listed(after)
    earlier = _listed(before) * (len(later) if len(_listed(before)) == 1 else 1)
    if not later or len(earlier) != len(later):
        raise UsageError(f"before must name one folder, or one for each of after: got {len(earlier)} and {len(later)}")
    return compare([_records(f, suite) for f in earlier], [_records(f, suite) for f in later], suite, metric, choices=choices,
                   draws=draws, level=level, seed=seed)


def compare(before: Sequence[Sequence[Record]], after: Sequence[Sequence[Record]], suite: str, metric: str | None = None, *,
            choices: int | None = None, draws: int = 2000, level: float = LEVEL, seed: int = 0) -> Forgetting:
    """:func:`forgetting` on records in hand: ``before[s]`` and ``after[s]`` are the items of seed s."""
    aligned = [_aligned(b, a, before[0], suite) for b, a in zip(before, after, strict=True)]
    metric = metric or next(iter(before[0][0]["scores"]))
    old, new = (np.array([[_score(r, metric, suite) for r in pair[side]] for pair in aligned], dtype=float) for side in (0, 1))
    value, low, high = paired_interval(old, new, draws=draws, level=level, seed=seed)
    binary = bool(np.isin(old[..., 0], (0, 1)).all() and np.isin(new[..., 0], (0, 1)).all() and (old[..., 1] == 1).all())
    flips = _flips(aligned, old[..., 0] == 1, new[..., 0] == 1, suite, choices) if binary else {}
    return Forgetting(suite=suite, metric=metric, n=old.shape[1], seeds=len(old), before=_ratio(old), after=_ratio(new),
                      change=value, low=low, high=high, level=level, drop=value if lower_is_better(metric) else -value, **flips)


def _flips(aligned: Sequence[tuple[Sequence[Record], Sequence[Record]]], old: NDArray[np.bool_], new: NDArray[np.bool_],
           suite: str, choices: int | None) -> dict[str, Any]:
    numbers = {choices or r.get("choices") for _, later in aligned for r in later}
    if len(numbers) > 1:
        raise UsageError(f"items of {suite} differ in their numbers of choices ({sorted(map(str, numbers))}), so that forgetting "
                         "has no one chance level; compare the parts of one number each")
    k = numbers.pop()
    unfinished = np.array([[r.get("finished") is False for r in later] for _, later in aligned])
    lost, gained = old & ~new, ~old & new
    adjusted = [chance_adjusted(was, now, k) for was, now in zip(old, new, strict=True)]
    return {"choices": k, "lost": float(lost.mean()), "gained": float(gained.mean()),
            "lost_unfinished": float((lost & unfinished).mean()), "chance_adjusted": float(np.mean(adjusted)),
            "p_values": tuple(mcnemar(int(x.sum()), int(y.sum())) for x, y in zip(lost, gained, strict=True))}


def chance_adjusted(before: NDArray[np.bool_], after: NDArray[np.bool_], k: int | None) -> float:
    """Forgetting beyond what guessing alone would show (see :class:`Forgetting`), of items right or wrong before and after.

    >>> before, after = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 0, 0, 1, 0, 0], bool)
    >>> round(chance_adjusted(before, after, 4), 4), round(chance_adjusted(before, after, None), 4)  # 2/6 − (3/6)(4/6)/3, 2/6
    (0.2222, 0.3333)
    """
    by_chance = 0.0 if k is None else float((1 - before.mean()) * (1 - after.mean())) / (k - 1)
    return max(float((before & ~after).mean()) - by_chance, 0.0)


def mcnemar(lost: int, gained: int) -> float:
    r"""Two-sided exact p-value that a changed item is as likely lost as gained: :math:`\min(1, 2 P(X \le \min))`, X ~ Bin(lost
    + gained, ½).

    >>> mcnemar(5, 0), mcnemar(3, 3)
    (0.0625, 1.0)
    """
    n = lost + gained
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n)


def paired_interval(old: NDArray[np.float64], new: NDArray[np.float64], *, draws: int, level: float,
                    seed: int) -> tuple[float, float, float]:
    r"""The change of a score with its percentile interval.

    ``old``, ``new`` [S, I, 2]: (total, weight) of every seed and item; the score is the ratio of the sums. Each draw takes
    seeds and items with replacement, the same on both sides, so what they share cancels; with one seed, items alone. Few seeds
    give an interval that is rather too narrow.
    """
    rng = np.random.default_rng(seed)
    n_seeds, n_items = old.shape[:2]
    both = np.concatenate([old, new], axis=-1)  # [S, I, 4]
    found = np.empty(draws)
    for d in range(draws):
        seeds = np.bincount(rng.integers(n_seeds, size=n_seeds), minlength=n_seeds).astype(float)
        items = np.bincount(rng.integers(n_items, size=n_items), minlength=n_items).astype(float)
        sums = np.einsum("s,sik,i->k", seeds, both, items, optimize=True)
        found[d] = sums[2] / sums[3] - sums[0] / sums[1]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return _ratio(new) - _ratio(old), float(low), float(high)


def gain_drop(base: Folder, methods: Mapping[str, Sequence[Folder]], task: str | tuple[str, str],
              general: Sequence[str | tuple[str, str]], **options: Any) -> list[dict[str, Any]]:
    """What each method gained on the task and dropped elsewhere, as a tidy table: one row a method and suite.

    ``methods``: {name: folders, one a seed}; ``task`` and ``general``: suites, or (suite, metric). A row has ``method``,
    ``kind`` ("gain" or "drop"), ``value`` (positive is a gain of the task, a loss of the rest), its interval ``value_low``,
    ``value_high``, and the fields of :class:`Forgetting`. :func:`curve` makes one point a method of them. Never read a drop
    without its gain.
    """
    rows = []
    for method, folders in methods.items():
        for kind, wanted in (("gain", task), *(("drop", g) for g in general)):
            suite, metric = (wanted, None) if isinstance(wanted, str) else wanted
            found = forgetting(base, folders, suite, metric, **options)
            turned = lower_is_better(found.metric) == (kind == "gain")  # what the value is called is minus the change
            value, low, high = (-found.change, -found.high, -found.low) if turned else (found.change, found.low, found.high)
            rows.append({"method": method, "kind": kind, "value": value, "value_low": low, "value_high": high, **asdict(found)})
    return rows


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a method for a gain-drop figure: its gain with the interval, and the mean drop over the general suites.

    The mean is of suites in their own units; give suites of one unit. No interval is given for it, since suites share the seeds.
    """
    return [{"method": method, "gain": gain["value"], "gain_low": gain["value_low"], "gain_high": gain["value_high"],
             "drop": float(np.mean(drops)), "suites": len(drops)}
            for method in dict.fromkeys(r["method"] for r in rows)
            for gain in [next(r for r in rows if r["method"] == method and r["kind"] == "gain")]
            if (drops := [r["value"] for r in rows if r["method"] == method and r["kind"] == "drop"])]


def _listed(folders: Folder | Sequence[Folder]) -> list[Folder]:
    return [folders] if isinstance(folders, (str, Path)) else list(folders)


def _records(folder: Folder, suite: str) -> list[dict[str, Any]]:
    found = read_records(folder, suite)
    if not found:
        raise UsageError(f"{folder} holds no results of the suite {suite!r}; evaluate the model on it first")
    return found


def _aligned(before: Sequence[Record], after: Sequence[Record], first: Sequence[Record],
             suite: str) -> tuple[list[Record], list[Record]]:
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


def _ratio(scores: NDArray[np.float64]) -> float:
    return float(scores[..., 0].sum() / scores[..., 1].sum())
