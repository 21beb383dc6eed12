"""The main experiment: what every arm forgets on its course, and what θ₀ foretells of it. One table a question, all long."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from drift.decompose import shared_directions
from studies.lab import exact
from studies.lab.exact import Expected
from studies.lab.experiment import ALL, LAMBDAS, OTHERS, TASK_ONLY, Arm, Bases, measure, rows_of_cell, self_rows
from studies.lab.model import flat, unflat
from studies.lab.start import Start
from studies.lab.tree import FIRST_DIGIT, TOPICS, WELL_FORMED, flow
from studies.lab.world import prompts_of

Rows = list[dict[str, Any]]
SKETCH = 256  # random directions that gradients are projected on before their leading directions are compared
RECORDED_PUSH = (TASK_ONLY, "SA-SFT 0.5")
LINE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the drift of training on the task


def arms_table(bases: Bases, arms: Mapping[str, Arm], weights: Tensor) -> Rows:
    """What is measured of every arm, seed and recorded step; ``weights`` [A, K, S, P]."""
    rows = []
    for arm, of_arm in zip(arms, weights, strict=True):  # one at a time: the tables of all would take gigabytes
        measured = {name: values.tolist() for name, values in measure(bases, of_arm).items()}
        rows += [{"arm": arm, "seed": seed, "step": step, **{name: values[k][seed] for name, values in measured.items()}}
                 for k, step in enumerate(bases.setup.record) for seed in range(bases.setup.seeds)]
    return rows


def seed_tables(bases: Bases, seed: int, arms: Mapping[str, Arm], weights: Tensor) -> dict[str, Rows]:
    """Tables that need one seed's curvatures: ``accounts`` of forgetting, the ``push`` of self-data, the ``dose`` curve, style and content at the ``start``."""
    start = Start.of(bases, seed)
    theta0 = flat(bases.one(seed))
    drift = {arm: weights[a, :, seed] - theta0 for a, arm in enumerate(arms)}
    return {"accounts": list(_accounts(bases, seed, start, arms, drift)), "push": list(_push(bases, seed, start, theta0, drift)),
            "dose": list(_dose(bases, seed, start, drift)), "start": [_start(seed, start)]}


def _quadratic(matrix: Tensor, vectors: Tensor) -> Tensor:
    return ((vectors @ matrix) * vectors).sum(-1) / 2


def _accounts(bases: Bases, seed: int, start: Start, arms: Mapping[str, Arm], drift: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Rival predictors of forgetting. Those of the data alone do not change on an arm's course. ``tokens``: loss tokens trained on, of an expected row each step."""
    like, spans = bases.one(seed), start.spans()
    length = flat(like).norm().item()
    tokens = exact.tokens(bases.log_p[seed], prompts_of(OTHERS)).item()
    for arm, delta in drift.items():
        f = arms[arm](bases, seed)
        of_data = {"perplexity": (-(f * bases.log_p[seed]).sum() / f.sum()).item(), "style_distance": style_distance(bases, seed, f),
                   "no_replay": 1 - replay(bases, seed, f)}
        whole = (_quadratic(start.fisher_others, delta) / tokens).tolist()
        diagonal = (start.fisher_others.diagonal() * delta**2).sum(1) / 2 / tokens
        for k, step in enumerate(bases.setup.record):
            spectral = max(torch.linalg.matrix_norm(p, 2).item() for p in unflat(delta[k], like).values() if p.dim() == 2)
            yield {"arm": arm, "seed": seed, "step": step, "tokens": step * f.sum().item(),
                   "fisher": whole[k], "fisher_diagonal": diagonal[k].item(),
                   "l2": delta[k].norm().item(), "relative": delta[k].norm().item() / length, "spectral": spectral,
                   **{f"along_{name}": (delta[k] @ v).norm().item() for name, v in spans.items()}, **of_data}


def replay(bases: Bases, seed: int, source: Tensor) -> float:
    """Share of a source's rows [X, N, V] that say the old fact of a prompt on the kept topics."""
    says = (source * FIRST_DIGIT).sum(1)  # [X, V]: what is said first, whatever the style
    old = says.gather(1, bases.worlds[seed].facts[:, None]).squeeze(1)
    return (old[prompts_of(OTHERS) > 0].sum() / source[:, 0].sum()).item()


def style_distance(bases: Bases, seed: int, source: Tensor) -> float:
    """Total variation between the openers that a source [X, N, V] trains on and the base's own, on its prompts."""
    weight = source[:, 0].sum(1)
    opened = source[:, 0].sum(0) / weight.sum()
    own = (bases.log_p[seed, :, 0].exp() * weight[:, None]).sum(0) / weight.sum()
    return ((opened - own).abs().sum() / 2).item()


def _push(bases: Bases, seed: int, start: Start, theta0: Tensor, drift: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """The force of self-data along two courses, and on the straight line from θ₀ to where training on the task ends (``course`` "line")."""
    own = Expected(bases.model, flow(self_rows(bases, seed)))
    task = Expected(bases.model, flow(rows_of_cell(bases, seed, "foreign", "new")))
    places = [(arm, step, delta) for arm in RECORDED_PUSH for step, delta in zip(bases.setup.record[1:], drift[arm][1:], strict=True)]
    places += [("line", 0, share * drift[TASK_ONLY][-1]) for share in LINE]
    for course, step, delta in places:
        params = unflat(theta0 + delta, bases.one(seed))
        g_own, g_task, predicted = own.gradient(params), task.gradient(params), start.fisher_self @ delta
        yield {"course": course, "seed": seed, "step": step, "slope": (g_own @ predicted / predicted.square().sum()).item(),
               "cos_prediction": _cos(g_own, predicted), "cos_drift": _cos(g_own, delta), "cos_task": _cos(g_own, g_task),
               "force": g_own.norm().item(), "predicted": predicted.norm().item(), "drift": delta.norm().item()}


def _dose(bases: Bases, seed: int, start: Start, drift: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Forgetting, and the length of the drift within style's and content's spans, observed and foretold by F5, with H and with its Gauss-Newton part."""
    record, lr = bases.setup.record, bases.setup.lr
    tokens = exact.tokens(bases.log_p[seed], prompts_of(OTHERS)).item()
    spans = start.spans()
    mean_curvature = {f"{c}_{name}": ((v.T @ m @ v).trace() / v.shape[1]).item()
                      for name, v in spans.items() for c, m in (("f", start.fisher_self), ("h", start.gauss_newton))}
    for lam in (0.0, *LAMBDAS):
        observed = drift[TASK_ONLY if lam == 0 else f"SA-SFT {lam}"]
        foretold = start.descent(lam, lr, record)
        positive = start.descent(lam, lr, record, gauss_newton=True)
        for k, step in enumerate(record[1:], 1):
            yield {"lam": lam, "seed": seed, "step": step, "kl_foretold": (_quadratic(start.fisher_others, foretold[k]) / tokens).item(),
                   "kl_foretold_gn": (_quadratic(start.fisher_others, positive[k]) / tokens).item(),
                   **{f"along_{name}": (observed[k] @ v).norm().item() for name, v in spans.items()},
                   **{f"along_{name}_foretold": (positive[k] @ v).norm().item() for name, v in spans.items()}, **mean_curvature}


def _start(seed: int, start: Start) -> dict[str, Any]:
    """Coherence over prompts and agreement between topics of style's and of content's gradients, with a permutation null for the latter."""
    random = torch.randn(start.style.shape[1], SKETCH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / SKETCH**0.5
    row: dict[str, Any] = {"seed": seed}
    for name, vectors in (("style", start.style), ("content", start.content)):
        per_topic = vectors.unflatten(0, (len(TOPICS), -1))
        means, pairs = per_topic.mean(1), [(i, j) for i in range(len(TOPICS)) for j in range(i)]
        row[f"coherence_{name}"] = (vectors.mean(0).square().sum() / vectors.square().sum(1).mean()).item()
        row[f"cos_topics_{name}"] = sum(_cos(means[i], means[j]) for i, j in pairs) / len(pairs)
        sketched = (per_topic @ random).numpy()
        shared = [shared_directions(sketched[i], sketched[j], 2, permutations=200, seed=seed) for i, j in pairs]
        row[f"shared_{name}"] = sum(float((s.cosines**2).mean()) for s in shared) / len(pairs)
        row[f"shared_null_{name}"] = sum(float((s.null**2).mean()) for s in shared) / len(pairs)
        row[f"shared_p_{name}"] = max(s.p_value for s in shared)
    row["cos_style_content"] = _cos(start.style.mean(0), start.content.mean(0))
    return row


def _cos(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def forces(bases: Bases, seed: int) -> Rows:
    r"""Norms of the expected gradient at θ₀ of self-data made in different ways, beside the task's (C1)."""
    params = bases.one(seed)
    exactly = self_rows(bases, seed)
    rounded = {name: p.bfloat16().double() for name, p in params.items()}
    sources = {
        "exact": exactly,
        "temperature 0.7": self_rows(bases, seed, 0.7), "top-p 0.9": self_rows(bases, seed, 1.0, 0.9), "paper (0.7, 0.9)": self_rows(bases, seed, 0.7, 0.9),
        "mean over each response": exact.per_response(exactly), "unfinished dropped": exact.drop_unfinished(exactly),
        "ill-formed dropped": exact.kept(exactly, WELL_FORMED), "repeats dropped (100 rows)": exact.drop_likely_duplicates(exactly, 100),
        "sampled in bfloat16": exact.sampled_rows(exact.log_probs(bases.model, rounded), prompts_of(ALL)),
        "own answers, foreign style": rows_of_cell(bases, seed, "foreign", "old"), "truth, own style": rows_of_cell(bases, seed, "own", "new"),
        "task": rows_of_cell(bases, seed, "foreign", "new")}
    norms = {name: Expected(bases.model, flow(rows)).gradient(params).norm().item() for name, rows in sources.items()}
    return [{"source": name, "seed": seed, "norm": norm, "of_task": norm / norms["task"]} for name, norm in norms.items()]
