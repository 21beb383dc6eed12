"""The main arms once more as practice has them: rows drawn from the world's distributions, Adam, the package's own trainer and recorder.

What was learned and forgotten is still measured over all responses; what :mod:`drift` recorded on the way, from held-out rows, stands beside it.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

import drift
from sasft import FitSettings, fit, make_plan
from sasft.chat import Encoded, collate
from studies.lab.courses import Rows
from studies.lab.drawing import PAD, draw, encoded, module
from studies.lab.experiment import OTHERS, TASK_ONLY, Bases, measure, rows_of_cell, self_rows
from studies.lab.model import flat

ROWS, HELD_OUT = 400, 256  # of each source; of the recorder's probe
TASK_ROWS = 16  # a step
LR = 0.003  # a tenth of pre-training's


@dataclass(frozen=True)
class SampledArm:
    """What the trainer reads as task rows, and as self rows in equal number (None: none); ``task_rows`` a step."""

    task: tuple[str, str]
    sampler: tuple[float, float] | None = None
    task_rows: int = TASK_ROWS


TASK = ("foreign", "new")
REPEATED = "task repeated"
ARMS: Mapping[str, SampledArm] = {
    "own/old": SampledArm(("own", "old")), "own/new": SampledArm(("own", "new")), "foreign/old": SampledArm(("foreign", "old")),
    TASK_ONLY: SampledArm(TASK), REPEATED: SampledArm(TASK, task_rows=2 * TASK_ROWS),
    "SA-SFT 0.5": SampledArm(TASK, (1.0, 1.0)), "SA-SFT paper": SampledArm(TASK, (0.7, 0.9))}


def sampled(bases: Bases, seed: int) -> Rows:
    """All arms of one seed: at each recorded step what :func:`studies.lab.experiment.measure` finds, and what the recorder did."""
    one = Bases(bases.setup, bases.model, (bases.worlds[seed],), {n: p[seed : seed + 1] for n, p in bases.params.items()})
    found: Rows = []
    for name, arm in ARMS.items():
        weights, recording = train(one, arm, seed)
        measured = {metric: values[:, 0].tolist() for metric, values in measure(one, weights.unsqueeze(1)).items()}
        l2, kl = recording.series("drift/l2"), recording.series("kl/base_model", source="kept")  # at the recorded steps
        found += [{"arm": name, "seed": seed, "step": step, **{m: v[k] for m, v in measured.items()}, "recorded_drift": float(l2.values[k]),
                   "recorded_kl": float(kl.values[k]), "recorded_kl_error": float(kl.stderr[k])} for k, step in enumerate(bases.setup.record)]
    return found


def train(one: Bases, arm: SampledArm, seed: int) -> tuple[Tensor, drift.Recording]:
    """Weights [K, P] at the recorded steps of one arm, trained from drawn rows, and what was recorded."""
    setup = one.setup
    rows = rows_of(one, arm, seed)
    model = module(one.one(0), setup.width).train()
    steps = setup.record[-1]
    plan = make_plan([r.loss_tokens for r in rows["task"]], [r.loss_tokens for r in rows["self"]], steps=steps, lam=0.5 if rows["self"] else 0.0,
                     rows_per_step=arm.task_rows * (2 if rows["self"] else 1), seed=seed)
    kept = _Weights(setup.record, model)
    generator = torch.Generator().manual_seed(10_000 + seed)
    probe = drift.DivergenceProbe("kept", [collate(encoded(draw(self_rows(one, 0, prompts=OTHERS), HELD_OUT, generator)), PAD)])
    with tempfile.TemporaryDirectory() as folder:
        recorder = drift.DriftCallback(folder, every=lambda step: step in setup.record, probes=[probe])
        fit(model, rows, plan, FitSettings(lr=LR, schedule="constant", max_grad_norm=0.0, precision="fp32", save_every=0, seed=seed, micro_rows=64),
            pad_id=PAD, out=Path(folder), callbacks=[recorder, kept], progress=False)
        return torch.stack(kept.found), drift.load(folder)


def rows_of(one: Bases, arm: SampledArm, seed: int) -> dict[str, list[Encoded]]:
    """The drawn rows of an arm by source; arms with a source in common share its rows."""
    def drawn(rows: Tensor, number: int) -> list[Encoded]:
        return encoded(draw(rows, ROWS, torch.Generator().manual_seed(1000 * number + seed)))

    return {"task": drawn(rows_of_cell(one, 0, *arm.task), 1), "self": drawn(self_rows(one, 0, *arm.sampler), 2) if arm.sampler else []}


class _Weights(transformers.TrainerCallback):
    """Keeps the weights at some steps."""

    def __init__(self, record: tuple[int, ...], model: torch.nn.Module) -> None:
        self.record, self.found = record, [self._of(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in self.record:
            self.found.append(self._of(model))

    @staticmethod
    def _of(model: torch.nn.Module) -> Tensor:
        return flat({name: p.detach().clone() for name, p in model.named_parameters()})
