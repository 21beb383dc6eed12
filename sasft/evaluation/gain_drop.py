"""What methods gain on a task against what they drop elsewhere: as a table, as points, as a figure, and at one gain."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sasft.evaluation.forgetting import Folder, compared, lower_is_better, paired
from sasft.evaluation.intervals import LEVEL, Estimate, average

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Named = str | tuple[str, str]
"""A suite with its headline metric, or (suite, metric)."""
_COLOURS = ("#1b3a5c", "#c8553d", "#6f8f79", "#8a6fb0", "#b08a3c", "#4f9fb5")
_MARKERS = "osD^vPX*"


def gain_drop(base: Folder, methods: Mapping[str, Sequence[Folder] | Mapping[Any, Sequence[Folder]]], task: Named,
              general: Sequence[Named], *, choices: int | None = None, level: float = LEVEL) -> list[dict[str, Any]]:
    """What each method gained on the task and dropped elsewhere, as a tidy table.

    ``methods``: {name: folders, one a seed}, or {name: {setting: folders}} where a method was run under several settings
    (learning rates, mixing ratios, steps), in the order in which its curve runs through them. ``task`` and ``general``: suites,
    or (suite, metric).

    A row has ``method``, ``setting`` (None without), ``kind``, ``value`` with its interval ``value_low``, ``value_high``, and for
    ``kind`` "gain" (the task) and "drop" (each general suite) the fields of :class:`Forgetting`. A positive value is a gain of
    the task, a loss of the rest. ``kind`` "mean drop" is the plain mean of a setting's drops, in the suites' own units: give
    suites of one unit. Its interval reckons with the seeds that suites share. Never read a drop without its gain.
    """
    rows = []
    for method, runs in methods.items():
        for setting, folders in (runs.items() if isinstance(runs, Mapping) else [(None, runs)]):
            drops = []
            for kind, named in (("gain", task), *(("drop", suite) for suite in general)):
                suite, metric = (named, None) if isinstance(named, str) else named
                found, change = compared(*paired(base, folders, suite), suite, metric, choices=choices, level=level)
                value = _turned(change, lower_is_better(found.metric) == (kind == "gain"))
                drops += [value] if kind == "drop" else []
                rows.append({"method": method, "setting": setting, "kind": kind, **_interval(value, level), **asdict(found)})
            if drops:
                rows.append({"method": method, "setting": setting, "kind": "mean drop", **_interval(average(drops), level)})
    return rows


def _turned(change: Estimate, minus: bool) -> Estimate:
    """The change, or minus the change."""
    sign = -1.0 if minus else 1.0
    return replace(change, value=sign * change.value, by_seed=sign * change.by_seed,
                   by_cluster={name: sign * r for name, r in change.by_cluster.items()}, shift=sign * change.shift)


def _interval(estimate: Estimate, level: float) -> dict[str, float]:
    low, high = estimate.interval(level)
    return {"value": estimate.value, "value_low": low, "value_high": high}


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of a gain-drop curve out of the table: one a method and setting, with the gain, the mean drop over the general
    suites, and both intervals."""
    points: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in rows:
        name = {"gain": "gain", "mean drop": "drop"}.get(row["kind"])
        if name:
            point = points.setdefault((row["method"], row["setting"]), {"method": row["method"], "setting": row["setting"]})
            point |= {name: row["value"], f"{name}_low": row["value_low"], f"{name}_high": row["value_high"]}
    return list(points.values())


def drop_at(points: Sequence[Mapping[str, Any]], gain: float) -> dict[str, float | None]:
    """Every method's drop where its curve reaches this gain: {method: drop, or None where it never does}.

    A curve runs in straight lines from the base, which gains and drops nothing, through the method's points in their order; of
    several crossings the first counts (the least training that gets there). Interpolation is a choice of ours.

    >>> points = [{"method": "a", "gain": 0.2, "drop": 0.1}, {"method": "a", "gain": 0.4, "drop": 0.5}]
    >>> round(drop_at(points, 0.3)["a"], 9), drop_at(points, 0.5)
    (0.3, {'a': None})
    """
    found: dict[str, float | None] = {}
    for method in dict.fromkeys(point["method"] for point in points):
        path = [(0.0, 0.0), *((p["gain"], p["drop"]) for p in points if p["method"] == method)]
        crossed = (drop0 + (drop1 - drop0) * ((gain - gain0) / (gain1 - gain0) if gain1 != gain0 else 1.0)
                   for (gain0, drop0), (gain1, drop1) in zip(path, path[1:], strict=False)
                   if min(gain0, gain1) <= gain <= max(gain0, gain1))
        found[method] = next(crossed, None)
    return found


def figure(points: Sequence[Mapping[str, Any]], *, gain: str = "gain on the task",
           drop: str = "mean drop on the general suites") -> "Figure":
    """The curve drawn: drop to the right, gain upwards, so that up and left is better; bars are the points' intervals, a line
    leads from the base at (0, 0) through a method's settings. ``gain`` and ``drop`` label the axes."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = drawn.subplots()
    axis.axhline(0, color="grey", linewidth=0.6), axis.axvline(0, color="grey", linewidth=0.6)
    for m, method in enumerate(dict.fromkeys(point["method"] for point in points)):
        own = [point for point in points if point["method"] == method]
        x, y = ([point[name] for point in own] for name in ("drop", "gain"))
        bars = [np.abs([[p[name] - p[f"{name}_low"] for p in own], [p[f"{name}_high"] - p[name] for p in own]])
                for name in ("drop", "gain")]
        colour = _COLOURS[m % len(_COLOURS)]
        axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt=_MARKERS[m % len(_MARKERS)], color=colour, markeredgecolor="black",
                      ecolor="grey", elinewidth=0.8, label=method)
        axis.plot([0, *x], [0, *y], color=colour, linewidth=0.9)
        for point in own:
            if point["setting"] is not None:
                axis.annotate(str(point["setting"]), (point["drop"], point["gain"]), textcoords="offset points", xytext=(5, 4),
                              fontsize=7)
    axis.set_xlabel(f"{drop} (further left forgets less)")
    axis.set_ylabel(f"{gain} (higher learns more)")
    axis.legend(frameon=False, fontsize=8)
    return drawn
