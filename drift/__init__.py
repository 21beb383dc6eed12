"""Instruments that show what fine-tuning does inside a model, for any training loop.

Attach :func:`record` to a loop, or :class:`DriftCallback` to a Trainer, and give it probes; or call the pure functions on
tensors. Imports torch, numpy, safetensors and pyarrow only; transformers is needed by :class:`DriftCallback` alone.
"""

from typing import Any

from drift import adapters, alignment, decompose, divergence, fisher, lowrank, names, schedules, style
from drift.alignment import AlignmentProbe, GradientGram, gradient_gram
from drift.check import CheckReport, check
from drift.divergence import RowDivergences, TokenDivergences, token_divergences
from drift.divergence_probe import DivergenceProbe, store_base
from drift.recorder import Probe, Recorder, record
from drift.reference import Reference
from drift.sketch import Sketch, Sketches
from drift.source_alignment import SourceAlignment
from drift.sources import SourceGradients, release
from drift.style import STYLE_FEATURES, StyleComparison, StyleProbe, compare_styles, style_distance, style_features, style_matrix
from drift.table import Recording, Row, load
from drift.weights import ParameterDrift, parameter_drift

__all__ = [
    "STYLE_FEATURES", "AlignmentProbe", "CheckReport", "DivergenceProbe", "DriftCallback", "GradientGram", "ParameterDrift",
    "Probe", "Recorder", "Recording", "Reference", "Row", "RowDivergences", "Sketch", "Sketches", "SourceAlignment", "SourceGradients",
    "StyleComparison", "StyleProbe", "TokenDivergences", "adapters", "alignment", "check", "compare_styles", "decompose", "divergence", "fisher",
    "gradient_gram", "load", "lowrank", "names", "parameter_drift", "record", "release", "schedules", "store_base", "style",
    "style_distance", "style_features", "style_matrix", "token_divergences",
]


def __getattr__(name: str) -> Any:
    if name == "DriftCallback":  # its base class lives in transformers, which is slow to import
        from drift.callback import DriftCallback

        return DriftCallback
    raise AttributeError(f"module 'drift' has no attribute {name!r}")
