"""Training a model in hand on a plan, by any objective of :mod:`sasft.methods`, on transformers' Trainer."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from drift import DriftCallback, SourceGradients
from sasft.batches import MicroBatches, RowsOfSources, batch_of, check_reads
from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.files import saving, write_json
from sasft.methods import Objective, response_loss
from sasft.mixing import Plan
from sasft.packing import check_rows_apart
from sasft.precision import Precision, autocast, resolved
from sasft.processes import gathered, own_part, sharding_asked
from sasft.sampling import positions
from sasft.settings import option

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
    precision: Precision = option("auto", "precision of the forward pass: bf16, fp32, or auto, which is bf16 where the hardware "
                                "multiplies it and fp32 elsewhere; weights stay in fp32")
    micro_rows: int = option(16, "rows in memory at once, of similar length; longer steps accumulate gradients, with the same result")
    packing: bool = option(False, "lay the rows in memory end to end instead of side by side, so that nothing is padding; each still "
                                  "sees itself alone, and the result is the same")
    micro_tokens: int | None = option(None, "with packing: tokens in memory at once, instead of micro_rows")
    activation_checkpointing: bool = option(False, "keep the layers' inputs only and compute the rest anew in the backward pass: less "
                                                   "memory for a third more time, with the same result")
    save_every: int = option(50, "steps between the checkpoints that an interrupted run goes on from; 0 for none")
    seed: int = option(0, "seed of everything random: row order, adapters, dropout")

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr must be > 0 and finite, got {self.lr}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:  # what numpy takes
            raise UsageError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.loss not in ("sum", "mean"):
            raise UsageError(f"loss must be sum or mean, got {self.loss!r}")
        self.precision = resolved(self.precision)  # what a run's identity tells
        if self.micro_rows < 1:
            raise UsageError(f"micro_rows must be at least 1, got {self.micro_rows}")
        if self.micro_tokens is not None and not (self.packing and self.micro_tokens >= 1):
            raise UsageError(f"micro_tokens must be at least 1, got {self.micro_tokens}" if self.packing else
                             f"micro_tokens={self.micro_tokens} is for packed rows; set packing too, or leave it out")
        if self.schedule not in (known := [s.value for s in transformers.SchedulerType]):
            raise UsageError(f"unknown schedule {self.schedule!r}; there are: {', '.join(sorted(known))}")


class _Trainer(transformers.Trainer):
    """transformers' Trainer, reading a plan and applying an objective, or the token-sum loss."""

    loss_is_scaled_for_ga = True  # losses are sums over the step: nothing is left to average

    def __init__(self, *, batches: MicroBatches, settings: FitSettings, objective: Objective | None, pad_id: int,
                 sources: Sequence[SourceGradients], **kwargs: Any) -> None:
        self.batches, self.settings, self.objective, self.sources = batches, settings, objective, sources
        self.spent: Counter[str] = Counter()  # by this process on its own micro-batches
        plan = batches.plan
        self.divisors = [plan.divisor] * len(plan) if settings.loss == "sum" else plan.weighted_tokens()
        super().__init__(data_collator=lambda rows: batch_of(rows, pad_id, plan.loss_weights, packing=settings.packing), **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        # Not prepared by accelerate, which would deal out to processes what is theirs already.
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def compute_loss_context_manager(self) -> AbstractContextManager:
        # Around the loss only: accelerate's bf16 mode would leave its wrapper on the model after training.
        return autocast(self.settings.precision, self.args.device.type)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        for sources in self.sources:
            self._tag(sources, inputs)
        total = response_loss(model, inputs) if self.objective is None else self._loss_of_objective(model, inputs)
        step = self.state.global_step
        loss = total / self.divisors[step] * self.accelerator.num_processes
        if self.objective is not None and self.accelerator.sync_gradients:  # the step's last micro-batch
            penalty = self.objective.penalty(model, step + 1)
            loss = loss if penalty is None else loss + penalty
        return loss

    def _tag(self, sources: SourceGradients, inputs: dict[str, Any]) -> None:
        """Tell an instrument whose every row or token is."""
        of_rows = torch.tensor([sources.sources.index(source) for source in inputs["source"]])
        if "rows" not in inputs:
            sources.tag(of_rows)
        else:
            rows = inputs["rows"].cpu()
            sources.tag(of_rows[rows], units=rows)
            inputs["whole"] = True

    def _loss_of_objective(self, model, inputs) -> torch.Tensor:
        costs = vars(self.objective.costs)
        before = dict(costs)
        total = self.objective.loss(model, inputs)
        self.spent.update({name: costs[name] - before[name] for name in costs})
        return total

    def add_up_costs(self) -> None:
        """Bring the costs of all processes together: what each has spent on its own micro-batches is added up."""
        costs = vars(self.objective.costs)
        mine = torch.tensor([self.spent[name] for name in costs], device=self.args.device)
        for name, own, everyone in zip(costs, mine.tolist(), self.accelerator.reduce(mine).tolist(), strict=True):
            costs[name] += int(everyone) - own
        self.spent.clear()

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.check_finite(f"step {self.state.global_step + 1}", {"loss": self._tr_loss, "gradient norm": gathered(norm)})
        return norm

    def check_weights(self) -> None:
        """The last step's weights, which no loss has been computed with."""
        parts = [own_part(p).detach() for p in self.model.parameters() if p.requires_grad]
        largest = torch.stack([torch.zeros_like(self._tr_loss), *(part.abs().amax().to(self._tr_loss) for part in parts if part.numel())])
        self.check_finite(f"step {self.state.global_step}", {"largest weight": largest.amax()})

    def check_finite(self, when: str, found: Mapping[str, torch.Tensor]) -> None:
        """Raise :class:`UsageError` in all processes for numbers that are not finite in one of them."""
        sums = self.accelerator.reduce(torch.stack([value.detach().float() for value in found.values()])).tolist()
        if bad := [f"the {name} is {value}" for name, value in zip(found, sums, strict=True) if not math.isfinite(value)]:
            raise self.diverged(f"{when}: {', '.join(bad)}")

    def diverged(self, what: str) -> UsageError:
        """The error that says since when, and what helps."""
        if not self.state.global_step:
            return UsageError(f"{what}, though nothing is trained yet; look at the model's weights, the precision and the rows")
        losses = [f"{entry['loss']:.4g}" for entry in self.state.log_history if "loss" in entry]
        return UsageError(f"training has diverged, {what}; the losses until then: {', '.join(losses[-3:]) or 'none'}. Lower lr "
                          f"({self.settings.lr:g}) or raise warmup_steps ({self.settings.warmup_steps}). What was recorded before stays")

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        with saving(f"the checkpoint of step {step}", Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.objective is not None:
            self.add_up_costs()
            if self.args.should_save:
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

    def close(self) -> None:
        """Leave the line to what an error says."""
        if self.training_bar is not None:
            self.training_bar.close()


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
    are there, training goes on from the last that is whole. A :class:`drift.SourceGradients` among the probes of a
    :class:`drift.DriftCallback` is told whose each row is, or of packed rows each token.

    Under ``accelerate launch`` or ``torchrun`` the processes share each step's micro-batches; loss and weights are those of one
    process. With an accelerate configuration of ``fsdp_version: 2`` the weights are sharded, and stay so in ``model``
    (:func:`sasft.processes.trained_weights` gathers them).

    Raises :class:`UsageError` if the plan reads rows that there are not, if rows are longer than the model takes, if it does not keep
    packed rows apart, or if the objective can't do with packing, activation checkpointing, sharded weights or gradients by source. Also, in all processes,
    before a step is taken whose loss or gradient norm is not finite, or where a recording or the last step's weights show that
    training has diverged; what was recorded and saved before stays. Also for a checkpoint that can't be written, from the last one
    before which the same call goes on.
    """
    check_reads(plan, rows)
    check_positions(model, rows)
    sources = [p for c in callbacks if isinstance(c, DriftCallback) for p in c.probes if isinstance(p, SourceGradients)]
    _check_goes_together(model, plan, settings, objective, sources)
    if settings.packing:
        source, index = plan.steps[0][0]
        check_rows_apart(model, rows[source][index])
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
        logging_nan_inf_filter=False,  # which would log 0 in their place
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        activation_checkpointing=settings.activation_checkpointing,
        disable_tqdm=not progress,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    args.mixed_precision = "no"  # the settings say it, and not accelerate's configuration
    batches = MicroBatches(plan, rows, settings.micro_rows, args.world_size, args.process_index, packing=settings.packing,
                           micro_tokens=settings.micro_tokens)
    if batches.a_process > 1 and any(not s.accumulate for s in sources):
        raise UsageError(f"a step has {batches.a_process} micro-batches, so SourceGradients needs accumulate=True (or raise micro_rows)")
    args.gradient_accumulation_steps = batches.a_process
    stages = [] if objective is None else [_Stages(objective)]
    trainer = _Trainer(model=model, args=args, train_dataset=RowsOfSources(rows), batches=batches, settings=settings,
                       objective=objective, pad_id=pad_id, sources=sources, callbacks=[*stages, *callbacks])
    _check_sharding(trainer)
    trainer.remove_callback(ProgressCallback if progress else transformers.PrinterCallback)
    if progress:
        trainer.add_callback(bar := _Progress())
    last = _last_checkpoint(Path(args.output_dir))
    if last is not None and objective is not None:
        vars(objective.costs).update(json.loads((last / _COSTS).read_text(encoding="utf-8")))
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.check_weights()
    except FloatingPointError as error:  # of an instrument
        raise trainer.diverged(f"after step {trainer.state.global_step}: {error}") from error
    finally:
        if progress:
            bar.close()
        if settings.activation_checkpointing:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
    if objective is not None:
        trainer.add_up_costs()
    trainer.accelerator.wait_for_everyone()  # who goes on may remove checkpoints that others still write
    return trainer.state.log_history


def check_positions(model: nn.Module, rows: Mapping[str, Sequence[Encoded]]) -> None:
    """Raise :class:`UsageError` for rows, by source, of more tokens than ``model`` takes (:func:`sasft.sampling.positions`)."""
    most = positions(model)
    for source, encoded in rows.items():
        if over := [length for length in map(len, (row.input_ids for row in encoded)) if length > most]:
            raise UsageError(f"{len(over)} of {len(encoded)} rows of {source} have more tokens than the {most} that the model takes (the "
                             f"longest {max(over)}); set max_tokens to {most} (of a mix, when it is mixed), and too_long to truncate or drop")


def _check_goes_together(model: nn.Module, plan: Plan, settings: FitSettings, objective: Objective | None,
                         sources: Sequence[SourceGradients]) -> None:
    for name in ("packing", "activation_checkpointing"):
        if getattr(settings, name) and objective is not None and objective.inside:
            raise UsageError(f"{name} can't be had with {_name(objective)}, which reaches into the model's layers row by row; turn it off")
    if settings.activation_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(f"a {type(model).__name__} does not support activation checkpointing; turn activation_checkpointing off")
    if sources and not (objective is None or objective.one_pass):
        raise UsageError(f"SourceGradients can't be had with {_name(objective)}, which does more than one pass with gradients over each micro-batch")
    read = {source for step in plan for source, _ in step}
    if unnamed := [min(read - set(s.sources)) for s in sources if read - set(s.sources)]:
        raise UsageError(f"the plan reads the source {unnamed[0]!r}, which SourceGradients does not name; name all that are read")


def _check_sharding(trainer: _Trainer) -> None:
    if not trainer.is_fsdp_enabled:
        if sharding_asked():
            raise UsageError("accelerate was told to shard the weights (use_fsdp), which it does over several GPUs only; leave it out")
        return
    if (version := trainer.accelerator.state.fsdp_plugin.fsdp_version) != 2:
        raise UsageError(f"accelerate's configuration has fsdp_version {version}; set fsdp_version: 2")
    objective = trainer.objective
    if objective is not None and not objective.in_step:
        raise UsageError(f"weights sharded by FSDP2 can't be had with {_name(objective)}, which does more with them than passes that every "
                         "process makes; take DDP (leave out use_fsdp)")


def _name(objective: Objective) -> str:
    return f"the objective {type(objective).__name__.strip('_')}"


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its state, which is written last, can be read. A run killed while saving has others."""
    def whole(checkpoint: Path) -> bool:
        try:
            return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    found = filter(whole, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return max(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
