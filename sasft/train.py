"""Fine-tuning from files to a run folder, full or LoRA, by any of :mod:`sasft.methods`.

It sets up the instruments, calls :func:`sasft.trainer.fit` and leaves a folder that says how it came about.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

import drift
from sasft.chat import Chat, Encoded
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import ensure_writable, sha256_file, write_json
from sasft.manifest import differences
from sasft.methods import Costs, Method, Workshop, parse_method
from sasft.mixing import SELF, TASK, make_plan
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.precision import autocast
from sasft.probes import run_probes
from sasft.sampling import EXACT
from sasft.settings import option
from sasft.trainer import FitSettings, fit
from sasft.versions import versions
from sasft.writing import Writer


@dataclass(kw_only=True)
class TrainSettings(FitSettings):
    """One run from files: what to train, on what, by which method, and what to record."""

    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")
    task: str = option("", "JSONL file of task rows")
    self_data: str | None = option(None, "JSONL file of self-dialogues, as written by `sasft generate`")
    out: str = option("", "folder of the run")
    lam: float = option(0.5, "share of self rows in the mix, in [0, 1); 0 is plain fine-tuning")
    method: str = option("sft", "fine-tuning method, by its name in sasft.methods; sft: the ordinary loss on the rows of the mix")
    method_options: str = option("", "options of the method: name=value, with blanks between them")
    steps: int = option(100, "optimiser steps")
    rows_per_step: int = option(16, "rows a step, of both sources together")
    max_tokens: int = option(1024, "longest row allowed, in tokens")
    too_long: Literal["error", "truncate", "drop"] = option("error", "what to do with longer rows")
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_alpha: float = option(16.0, "LoRA scale: updates are multiplied by alpha / rank")
    record_every: int = option(10, "steps between recordings of drift, alignment, KL and style; 0 for none")
    probe_rows: int = option(16, "rows of each file held out of training to measure alignment, KL and style on")
    general_text: str | None = option(None, "UTF-8 text file on which to record the negative log-likelihood")
    save_model: bool = option(True, "save the trained model (for LoRA, the adapter) in the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.task:
            raise UsageError("task is missing: name a JSONL file of task rows")
        if not self.out:
            raise UsageError("out is missing: name a folder for the run")
        if not 0 <= self.lam < 1:
            raise UsageError(f"lam (the share of self rows) must lie in [0, 1), got {self.lam}")
        if self.lam > 0 and not self.self_data:
            raise UsageError(f"lam is {self.lam}, but self_data names no file; write self-dialogues with "
                             "`sasft generate` and name them with --self-data, or set --lam 0")
        self.chosen_method()

    def chosen_method(self) -> Method:
        """The method with its options; raises :class:`UsageError` for what there is not."""
        return parse_method(self.method, self.method_options)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Fine-tune from files to a run folder, by default with SA-SFT (at ``lam=0`` on the task alone); returns the run's summary.

    The folder holds ``config.json`` (settings, versions, hashes of data and weights), ``plan.jsonl`` and ``mix.json``
    (every row of every step; λ realised in rows and tokens), ``drift/`` (the recorded table), ``log.json``,
    ``model/``, ``method/`` (what a method that makes rows has made) and, once finished, ``summary.json``, which says what the
    method has cost beyond SFT. The same call again returns a finished run's summary, or goes on
    with an unfinished one; another configuration in the same folder is refused.
    """
    out = Path(settings.out)
    ensure_writable(out)
    method, costs = settings.chosen_method(), Costs()
    text = _general_text(settings.general_text)
    files = {"task": settings.task, "self": settings.self_data, "general_text": settings.general_text}
    identity = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("out", "task", "self_data", "general_text")},
        "data_sha256": {k: sha256_file(Path(p)) for k, p in files.items() if p},
    }
    _claim(out, identity, files)
    if (done := out / "summary.json").exists():
        return json.loads(done.read_text(encoding="utf-8"))

    task_rows = read_rows(Path(settings.task))
    self_rows = read_rows(Path(settings.self_data)) if settings.self_data else []
    lora = LoraSettings(r=settings.lora_rank, alpha=settings.lora_alpha) if settings.lora_rank else None
    model, tokenizer = load_model(settings.model, revision=settings.revision, lora=lora, seed=settings.seed)
    chat = Chat(tokenizer)
    writer = _writer(settings, model, chat) if method.writes else None
    made = method.rows({TASK: task_rows, SELF: self_rows},
                       Workshop(chat=chat, folder=out / "method", writer=writer, seed=settings.seed, costs=costs))
    model = method.prepare(model, settings.seed)
    rows: dict[str, list[Encoded]] = {}
    held_out: dict[str, list[Encoded]] = {}
    for source, read in made.items():
        encoded, report = encode_rows(read, chat, settings.max_tokens, too_long=settings.too_long)
        measured = settings.probe_rows if settings.record_every and source in (TASK, SELF) else 0
        rows[source], held_out[source] = _hold_out(encoded, measured)
        if encoded:
            print(f"{source}: {report}; {len(held_out[source])} held out to measure on", file=sys.stderr)
    with autocast(settings.precision, model.device.type):
        rows = method.encoded(rows, model, chat.pad_id, costs)
        objective = method.objective(model, rows, chat.pad_id, costs)
    plan = make_plan(
        [r.loss_tokens for r in rows[TASK]], [r.loss_tokens for r in rows[SELF]],
        steps=settings.steps, lam=settings.lam, rows_per_step=settings.rows_per_step, seed=settings.seed)
    plan.save(out / "plan.jsonl")
    write_json(out / "mix.json", plan.report())
    callbacks = []
    if settings.record_every:
        callbacks.append(drift.DriftCallback(
            out=out, overwrite=True, every=settings.record_every, config=identity, reference=drift.Reference.snapshot(model),
            probes=run_probes(chat, held_out, text, precision=settings.precision)))
    fitted = replace(settings, lr=method.learning_rate(settings.lr))
    log = fit(model, rows, plan, fitted, pad_id=chat.pad_id, out=out, objective=objective, callbacks=callbacks)
    write_json(out / "log.json", log)
    if settings.save_model:
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    summary = {"mix": plan.report(), "method": method.describe(), "costs": costs.describe(),
               "weights_sha256": weights_hash(model),
               "recorded": callbacks[0].recorder.latest() if callbacks else {},
               "loss": [entry["loss"] for entry in log if "loss" in entry]}
    write_json(done, summary)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # three times the model's size, and of no use any more
    return summary


def _writer(settings: TrainSettings, model: nn.Module, chat: Chat) -> Writer:
    """The untrained model as it writes for methods that make rows; they choose samplers of their own."""
    provenance = {"model": settings.model, "revision": settings.revision, "weights_sha256": weights_hash(model)}
    return Writer(model=model, chat=chat, sampler=EXACT, provenance=provenance, precision=settings.precision)


def _claim(out: Path, identity: dict[str, Any], files: Mapping[str, str | None]) -> None:
    """Make the folder this run's, or find that it is; refuse a folder that holds another run."""
    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        if differing := differences(before, json.loads(json.dumps(identity))):
            raise UsageError(f"{out} holds another run ({'; '.join(differing)}); name another folder, or remove this one")
    else:
        write_json(path, {"identity": identity, "files": dict(files), "versions": versions()})


def _hold_out(rows: list[Encoded], n: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to train on and the last ``n`` rows to measure on, at most a quarter of them."""
    n = min(n, len(rows) // 4)
    return rows[: len(rows) - n], rows[len(rows) - n :]


def _general_text(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"general_text {path} can't be read as UTF-8 text: {error}") from None
