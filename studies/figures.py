"""How every figure of the studies is drawn and kept: PNG + SVG, the table it is drawn from, its verdicts."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from studies.stats import Effect

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
    """Write ``name``.png, .svg, .csv (the table drawn) and .json (verdicts and provenance); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ext}" for ext in ("png", "svg", "csv", "json")]
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"Date": None})
    with paths[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    paths[3].write_text(json.dumps({"verdicts": list(verdicts), "provenance": dict(provenance)}, indent=1) + "\n",
                        encoding="utf-8")
    return paths


def error_bars(effects: Sequence[Effect]) -> np.ndarray:
    """[2, n] distances below and above each value, as matplotlib wants them."""
    return np.array([[max(e.value - e.low, 0) for e in effects], [max(e.high - e.value, 0) for e in effects]])
