"""Training the arms of a study: every (arm, seed) is one short run, cached, resumable, several side by side."""

import ctypes
import gc
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import drift
from sasft.chat import Encoded, collate
from sasft.files import write_json
from sasft.mixing import SELF, TASK, Plan, make_plan
from sasft.models import load_model
from sasft.trainer import FitSettings, fit
from sasft.workers import end_with_parent
from studies.stats import Scores

_EVAL_ROWS = 8
METRICS = ("kl_base_model", "kl_model_base", "entropy_base", "entropy_model", "nll_base", "nll_model")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: which pool is the task's, which is mixed in, and how many loss tokens a step takes.

    ``matched_to`` names an arm whose loss tokens a step this one is given (of the task alone): the control that
    repeats the task instead of mixing. ``record`` keeps per-layer drift along the run and, where self-data are mixed
    in, one seed's alignment at its ends.
    """

    name: str
    task: str
    self_data: str | None = None
    matched_to: str | None = None
    record: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The training that all arms share."""

    fit: FitSettings
    steps: int
    tokens_per_step: int
    lam: float
    seeds: int
    record_every: int
    align_rows: int
    attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker process needs to run arms."""

    model: str
    settings: TrainingSettings
    train: Mapping[str, list[Encoded]]
    held_out: Mapping[str, list[Encoded]]
    arms: tuple[Arm, ...]
    folder: Path
    pad_id: int
    threads: int


def plan_for(arm: Arm, arms: Sequence[Arm], settings: TrainingSettings, train: Mapping[str, Sequence[Encoded]],
             seed: int) -> Plan:
    """The rows of every step of an arm: same seed, same prompts in the same order in every arm."""
    def lengths(pool: str | None) -> list[int]:
        return [r.loss_tokens for r in train[pool]] if pool else []

    budget = settings.tokens_per_step
    if arm.matched_to:
        model_arm = next(a for a in arms if a.name == arm.matched_to)
        budget = round(float(np.mean(plan_for(model_arm, arms, settings, train, seed).loss_tokens())))
    return make_plan(lengths(arm.task), lengths(arm.self_data), steps=settings.steps, tokens_per_step=budget,
                     lam=settings.lam if arm.self_data else 0.0, seed=seed)


def run_arms(job: Job, workers: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every (arm, seed) that has no result yet; returns all results. Shows what is running and how long still."""
    todo = [(arm.name, seed) for seed in range(job.settings.seeds) for arm in job.arms
            if not _result_path(job.folder, arm.name, seed).exists()]
    total = job.settings.seeds * len(job.arms)
    with tqdm(total=total, initial=total - len(todo), desc="training runs", unit="run", dynamic_ncols=True) as bar:
        if todo:
            _run_pool(job, todo, workers, bar)
    return {(arm.name, seed): json.loads(_result_path(job.folder, arm.name, seed).read_text(encoding="utf-8"))
            for seed in range(job.settings.seeds) for arm in job.arms}


def _run_pool(job: Job, todo: list[tuple[str, int]], workers: int, bar: tqdm) -> None:
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"), initializer=_start_worker,
                               initargs=(job,))
    try:
        running = {pool.submit(_run_one, arm, seed) for arm, seed in todo}
        while running:
            done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            bar.refresh()  # the clock runs between two results too
            for future in done:
                bar.set_postfix_str(future.result())
                bar.update()
    except BaseException:
        for process in list(pool._processes.values()):  # a run takes long: do not wait for it on Ctrl-C
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result_path(folder: Path, arm: str, seed: int) -> Path:
    return folder / arm.replace("/", "-") / f"seed{seed}" / "result.json"


_worker: "Worker"


def _start_worker(job: Job) -> None:
    global _worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(job.threads)
    _worker = Worker(job)


def _run_one(arm: str, seed: int) -> str:
    _worker.run(next(a for a in _worker.job.arms if a.name == arm), seed)
    return f"{arm}, seed {seed}"


def give_back_memory() -> None:
    """Return what has been freed: glibc keeps it, and run by run a process would grow to twice its need."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Worker:
    """A model in memory that is put back to θ₀ before every run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _ = load_model(job.model, device=device, attention=job.settings.attention)
        self.reference = drift.Reference.snapshot(self.model)
        self.probes = {name: self._divergence(name, rows) for name, rows in job.held_out.items()}

    def _divergence(self, name: str, rows: Sequence[Encoded]) -> drift.DivergenceProbe:
        # In batches of similar length; items stay the same in every arm, so they pair whatever their order.
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        batches = [collate(ordered[i : i + _EVAL_ROWS], self.job.pad_id) for i in range(0, len(ordered), _EVAL_ROWS)]
        probe = drift.DivergenceProbe(name, batches)
        probe.prepare(self.model, self.reference)
        return probe

    def run(self, arm: Arm, seed: int) -> None:
        """Train one arm from θ₀ and write its result."""
        start = time.monotonic()
        out = _result_path(self.job.folder, arm.name, seed).parent
        out.mkdir(parents=True, exist_ok=True)
        self.reference.load_into(self.model)
        plan = plan_for(arm, self.job.arms, self.job.settings, self.job.train, seed)
        rows = {TASK: self.job.train[arm.task], SELF: self.job.train[arm.self_data] if arm.self_data else []}
        settings = FitSettings(**{**self.job.settings.fit.__dict__, "seed": seed})
        callbacks = [self._recorder(arm, seed, out)] if arm.record else []
        log = fit(self.model, rows, plan, settings, pad_id=self.job.pad_id, out=out, callbacks=callbacks, progress=False)
        l2 = drift.parameter_drift(self.model, self.reference)
        result = {
            "arm": arm.name, "seed": seed, "mix": plan.report(),
            "loss": [entry["loss"] for entry in log if "loss" in entry],
            "drift_l2": float(np.sqrt(sum(p.l2 ** 2 for p in l2))),
            "probes": {name: self._measure(probe) for name, probe in self.probes.items()},
            "seconds": time.monotonic() - start,
        }
        write_json(out / "result.json", result)
        give_back_memory()

    def _measure(self, probe: drift.DivergenceProbe) -> dict[str, list[float]]:
        rows = probe.per_row(self.model)
        return {"tokens": rows.tokens.tolist(), **{m: getattr(rows, m).tolist() for m in METRICS}}

    def _recorder(self, arm: Arm, seed: int, out: Path) -> Any:
        n = self.job.settings.align_rows
        sources = {"task": self.job.held_out["gold_raw"][:n], "self": self.job.held_out["self_exact"][:n]}
        alignment = drift.AlignmentProbe("align", {s: [collate(r, self.job.pad_id)] for s, r in sources.items()},
                                         every=self.job.settings.steps)  # at both ends of the run
        return drift.DriftCallback(
            out=out, overwrite=True, run=f"{arm.name}/seed{seed}", every=self.job.settings.record_every, reference=self.reference,
            probes=[alignment] if arm.self_data and seed == 0 else [])


def scores(results: Mapping[tuple[str, int], Mapping], arm: str, probe: str, metric: str, seeds: int) -> Scores:
    """One arm's scores on a probe, over seeds and items."""
    runs = [results[arm, seed]["probes"][probe] for seed in range(seeds)]
    return Scores(np.array([r[metric] for r in runs]), np.array(runs[0]["tokens"], dtype=float))
