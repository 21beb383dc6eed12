"""Tables of the lab made by hand, with effects that can be worked out on paper."""

from typing import Any

from studies.lab import sweeps
from studies.lab.experiment import LAMBDAS, TASK_ONLY, Setup, main_arms
from studies.lab.sampled import ARMS
from studies.lab.sweeps import SA_SFT

N = 4
STEPS = (0, 1, 2, 5, 10, 20)
END = {  # kl, content, kl_dropped, content_dropped, gain, entropy at the last step, and what each further seed adds to kl and content
    "own/old": (0, 0, 0, 0, 0, 2.0), "own/new": (0.2, 0.5, 0.2, 0.5, 0.8, 2.0), "foreign/old": (1.0, 0.1, 1.0, 0.1, 0.0, 2.0),
    TASK_ONLY: (1.4, 0.6, 1.5, 0.8, 0.8, 1.0), "SA-SFT 0.5": (0.3, 0.1, 0.5, 0.2, 0.4, 2.1), "SA-SFT paper": (0.4, 0.2, 0.4, 0.2, 0.4, 1.6),
    "SA-SFT without a topic": (0.4, 0.2, 0.6, 0.5, 0.4, 2.0), "external 1.0": (0.9, 0.05, 0.9, 0.1, 0.4, 1.5), "external, as varied": (0.7, 0.05, 0.9, 0.1, 0.4, 1.5),
    "task at half rate": (0.8, 0.4, 0.8, 0.4, 0.5, 1.5)}
SPREAD = 0.01


def course(arm: str, seed: int, step: int) -> dict[str, float]:
    """Measures at a step: in proportion to it, so that forgetting against gain is a straight line."""
    lam = float(arm.split()[-1]) if arm.startswith(("SA-SFT 0", "external 0")) else 0.3
    names = ("kl", "content", "kl_dropped", "content_dropped", "gain", "entropy")
    ends = dict(zip(names, END.get(arm, (lam, lam / 2, lam, lam / 2, 0.4, 2.0)), strict=True))
    if arm != "own/old":
        ends["kl"] += SPREAD * seed
        ends["content"] += SPREAD * seed
    share = step / STEPS[-1]
    at = {name: value * share for name, value in ends.items() if name != "entropy"}
    return {**at, "entropy": 2.0 + (ends["entropy"] - 2.0) * share, "kl_task": at["kl"], "kl_all": at["kl"], "fact": at["content"], "drift": share}


def tables() -> dict[str, list[dict[str, Any]]]:
    """All tables of a quick run."""
    seeds = range(N)
    arms = [{"arm": a, "seed": s, "step": k, **course(a, s, k)} for a in main_arms() for k in STEPS for s in seeds]
    accounts = [{"arm": r["arm"], "seed": r["seed"], "step": r["step"], "fisher": r["kl"], "fisher_diagonal": r["kl"] ** 2, "l2": -r["kl"], "relative": r["kl"],
                 "spectral": r["step"], "along_style": r["kl"], "along_content": r["content"], "perplexity": 1.0 + len(r["arm"]), "style_distance": len(r["arm"]) % 3,
                 "no_replay": len(r["arm"]) % 2, "tokens": 4.0 * r["step"]} for r in arms]
    of_task = {"exact": 1e-15, "temperature 0.7": 0.2, "paper (0.7, 0.9)": 0.3, "mean over each response": 0.1, "repeats dropped (100 rows)": 0.05,
               "own answers, foreign style": 0.7, "task": 1.0}
    forces = [{"source": name, "seed": s, "norm": 30 * x, "of_task": x * (1 + SPREAD * s)} for name, x in of_task.items() for s in seeds]
    push = [{"course": c, "seed": s, "step": k, "slope": 0.7, "cos_prediction": 0.9, "cos_drift": 0.5 + SPREAD * s, "cos_task": -0.2 - SPREAD * s, "force": 1.0,
             "predicted": 1.0, "drift": 0.1 * k} for c in (TASK_ONLY, "SA-SFT 0.5") for k in STEPS[1:] for s in seeds]
    push += [{"course": "line", "seed": s, "step": 0, "slope": 1 + share * (-1) ** s, "cos_prediction": 1.0, "cos_drift": 0.5, "cos_task": 0.0, "force": share,
              "predicted": share, "drift": share} for share in (0.5, 0.02, 0.1) for s in seeds]
    dose = []
    for lam in (0.0, *LAMBDAS):
        for k in STEPS[1:]:
            for s in seeds:
                kl = course(TASK_ONLY if lam == 0 else f"SA-SFT {lam}", s, k)["kl"]
                dose.append({"lam": lam, "seed": s, "step": k, "kl_foretold": kl * (1.1 if k == 5 else 1e9), "kl_foretold_gn": kl / 1.2, "f_style": 2.0, "h_style": 1.0,
                             "f_content": 1.0, "h_content": 2.0, "along_style": (1 - lam) ** 2 * k, "along_content": (1 - lam) * k,
                             "along_style_foretold": (1 - lam) * k, "along_content_foretold": (1 - lam) * k})
    start = [{"seed": s, "coherence_style": 0.6, "coherence_content": 0.2 + SPREAD * s, "cos_topics_style": 0.9, "cos_topics_content": 0.3, "shared_style": 0.8,
              "shared_content": 0.1, "shared_null_style": 0.1, "shared_null_content": 0.1, "shared_p_style": 0.005, "shared_p_content": 0.5,
              "cos_style_content": 0.1} for s in seeds]
    found = []
    for sweep in sweeps.sweeps(Setup(seeds=N), quick=True):
        setting = {name: getattr(sweep.setup, name) for name in ("width", "coupling", "share", "lr")}
        found += [{"sweep": sweep.name, "value": sweep.value, **setting, "arm": a, "seed": s, "step": k, **course("SA-SFT 0.5" if a == SA_SFT else a, s, k)}
                  for a in sweep.arms for k in STEPS for s in seeds]
    calibration = [{"quantity": f"quantity {i % 3}", "estimator": f"estimator {i}", "rows": 32, "repeats": 500, "undefined": 0, "exact": 1.0, "mean": 1.0 + i / 100,
                    "bias": i / 100, "bias_error": 0.01, "spread": 0.2, "coverage": 0.95, "coverage_low": 0.93, "coverage_high": 0.97, "seconds": 0.01,
                    "of_pass": 1.0} for i in range(6)]
    sampled = [{"arm": a, "seed": s, "step": k, **course(a, s, k), "recorded_drift": k, "recorded_kl": course(a, s, k)["kl"], "recorded_kl_error": 0.01}
               for a in ARMS for k in STEPS for s in seeds]
    return {"calibration": calibration, "sampled": sampled, "arms": arms, "accounts": accounts, "forces": forces, "push": push, "dose": dose, "start": start, "sweeps": found}
