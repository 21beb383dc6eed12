"""Fine-tuning on a plan: ordinary SFT of task rows and self rows, full or LoRA, on transformers' Trainer.

Two levels: :func:`fit` trains a model in hand on encoded rows; :func:`train` reads files, sets up the
instruments, calls :func:`fit` and leaves a run folder that says how it came about.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

import drift
from sasft.chat import Chat, Encoded, collate
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import ensure_writable, sha256_file, write_json
from sasft.mixing import SELF, TASK, Plan, make_plan
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.precision import Precision, autocast
from sasft.probes import run_probes
from sasft.settings import option
from sasft.versions import versions


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
    """One run of SA-SFT from files: what to train, on what, and what to record."""

    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")
    task: str = option("", "JSONL file of task rows")
    self_data: str | None = option(None, "JSONL file of self-dialogues, as written by `sasft generate`")
    out: str = option("", "folder of the run")
    lam: float = option(0.5, "share of self rows in the mix, in [0, 1); 0 is plain fine-tuning")
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


class _Rows(Dataset):
    """The rows of all sources, addressed by (source, index)."""

    def __init__(self, rows: Mapping[str, Sequence[Encoded]]) -> None:
        self.rows = rows

    def __getitem__(self, key: tuple[str, int]) -> Encoded:
        return self.rows[key[0]][key[1]]

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))


class _MicroBatches:
    """Every step of the plan cut into the same number of micro-batches, rows of similar length together, none empty."""

    def __init__(self, plan: Plan, rows: Mapping[str, Sequence[Encoded]], micro_rows: int) -> None:
        self.plan, self.rows = plan, rows
        self.per_step = -(-max(map(len, plan)) // micro_rows)
        if self.per_step > min(map(len, plan)):
            raise UsageError(f"micro_rows={micro_rows} cuts the largest step into {self.per_step} micro-batches, more "
                             f"than the {min(map(len, plan))} rows of the smallest step; raise micro_rows")

    def __iter__(self):
        for step in self.plan:
            ordered = sorted(step, key=lambda key: len(self.rows[key[0]][key[1]].input_ids))
            bounds = [part * len(ordered) // self.per_step for part in range(self.per_step + 1)]
            for begin, end in pairwise(bounds):
                yield ordered[begin:end]

    def __len__(self) -> int:
        return len(self.plan) * self.per_step


def response_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    r"""Cross-entropy summed over the labelled tokens of a batch, in nats, accumulated in fp32.

    :math:`\sum_i \sum_{t \in M_i} -\log p_\theta(y_{i,t} \mid x_i, y_{i,<t})`. ``batch`` comes from
    :func:`sasft.chat.collate`; vocabulary logits are computed for the response columns only.
    """
    start = batch["response_start"]
    labels = batch["labels"][:, start:]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
        use_cache=False, logits_to_keep=labels.shape[1] + 1,
    ).logits[:, :-1]
    counted = labels != -100
    return nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")


class _Trainer(transformers.Trainer):
    """transformers' Trainer, reading a plan and applying the token-sum loss."""

    loss_is_scaled_for_ga = True  # both losses below are sums over the step: nothing is left to average

    def __init__(self, *, batches: _MicroBatches, settings: FitSettings, pad_id: int, **kwargs: Any) -> None:
        self.batches = batches
        self.settings = settings
        self.divisor = sum(batches.plan.loss_tokens()) / len(batches.plan)
        super().__init__(data_collator=lambda rows: collate(rows, pad_id), **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the step's loss tokens

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def compute_loss_context_manager(self) -> AbstractContextManager:
        # Around the loss only: accelerate's bf16 mode would leave its wrapper on the model after training.
        return autocast(self.settings.precision, self.args.device.type)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total = response_loss(model, inputs)
        divisor = self.divisor if self.settings.loss == "sum" else num_items_in_batch
        return total / divisor * self.accelerator.num_processes


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
    callbacks: Sequence[transformers.TrainerCallback] = (),
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``rows`` as laid out by ``plan``; returns the Trainer's log, one entry a step.

    ``rows`` maps each source of the plan (``task``, ``self``) to its encoded rows. Checkpoints go to
    ``out/checkpoints``; if some are there, training goes on from the last.
    """
    batches = _MicroBatches(plan, rows, settings.micro_rows)
    args = transformers.TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=len(plan),
        gradient_accumulation_steps=batches.per_step,
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
    trainer = _Trainer(model=model, args=args, train_dataset=_Rows(rows), batches=batches, settings=settings, pad_id=pad_id,
                       callbacks=list(callbacks))
    trainer.remove_callback(ProgressCallback if progress else transformers.PrinterCallback)
    if progress:
        trainer.add_callback(_Progress)
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=last)
    return trainer.state.log_history


def train(settings: TrainSettings) -> dict[str, Any]:
    """Run SA-SFT (or plain fine-tuning, at ``lam=0``) from files to a run folder; returns the run's summary.

    The folder holds ``config.json`` (settings, versions, hashes of data and weights), ``plan.jsonl`` and ``mix.json``
    (every row of every step; λ realised in rows and tokens), ``drift/`` (the recorded table), ``log.json``,
    ``model/`` and, once finished, ``summary.json``. The same call again returns a finished run's summary, or goes on
    with an unfinished one; another configuration in the same folder is refused.
    """
    out = Path(settings.out)
    ensure_writable(out)
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
    rows: dict[str, list[Encoded]] = {}
    held_out: dict[str, list[Encoded]] = {}
    for source, read in ((TASK, task_rows), (SELF, self_rows)):
        encoded, report = encode_rows(read, chat, settings.max_tokens, too_long=settings.too_long)
        rows[source], held_out[source] = _hold_out(encoded, settings.probe_rows if settings.record_every else 0)
        if encoded:
            print(f"{source}: {report}; {len(held_out[source])} held out to measure on", file=sys.stderr)
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
    log = fit(model, rows, plan, settings, pad_id=chat.pad_id, out=out, callbacks=callbacks)
    write_json(out / "log.json", log)
    if settings.save_model:
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    summary = {"mix": plan.report(), "weights_sha256": weights_hash(model),
               "recorded": callbacks[0].recorder.latest() if callbacks else {},
               "loss": [entry["loss"] for entry in log if "loss" in entry]}
    write_json(done, summary)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # three times the model's size, and of no use any more
    return summary


def _claim(out: Path, identity: dict[str, Any], files: Mapping[str, str | None]) -> None:
    """Make the folder this run's, or find that it is; refuse a folder that holds another run."""
    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        now = json.loads(json.dumps(identity))
        differing = [f"{part}.{k} is {before[part].get(k)!r}, now {now[part].get(k)!r}" for part in now
                     for k in {**before[part], **now[part]} if before[part].get(k) != now[part].get(k)]
        if differing:
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
