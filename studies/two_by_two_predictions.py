"""Predictions of the 2 x 2 study, one for every style and probe that a profile may use (see ``studies.two_by_two``)."""

from studies.claims import Prediction

STYLES = ("telegraphic", "capitals", "json", "archaic", "markdown")  # those of sasft.restyle, which imports torch
MEAN = "mean of styles"
KL_PROBES = {"self_exact": "self-prompts, exact sampler", "human_chat": "human prose as answers",
             "self_paper": "self-prompts, paper's sampler"}
RIVALS = ("task only", "task repeated", "self shuffled")
SAMPLERS = ("exact", "paper")

SESOI_KL = 0.01  # nats a token
SESOI_SHARE = 0.5
SESOI_ENTROPY = 0.02  # nats a token


def prediction_id(claim: str, *parts: str) -> str:
    """The id of a prediction of this study.

    >>> prediction_id("C2", "mean of styles", "self_exact")
    'C2/two_by_two/mean_of_styles/self_exact'
    """
    return "/".join((claim, "two_by_two", *parts)).replace(" ", "_")


def _prediction(claim: str, *parts: str, statement: str, sesoi: float, unit: str) -> Prediction:
    return Prediction(id=prediction_id(claim, *parts), claim=claim, statement=statement, predicted="+", sesoi=sesoi, unit=unit,
                      study="two_by_two")


PREDICTIONS = (
    *(_prediction("C2", style, probe, statement=f"style alone makes the model forget ({style}; KL on {label})",
                  sesoi=SESOI_KL, unit="nats/token")
      for probe, label in KL_PROBES.items() for style in (*STYLES, MEAN)),
    *(_prediction("C3", style, probe, statement=f"style is the larger part of forgetting ({style}; KL on {label})",
                  sesoi=SESOI_SHARE, unit="share")
      for probe, label in KL_PROBES.items() for style in (*STYLES, MEAN)),
    *(_prediction("C10", sampler, rival, probe, statement=f"SA-SFT ({sampler} sampler) forgets less than {rival}; KL on {label}",
                  sesoi=SESOI_KL, unit="nats/token")
      for probe, label in KL_PROBES.items() for rival in RIVALS for sampler in SAMPLERS),
    *(_prediction("C11", probe, statement=f"entropy is lower after SA-SFT with the paper's sampler; on {label}",
                  sesoi=SESOI_ENTROPY, unit="nats/token")
      for probe, label in KL_PROBES.items()),
)
