"""From a model and a file of task rows to a model that has learnt them and kept the rest: what ``sasft run`` does.

Self-dialogues, a look at their quality, the mix, training, evaluation of the model before and after: one folder, each part of
which goes on where it was stopped. The options are those of the parts, made from the same dataclasses.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drift.table import written_whole
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.evaluation import EvaluateSettings, curve, figure, forgetting, gain_drop
from sasft.evaluation import run as evaluate
from sasft.evaluation.forgetting import lower_is_better
from sasft.evaluation.request import taken_apart
from sasft.evaluation.run import make_suites
from sasft.files import ensure_writable, write_json
from sasft.manifest import claim
from sasft.mixing import SELF, TASK
from sasft.mixture import MixSettings, Mixture, load_chat, make_mixture, read_mixture
from sasft.options import default_of, headed
from sasft.precision import Precision
from sasft.processes import first_goes_first, join
from sasft.settings import option
from sasft.talk import TalkSettings, talk
from sasft.terminal import table
from sasft.train import TrainSettings, train

# May change from one call to the next, as those of evaluation may: what was done before stays valid, or refuses by itself.
_FREE = ("out", "task_test", "talk_limits")
_WHOLE = "the whole run"
_COMMON = ("model", "revision", "seed", "precision")


@dataclass(kw_only=True)
class _Common:
    """What all parts of a run have in common."""

    task: str = option("", "task rows: FILE[:field=column,...] (JSONL or Parquet) or a hub dataset")
    out: str = option("", "folder of the run; a stopped run goes on there")
    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")
    lam: float = option(0.5, "share of self-dialogues in the mix, in [0, 1), in the measure mix_by; 0 is plain fine-tuning")
    self_data: str | None = option(None, "file of self-dialogues that are there already; without it they are written")
    task_test: str | None = option(None, "JSONL file of task rows on which the gain is measured; without it, those that the mix "
                                         "holds out")
    seed: int = option(0, "seed of self-dialogues, mix and training")
    precision: Precision = option("auto", "precision of writing and training: bf16, fp32, or auto, which is bf16 where the "
                                          "hardware multiplies it and fp32 elsewhere")


def _fields(kind: type, part: str, left_out: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """The options of a part under its name, in the order and under the headings of its own help."""
    return [(f"{part}_{field.name}", field.type, _copy(field, f"{part}: {heading}"))
            for heading, fields in headed(kind).items() for field in fields if field.name not in left_out]


def _copy(field: dataclasses.Field, heading: str) -> Any:
    return dataclasses.field(metadata={**field.metadata, "group": heading}, **default_of(field))


RunSettings = dataclasses.make_dataclass("RunSettings", [
    *((field.name, field.type, _copy(field, _WHOLE)) for field in dataclasses.fields(_Common)),
    *_fields(TalkSettings, "talk", {"out", *_COMMON}),
    *_fields(MixSettings, "mix", {"out", "sources", "shares", "like", "equal", "shuffle", *_COMMON}),
    *_fields(TrainSettings, "train", {"out", "mix", "task", "self_data", "lam", "steps", "rows_per_step", "max_tokens",
                                      "too_long", "probe_rows", "save_model", *_COMMON}),
    *_fields(EvaluateSettings, "evaluate", {"out", "model", "revision", "base", "base_revision", "training"}),
], kw_only=True)
RunSettings.__doc__ = """Self-dialogues, mix, training, and evaluation before and after, in one command and one folder.

Options of a part carry its name: --talk_n is the n of `sasft talk`; in a YAML file they may stand under it.
"""


@dataclass(frozen=True)
class Parts:
    """The settings of a run's parts; a part that is not wanted is None."""

    talk: TalkSettings | None
    mix: MixSettings
    train: TrainSettings
    before: EvaluateSettings | None
    after: EvaluateSettings | None


def parts_of(settings: Any) -> Parts:
    """The parts of a run, each checked by its own settings before any work is done.

    Raises :class:`UsageError` for what no part takes, and for options that contradict one another.
    """
    if not settings.task:
        raise UsageError("task is missing: name a file of task rows")
    if not settings.out:
        raise UsageError("out is missing: name a folder for the run")
    if not 0 <= settings.lam < 1:
        raise UsageError(f"lam (the share of self-dialogues) must lie in [0, 1), got {settings.lam}")
    out, mixes = Path(settings.out), settings.lam > 0
    if not mixes and settings.self_data:
        raise UsageError(f"lam is 0, so nothing of self_data {settings.self_data} would be read; leave out one of the two")
    writes = mixes and not settings.self_data
    if not writes and (idle := _changed(TalkSettings, "talk", settings)):
        why = f"self_data names {settings.self_data}" if mixes else "lam is 0, so nothing would be mixed in"
        raise UsageError(f"{idle[0]} is for self-dialogues that are to be written, but {why}; leave out one of the two")
    talking = _part(TalkSettings, "talk", settings, out=str(out / "self.jsonl")) if writes else None
    own = settings.self_data or (talking and str(talking.kept))
    sources = [f"{TASK}={settings.task}", *([f"{SELF}={own}"] if mixes else [])]
    mixing = _part(MixSettings, "mix", settings, out=str(out / "mix"), sources=sources,
                   shares=[1 - settings.lam, settings.lam] if mixes else [1.0])
    training = _part(TrainSettings, "train", settings, out=str(out / "train"), mix=mixing.out)
    if not settings.evaluate_suites:
        return Parts(talking, mixing, training, None, None)
    before = _part(EvaluateSettings, "evaluate", settings, out=str(out / "before"), training=str(out / "mix" / "rows.jsonl"))
    after = dataclasses.replace(before, model=str(out / "train" / "model"), revision=None, out=str(out / "after"),
                                base=settings.model, base_revision=settings.revision)
    return Parts(talking, mixing, training, before, after)


def run(settings: Any, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do all parts that are not done yet; returns what ``out/report.json`` then holds.

    The folder holds ``run.json`` (the configuration; a run with another one is refused, saying what differs), ``self.jsonl`` and
    ``self.quality.json``, ``mix/``, ``train/``, ``before/`` and ``after/`` (see the parts), ``report.json``, ``gain_drop.csv``
    and ``gain_drop.png``. Under ``accelerate launch`` the parts that one process does alone are done by the first.
    """
    parts = parts_of(settings)
    first, out = join(), Path(settings.out)
    say = say if first else lambda text: None
    with first_goes_first():
        _check(settings, parts)
    ensure_writable(out)
    claim(out / "run.json", {name: value for name, value in asdict(settings).items()
                             if name not in _FREE and not name.startswith(("evaluate_", "train_"))})  # training claims a folder of its own
    report: dict[str, Any] = {}
    if parts.talk:
        say(f"\n== self-dialogues: {parts.talk.out}")
        talked = talk(parts.talk)
        report["talk"] = talked.as_dict()
        say(str(talked))
        talked.check()
    with first_goes_first():
        mixed = make_mixture(parts.mix)
    mixture = read_mixture(parts.mix.out)
    report["mix"] = {name: mixed[name] for name in mixture.plan.report()}
    say(f"\n== mix: {parts.mix.out}\n{mix_table(report['mix'])}")
    gain, suites = _suites(settings, parts.mix, mixture)
    _measure(parts.before, suites, first, say, "before")
    say(f"\n== training: {parts.train.out}")
    trained = train(parts.train)
    report |= {name: trained[name] for name in ("method", "costs", "recorded")}
    say(recorded_table(report["recorded"]))
    _measure(parts.after, suites, first, say, "after")
    if first and parts.before and parts.after:
        report |= _compared(parts.before.out, parts.after.out, gain, suites, settings.train_method, out)
        say(f"\n== what was lost and gained, item by item\n{forgetting_table(report['forgetting'])}")
        say(f"\n== gain and drop: {out / 'gain_drop.csv'}, .png\n{gain_drop_table(report['gain_drop'])}" if gain else
            "\nno rows to measure the gain on: name some with --task_test, or raise --mix_hold_out")
    if first:
        write_json(out / "report.json", report)
    return report


def _check(settings: Any, parts: Parts) -> None:
    """Read what lies there before self-dialogues are written, which may take hours; raises :class:`UsageError` for what later parts
    would refuse in the task's rows, and for suites that can't be made."""
    chat = load_chat(settings.model, settings.revision)
    encode_rows(read_rows(settings.task), chat, parts.mix.max_tokens, parts.mix.too_long, parts.mix.turns)
    if parts.before and (asked := suites_asked(settings)):
        make_suites(asked, chat, parts.before)


def suites_asked(settings: Any) -> list[str]:
    """The suites that a run's settings name, those of its task first; held-out rows join them once there is a mix."""
    test = [f"answers:{settings.task_test}"] if settings.task_test else []
    return list(dict.fromkeys([*test, *taken_apart(settings.evaluate_suites)]))


def _suites(settings: Any, mixing: MixSettings, mixture: Mixture) -> tuple[str | None, list[str]]:
    """The suite that measures the gain on the task, if there are rows for it, and all suites, the model's own dialogues among
    them."""
    held_out = {name: f"{mixing.out}/held_out/{name}.jsonl" for name, rows in mixture.held_out.items() if rows}
    test = settings.task_test or held_out.get(TASK)
    gain = f"answers:{test}" if test else None
    own = [f"rows:{held_out[SELF]}"] if SELF in held_out else []
    return gain, list(dict.fromkeys([*([gain] if gain else []), *suites_asked(settings), *own]))


def _measure(settings: EvaluateSettings | None, suites: Sequence[str], first: bool, say: Callable[[str], None],
             when: str) -> None:
    if settings is None:
        return
    say(f"\n== the model {when} training: {settings.out}")
    with first_goes_first():
        if first:
            evaluate(settings, suites)


def _compared(before: str, after: str, gain: str | None, suites: Sequence[str], method: str, out: Path) -> dict[str, Any]:
    """Forgetting on every suite; gain on the task against drops on the others, as a table and as a picture, beside the report."""
    found = [forgetting(before, after, suite) for suite in suites]
    report: dict[str, Any] = {"forgetting": [asdict(f) for f in found]}
    if gain is None:
        return report
    # Their mean needs suites of one unit: scores, or where there is no other but the task's, losses.
    scores = [f.suite for f in found if f.suite != gain and not lower_is_better(f.metric)]
    general = scores or [f.suite for f in found if f.suite != gain]
    rows = report["gain_drop"] = gain_drop(before, {method: [after]}, gain, general)
    with written_whole(out / "gain_drop.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        sheet.writeheader()
        sheet.writerows(rows)
    if general:
        figure(curve(rows)).savefig(out / "gain_drop.png", dpi=150)
    return report


def mix_table(report: Mapping[str, Any]) -> str:
    """A plan's report, one line a source."""
    rows = [("source", "asked", "of rows", "of tokens", "rows read", "loss tokens", "epochs", "most reads")]
    rows += [(name, "" if of["asked"] is None else f"{of['asked']:.3f}", f"{of['rows']:.3f}", f"{of['tokens']:.3f}",
              str(report["rows"][name]), str(report["loss_tokens"][name]), f"{report['epochs'].get(name, 0):.2f}",
              str(report["most_reads"][name])) for name, of in report["shares"].items() if report["rows"][name]]
    a_step = report["loss_tokens_per_step"]
    head = f"{report['steps']} steps of {a_step['min']} to {a_step['max']} loss tokens, mixed by {report['by']}"
    return f"{head}\n{table(rows, '  ')}"


def recorded_table(recorded: Mapping[str, float | None]) -> str:
    """What was recorded last, one line a figure, but of style its distance from the untrained model's alone."""
    told = {name: value for name, value in sorted(recorded.items()) if not name.startswith("style/") or "distance" in name}
    if not told:
        return "nothing was recorded"
    return table([("recorded last", ""), *((name, "" if value is None else f"{value:.4g}") for name, value in told.items())])


def forgetting_table(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a suite: the score before and after, its change with the interval over items, what was lost and gained."""
    rows = [("suite", "metric", "items", "before", "after", "change", "95 % interval", "1→0", "0→1", "1→0 beyond chance", "p")]
    for f in found:
        flips = [""] * 4 if f["lost"] is None else [*(f"{f[name]:.3f}" for name in ("lost", "gained", "lost_adjusted")),
                                                    f"{f['p_values'][0]:.3g}"]
        rows.append((f["suite"], f["metric"], str(f["n"]), f"{f['before']:.4f}", f"{f['after']:.4f}", f"{f['change']:+.4f}",
                     _interval(f["low"], f["high"]), *flips))
    return table(rows)


def gain_drop_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a suite; positive figures are a gain on the task, a loss of the rest."""
    return table([("", "suite", "metric", "value", "95 % interval"),
                  *((row["kind"], row.get("suite", ""), row.get("metric", ""), f"{row['value'] + 0.0:+.4f}",
                     _interval(row["value_low"], row["value_high"])) for row in rows)])


def _interval(low: float | None, high: float | None) -> str:
    """Nothing where it isn't known: of one item, say."""
    known = all(bound is not None and math.isfinite(bound) for bound in (low, high))
    return f"[{low + 0.0:+.4f}, {high + 0.0:+.4f}]" if known else ""


def _part(kind: type, part: str, settings: Any, **fixed: Any) -> Any:
    """The part's settings: what is fixed, its own options, and those that all parts have in common."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in fixed]
    given = {name: getattr(settings, f"{part}_{name}") for name in names if hasattr(settings, f"{part}_{name}")}
    common = {name: getattr(settings, name) for name in _COMMON if name in names and name not in given}
    return kind(**fixed, **given, **common)


def _changed(kind: type, part: str, settings: Any) -> list[str]:
    """Options of a part that are not at their default."""
    names = {f"{part}_{field.name}" for field in dataclasses.fields(kind)}
    return [field.name for field in dataclasses.fields(settings) if field.name in names and getattr(settings, field.name) != (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory())]
