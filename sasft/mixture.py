"""A mix on disk: the rows of every step in the order of training, what they are made of, and where they come from.

``rows.jsonl`` holds one line for every row that is read, repeats included, so that any trainer can take it as it stands;
``held_out/NAME.jsonl`` the rows of each source that no step reads, to measure on; ``mix.json`` the realised shares in rows and
tokens, repeats, settings, and the SHA-256 of every source and of what was written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import AutoTokenizer

from sasft.chat import Chat, Encoded, Turns
from sasft.controls import match, shuffle_tokens
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import ensure_writable, sha256_file, write_json, write_jsonl
from sasft.manifest import differences
from sasft.mixing import By, Plan, mix
from sasft.models import resolve
from sasft.settings import option
from sasft.sources import Source
from sasft.versions import versions

_MIXED, _SIZE, _ROWS, _CONTROLS = "what is mixed", "how many and how large the steps are", "how rows are read", "controls"
_ENCODING = ("max_tokens", "too_long", "turns")
T = TypeVar("T")


@dataclass(kw_only=True)
class MixSettings:
    """Mix any number of sources into the rows of every training step, exactly, and write them down with what they amount to."""

    sources: list[str] = option([], "NAME=SOURCE of each, a source being FILE[:field=column,...] (JSONL or Parquet) or a hub "
                                    "dataset ORG/NAME[:config][@revision][#split][:field=column,...]; without a name, its file's",
                                _MIXED)
    shares: list[float] = option([], "a positive number for each source, in their order; they are scaled to a sum of 1 (none: "
                                     "equal shares)", _MIXED)
    by: By = option("rows", "what the shares are shares of: rows read, loss tokens (short self-dialogues against long task rows: "
                            "by rows they weigh less than the share says), or loss (rows read equally often, weighted in the "
                            "loss)", _MIXED)
    hold_out: int = option(16, "rows of each source, evenly spread and at most a quarter of them, that no step reads, to measure on",
                           _MIXED)
    out: str = option("", "folder of the mix", _MIXED)
    steps: int | None = option(None, "optimiser steps (100, unless like is given)", _SIZE)
    rows_per_step: int | None = option(None, "rows a step, of all sources together (16, unless tokens_per_step is given)", _SIZE)
    tokens_per_step: int | None = option(None, "loss tokens a step, of all sources together, instead of rows_per_step", _SIZE)
    max_tokens: int = option(1024, "longest row allowed, in tokens", _ROWS)
    too_long: Literal["error", "truncate", "drop"] = option("error", "what to do with longer rows", _ROWS)
    turns: Turns = option("last", "assistant turns in the loss: the last one of a row, or all", _ROWS)
    model: str = option("smollm2-135m-instruct", "whose tokens are counted: embedded model name, local folder, or hub id "
                                                 "(org/name)", _ROWS)
    revision: str | None = option(None, "revision of a hub model", _ROWS)
    seed: int = option(0, "seed of the order of rows", _ROWS)
    like: str | None = option(None, "folder of another mix whose steps this one fills with its own sources: the control of equal "
                                    "steps and tokens (it sets the number of steps and their sizes)", _CONTROLS)
    equal: Literal["tokens", "rows"] = option("tokens", "what a step has in common with that of the mix named by like", _CONTROLS)
    shuffle: list[str] = option([], "names of sources whose answers' tokens are put in random order: the control that keeps the "
                                    "tokens and loses what they say", _CONTROLS)

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("sources are missing: name at least one, as --sources task=my_task.jsonl self=self.jsonl")
        if not self.out:
            raise UsageError("out is missing: name a folder for the mix")
        if self.shares and len(self.shares) != len(self.sources):
            raise UsageError(f"shares must be one number a source: got {len(self.shares)} for {len(self.sources)} sources")
        if self.like and not (self.steps is self.rows_per_step is self.tokens_per_step is None):
            raise UsageError("like takes the number and the sizes of steps from another mix, so steps, rows_per_step and "
                             "tokens_per_step must be left out")
        if self.equal != "tokens" and not self.like:
            raise UsageError(f"equal={self.equal} says in what a step is that of another mix, but like names none")
        if self.rows_per_step and self.tokens_per_step:
            raise UsageError(f"give either rows_per_step or tokens_per_step, got {self.rows_per_step} and {self.tokens_per_step}")
        for name, least in (("steps", 1), ("rows_per_step", 1), ("tokens_per_step", 1), ("max_tokens", 1), ("hold_out", 0),
                            ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        names = self.named()
        if len(names) < len(self.sources):
            raise UsageError(f"two sources have one name; name them apart, as --sources a={self.sources[0]} ...: {self.sources}")
        if unknown := set(self.shuffle) - names.keys():
            raise UsageError(f"shuffle names {min(unknown)!r}, which is none of the sources {', '.join(names)}")

    def named(self) -> dict[str, Source]:
        """The sources by name."""
        return dict(map(named_source, self.sources))


def named_source(text: str) -> tuple[str, Source]:
    """``name=SOURCE`` taken apart; a bare source has its file's name.

    >>> named_source("self=runs/self.jsonl")[0], named_source("web.parquet:prompt=q,response=a")[0]
    ('self', 'web')
    """
    name, equals, rest = text.partition("=")
    if equals and name.isidentifier():
        return name, Source.parse(rest)
    source = Source.parse(text)
    return source.name, source


@dataclass(frozen=True)
class Mixture:
    """Rows by source, the plan that reads them, and the rows that it leaves to measure on.

    ``encoding``: how rows are encoded (``max_tokens``, ``too_long``, ``turns``, see :func:`sasft.data.encode_rows`);
    ``reports``: what that came to, by source.
    """

    rows: Mapping[str, Sequence[Row]]
    plan: Plan
    held_out: Mapping[str, Sequence[Row]]
    encoding: Mapping[str, Any]
    reports: Mapping[str, str] = field(default_factory=dict)


def load_chat(model: str, revision: str | None = None) -> Chat:
    """A model's chat template, without its weights."""
    return Chat(AutoTokenizer.from_pretrained(resolve(model, revision=revision)))


def make_mixture(settings: MixSettings) -> dict[str, Any]:
    """Read the sources, lay out the plan and write the folder; returns what ``mix.json`` holds.

    The same call again returns the finished mix. Raises :class:`UsageError` for sources that cannot be read or do not fit
    the settings, and for a folder that holds another mix (what differs).
    """
    out = Path(settings.out)
    ensure_writable(out)
    asked = {k: v for k, v in asdict(settings).items() if k not in ("out", "sources", "like")}
    origins = {name: {"from": str(source), "sha256": source.sha256()} for name, source in settings.named().items()}
    identity = {"settings": asked, "sources": origins,
                "like_sha256": sha256_file(Path(settings.like) / "rows.jsonl") if settings.like else None}
    if (done := out / "mix.json").exists():
        before = json.loads(done.read_text(encoding="utf-8"))
        if differing := differences(before["identity"], json.loads(json.dumps(identity))):
            raise UsageError(f"{out} holds another mix ({'; '.join(differing)}); name another folder, or remove this one")
        return before
    mixture = lay_out(settings)
    lines = (_line(mixture, k, *key) for k, step in enumerate(mixture.plan, start=1) for key in step)
    write_jsonl(out / "rows.jsonl", lines)
    (out / "held_out").mkdir(exist_ok=True)
    for name, rows in mixture.held_out.items():
        write_jsonl(_held_out(out, name), (_plain(row, name) for row in rows))
    report = {**mixture.plan.report(), "encoding": dict(mixture.reports), "rows_sha256": sha256_file(out / "rows.jsonl"),
              "held_out": {name: {"rows": len(rows), "sha256": sha256_file(_held_out(out, name))}
                           for name, rows in mixture.held_out.items()},
              "identity": identity, "versions": versions()}
    write_json(done, report)
    return report


def lay_out(settings: MixSettings) -> Mixture:
    """The mix that the settings ask for, in memory; nothing is written."""
    chat = load_chat(settings.model, settings.revision)
    encoding = {name: getattr(settings, name) for name in _ENCODING}
    rows: dict[str, list[Row]] = {}
    held_out: dict[str, list[Row]] = {}
    encoded: dict[str, list[Encoded]] = {}
    reports: dict[str, str] = {}
    for name, source in settings.named().items():
        read = read_rows(source)
        whole, report = encode_rows(read, chat, **encoding)
        rows[name], held_out[name] = hold_out([read[i] for i in report.kept_rows], settings.hold_out)
        encoded[name], reports[name] = hold_out(whole, settings.hold_out)[0], str(report)
    for name in settings.shuffle:
        encoded[name] = shuffle_tokens(encoded[name], seed=settings.seed)
        rows[name] = [replace(r, response_ids=e.response_ids, response=chat.tokenizer.decode(e.response_ids), finished=e.finished)
                      for r, e in zip(rows[name], encoded[name], strict=True)]
    plan = plan_of({name: [e.loss_tokens for e in found] for name, found in encoded.items()}, settings)
    return Mixture(rows, plan, held_out, encoding, reports)


def hold_out(rows: Sequence[T], n: int) -> tuple[list[T], list[T]]:
    """Rows to train on, and ``n`` rows to measure on, at most a quarter of them, evenly spread over the file: many are sorted, by
    label or by length, and the rows at one end are then of one kind.

    >>> hold_out("abcdefgh", 3), hold_out("abcd", 0)
    ((['a', 'b', 'd', 'e', 'f', 'h'], ['c', 'g']), (['a', 'b', 'c', 'd'], []))
    """
    n = min(n, len(rows) // 4)
    held = {(2 * k + 1) * len(rows) // (2 * n) for k in range(n)}
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def read_mixture(folder: Path | str) -> Mixture:
    """A mix as :func:`make_mixture` wrote it: the rows that it reads, numbered anew by source, and the plan.

    Raises :class:`UsageError` if the folder holds no mix, or if its rows were changed since (hashes and counts).
    """
    folder = Path(folder)
    if not (folder / "mix.json").exists():
        raise UsageError(f"{folder} holds no mix (no mix.json); write one with `sasft mix`")
    report = json.loads((folder / "mix.json").read_text(encoding="utf-8"))
    held = {name: _held_out(folder, name) for name in report["held_out"]}
    written = {folder / "rows.jsonl": report["rows_sha256"], **{held[name]: report["held_out"][name]["sha256"] for name in held}}
    for path, sha256 in written.items():
        if sha256_file(path) != sha256:
            raise UsageError(f"{path} is not the file that mix.json describes (another SHA-256); write the mix again")
    found: dict[str, dict[int, Row]] = {source: {} for source in report["rows"]}
    steps: list[list[tuple[str, int]]] = [[] for _ in range(report["steps"])]
    for row in read_rows(folder / "rows.jsonl"):
        found[row.source][row.meta["row"]] = row
        steps[row.meta["step"] - 1].append((row.source, row.meta["row"]))
    number = {source: {old: new for new, old in enumerate(sorted(of))} for source, of in found.items()}
    rows = {source: [of[old] for old in sorted(of)] for source, of in found.items()}
    plan = Plan(tuple(tuple((s, number[s][i]) for s, i in step) for step in steps),
                {s: tuple(r.meta["loss_tokens"] for r in of) for s, of in rows.items()}, report["lambda_asked"], report["by"],
                {s: share["asked"] for s, share in report["shares"].items()}, report["loss_weights"])
    counted = plan.report()
    for what in ("steps", "rows", "loss_tokens"):
        if counted[what] != report[what]:
            raise UsageError(f"{folder}: mix.json counts {what} {report[what]}, rows.jsonl has {counted[what]}; write the mix "
                             "again")
    held_out = {name: read_rows(path) if report["held_out"][name]["rows"] else [] for name, path in held.items()}
    return Mixture(rows, plan, held_out, {name: report["identity"]["settings"][name] for name in _ENCODING}, report["encoding"])


def _held_out(folder: Path, name: str) -> Path:
    return folder / "held_out" / f"{name}.jsonl"


def plan_of(tokens: Mapping[str, Sequence[int]], settings: MixSettings) -> Plan:
    """The plan that the settings ask for, over rows with so many loss tokens."""
    shares = dict(zip(tokens, settings.shares or [1.0] * len(tokens), strict=True))
    if settings.like:
        return match(read_mixture(settings.like).plan, tokens, shares, equal=settings.equal, by=settings.by, seed=settings.seed)
    rows_per_step = settings.rows_per_step or (None if settings.tokens_per_step else 16)
    steps = 100 if settings.steps is None else settings.steps
    return mix(tokens, shares, by=settings.by, steps=steps, rows_per_step=rows_per_step,
               tokens_per_step=settings.tokens_per_step, seed=settings.seed)


def _line(mixture: Mixture, step: int, source: str, i: int) -> dict[str, Any]:
    return {"step": step, "row": i, "loss_tokens": mixture.plan.tokens[source][i],
            "loss_weight": mixture.plan.loss_weights.get(source, 1.0), **_plain(mixture.rows[source][i], source)}


def _plain(row: Row, source: str) -> dict[str, Any]:
    """A row without its other fields, which in a table may be of any type (dates, images); the sampler stays, for which some
    methods ask."""
    sampler = {name: row.meta[name] for name in ("sampler",) if name in row.meta}
    return replace(row, source=source, meta=sampler).as_json()
