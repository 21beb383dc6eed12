"""Fine-tuning from files to a run folder, full or LoRA, by any of :mod:`sasft.methods`.

It sets up the instruments, calls :func:`sasft.trainer.fit` and leaves a folder that says how it came about.
"""

import json
import math
import shutil
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

import drift
from sasft.chat import Chat, Encoded
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import ensure_writable, saving, sha256_file, write_json
from sasft.manifest import claim
from sasft.methods import Costs, Method, Workshop, parse_method
from sasft.mixing import SELF, TASK, Plan, make_plan, mix
from sasft.mixture import Mixture, hold_out, read_mixture
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.precision import autocast
from sasft.probes import run_probes
from sasft.processes import first_goes_first, in_one_piece, join, sharding_asked
from sasft.sampling import EXACT
from sasft.selfdialogue import generated_tokens
from sasft.settings import option
from sasft.sources import Source
from sasft.trainer import FitSettings, check_positions, fit
from sasft.versions import versions
from sasft.writing import Writer

_FILES = ("mix", "task", "self_data", "general_text")
_DATA, _MODEL, _METHOD, _RECORD = "what is trained on", "the model", "the method", "what is recorded and kept"
_GONE_ON_WITH = ("checkpoints", "drift", "method")  # folders in a run's that a later call reads
_RECORDINGS = 10  # in a run, beside the one before it
# What a mix has settled already; without one, these hold where nothing else is asked for.
_WITHOUT_A_MIX: Mapping[str, Any] = {
    "lam": 0.5, "steps": 100, "rows_per_step": 16, "max_tokens": 1024, "too_long": "error", "probe_rows": 16}


@dataclass(kw_only=True)
class TrainSettings(FitSettings):
    """One run from files: what to train, on what, by which method, and what to record.

    Trained on are either a mix that `sasft mix` has written, or task rows and self-dialogues in the ratio that lam says.
    """

    out: str = option("", "folder of the run; a stopped run goes on there", _DATA)
    mix: str | None = option(None, "folder of a mix, as written by `sasft mix`: its rows, in its steps", _DATA)
    task: str = option("", "without a mix: JSONL or Parquet file, or hub dataset, of task rows", _DATA)
    self_data: str | None = option(None, "without a mix: JSONL file of self-dialogues, as written by `sasft talk`", _DATA)
    lam: float | None = option(None, "share of self rows in the mix, in [0, 1); 0 is plain fine-tuning (0.5; a mix has settled "
                                     "this and the next four)", _DATA)
    steps: int | None = option(None, "optimiser steps (100)", _DATA)
    rows_per_step: int | None = option(None, "rows a step, of both sources together (16)", _DATA)
    max_tokens: int | None = option(None, "longest row allowed, in tokens (1024)", _DATA)
    too_long: Literal["error", "truncate", "drop"] | None = option(None, "what to do with longer rows (error)", _DATA)
    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name)", _MODEL)
    revision: str | None = option(None, "revision of a hub model", _MODEL)
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers; 0 trains all weights", _MODEL)
    lora_alpha: float = option(16.0, "LoRA scale: updates are multiplied by alpha / rank", _MODEL)
    method: str = option("sft", "fine-tuning method, by its name (`sasft train --help` lists them); sft: the ordinary loss on "
                                "the rows of the mix", _METHOD)
    method_options: str = option("", "options of the method: name=value, with blanks between them", _METHOD)
    record_every: int | None = option(None, "steps between recordings of drift, alignment, KL and style, each as dear as some five "
                                            "steps; 0 for none (a tenth of the run)", _RECORD)
    probe_rows: int | None = option(None, "rows of each file held out of training to measure alignment, KL and style on (16; a "
                                          "mix has settled it)", _RECORD)
    general_text: str | None = option(None, "UTF-8 text file on which to record the negative log-likelihood", _RECORD)
    save_model: bool = option(True, "save the trained model (for LoRA, the adapter) in the run folder", _RECORD)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix:
            settled = [name for name in ("task", "self_data", *_WITHOUT_A_MIX) if getattr(self, name) not in (None, "")]
            if settled:
                raise UsageError(f"{settled[0]} is {getattr(self, settled[0])}, but the mix {self.mix} has settled that; leave "
                                 "out one of the two (`sasft mix` takes the settings of a mix)")
            if files := self.chosen_method().files():
                raise UsageError(f"the method {self.method} reads {next(iter(files.values()))}, but the mix {self.mix} has "
                                 "settled what is read; leave out one of the two")
        else:
            self._without_a_mix()
        if not self.out:
            raise UsageError("out is missing: name a folder for the run")
        for name, least in (("record_every", 0), ("lora_rank", 0), ("save_every", 0)):
            if (given := getattr(self, name)) is not None and given < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.lora_alpha != 16.0 and not self.lora_rank:
            raise UsageError(f"lora_alpha={self.lora_alpha} is for adapters, but lora_rank is 0; give a rank, or leave lora_alpha "
                             "out")
        if self.lora_rank and self.method == "lora":
            raise UsageError(f"lora_rank={self.lora_rank} and the method lora would each add adapters; leave out one of the two")
        if self.general_text and not self.records:
            raise UsageError(f"general_text {self.general_text} is to be recorded on, but record_every is 0; leave out one of the "
                             "two")
        self.chosen_method()

    def _without_a_mix(self) -> None:
        if not self.task:
            raise UsageError("task is missing: name a file of task rows with --task, or with --mix a folder that `sasft mix` has "
                             "written")
        for name, value in _WITHOUT_A_MIX.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not 0 <= self.lam < 1:
            raise UsageError(f"lam (the share of self rows) must lie in [0, 1), got {self.lam}")
        method = self.chosen_method()
        shares = method.shares(self.lam)
        if unread := shares.keys() - {TASK, SELF, *method.files()}:
            raise UsageError(f"the method {self.method} mixes in rows of the source {min(unread)!r}, of which there are none; "
                             "name their file with --method_options file=FILE, or mix them with `sasft mix` and give --mix")
        if shares[SELF] > 0 and not self.self_data:
            raise UsageError(f"lam is {self.lam}, but self_data names no file; write self-dialogues with "
                             "`sasft talk` and name them with --self_data, or set --lam 0")
        for name in ("steps", "rows_per_step", "max_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def records(self) -> bool:
        """Whether anything is recorded."""
        return self.record_every != 0

    def steps_between(self, steps: int) -> int:
        """Steps between the recordings of a run of so many, so that by default their share of its time falls as it gets longer."""
        return self.record_every or math.ceil(steps / _RECORDINGS)

    def chosen_method(self) -> Method:
        """The method with its options; raises :class:`UsageError` for what there is not."""
        return parse_method(self.method, self.method_options)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Fine-tune from files to a run folder, by default with SA-SFT (at ``lam=0`` on the task alone); returns the run's summary.

    The folder holds ``config.json`` (settings, versions, hashes of data and weights), ``plan.jsonl`` and ``mix.json``
    (every row of every step; λ realised in rows and tokens), ``drift/`` (the recorded table), ``log.json``,
    ``model/``, ``method/`` (what a method that makes rows has made) and, once finished, ``summary.json``, which says what the
    method has cost beyond SFT. The same call again returns a finished run's summary, or goes on
    with an unfinished one; another configuration in the same folder is refused, unless the first one failed before it left
    anything to go on with.

    Under ``accelerate launch`` or ``torchrun`` the processes train together (:func:`sasft.trainer.fit`), and the first one
    writes.
    """
    first, out = join(), Path(settings.out)
    if settings.records and sharding_asked():
        raise UsageError(f"record_every is {settings.record_every or 'not 0'}, but instruments put the base's weights into the model, which "
                         "can't be done while these are sharded (FSDP2); set record_every to 0, or take DDP")
    ensure_writable(out)
    text = read_general_text(settings.general_text)
    material = read_material(settings)
    hashes = dict(material.sha256)
    if settings.general_text:
        hashes["general_text"] = sha256_file(settings.general_text)
    identity = {"settings": {k: v for k, v in asdict(settings).items() if k not in ("out", *_FILES)}, "data_sha256": hashes}
    claim(out / "config.json", identity, {"files": {name: getattr(settings, name) for name in _FILES}, "versions": versions()})
    if (out / "summary.json").exists():
        return _summary(out)

    try:
        return _train(settings, material, text, identity, first)
    except Exception:
        if not any(path.is_file() for name in _GONE_ON_WITH for path in (out / name).rglob("*")):
            (out / "config.json").unlink(missing_ok=True)  # the folder is free for settings that are mended
        raise


def _train(settings: TrainSettings, material: "Material", text: str | None, identity: Mapping[str, Any], first: bool) -> dict[str, Any]:
    out, method, costs = Path(settings.out), settings.chosen_method(), Costs()
    model, tokenizer = load(settings)
    chat = Chat(tokenizer)
    writer = _writer(settings, model, chat) if method.writes else None
    workshop = Workshop(chat=chat, folder=out / "method", writer=writer, seed=settings.seed, costs=costs)
    with first_goes_first():  # the others find the rows that it has written
        made = method.rows(material.rows, workshop)
    model = method.prepare(model, settings.seed)
    rows, held_out, reports = encode(settings, material, made, chat)
    check_positions(model, rows), check_positions(model, held_out)
    if first:
        print(*reports, sep="\n", file=sys.stderr)
    with autocast(settings.precision, model.device.type):
        rows = method.encoded(rows, model, chat.pad_id, costs, out / "method")
        objective = method.objective(model, rows, chat.pad_id, costs)
    plan = lay_out(settings, material, rows)
    if plan.report()["rows"].get(SELF) or SELF in method.reads():
        costs.self_data_tokens = generated_tokens([*material.rows[SELF], *material.held_out[SELF]], chat)
    if first:
        plan.save(out / "plan.jsonl")
        write_json(out / "mix.json", plan.report())
    callbacks = []
    if settings.records:
        callbacks.append(drift.DriftCallback(
            out=out, overwrite=True, every=settings.steps_between(len(plan)), config=identity, reference=drift.Reference.snapshot(model),
            probes=run_probes(chat, held_out, text, precision=settings.precision)))
    fitted = replace(settings, lr=method.learning_rate(settings.lr))
    log = fit(model, rows, plan, fitted, pad_id=chat.pad_id, out=out, objective=objective, callbacks=callbacks)
    model = in_one_piece(model, lambda: method.prepare(load(settings)[0], settings.seed))
    with first_goes_first():
        if first:
            if settings.save_model:
                with saving("the trained model", out / "model"):
                    model.save_pretrained(out / "model")
                    tokenizer.save_pretrained(out / "model")
            summary = {"mix": plan.report(), "method": method.describe(), "costs": costs.describe(),
                       "weights_sha256": weights_hash(model),
                       "recorded": callbacks[0].recorder.latest() if callbacks else {},
                       "loss": [entry["loss"] for entry in log if "loss" in entry]}
            write_json(out / "log.json", log)
            write_json(out / "summary.json", summary)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # three times the model's size, and of no use any more
        return _summary(out)


def _summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Material:
    """What a run is made of: rows by source as they are read, those held out of it, their files' hashes, and the mix that they come
    from, if any."""

    rows: Mapping[str, Sequence[Row]]
    held_out: Mapping[str, Sequence[Row]]
    sha256: Mapping[str, Any]
    mixture: Mixture | None = None


def read_material(settings: TrainSettings) -> Material:
    """The rows that the settings name; raises :class:`UsageError` for what cannot be read or was changed since it was mixed."""
    if settings.mix:
        mixture = read_mixture(settings.mix)
        report = json.loads((Path(settings.mix) / "mix.json").read_text(encoding="utf-8"))
        hashes = {name: report[name] for name in ("rows_sha256", "held_out")}
        return Material({TASK: [], SELF: [], **mixture.rows}, {TASK: [], SELF: [], **mixture.held_out}, hashes, mixture)
    own = {SELF: settings.self_data} if settings.self_data else {}
    files = {TASK: settings.task, **own, **settings.chosen_method().files()}
    sources = {name: Source.parse(file) for name, file in files.items()}
    rows = {TASK: [], SELF: [], **{name: read_rows(source) for name, source in sources.items()}}
    # Before a method rewrites or selects rows, so that every method is measured on the same.
    held_out = {}
    for name in (TASK, SELF):
        rows[name], held_out[name] = hold_out(rows[name], settings.probe_rows if settings.records else 0)
    return Material(rows, held_out, {name: source.sha256() for name, source in sources.items()})


def load(settings: TrainSettings) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The untrained model, with adapters if there are to be some."""
    lora = LoraSettings(r=settings.lora_rank, alpha=settings.lora_alpha) if settings.lora_rank else None
    return load_model(settings.model, revision=settings.revision, lora=lora, seed=settings.seed)


Rows = dict[str, list[Encoded]]


def encode(settings: TrainSettings, material: Material, made: Mapping[str, Sequence[Row]],
           chat: Chat) -> tuple[Rows, Rows, list[str]]:
    """Rows to train on and rows held out of training, encoded, and what that came to; ``made`` is what a method has made of the
    material's rows.

    Raises :class:`UsageError` if the rows of a mix have other lengths than those that it was laid out for.
    """
    mixture = material.mixture
    rows: Rows = {}
    held_out: Rows = {}
    reports = []
    limits = {"max_tokens": settings.max_tokens, "too_long": settings.too_long} if mixture is None else mixture.encoding
    for source, read in made.items():
        held = material.held_out.get(source, ())
        encoded, report = encode_rows([*read, *held], chat, **limits)
        kept = bisect_left(report.kept_rows, len(read))
        rows[source], held_out[source] = encoded[:kept], encoded[kept:]
        if (mixture is not None and source in mixture.held_out and read == mixture.rows[source]
                and tuple(e.loss_tokens for e in rows[source]) != mixture.plan.tokens[source]):
            raise UsageError(f"the rows of {source} have other lengths for {settings.model} than {settings.mix} was laid out "
                             f"for; mix them for this model: sasft mix --model {settings.model} ...")
        if encoded:
            reports.append(f"{source}: {report}; {len(held_out[source])} held out to measure on")
    return rows, held_out, reports


def lay_out(settings: TrainSettings, material: Material, rows: Rows) -> Plan:
    """The rows of every step: the mix's, or those that the method makes of ``lam``."""
    if material.mixture is None:
        shares = settings.chosen_method().shares(settings.lam)
        tokens = {source: [row.loss_tokens for row in rows[source]] for source in shares}
        given = {"steps": settings.steps, "rows_per_step": settings.rows_per_step, "seed": settings.seed}
        if shares.keys() == {TASK, SELF}:
            return make_plan(tokens[TASK], tokens[SELF], lam=shares[SELF], **given)
        shares = {source: share for source, share in shares.items() if share}
        return mix({source: tokens[source] for source in shares}, shares, **given)
    plan = material.mixture.plan
    for source, tokens in plan.tokens.items():
        if len(rows[source]) != len(tokens):
            raise UsageError(f"the method {settings.method} makes {len(rows[source])} rows of the {len(tokens)} of {source}, so "
                             "the steps of the mix no longer fit; name the files by task and self_data instead, and steps are "
                             "laid out after it")
    return replace(plan, tokens={source: tuple(r.loss_tokens for r in rows[source]) for source in plan.tokens})


def _writer(settings: TrainSettings, model: nn.Module, chat: Chat) -> Writer:
    """The untrained model as it writes for methods that make rows; they choose samplers of their own."""
    provenance = {"model": settings.model, "revision": settings.revision, "weights_sha256": weights_hash(model)}
    return Writer(model=model, chat=chat, sampler=EXACT, provenance=provenance, precision=settings.precision)


def read_general_text(path: str | None) -> str | None:
    """The text of the file, if one is named; raises :class:`UsageError` where it can't be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"general_text {path} can't be read as UTF-8 text: {error}") from None
