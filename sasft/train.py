"""Fine-tuning on a plan, full or LoRA, by any of :mod:`sasft.methods`, on transformers' Trainer.

Two levels: :func:`fit` trains a model in hand on encoded rows; :func:`train` reads files, sets up the
instruments, calls :func:`fit` and leaves a run folder that says how it came about.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import drift
from sasft.batches import MicroBatches, RowsOfSources, batch_of, check_reads
from sasft.chat import Chat, Encoded
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import ensure_writable, sha256_file, write_json
from sasft.manifest import differences
from sasft.methods import Costs, Method, Objective, Workshop, parse_method, response_loss
from sasft.mixing import SELF, TASK, Plan, make_plan
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.precision import Precision, autocast
from sasft.probes import run_probes
from sasft.sampling import EXACT
from sasft.settings import option
from sasft.versions import versions
from sasft.writing import Writer

_COSTS = "costs.json"  # of a method, in a checkpoint


@dataclass(kw_only=True)
class FitSettings:
    """How the weights are moved. Everything here enters the run's identity."""

    lr: float = option(2e-5, "peak learning rate of AdamW")
    schedule: str = option("linear", "learning-rate schedule, by its name in transformers (constant, linear, cosine)")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down; 0 turns it off")
    loss: Literal["sum", "mean"] = option(
        "sum", "sum: cross-entropy summed over response tokens, divided by one constant of the run (the plan's mean "
        "number of loss tokens a step), which keeps self-data force-free; mean: the usual mean over the step's tokens")
    precision: Precision = option("bf16", "precision of the forward pass; weights stay in fp32")
    micro_rows: int = option(16, "rows in memory at once, of similar length; longer steps accumulate gradients, with the same result")
    save_every: int = option(50, "steps between the checkpoints that an interrupted run goes on from; 0 for none")
    seed: int = option(0, "seed of everything random: row order, adapters, dropout")

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UsageError(f"lr must be > 0, got {self.lr}")
        if self.loss not in ("sum", "mean"):
            raise UsageError(f"loss must be sum or mean, got {self.loss!r}")
        if self.precision not in ("bf16", "fp32"):
            raise UsageError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if self.micro_rows < 1:
            raise UsageError(f"micro_rows must be at least 1, got {self.micro_rows}")
        if self.schedule not in (known := [s.value for s in transformers.SchedulerType]):
            raise UsageError(f"unknown schedule {self.schedule!r}; there are: {', '.join(sorted(known))}")


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


class _Trainer(transformers.Trainer):
    """transformers' Trainer, reading a plan and applying an objective, or the token-sum loss."""

    loss_is_scaled_for_ga = True  # losses are sums over the step: nothing is left to average

    def __init__(self, *, batches: MicroBatches, settings: FitSettings, objective: Objective | None, pad_id: int,
                 **kwargs: Any) -> None:
        self.batches, self.settings, self.objective = batches, settings, objective
        plan = batches.plan
        self.divisors = [plan.divisor] * len(plan) if settings.loss == "sum" else plan.weighted_tokens()
        super().__init__(data_collator=lambda rows: batch_of(rows, pad_id, plan.loss_weights), **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would deal out to processes what is theirs already.
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def compute_loss_context_manager(self) -> AbstractContextManager:
        # Around the loss only: accelerate's bf16 mode would leave its wrapper on the model after training.
        return autocast(self.settings.precision, self.args.device.type)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total = response_loss(model, inputs) if self.objective is None else self.objective.loss(model, inputs)
        step = self.state.global_step
        loss = total / self.divisors[step] * self.accelerator.num_processes
        if self.objective is not None and self.accelerator.sync_gradients:  # the step's last micro-batch
            penalty = self.objective.penalty(model, step + 1)
            loss = loss if penalty is None else loss + penalty
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.objective is not None:
            write_json(Path(output_dir) / _COSTS, self.objective.costs.describe())


class _Stages(transformers.TrainerCallback):
    """The objective's later stages; they come before other callbacks, which then see the model as it really is."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.objective.after_step(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.objective.finish(model)


class _Progress(ProgressCallback):
    """The Trainer's bar with the loss beside it; what is logged stays off standard output."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def fit(
    model: nn.Module,
    rows: Mapping[str, Sequence[Encoded]],
    plan: Plan,
    settings: FitSettings,
    *,
    pad_id: int,
    out: Path,
    objective: Objective | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``rows`` as laid out by ``plan``; returns the Trainer's log, one entry a step.

    ``rows`` maps each source of the plan (``task``, ``self``, any other) to its encoded rows. ``objective`` is what a method
    makes of the untrained model (:mod:`sasft.methods`), None the cross-entropy. Checkpoints go to ``out/checkpoints``; if some
    are there, training goes on from the last that is whole. Under ``accelerate launch`` or ``torchrun`` the processes share each
    step's micro-batches; loss and weights are those of one process.

    Raises :class:`UsageError` if the plan reads rows that there are not.
    """
    check_reads(plan, rows)
    args = transformers.TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=len(plan),
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=not progress,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    batches = MicroBatches(plan, rows, settings.micro_rows, args.world_size, args.process_index)
    args.gradient_accumulation_steps = batches.a_process
    stages = [] if objective is None else [_Stages(objective)]
    trainer = _Trainer(model=model, args=args, train_dataset=RowsOfSources(rows), batches=batches, settings=settings,
                       objective=objective, pad_id=pad_id, callbacks=[*stages, *callbacks])
    trainer.remove_callback(ProgressCallback if progress else transformers.PrinterCallback)
    if progress:
        trainer.add_callback(_Progress)
    last = _last_checkpoint(Path(args.output_dir))
    if last is not None and objective is not None:
        vars(objective.costs).update(json.loads((last / _COSTS).read_text(encoding="utf-8")))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.state.log_history


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its state, which is written last, can be read. A run killed while saving has others."""
    def whole(checkpoint: Path) -> bool:
        try:
            return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    found = filter(whole, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return max(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


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
