"""From the lab's tables to effects with intervals over seeds, one for every prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from studies.lab.experiment import DISTANCES, LAMBDAS, TASK_ONLY
from studies.stats import Effect, factorial, mean_over_seeds, over_seeds

Rows = Sequence[Mapping[str, Any]]
ACCOUNTS = {
    "fisher": "Fisher-weighted drift ½ δᵀFδ", "fisher_diagonal": "… with F's diagonal only",
    "kl": "KL on the kept topics", "kl_task": "KL on the task's prompts",
    "l2": "‖δ‖₂", "relative": "‖δ‖₂/‖θ₀‖₂", "spectral": "largest spectral norm of δ",
    "along_style": "‖δ‖₂ in the span of style's gradients", "along_content": "‖δ‖₂ in the span of content's",
    "early": "KL on the kept topics after the first step", "perplexity": "NLL of the data under p₀",
    "style_distance": "style distance of the data", "no_replay": "share of rows without an old fact of the kept topics"}


def column(rows: Rows, name: str, n: int, **where: Any) -> NDArray[np.float64]:
    """One number a seed, [S], from the rows that match ``where``."""
    found = sorted((row["seed"], row[name]) for row in rows if all(row[k] == v for k, v in where.items()))
    if (seeds := [seed for seed, _ in found]) != list(range(n)):
        raise ValueError(f"{name} must be there once for each of {n} seeds where {where}; seeds found: {seeds}")
    return np.array([value for _, value in found])


def at_gain(rows: Rows, metric: str, arm: str, gain: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """An arm's forgetting [S] at the point of its course where it has first gained so much; nan where it never does.

    Between recorded steps its logarithm is taken to be linear in the gain (linear from 0 on, at the start). The task at half rate, which takes the
    same course in smaller steps, shows that chords overrate it: by them it would save something over the task alone, by this it does not
    (figures/lab_gain_drop.csv).
    """
    found = np.full(n, np.nan)
    for seed in range(n):
        course = sorted((r["step"], r["gain"], r[metric]) for r in rows if r["arm"] == arm and r["seed"] == seed)
        for (_, g0, f0), (_, g1, f1) in zip(course, course[1:], strict=False):
            if g0 <= gain[seed] <= g1:
                part = (gain[seed] - g0) / (g1 - g0) if g1 > g0 else 0.0
                found[seed] = f0 ** (1 - part) * f1**part if f0 > 0 else part * f1
                break
    return found


def at_equal_gain(rows: Rows, metric: str, n: int, arm: str, other: str = TASK_ONLY) -> NDArray[np.float64]:
    """What ``other`` forgets more than ``arm`` [S], both at the gain that the poorer of the two ends with."""
    last = max(row["step"] for row in rows)
    gain = np.minimum(column(rows, "gain", n, arm=arm, step=last), column(rows, "gain", n, arm=other, step=last))
    return at_gain(rows, metric, other, gain, n) - at_gain(rows, metric, arm, gain, n)


def effects(tables: Mapping[str, Rows], n: int) -> dict[str, Effect]:
    """The effect that each of the lab's predictions is about, by its id."""
    arms, drawn, forces, push, dose, start = (tables[k] for k in ("arms", "sampled", "forces", "push", "dose", "start"))
    last = max(row["step"] for row in arms)

    def end(metric: str, arm: str, rows: Rows = arms) -> NDArray[np.float64]:
        return column(rows, metric, n, arm=arm, step=last)

    def force(source: str) -> Effect:
        return mean_over_seeds(column(forces, "of_task", n, source=source))

    def difference(metric: str, a: str, b: str, rows: Rows = arms) -> Effect:
        return mean_over_seeds(end(metric, a, rows) - end(metric, b, rows))

    def share(metric: str, rows: Rows = arms) -> Effect:
        cells = [end(metric, arm, rows) for arm in ("own/old", "own/new", "foreign/old", TASK_ONLY)]
        return over_seeds(lambda s: factorial(*(c[s].mean() for c in cells))["share"], n)

    def kept(metric: str) -> Effect:
        alone, full, without = (end(metric, arm) for arm in (TASK_ONLY, "SA-SFT 0.5", "SA-SFT without a topic"))
        return over_seeds(lambda s: (alone[s] - without[s]).mean() / (alone[s] - full[s]).mean(), n)

    def start_difference(name: str) -> Effect:
        return mean_over_seeds(column(start, f"{name}_style", n) - column(start, f"{name}_content", n))

    def removed(kind: str) -> NDArray[np.float64]:
        free, held = (column(dose, f"along_{kind}", n, lam=lam, step=last) for lam in (0.0, 0.5))
        return 1 - held / free

    def removed_at_equal_dose(kind: str) -> NDArray[np.float64]:
        half, held = (column(tables["accounts"], f"along_{kind}", n, arm=arm, step=last) for arm in ("task at half rate", "SA-SFT 0.5"))
        return 1 - held / half

    def missed(foretold: str, step: int) -> Effect:
        """Mean |log(foretold/observed)| over λ; a prediction without bound counts as e^10 times too large."""
        errors = [np.abs(np.log(column(dose, foretold, n, lam=lam, step=step) / column(arms, "kl", n, arm=arm, step=step)))
                  for lam, arm in [(0.0, TASK_ONLY), *((lam, f"SA-SFT {lam}") for lam in LAMBDAS)]]
        return mean_over_seeds(np.minimum(errors, 10).mean(0))

    def lead(outcome: str, *, ends: bool = False) -> Effect:
        race = Race(tables, outcome, n, ends=ends)
        return over_seeds(lambda s: race.correlation("fisher", s) - race.correlation("l2", s), n)

    order = np.array([spearmanr(DISTANCES, [end("kl", f"external {d}")[s] for d in DISTANCES]).statistic for s in range(n)])
    return {
        "C1/lab/exact": force("exact"), "C1/lab/paper": force("paper (0.7, 0.9)"), "C1/lab/paper below task": force("paper (0.7, 0.9)"),
        "C1/lab/mean loss": force("mean over each response"), "C1/lab/deduplicated": force("repeats dropped (100 rows)"),
        "C2/lab/kl": difference("kl", "foreign/old", "own/old"), "C2/lab/content": difference("content", "foreign/old", "own/old"),
        "C2/lab/kl, sampled": difference("kl", "foreign/old", "own/old", drawn),
        "C3/lab/kl": share("kl"), "C3/lab/content": share("content"), "C3/lab/kl, sampled": share("kl", drawn),
        "C4/lab/coherence": start_difference("coherence"), "C4/lab/shared": start_difference("cos_topics"),
        "C5/lab/kl": lead("kl"), "C5/lab/kl, ends": lead("kl", ends=True), "C5/lab/content": lead("content"),
        "C6/lab/slope": mean_over_seeds(np.abs(_smallest(push, n) - 1)),
        "C6/lab/push": mean_over_seeds(column(push, "cos_drift", n, course=TASK_ONLY, step=last)),
        "C6/lab/against the task": mean_over_seeds(column(push, "cos_task", n, course="SA-SFT 0.5", step=last)),
        "C7/lab/selective": mean_over_seeds(removed("style") - removed("content")),
        "C7/lab/selective, equal dose": mean_over_seeds(removed_at_equal_dose("style") - removed_at_equal_dose("content")),
        "C7/lab/dose, early": missed("kl_foretold", 5), "C7/lab/dose, end": missed("kl_foretold", last),
        "C7/lab/dose, end, Gauss-Newton": missed("kl_foretold_gn", last),
        "C8/lab/kl": difference("kl", "external 1.0", "SA-SFT 0.5"), "C8/lab/content": difference("content", "external 1.0", "SA-SFT 0.5"),
        "C8/lab/kl, as varied": difference("kl", "external, as varied", "SA-SFT 0.5"), "C8/lab/order": mean_over_seeds(order),
        "C9/lab/kl": kept("kl_dropped"), "C9/lab/content": kept("content_dropped"),
        "C10/lab/kl": mean_over_seeds(at_equal_gain(arms, "kl", n, "SA-SFT 0.5")), "C10/lab/content": mean_over_seeds(at_equal_gain(arms, "content", n, "SA-SFT 0.5")),
        "C10/lab/kl, sampled": mean_over_seeds(at_equal_gain(drawn, "kl", n, "SA-SFT 0.5")),
        "C11/lab/exact": difference("entropy", "SA-SFT 0.5", "own/old"), "C11/lab/paper": difference("entropy", "SA-SFT paper", "SA-SFT 0.5"),
        "C11/lab/paper, sampled": difference("entropy", "SA-SFT paper", "SA-SFT 0.5", drawn),
    }


def _smallest(push: Rows, n: int) -> NDArray[np.float64]:
    line = [row for row in push if row["course"] == "line"]
    return np.array([min((r for r in line if r["seed"] == s), key=lambda r: r["drift"])["slope"] for s in range(n)])


class Race:
    """Rank correlation (Spearman) of every account of forgetting with what was forgotten, over all arms and steps after the start, or
    over the arms' ``ends`` alone."""

    def __init__(self, tables: Mapping[str, Rows], outcome: str, n: int, *, ends: bool = False) -> None:
        last = max(r["step"] for r in tables["arms"])
        accounts = {(r["arm"], r["seed"], r["step"]): r for r in tables["accounts"]}
        first = min(r["step"] for r in tables["arms"] if r["step"] > 0)
        early = {(r["arm"], r["seed"]): r["kl"] for r in tables["arms"] if r["step"] == first}
        rows = [{**r, **accounts[r["arm"], r["seed"], r["step"]], "early": early[r["arm"], r["seed"]]}
                for r in tables["arms"] if r["step"] >= (last if ends else 1) and r["arm"] != "own/old"]
        by_seed = [[r for r in rows if r["seed"] == seed] for seed in range(n)]
        self.outcome = np.array([[r[outcome] for r in some] for some in by_seed])
        self.accounts = {name: np.array([[r[name] for r in some] for some in by_seed]) for name in ACCOUNTS if name != outcome}

    def correlation(self, account: str, seeds: NDArray[np.intp]) -> float:
        """Over the given seeds together."""
        ranks = [rankdata(x[seeds].ravel()) for x in (self.accounts[account], self.outcome)]
        return float(np.corrcoef(ranks)[0, 1])
