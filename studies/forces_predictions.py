"""Predictions of the study of forces on a real model (see ``studies.forces``), written before its first run."""

from studies.claims import Prediction

UNIT = "of the task's ‖E g‖²"


def _prediction(name: str, statement: str, predicted: str, sesoi: float) -> Prediction:
    return Prediction(id=f"C1/forces/{name}", claim="C1", statement=statement, predicted=predicted, sesoi=sesoi, unit=UNIT, study="forces")


PREDICTIONS = (
    _prediction("exact", "‖E g‖² of exact self-data at θ₀ is below a twentieth of the task's", "-", -0.05),
    _prediction("paper", "the paper's sampler exerts more force at θ₀ than the exact one", "+", 0.01),
    _prediction("paper below task", "the force of the paper's sampler at θ₀ is smaller than the task's", "-", -1.0),
    _prediction("foreign style", "the model's own answers exert a force once their style is changed by rule", "+", 0.05),
    _prediction("shuffled", "self-data with shuffled tokens exert a force", "+", 0.05),
)
