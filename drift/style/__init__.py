"""Style of texts: how something is said, as numbers that do not look at what is said.

:func:`style_features` counts surface features of one English text, :func:`style_matrix` those of many. :func:`compare_styles`
gives four distances between two sets of texts, each with a confidence interval and a permutation p-value;
:func:`style_distance` is the first of them alone. :class:`StyleProbe` records what the model writes while it trains.
"""

from drift.style.distances import FeatureDifference, Statistic, StyleComparison, compare_styles, style_distance
from drift.style.diversity import mattr, mtld
from drift.style.probe import StyleProbe
from drift.style.surface import STYLE_FEATURES, style_features, style_matrix

__all__ = ["STYLE_FEATURES", "FeatureDifference", "Statistic", "StyleComparison", "StyleProbe", "compare_styles", "mattr", "mtld",
           "style_distance", "style_features", "style_matrix"]
