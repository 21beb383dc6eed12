"""The recorder as a callback of transformers' Trainer, and of trainers built on it (TRL's SFTTrainer)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drift.recorder import Probe, Recorder, record
from drift.reference import Reference
from drift.schedules import Schedule


class DriftCallback(TrainerCallback):
    """Record drift and probes while a Trainer trains; arguments as in :func:`drift.record`.

    >>> callback = DriftCallback(out=None, every=10)  # Trainer(..., callbacks=[callback])

    ``out`` defaults to the Trainer's ``output_dir``. Whole-model figures join the Trainer's next log entry. A run resumed
    from a checkpoint goes on in the same table; as the model has then left θ₀, ``reference`` must be given.
    """

    def __init__(self, out: Path | str | None = "", *, every: int | Schedule = 1, probes: Sequence[Probe] = (),
                 reference: Reference | None = None, run: str = "run", config: Mapping[str, Any] | None = None) -> None:
        self.out, self.every, self.probes, self.reference = out, every, probes, reference
        self.run, self.config = run, config
        self.recorder: Recorder | None = None
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model, **kwargs) -> None:
        out = args.output_dir if self.out == "" else self.out
        self.recorder = record(model, out, every=self.every, probes=self.probes, reference=self.reference, run=self.run,
                               config=self.config, start_step=state.global_step)
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
