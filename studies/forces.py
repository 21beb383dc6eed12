r"""Do a real model's own dialogues exert a force on it before training? C1 beyond the exact lab.

    python -m studies.forces

Kinds of data are compared by :math:`\lVert\mathbb E g\rVert^2`, the squared norm of the expected gradient at θ₀ of a row's summed loss, as a share of the
task's. F1 says that it is 0 for answers sampled exactly from the model; the mean gradient of any sample is not, because of noise, so that only an estimate
without that noise can tell (:func:`drift.alignment.mean_inner`). Rows' gradients are compared by sketches (:class:`drift.Sketch`), which leave expected products
as they are and add a few per cent of error to them. Intervals resample rows: Student's, with jackknife errors, which are √2 too large where there is no force.

``studies/forces_predictions.py`` says what was predicted. What is drawn from the model and every kind's sketches are kept in ``--runs``, so that a stopped run goes on.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor, nn
from tqdm import tqdm

import drift
from drift.alignment import mean_inner, mean_inner_error
from sasft.chat import Chat, Encoded, collate
from sasft.errors import UsageError
from sasft.files import ensure_writable
from sasft.models import load_model, weights_hash
from sasft.restyle import restyle
from sasft.sampling import EXACT, PAPER
from sasft.selfdialogue import Writer, write_dialogues
from sasft.tasks import get_task
from sasft.terminal import exit_code
from sasft.versions import versions
from studies.cells import ONE_SENTENCE, shuffled
from studies.figures import DARK, LIGHT, MIDDLE, error_bars, new_figure, save
from studies.forces_predictions import PREDICTIONS
from studies.lab.units import kept
from studies.stats import LEVEL, Effect, short_hash, verdict

TASK = "task (worked sums)"
EXACT_SELF, PAPER_SELF = "self-dialogues, exact sampler", "self-dialogues, the paper's sampler"
RESTYLED, SHUFFLED = "exact self-dialogues, style changed by rule", "exact self-dialogues, tokens shuffled"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is sampled, and how it is measured."""

    model: str = "smollm2-135m-instruct"
    rows: int = 128
    max_answer_tokens: int = 36
    max_user_tokens: int = 32
    style: str = "telegraphic"
    sketch: int = 16
    batch_size: int = 16
    data_seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.forces", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=Settings.model, help="embedded name, folder or hub id (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=Settings.rows, help="rows of every kind (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where data and sketches are kept (default: runs)")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="where figures go (default: figures)")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(Settings(model=args.model, rows=args.rows), args.runs / "forces", args.figures))


def run(settings: Settings, home: Path, figures: Path) -> None:
    """Sample, measure, draw and print. Finished parts are not done again."""
    began = time.monotonic()
    if settings.rows < 3:
        raise UsageError(f"rows must be at least 3, for an error to be told, got {settings.rows}")
    ensure_writable(figures)
    model, tokenizer = load_model(settings.model)
    weights, chat = weights_hash(model), Chat(tokenizer)
    writer = Writer(model=model, chat=chat, sampler=EXACT, provenance={"model": settings.model, "weights_sha256": weights})
    identity = {"settings": vars(settings), "weights_sha256": weights, **writer.identity()}
    folder = home / short_hash(identity)
    ensure_writable(folder)
    sources = build(writer, settings, folder)
    values = {name: kept(folder / f"sketch{k}.pt", lambda name=name, rows=rows: sketches(model, rows, chat.pad_id, settings, name)).numpy()
              for k, (name, rows) in enumerate(sources.items())}
    table = measure(values)
    provenance = {**identity, "loss_tokens_a_row": {name: float(np.mean([r.loss_tokens for r in rows])) for name, rows in sources.items()},
                  "versions": versions()}
    verdicts = judged(table)
    paths = draw(table, verdicts, provenance, figures)
    for v in verdicts:
        print(f"{v['claim']:<4}{v['verdict']:<13}{v['value']:>8.3f} [{v['low']:.3f}, {v['high']:.3f}] {v['unit']:<22}{v['statement']}")
    print("\npictures and tables:", *(f"  {path}" for path in paths), sep="\n")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


def build(writer: Writer, settings: Settings, folder: Path) -> dict[str, list[Encoded]]:
    """Rows of every kind; what is in ``folder`` already is kept."""
    chat, task = writer.chat, get_task("sums")
    written = {}
    for name, sampler in (("exact", EXACT), ("paper", PAPER)):
        capped = replace(writer, sampler=replace(sampler, max_new_tokens=settings.max_answer_tokens))
        written[name] = write_dialogues(capped, settings.rows, folder / f"self_{name}.jsonl", seed=settings.data_seed,
                                        max_user_tokens=settings.max_user_tokens)
    own = {name: [chat.encode(r.prompt, r.response_ids, finished=r.finished) for r in rows] for name, rows in written.items()}
    problems = task.problems(settings.rows, seed=settings.data_seed)
    return {
        TASK: [chat.encode(({"role": "user", "content": f"{p.question} {ONE_SENTENCE}"},), task.worked(p), finished=True) for p in problems],
        EXACT_SELF: own["exact"], PAPER_SELF: own["paper"],
        RESTYLED: [chat.encode(r.prompt, restyle(r.response, settings.style), finished=r.finished) for r in written["exact"] if r.response.strip()],
        SHUFFLED: shuffled(own["exact"], settings.data_seed),
    }


def sketches(model: nn.Module, rows: Sequence[Encoded], pad_id: int, settings: Settings, what: str) -> Tensor:
    """Sketches [R, K] of the rows' gradients in float32, a batch at a time."""
    sketch, found = drift.Sketch(settings.sketch, settings.sketch), []
    starts = range(0, len(rows), settings.batch_size)
    for start in tqdm(starts, desc=f"gradients of {what}", unit="batch", dynamic_ncols=True):
        batch = collate(rows[start : start + settings.batch_size], pad_id)
        found.append(sketch.gradients(model, batch).values.astype(np.float32))
    return torch.from_numpy(np.concatenate(found))


def measure(values: Mapping[str, NDArray[np.float32]]) -> dict[str, dict[str, Any]]:
    """For every kind of data its ‖E g‖² and the uncorrected ‖mean g‖², as shares of the task's ‖E g‖², and ⟨E g, E g_task⟩."""
    task = values[TASK].astype(np.float64)
    found: dict[str, dict[str, Any]] = {}
    norm, norm_error = _norm2(task @ task.T)
    for name, one in values.items():
        both = np.concatenate([one.astype(np.float64), task])
        gram, n = both @ both.T, len(one)
        mine, rest = list(range(n)), list(range(n, len(both)))
        value, error = _norm2(gram[:n, :n])
        inner, inner_error = (value, error) if name == TASK else (mean_inner(gram, mine, rest), mean_inner_error(gram, mine, rest))
        found[name] = {"source": name, "rows": n, "share": value / norm, "share_error": 0.0 if name == TASK else ratio_error(value, error, norm, norm_error),
                       "uncorrected": float(gram[:n, :n].mean()) / norm, "norm2": value, "norm2_error": error, "inner_task": inner, "inner_task_error": inner_error}
    return found


def _norm2(gram: NDArray[np.float64]) -> tuple[float, float]:
    rows = list(range(len(gram)))
    return mean_inner(gram, rows, rows), mean_inner_error(gram, rows, rows)


def ratio_error(a: float, a_error: float, b: float, b_error: float) -> float:
    """Standard error of a / b of independent estimates, first-order.

    >>> ratio_error(0.0, 0.2, 2.0, 1.0), round(ratio_error(2.0, 0.2, 2.0, 0.2), 4)
    (0.1, 0.1414)
    """
    return math.hypot(a_error / b, a * b_error / b**2)


def interval(value: float, error: float, n: int) -> Effect:
    """Student's, of an estimate from n rows."""
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return Effect(value, value - reach, value + reach)


def judged(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdict on every prediction."""
    def share(name: str) -> tuple[Effect, int]:
        row = table[name]
        return interval(row["share"], row["share_error"], row["rows"]), row["rows"]

    exact, paper, task = (table[name] for name in (EXACT_SELF, PAPER_SELF, TASK))
    difference, error = paper["norm2"] - exact["norm2"], math.hypot(paper["norm2_error"], exact["norm2_error"])
    n = min(exact["rows"], paper["rows"])
    more = interval(difference / task["norm2"], ratio_error(difference, error, task["norm2"], task["norm2_error"]), n), n
    found = {"exact": share(EXACT_SELF), "paper": more, "paper below task": share(PAPER_SELF), "foreign style": share(RESTYLED), "shuffled": share(SHUFFLED)}
    return [verdict(p, effect, n=n, resampled="rows") for p in PREDICTIONS for effect, n in (found[p.id.rsplit("/", 1)[1]],)]


def draw(table: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], folder: Path) -> list[Path]:
    """‖E g‖² at θ₀ of every kind of data, with and without sampling noise."""
    figure, axis = new_figure(7.6, 3.2)
    rows = sorted(table.values(), key=lambda row: row["share"])
    for place, row in enumerate(rows):
        e = interval(row["share"], row["share_error"], row["rows"])
        axis.plot(row["uncorrected"], place, "s", markersize=6, color="white", markeredgecolor="black", label=None if place else "‖mean g‖², noise included")
        axis.errorbar(e.value, place, xerr=error_bars([e]), fmt="o", markersize=6, color=LIGHT if row["source"] == EXACT_SELF else MIDDLE if row["source"] == TASK else DARK,
                      markeredgecolor="black", ecolor="black", capsize=3, linewidth=1, label=None if place else "‖E g‖², without noise")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yticks(range(len(rows)), [row["source"] for row in rows])
    axis.set_xlabel("squared norm of the gradient at θ₀, as a share of the task's ‖E g‖²\n(linear up to 0.1, then logarithmic)")
    axis.grid(axis="y", color="0.9")
    axis.legend(frameon=False, fontsize=7.5, loc="lower right")
    axis.set_title(f"Force of every kind of data on {provenance['settings']['model']}", loc="left")
    return save(figure, folder, "forces", rows, verdicts, provenance)


if __name__ == "__main__":
    sys.exit(main())
