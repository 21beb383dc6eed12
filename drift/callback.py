"""The recorder as a callback of transformers' Trainer, and of trainers built on it (TRL's SFTTrainer)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drift.recorder import UPDATE, Probe, Recorder, record
from drift.schedules import Schedule, schedule
from drift.weights import METRICS, Side, check_metrics

if TYPE_CHECKING:  # slow to import
    from transformers import Trainer


class DriftCallback(TrainerCallback):
    """Record drift and probes while a Trainer trains; arguments as in :func:`drift.record`.

    >>> callback = DriftCallback(out=None, every=10)  # Trainer(..., callbacks=[callback])

    ``out`` defaults to the Trainer's ``output_dir``. Whole-model figures join the Trainer's next log entry; a Trainer asks its reporters (W&B,
    TensorBoard) before the callbacks that it was given, so use :meth:`add_to` for the figures to reach those as well. A run resumed
    from a checkpoint goes on in the same table; as the model has then left θ₀, ``reference`` must be given. A
    :class:`~drift.sources.SourceGradients` among the probes takes its tags from the batch under its ``key``; a Trainer passes such a column
    on with ``remove_unused_columns=False`` and a collator that keeps it. If training crashes, :func:`drift.release` takes it off the model.
    """

    def __init__(self, out: Path | str | None = "", *, every: int | Schedule = 1, probes: Sequence[Probe] = (),
                 reference: Side | None = None, metrics: Collection[str] = ("l2", "rel"), run: str = "run",
                 config: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
        schedule(every), check_metrics(metrics, [*METRICS, UPDATE])
        self.out, self.every, self.probes, self.reference = out, every, probes, reference
        self.metrics, self.run, self.config, self.overwrite = metrics, run, config, overwrite
        self.recorder: Recorder | None = None
        self._pending: dict[str, float] = {}

    def add_to(self, trainer: "Trainer") -> Self:
        """Put the callback in front of the Trainer's others, so that its reporters get the figures too."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(c for c in callbacks if c is not self)]
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model, **kwargs) -> None:
        out = args.output_dir if self.out == "" else self.out
        self.recorder = record(model, out, every=self.every, probes=self.probes, reference=self.reference, metrics=self.metrics,
                               run=self.run, config=self.config, start_step=state.global_step, overwrite=self.overwrite)
        self.recorder.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._pending |= self.recorder.step(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs) -> None:
        if logs is not None and self._pending and "loss" in logs:
            logs |= self._pending
            state.log_history[-1] |= self._pending
            self._pending = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.recorder.__exit__(None, None, None)
