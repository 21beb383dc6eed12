"""What a command would do and what it would take, said before it does any of it: rows, tokens, steps, time and memory.

Nothing is written. What is measured is measured on the model itself, on this machine, and what is reckoned says by which rule.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from drift.names import parameters, trainable
from sasft.chat import Chat, Encoded
from sasft.costing import (
    TrainingCost,
    cache_bytes,
    measure_reading,
    measure_recording,
    measure_training,
    measure_writing,
    weight_bytes,
)
from sasft.data import encode_rows, read_rows
from sasft.evaluation import Answered, EvaluateSettings, Predicted
from sasft.evaluation.request import taken_apart
from sasft.evaluation.run import choose, make_suites
from sasft.evaluation.subject import Subject
from sasft.mixing import SELF, TASK, Plan
from sasft.mixture import MixSettings, hold_out, lay_out, plan_of
from sasft.models import load_model
from sasft.pipeline import mix_table, parts_of, suites_asked
from sasft.precision import Precision
from sasft.probes import run_probes
from sasft.talk import TalkSettings
from sasft.terminal import counted, duration, gib
from sasft.train import Rows, TrainSettings, encode, load, read_general_text, read_material
from sasft.train import lay_out as lay_out_training
from sasft.trainer import check_positions

Loaded = tuple[nn.Module, PreTrainedTokenizerBase]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What is to be said, and the seconds that it comes to (None where they are not known)."""

    text: str
    seconds: float | None = None


def of_talk(settings: TalkSettings, loaded: Loaded | None = None) -> Forecast:
    """Self-dialogues: how many tokens at most, and how long a step of a batch takes."""
    there = Path(settings.out).read_bytes().count(b"\n") if Path(settings.out).exists() else 0
    rows, longest = settings.n * settings.turns, settings.max_user_tokens + settings.max_new_tokens
    asked, answered = rows * settings.max_user_tokens, rows * settings.max_new_tokens
    lines = [f"{settings.n} self-dialogues of {counted(settings.turns, 'user turn')}: up to {asked:,} tokens of user turns and "
             f"{answered:,} of answers (all of them at their length caps), to {settings.out}"]
    if there:
        lines.append(f"{there} rows are there already")
    if settings.backend == "vllm":
        return Forecast("\n".join([*lines, "time and memory: not estimated, since vLLM batches and takes memory by itself"]))
    model, tokenizer = loaded or load_model(settings.model, revision=settings.revision)
    chat = Chat(tokenizer)
    prefix = chat.user_prefix_ids()
    reading, step = measure_writing(model, prefix, settings.batch_size, settings.precision, chat.pad_id)
    batches = math.ceil(max(rows - there, 0) / settings.batch_size)
    seconds = batches * (2 * reading + longest * step)
    width = len(prefix) + settings.turns * longest
    lines += [
        f"time on {model.device.type}: at most about {duration(seconds)} ({step:.3g} s a token of {settings.batch_size} rows "
        "together, measured on a few; dialogues that end before their caps take less, user turns that are passed over are not "
        "counted)",
        _running(model, weight_bytes(model), settings.batch_size, width, settings.precision)]
    return Forecast("\n".join(lines), seconds)


def of_mix(settings: MixSettings) -> Forecast:
    """The mix itself, which is laid out in memory."""
    mixture = lay_out(settings)
    reports = [f"{name}: {report}; {len(mixture.held_out[name])} held out to measure on"
               for name, report in mixture.reports.items()]
    read = (mixture.rows[source][i] for step in mixture.plan for source, i in step)
    size = sum(len(row.response) + sum(len(message["content"]) for message in row.prompt) for row in read)
    return Forecast("\n".join([
        *reports, mix_table(mixture.plan.report()),
        f"disk: about {gib(size)} in {settings.out} (a line for every row that is read)",
        "time: as long as this has taken", "memory: that of the rows"]), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reckoned:
    """What a training from files would be, without what its method adds: the steps, their cost, and that of the recordings beside them.

    ``recording_seconds``: of the first recording, which none exceeds by much. ``snapshot_bytes``: the untrained weights that drift is measured from.
    """

    model: nn.Module
    plan: Plan
    reports: Sequence[str]
    training: TrainingCost
    recordings: int
    recording_seconds: float
    snapshot_bytes: int

    @property
    def seconds(self) -> float:
        """Of all steps and recordings."""
        return self.training.seconds + self.recordings * self.recording_seconds

    @property
    def bytes(self) -> int:
        """A floor for the peak of memory."""
        return self.training.bytes + self.snapshot_bytes


def reckon(settings: TrainSettings) -> Reckoned:
    """Measure a step and a recording of a training whose files are there."""
    material = read_material(settings)
    model, tokenizer = load(settings)
    chat = Chat(tokenizer)
    rows, held_out, reports = encode(settings, material, material.rows, chat)
    return _reckon(settings, model, lay_out_training(settings, material, rows), rows, held_out, chat, reports)


def _reckon(settings: TrainSettings, model: nn.Module, plan: Plan, rows: Rows, held_out: Rows, chat: Chat, reports: Sequence[str]) -> Reckoned:
    model = settings.chosen_method().prepare(model, settings.seed)
    check_positions(model, rows), check_positions(model, held_out)
    cost = measure_training(model, plan, rows, settings, chat.pad_id)
    recordings, seconds, snapshot = 0, 0.0, 0
    if settings.records:
        probes = run_probes(chat, held_out, read_general_text(settings.general_text), precision=settings.precision)
        recordings, seconds = 1 + math.ceil(len(plan) / settings.steps_between(len(plan))), measure_recording(model, probes)
        snapshot = sum(p.numel() * p.element_size() for p in trainable(model).values())
    return Reckoned(model=model, plan=plan, reports=reports, training=cost, recordings=recordings, recording_seconds=seconds, snapshot_bytes=snapshot)


def of_training(settings: TrainSettings) -> Forecast:
    """Training: the mix as it would be without what a method makes of it, and the cost of its steps and recordings."""
    return _training(settings, reckon(settings))


def _training(settings: TrainSettings, found: Reckoned) -> Forecast:
    cost, plan = found.training, found.plan
    trained, whole = (sum(p.numel() for p in some.values()) for some in (trainable(found.model), parameters(found.model)))
    method = "" if settings.method == "sft" else f" and without what the method {settings.method} adds"
    recordings = (f"with {counted(found.recordings, 'recording')} of about {duration(found.recording_seconds)} each, one of which was measured"
                  if found.recordings else "without recordings")
    device = next(found.model.parameters()).device.type
    lines = [
        *found.reports, mix_table(plan.report()),
        f"{cost.tokens:,} tokens through the model, prompts and padding included, in {len(plan)} steps; {trained:,} of {whole:,} "
        f"parameters are trained ({trained / whole:.2%})",
        f"time on {device}: about {duration(found.seconds)} ({1 / cost.seconds_per_token:,.0f} tokens/s forward and backward, "
        f"{cost.optimizer_seconds:.3g} s an optimiser step, measured on one micro-batch; one process, {recordings}, "
        f"without checkpoints{method})",
        f"memory: at least {gib(found.bytes)} ({gib(cost.weight_bytes)} weights, {gib(cost.state_bytes)} gradients "
        f"and AdamW's moments, {gib(cost.activation_bytes)} activations of the largest micro-batch, by what autograd kept of "
        f"the measured one, {gib(found.snapshot_bytes)} the untrained weights to measure drift from{method})"]
    return Forecast("\n".join(lines), found.seconds)


def of_evaluation(settings: EvaluateSettings, suites: Sequence[str] | None = None, loaded: Loaded | None = None) -> Forecast:
    """Evaluation: items and tokens of every suite, and how long reading and writing take."""
    model, tokenizer = loaded or load_model(settings.model, revision=settings.revision)
    chat = Chat(tokenizer)
    subject = Subject(model=model, chat=chat, precision=settings.precision)
    lines, seconds, longest = [], 0.0, 0
    for suite in make_suites(taken_apart(settings.suites) if suites is None else suites, chat, settings):
        items = choose(suite.items, settings.limit)
        if not items:
            lines.append(f"{suite.name}: not estimated, since lm-eval reads and batches by itself")
            continue
        prompts = sorted((suite.prompt_ids(subject, item) for item in items), key=len)
        middle, tokens = prompts[len(prompts) // 2], sum(map(len, prompts))
        cap = (settings.max_new_tokens or suite.max_new_tokens) if isinstance(suite, Answered) else 0
        if cap:
            reading, step = measure_writing(model, middle, settings.batch_size, settings.precision, chat.pad_id)
            batches = math.ceil(len(items) / settings.batch_size)
            takes = batches * (reading + cap * step)
        else:
            precision = "fp32" if isinstance(suite, Predicted) else settings.precision
            passes = 1 if settings.base is None or not isinstance(suite, Predicted) else 2
            takes = tokens * passes * measure_reading(model, middle, settings.batch_size, precision)
        longest, seconds = max(longest, len(prompts[-1]) + cap), seconds + takes
        writes = f", up to {len(items) * cap:,} to write; at most" if cap else ";"
        lines.append(f"{suite.name}: {len(items)} items, {tokens:,} tokens to read{writes} about {duration(takes)}")
    weights = weight_bytes(model) * (1 if settings.base is None else 2)
    lines += [f"time on {model.device.type}: about {duration(seconds)} (a batch of middling prompts and a few written tokens of "
              "each suite were measured)", _running(model, weights, settings.batch_size, longest, settings.precision)]
    return Forecast("\n".join(lines), seconds)


def of_run(settings: Any) -> Forecast:
    """All parts. Self-dialogues that are not written yet count as the longest that can be, so that figures are upper bounds."""
    parts = parts_of(settings)
    loaded = load_model(settings.model, revision=settings.revision)
    chat = Chat(loaded[1])
    said: list[tuple[str, Forecast]] = []
    encoded: Rows = {}
    held_out: Rows = {}
    reports = []
    for name, source in parts.mix.named().items():
        if parts.talk and name == SELF and not parts.talk.kept.exists():
            longest = [_longest(parts.talk, chat)] * parts.talk.n * parts.talk.turns
            encoded[name], held_out[name] = hold_out(longest, parts.mix.hold_out)
            reports.append(f"{name}: rows to be written, counted as {len(encoded[name])} of the longest that can be")
        else:
            whole, report = encode_rows(read_rows(source), chat, parts.mix.max_tokens, parts.mix.too_long, parts.mix.turns)
            encoded[name], held_out[name] = hold_out(whole, parts.mix.hold_out)
            reports.append(f"{name}: {report}; {len(held_out[name])} held out to measure on")
    if parts.talk:
        said.append(("self-dialogues", of_talk(parts.talk, loaded)))
    plan = plan_of({name: [e.loss_tokens for e in rows] for name, rows in encoded.items()}, parts.mix)
    evaluation = None
    if parts.before:
        evaluation = of_evaluation(dataclasses.replace(parts.before, training=None), suites_asked(settings), loaded)
        said.append(("the model before training", evaluation))
    del loaded
    model, _ = load(parts.train)
    trained_on, measured_on = ({TASK: [], SELF: [], **found} for found in (encoded, held_out))
    said.append(("mix and training", _training(parts.train, _reckon(parts.train, model, plan, trained_on, measured_on, chat, reports))))
    if evaluation:
        said.append(("the model after training", Forecast("as before training, and once more for the KL to the untrained model",
                                                          evaluation.seconds)))
    known = [forecast.seconds for _, forecast in said if forecast.seconds is not None]
    text = "\n\n".join(f"== {title}\n{forecast.text}" for title, forecast in said)
    rest = "" if len(known) == len(said) else ", and what is not estimated"
    return Forecast(f"{text}\n\nall in all: about {duration(sum(known))}{rest}", sum(known))


DRY_RUNS: Mapping[str, Callable[[Any], Forecast]] = {
    "talk": of_talk, "mix": of_mix, "train": of_training, "evaluate": of_evaluation, "run": of_run}
"""The forecast of each command that works long."""


def _running(model: nn.Module, weights: int, rows: int, tokens: int, precision: Precision) -> str:
    kept = rows * tokens * cache_bytes(model.config, precision)
    return (f"memory: about {gib(weights + kept)} ({gib(weights)} weights, {gib(kept)} keys and values of {rows} rows of "
            f"{tokens} tokens, by the model's configuration)")


def _longest(settings: TalkSettings, chat: Chat) -> Encoded:
    before = settings.turns * settings.max_user_tokens + (settings.turns - 1) * settings.max_new_tokens
    prompt = [*chat.user_prefix_ids(), *[chat.pad_id] * before]
    return Encoded.answered(prompt, [*[chat.pad_id] * settings.max_new_tokens, chat.end_of_turn])
