"""Evaluating a model on suites: per-item records on disk, a summary with standard errors, a table. A stopped run goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from drift.adapters import has_adapters
from drift.divergence_probe import NO_ADAPTERS
from drift.names import parameters
from sasft.chat import Chat
from sasft.data import read_rows
from sasft.errors import UsageError
from sasft.evaluation.benchmarks import BENCHMARKS
from sasft.evaluation.builtin import BUILT_IN
from sasft.evaluation.contamination import contaminated
from sasft.evaluation.harness import Harness
from sasft.evaluation.request import Request, taken_apart
from sasft.evaluation.sources import FOLDER_VARIABLE, MissingSet, data_folder
from sasft.evaluation.subject import Base, Subject
from sasft.evaluation.suites import Answered, Item, Suite
from sasft.evaluation.summary import read_records, summarise, table
from sasft.files import JsonlWriter, ensure_writable, write_json
from sasft.manifest import claim
from sasft.models import load_model, weights_hash
from sasft.precision import Precision, resolved
from sasft.sampling import positions
from sasft.settings import option
from sasft.versions import versions

SUITES = {**BENCHMARKS, **BUILT_IN}
"""Suites by name; ``lm_eval:<task>`` names one of lm-evaluation-harness's."""


@dataclass(kw_only=True)
class MeasureSettings:
    """How a model in hand is measured."""

    data: str | None = option(None, f"folder of benchmarks' files; without it {FOLDER_VARIABLE}, without both the hub")
    limit: int = option(0, "items of every suite, the same ones in every run; 0 for all")
    batch_size: int = option(16, "items that are run together; scores don't depend on it beyond rounding")
    precision: Precision = option("fp32", "precision of the forward pass: fp32 leaves the weights' own, bf16 is autocast, "
                                          "auto is bf16 where the hardware multiplies it")
    temperature: float = option(0.0, "sampling temperature of written answers; 0 takes the most probable token")
    seed: int = option(0, "seed of sampled answers; each depends on it and on its item alone")
    max_new_tokens: int = option(0, "length cap of an answer in tokens; 0 for each suite's own")
    training: str | None = option(None, "files of training rows or hub datasets, separated by commas, to look for the questions "
                                        "in")
    task_folder: str | None = option(None, "folder of lm-eval task files (YAML) of your own")

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("batch_size", 1), ("max_new_tokens", 0), ("temperature", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self.precision = resolved(self.precision)


@dataclass(kw_only=True)
class EvaluateSettings(MeasureSettings):
    """Scores of a model on suites of questions, with standard errors, into a folder; per-item results beside them."""

    model: str = option("smollm2-135m-instruct", "embedded model name, local folder (a LoRA adapter's too), or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")
    suites: str = option("instructions,task:sums,text", f"what to measure, separated by commas: name[:part][@shots]; names are "
                                                        f"{', '.join(SUITES)}, lm_eval")
    out: str = option("", "folder of the results; results already there are kept, and the run goes on after them")
    base: str | None = option(None, "model to which KL is measured, or 'without adapters'")
    base_revision: str | None = option(None, "revision of base, where that is a hub model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise UsageError("out is missing: name a folder for the results")
        if self.base_revision is not None and self.base in (None, NO_ADAPTERS):
            raise UsageError(f"base_revision is {self.base_revision!r}, but base names no model; name the hub model whose revision it is, or "
                             "leave base_revision out")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str | Suite],
    out: Path | str,
    settings: MeasureSettings | None = None,
    *,
    base: Base = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model on suites; returns the summary that ``out/summary.json`` holds.

    ``suites``: names as in :data:`SUITES`, ``name[:part][@shots]``, or :class:`Suite` objects of one's own. ``base``: the model
    to which KL is measured where a suite predicts given tokens, or ``"without adapters"``.

    ``out`` holds ``items.jsonl`` (one record an item: its scores as total and weight, the answer, the SHA-256 of the tokens of
    its prompt and of where the set came from), ``config.json`` (what the scores hang on: hashes of weights and chat template,
    generation settings, versions) and ``summary.json``. The same call goes on where it was stopped; other suites join those
    there; another model or setting is refused.

    Raises :class:`UsageError`, before any item is run, for unknown suites, sets that are missing, empty or of another shape,
    prompts that the template refuses or that with their answers may be longer than the model takes, weights that are not finite,
    a base that predicts other tokens, and a folder that holds another run.
    """
    settings = MeasureSettings() if settings is None else settings
    out, chat = Path(out), Chat(tokenizer)
    made = make_suites(suites, chat, settings)
    subject = Subject(model=model, chat=chat, base=base, precision=settings.precision, temperature=settings.temperature,
                      seed=settings.seed, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
    _check_models(subject)
    asked = {suite.name: choose(suite.items, settings.limit) for suite in made}
    shown = {suite.name: _shown(suite, subject, asked[suite.name]) for suite in made}
    found_in_training = {suite.name: _contaminated(asked[suite.name], settings) for suite in made}
    ensure_writable(out)
    identity = _identity(subject)
    claim(out / "config.json", identity)
    summary: dict[str, Any] = {"identity": identity, "suites": {}}
    if (path := out / "summary.json").exists():
        summary["suites"] = json.loads(path.read_text(encoding="utf-8"))["suites"]
    for suite in made:
        source = dict(suite.source)
        if isinstance(suite, Harness):
            records, details = _run_harness(suite, subject, out, settings.limit or None, summary["suites"].get(suite.name))
            source |= details
        else:
            records = _run(suite, subject, out, asked[suite.name], shown[suite.name], progress)
        summary["suites"][suite.name] = {"source": source, **summarise(records, suite.metrics, found_in_training[suite.name])}
        write_json(path, summary)
    return summary


def run(settings: EvaluateSettings, suites: Sequence[str] | None = None) -> dict[str, Any]:
    """Load the model (and the base), evaluate, print the table; returns the summary.

    ``suites`` stand in for those of the settings, whose names a comma would take apart.
    """
    model, tokenizer = load_model(settings.model, revision=settings.revision)
    base: Base = None
    if settings.base is not None:
        base, other = (NO_ADAPTERS, tokenizer) if settings.base == NO_ADAPTERS else load_model(settings.base, revision=settings.base_revision)
        if other.get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"base {settings.base} has another tokenizer than {settings.model}, and a KL between predictions of "
                             "different tokens means nothing; name the model that it was trained from, or leave base out")
    summary = evaluate(model, tokenizer, taken_apart(settings.suites) if suites is None else suites, settings.out, settings, base=base)
    print(table(summary))
    return summary


def make_suite(spec: str, chat: Chat, settings: MeasureSettings) -> Suite:
    """The suite that ``name[:part][@shots]`` names."""
    whole, at, shots = spec.rpartition("@")
    named = whole if at and shots.isdigit() else spec
    name, _, part = named.partition(":")
    n = int(shots) if named is whole else None
    if name == "lm_eval":
        if not part:
            raise UsageError(f"suite {spec!r} needs a task of lm-eval: lm_eval:hellaswag")
        return Harness(name=spec, task=part, shots=n, task_folder=settings.task_folder)
    if name not in SUITES:
        raise UsageError(f"there is no suite {name!r}; there are {', '.join(SUITES)} and lm_eval:<task>")
    return SUITES[name](Request(spec=spec, part=part, shots=n or 0, folder=data_folder(settings.data), chat=chat))


def make_suites(suites: Sequence[str | Suite], chat: Chat, settings: MeasureSettings) -> list[Suite]:
    """Every suite. Raises :class:`UsageError` for what :func:`evaluate` would refuse in them, so that it can be told before other
    work; the sets that are missing are named all at once."""
    made, missing = [], []
    for suite in suites:
        try:
            made.append(suite if isinstance(suite, Suite) else make_suite(suite, chat, settings))
        except MissingSet as error:
            missing.append(str(error))
    if missing:
        raise MissingSet("\n".join(missing))
    _check(made)
    return made


def choose(items: Sequence[Item], limit: int) -> list[Item]:
    """``limit`` of the items (all for 0), spread over the suite by a hash of their ids: the same in every run, and nested."""
    if not limit:
        return list(items)
    return sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:limit]


@dataclass(frozen=True)
class _Shown:
    """A prompt's number of tokens and the SHA-256 of their ids."""

    tokens: int
    sha256: str


def _shown(suite: Suite, subject: Subject, items: Sequence[Item]) -> dict[str, _Shown]:
    """What the model is shown, by item. Raises :class:`UsageError` for a prompt that with its answer is longer than it takes."""
    found = {}
    most = positions(subject.model)
    cap = (subject.max_new_tokens or suite.max_new_tokens) if isinstance(suite, Answered) else 0
    for item in items:
        ids = suite.prompt_ids(subject, item)
        if len(ids) > most:
            raise UsageError(f"suite {suite.name!r}: the prompt of item {item.id} has {len(ids)} tokens, the model takes "
                             f"{most}; show fewer worked examples (@n), or leave the suite out")
        if len(ids) + cap - 1 > most:  # the last token is never fed
            raise UsageError(f"suite {suite.name!r}: the prompt of item {item.id} has {len(ids)} tokens and its answer up to "
                             f"{cap}, the model takes {most}; lower max_new_tokens, show fewer worked examples (@n), or leave the "
                             "suite out")
        found[item.id] = _Shown(len(ids), hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest())
    return found


def _run(suite: Suite, subject: Subject, out: Path, items: Sequence[Item], shown: Mapping[str, _Shown],
         progress: bool) -> list[dict[str, Any]]:
    """The records of these items, in their order, each batch on the disk as it ends."""
    done = {r["id"]: r for r in read_records(out, suite.name) if r["id"] in shown}
    source = hashlib.sha256(json.dumps(suite.source, sort_keys=True).encode()).hexdigest()
    for name, record in done.items():
        if record["prompt_sha256"] != shown[name].sha256:
            raise UsageError(f"{out} holds results of {suite.name} on other prompts (item {name}); name another folder")
        if record["source_sha256"] != source:
            raise UsageError(f"{out} holds results of {suite.name} from another source, whose reference answers may be others; "
                             f"now it is {json.dumps(suite.source)}; name another folder")
    # Batches are formed before finished items are left out, so that a run that goes on forms the same ones.
    ordered = sorted(items, key=lambda item: (shown[item.id].tokens, item.id))
    batches = [ordered[i : i + subject.batch_size] for i in range(0, len(ordered), subject.batch_size)]
    with (JsonlWriter(out / "items.jsonl") as sink,
          tqdm(total=len(items), initial=len(done), desc=suite.name, unit="item", disable=not progress,
               dynamic_ncols=True) as bar):
        for batch in batches:
            left = [item for item in batch if item.id not in done]
            if left:
                new = [{"suite": suite.name, "id": item.id, **_parts(item), "prompt_sha256": shown[item.id].sha256,
                        "source_sha256": source, **record}
                       for item, record in zip(left, suite.measure(subject, left), strict=True)]
                sink.write(new)
                done |= {r["id"]: r for r in new}
                bar.update(len(left))
    return [done[item.id] for item in items]


def _parts(item: Item) -> dict[str, str]:
    return {name: value for name, value in (("group", item.group), ("cluster", item.cluster)) if value}


def _run_harness(suite: Harness, subject: Subject, out: Path, limit: int | None,
                 before: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of a whole task of lm-eval; a task of which not all is on the disk is run anew."""
    there = {record["id"]: record for record in read_records(out, suite.name)}
    if before is not None and before["source"]["limit"] != limit:
        raise UsageError(f"{out} holds {suite.name} with limit {before['source']['limit']}, now {limit}; name another folder")
    if before is not None and before["n"] == len(there):
        return list(there.values()), dict(before["source"])
    records, details = suite.run(subject, limit)
    if other := there.keys() - {record["id"] for record in records}:
        raise UsageError(f"{out} holds {suite.name} on other items, such as {min(other)}; name another folder")
    with JsonlWriter(out / "items.jsonl") as sink:
        sink.write([{"suite": suite.name, **record} for record in records if record["id"] not in there])
    return records, {**details, "limit": limit}


def _identity(subject: Subject) -> dict[str, Any]:
    """What scores hang on beside their suites."""
    base = weights_hash(subject.base) if isinstance(subject.base, nn.Module) else subject.base
    template = subject.chat.tokenizer.chat_template
    return {"weights_sha256": weights_hash(subject.model), "base": base,
            "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest(), "precision": subject.precision,
            "generation": {"temperature": subject.temperature, "seed": subject.seed,
                           "max_new_tokens": subject.max_new_tokens or "suite's"},
            "versions": {"sasft": version("sasft"), **versions()}}


def _check(suites: Sequence[Suite]) -> None:
    if not suites:
        raise UsageError(f"suites is empty; name at least one of {', '.join(SUITES)}")
    names = [suite.name for suite in suites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"suites are named twice: {', '.join(twice)}")
    for suite in suites:
        ids = [item.id for item in suite.items]
        if not ids and not isinstance(suite, Harness):
            raise UsageError(f"suite {suite.name!r} has no items")
        if len(set(ids)) < len(ids):
            raise UsageError(f"suite {suite.name!r}: ids of items must be distinct; "
                             f"{next(i for i in ids if ids.count(i) > 1)!r} is not")


def _check_models(subject: Subject) -> None:
    if bad := [name for name, p in parameters(subject.model).items() if not p.isfinite().all()]:
        raise UsageError(f"{len(bad)} of the model's weights are not finite, such as {bad[0]}, so there is nothing to measure: its "
                         "training has diverged (a smaller learning rate may help)")
    if subject.base == NO_ADAPTERS and not has_adapters(subject.model):
        raise UsageError(f"base is {NO_ADAPTERS!r}, but the model has none; name the model that it was trained from")
    if isinstance(subject.base, nn.Module):
        base, model = (m.get_output_embeddings().weight.shape[0] for m in (subject.base, subject.model))
        if base != model:
            raise UsageError(f"base predicts {base} tokens, the model {model}; name the model that it was trained from, or leave "
                             "base out")


def _contaminated(items: Sequence[Item], settings: MeasureSettings) -> list[str] | None:
    """Ids of the items whose question occurs in the training rows; None if nothing was looked at."""
    asked = {item.id: item.asked for item in items if item.asked}
    if settings.training is None or not asked:
        return None
    names = [settings.training] if Path(settings.training).exists() else taken_apart(settings.training)
    return contaminated(asked, (row for name in names for row in read_rows(name)))
