"""How every figure of the studies is drawn and kept: PNG + SVG, the table it is drawn from, its verdicts."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sasft.files import write_json
from studies.stats import Effect, config_hash

# Distinct in colour and, printed in grey, in lightness.
DARK, MIDDLE, LIGHT = "#1b3a5c", "#c8553d", "#9bb8a3"
MARKERS = "osD^vPX*hp<>"


def new_figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """An empty figure (inches) in the studies' common look; no window is opened."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "svg.hashsalt": "sasft", "figure.constrained_layout.use": True})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def save(figure: Figure, folder: Path, name: str, rows: Sequence[Mapping[str, Any]],
         verdicts: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> list[Path]:
    """Write ``name``.png, .svg, .csv (the table drawn) and .json (verdicts and provenance); returns their paths.

    ``verdicts``: records of :func:`studies.stats.verdict`, which ``studies ledger`` reads, and notes, whose claim is "none".
    ``provenance``: what the result came from, the same whenever it is made again; only "versions" stays out of its hash.
    """
    for row in verdicts:
        if row["claim"] != "none" and "prediction" not in row:
            raise ValueError(f"a row about claim {row['claim']} must be made by studies.stats.verdict from a registered prediction, "
                             f"got {dict(row)}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ext}" for ext in ("png", "svg", "csv", "json")]
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"Date": None})
    with paths[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_json(paths[3], {"config_sha256": config_hash(provenance), "verdicts": list(verdicts), "provenance": dict(provenance)})
    return paths


def error_bars(effects: Sequence[Effect]) -> np.ndarray:
    """[2, n] distances below and above each value, as matplotlib wants them."""
    return np.array([[max(e.value - e.low, 0) for e in effects], [max(e.high - e.value, 0) for e in effects]])


def effect_row(effect: Effect, **where: Any) -> dict[str, Any]:
    """An effect as a row of a figure's table, after what says which one it is."""
    return {**where, "value": effect.value, "low": effect.low, "high": effect.high}
