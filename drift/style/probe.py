"""Style of what a model writes while it trains, as a probe of :func:`drift.record`."""

import math
from collections.abc import Callable, Sequence

from torch import nn

from drift.modes import measuring
from drift.reference import Reference
from drift.style.distances import Features, check_sizes, feature_pair, mean_distance
from drift.style.surface import style_matrix
from drift.table import Row


class StyleProbe:
    """Style of what the model now writes, against reference texts (usually what the base wrote to the same prompts).

    ``write(model)`` returns at least 3 texts; make it draw with fixed seeds, so that only the model changes between
    recordings. With ``reference_texts=None`` the base's own texts, written by ``write`` with θ₀ in the model, are the
    reference. ``paired=True``: text i of both answers prompt i, which shows smaller changes (:func:`style_distance`).
    ``features`` gives [n, F] numbers for n texts, and may carry their ``names``. Table rows: ``style/<feature>`` (mean over
    texts, standard error of that mean) and ``style/distance``.

    >>> probe = StyleProbe("loud", lambda model: ["A b!", "C d!", "E f!"], ["A b.", "C d.", "E f."])
    >>> {row.metric: row.value for row in probe.rows(nn.Linear(1, 1), step=0)}["style/exclamation_marks"]  # for every 100 words
    50.0
    """

    def __init__(self, name: str, write: Callable[[nn.Module], list[str]], reference_texts: Sequence[str] | None = None, *,
                 paired: bool = False, features: Features = style_matrix,
                 every: Callable[[int], bool] | int | None = None) -> None:
        self.name, self.write, self.paired, self.features, self.every = name, write, paired, features, every
        self.reference_texts = None if reference_texts is None else list(reference_texts)

    def prepare(self, model: nn.Module, reference: Reference) -> None:
        """Write the reference texts with θ₀, if none were given."""
        if self.reference_texts is None:
            with measuring(model), reference.swapped_into(model):
                self.reference_texts = self.write(model)

    def rows(self, model: nn.Module, step: int) -> list[Row]:
        """Table rows of the model's style now."""
        with measuring(model):
            texts = self.write(model)
        check_sizes(f"probe {self.name!r}", self.reference_texts, texts, self.paired)
        x, y, names = feature_pair(self.features, self.reference_texts, texts)
        errors = y.std(axis=0, ddof=1) / math.sqrt(len(texts))
        rows = [Row(step=step, metric=f"style/{name}", source=self.name, value=float(value), stderr=float(error))
                for name, value, error in zip(names, y.mean(axis=0), errors, strict=True)]
        distance, error = mean_distance(x, y, self.paired)
        return [*rows, Row(step=step, metric="style/distance", source=self.name, value=distance, stderr=error)]
