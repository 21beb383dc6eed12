"""Scores of a model with standard errors, per item and resumable; forgetting item by item between two evaluations.

>>> from sasft.evaluation import SUITES
>>> sorted(SUITES)[:4]
['agieval', 'answers', 'gsm8k', 'ifeval']
"""

from sasft.evaluation.forgetting import Forgetting, forgetting
from sasft.evaluation.gain_drop import curve, drop_at, figure, gain_drop
from sasft.evaluation.run import SUITES, EvaluateSettings, MeasureSettings, evaluate, run
from sasft.evaluation.suites import Answered, Chosen, Item, Predicted, Suite
from sasft.evaluation.summary import read_records, table

__all__ = ["SUITES", "Answered", "Chosen", "EvaluateSettings", "Forgetting", "Item", "MeasureSettings", "Predicted", "Suite",
           "curve", "drop_at", "evaluate", "figure", "forgetting", "gain_drop", "read_records", "run", "table"]
