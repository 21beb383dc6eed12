"""Instruments that show what fine-tuning does inside a model, for any training loop.

Attach :func:`record` to a loop, or :class:`DriftCallback` to a Trainer, and give it probes; or call the pure functions on
tensors. Imports torch, numpy, safetensors and pyarrow only; transformers is needed by :class:`DriftCallback` alone.
"""

from typing import Any

from drift import adapters, fisher, lowrank, names, schedules
from drift.alignment import AlignmentProbe, GradientGram, gradient_gram
from drift.divergence import DivergenceProbe, RowDivergences, TokenDivergences, token_divergences
from drift.recorder import Probe, Recorder, record
from drift.reference import Reference
from drift.sources import SourceAlignment, SourceGradients
from drift.style import STYLE_FEATURES, StyleComparison, StyleProbe, compare_styles, style_distance, style_features, style_matrix
from drift.table import Row, read_table
from drift.weights import ParameterDrift, parameter_drift

__all__ = [
    "STYLE_FEATURES", "AlignmentProbe", "DivergenceProbe", "DriftCallback", "GradientGram", "ParameterDrift", "Probe",
    "Recorder", "Reference", "Row", "RowDivergences", "SourceAlignment", "SourceGradients", "StyleComparison", "StyleProbe",
    "TokenDivergences", "adapters", "compare_styles", "gradient_gram", "lowrank", "parameter_drift", "read_table", "record",
    "schedules", "style_distance", "style_features", "style_matrix", "token_divergences",
]


def __getattr__(name: str) -> Any:
    if name == "DriftCallback":  # its base class lives in transformers, which is slow to import
        from drift.callback import DriftCallback

        return DriftCallback
    raise AttributeError(f"module 'drift' has no attribute {name!r}")
