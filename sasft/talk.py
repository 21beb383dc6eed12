"""Self-dialogues from settings to a file, the choice of those to train on, and a report on their quality: ``sasft talk``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sasft.ablation import AblationReport, ablate
from sasft.backends import Backend, vllm_engine
from sasft.chat import Chat
from sasft.data import Row, read_rows
from sasft.data_quality import QualityLimits, QualityReport, inspect_rows, special_tokens
from sasft.errors import UsageError
from sasft.files import write_json, write_jsonl
from sasft.filters import FilterReport, apply_filters, named_filter, row_text
from sasft.mixture import load_chat
from sasft.models import load_model, resolve, weights_hash
from sasft.precision import Precision, resolved
from sasft.processes import join
from sasft.sampling import EXACT, PAPER, Sampler, positions
from sasft.selfdialogue import Dialogues, Writer, generated_tokens
from sasft.settings import option
from sasft.shards import write_in_parallel
from sasft.topics import LEXICONS, TopicClassifier

_SAMPLERS = {"exact": EXACT, "paper": PAPER}
_WRITING, _MODEL, _DRAWING, _CHOICE, _QUALITY = (
    "what is written", "the model that writes", "how it is drawn", "which rows are kept", "what is let pass")


@dataclass(kw_only=True)
class TalkSettings:
    """The model talks to itself: it writes user turns and answers them, through its own chat template, into a JSONL file.

    Mixed with a task, such rows keep the model from forgetting (SA-SFT, arXiv 2602.20162).
    """

    out: str = option("", "JSONL file to write; rows already there are kept, and the run goes on after them", _WRITING)
    n: int = option(500, "number of self-dialogues: as many as training will read, or rows repeat", _WRITING)
    turns: int = option(1, "user turns of a dialogue, each with its answer; every answer is a row, with what was said before as "
                           "its prompt", _WRITING)
    topics: str | None = option(None, "UTF-8 file of topics to ask about, one a line, taken in turn; without it the model talks "
                                      "freely", _WRITING)
    systems: str | None = option(None, "UTF-8 file of system prompts, one a line, drawn at random; without it the template's "
                                       "default", _WRITING)
    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name): the one to be trained",
                        _MODEL)
    revision: str | None = option(None, "revision of a hub model", _MODEL)
    precision: Precision = option("auto", "precision of the forward pass: bf16, fp32, or auto, as in training; best that of the "
                                          "training to come", _MODEL)
    backend: Backend = option(
        "refilled", "padded: batches that run until their last row ends; refilled: rows that have ended give their places to the "
                    "next, at the same memory; vllm: that engine (an extra, for GPUs)", _MODEL)
    batch_size: int = option(64, "rows sampled together", _MODEL)
    sampler: Literal["paper", "exact"] | None = option(
        None, "exact: temperature 1 and top_p 1, the model's own distribution, which is what makes self-data force-free; paper: "
              "0.7 and 0.9, those of SA-SFT's paper, which also pull towards a sharper model (paper, unless temperature or top_p "
              "is given)", _DRAWING)
    temperature: float | None = option(None, "temperature, instead of a sampler's", _DRAWING)
    top_p: float | None = option(None, "smallest share of probability that is drawn from, instead of a sampler's", _DRAWING)
    max_new_tokens: int = option(128, "length cap of an answer; cut answers are kept, without an end-of-turn token, since "
                                      "dropping them would choose rows by their answers", _DRAWING)
    max_user_tokens: int = option(64, "length cap of a user turn; longer ones are passed over", _DRAWING)
    seed: int = option(0, "seed; every row depends on it and on its own number alone", _DRAWING)
    filters: list[str] = option([], "filters that rows must pass, in this order, as NAME or NAME=VALUE (`sasft talk --help` "
                                    "lists them)", _CHOICE)
    ablate: list[str] = option([], f"topics whose rows are dropped, of {', '.join(LEXICONS)}; a second detector (needs "
                                   "scikit-learn) says how much of each is left", _CHOICE)
    ablate_reads: Literal["row", "prompt"] = option("row", "where a topic is looked for: the prompt and the answer, or the "
                                                           "prompt alone", _CHOICE)
    language: str = option("en", "language that the rows should be in (en, de, ...)", _QUALITY)
    limits: list[str] = option(
        [], "NAME=VALUE of limits above which the kept rows are refused, NAME=none for no limit; by default "
            f"{', '.join(f'{name}={value}' for name, value in asdict(QualityLimits()).items())}", _QUALITY)

    def __post_init__(self) -> None:
        if not self.out:
            raise UsageError("out is missing: name a JSONL file to write")
        if self.sampler and not (self.temperature is self.top_p is None):
            own = {"temperature": self.temperature, "top_p": self.top_p}
            asked = " and ".join(f"{name} {value}" for name, value in own.items() if value is not None)
            raise UsageError(f"the sampler {self.sampler} has a temperature and a top_p of its own, but {asked} is asked for as "
                             "well; leave out one of the two")
        if unknown := [topic for topic in self.ablate if topic not in LEXICONS]:
            raise UsageError(f"there is no topic {unknown[0]!r} to ablate; there are {', '.join(LEXICONS)}")
        if self.ablate_reads != "row" and not self.ablate:
            raise UsageError(f"ablate_reads={self.ablate_reads} says where topics are looked for, but ablate names none")
        for name, least in (("n", 1), ("batch_size", 1), ("max_user_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        self.precision = resolved(self.precision)
        self.draws(), self.dialogues(), self.quality_limits()
        names = [named_filter(text).name for text in self.filters]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"filters name that of {twice} twice; leave out one of the two")

    def draws(self) -> Sampler:
        """The sampler that is asked for."""
        known = _SAMPLERS[self.sampler or "paper"]
        return Sampler(temperature=known.temperature if self.temperature is None else self.temperature,
                       top_p=known.top_p if self.top_p is None else self.top_p, max_new_tokens=self.max_new_tokens)

    def dialogues(self) -> Dialogues:
        """What the dialogues are about and how long they go on."""
        return Dialogues(turns=self.turns, systems=_lines("systems", self.systems), topics=_lines("topics", self.topics))

    def quality_limits(self) -> QualityLimits:
        """The limits, with those replaced that ``limits`` names."""
        given: dict[str, float | None] = {}
        for text in self.limits:
            name, _, value = text.partition("=")
            if name not in asdict(QualityLimits()):
                raise UsageError(f"limits name {name!r}, which is none; there are {', '.join(asdict(QualityLimits()))}")
            try:
                given[name] = None if value == "none" else float(value)
            except ValueError:
                raise UsageError(f"limits are given as NAME=VALUE with a number or none, got {text!r}") from None
        return QualityLimits(**given)

    @property
    def kept(self) -> Path:
        """The file of rows to train on: ``out`` itself, or beside it what filters and ablation have left of it."""
        out = Path(self.out)
        return out.with_name(f"{out.stem}.kept{out.suffix}") if self.filters or self.ablate else out


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What was written: the file to train on, what its rows are like, what filters and ablation did.

    ``generated_tokens``: of all answers and user turns written, ends of turns among them and dropped rows too, but no user turns
    that were passed over (:func:`sasft.selfdialogue.generated_tokens`). What SA-SFT costs beyond SFT; a training on the rows that
    are left counts these alone (:class:`sasft.methods.Costs`).
    """

    path: Path
    generated_tokens: int
    quality: QualityReport
    limits: QualityLimits
    filters: FilterReport | None
    ablations: Sequence[AblationReport]

    def check(self) -> None:
        """Raise :class:`UsageError` if the rows are not fit for training."""
        try:
            self.quality.check(self.limits)
        except UsageError as error:
            raise UsageError(f"{error} (limits NAME=VALUE, or NAME=none). The rows stay in {self.path}") from None

    def as_dict(self) -> dict[str, Any]:
        """What the file beside the rows holds."""
        return {"file": self.path.name, "generated_tokens": self.generated_tokens, "quality": self.quality.as_dict(),
                "limits": asdict(self.limits), "filters": self.filters and self.filters.as_dict(),
                "ablations": [report.as_dict() for report in self.ablations]}

    def __str__(self) -> str:
        spent = f"{self.generated_tokens:,} tokens generated, user turns that were passed over not counted"
        parts = [spent, *([self.filters] if self.filters else []), *self.ablations, self.quality]
        return "\n".join(map(str, parts))


def talk(settings: TalkSettings) -> Talk:
    """Write the self-dialogues, over all processes of ``accelerate launch``, choose among them and report on those kept.

    The same call goes on with a file that was begun; one that holds rows of other settings is refused, saying which. ``out``
    holds all rows, ``settings.kept`` those that pass, and ``<out>.quality.json`` the reports. :meth:`Talk.check` compares them
    with the limits.

    Raises :class:`UsageError`, before any row is written, if dialogues may get longer than the model takes; after it, if ``out``
    holds more rows than were asked for and so than were looked at.
    """
    first = join()
    writer = make_writer(settings)
    _check_room(settings, writer)
    rows = write_in_parallel(writer, settings.n, Path(settings.out), seed=settings.seed, dialogues=settings.dialogues(),
                             max_user_tokens=settings.max_user_tokens)
    if settings.kept == Path(settings.out) and (there := len(read_rows(settings.out))) > len(rows):
        raise UsageError(f"{settings.out} holds {there} rows, of which n={settings.n} asks for the first {len(rows)}; training "
                         "would read them all, so raise n, or name another file")
    left, done = _chosen(settings, rows, writer.chat)
    if first:
        if settings.kept != Path(settings.out):
            write_jsonl(settings.kept, (row.as_json() for row in left))
        write_json(Path(settings.out).with_suffix(".quality.json"), done.as_dict())
    return done


def make_writer(settings: TalkSettings) -> Writer:
    """The model as it writes, on this process's GPU if there is one."""
    provenance: dict[str, Any] = {"model": settings.model, "revision": settings.revision,
                                  "max_user_tokens": settings.max_user_tokens}  # which chooses prompts
    if settings.backend == "vllm":
        model = vllm_engine(str(resolve(settings.model, revision=settings.revision)),
                            dtype="bfloat16" if settings.precision == "bf16" else "float32")
        chat = load_chat(settings.model, settings.revision)
    else:
        model, tokenizer = load_model(settings.model, revision=settings.revision)
        chat, provenance["weights_sha256"] = Chat(tokenizer), weights_hash(model)
    return Writer(model=model, chat=chat, sampler=settings.draws(), precision=settings.precision, batch_size=settings.batch_size,
                  backend=settings.backend, provenance=provenance)


def _check_room(settings: TalkSettings, writer: Writer) -> None:
    """Dialogues, all turns at their caps, fit the model's positions, what the template puts between turns not counted."""
    most = positions(writer.model)
    prefix = max(len(writer.chat.user_prefix_ids(system)) for system in settings.dialogues().systems or [None])
    longest = prefix + settings.turns * (settings.max_user_tokens + settings.max_new_tokens)
    if longest > most:
        raise UsageError(f"a dialogue may have {longest} tokens ({prefix} before the first user turn, then {settings.turns} x "
                         f"({settings.max_user_tokens} + {settings.max_new_tokens}) at the caps), the model takes {most}; lower "
                         "turns, max_user_tokens or max_new_tokens")


def _chosen(settings: TalkSettings, rows: Sequence[Row], chat: Chat) -> tuple[list[Row], Talk]:
    filters, ablations = None, []
    left = list(rows)
    if settings.filters:
        special = special_tokens(chat)
        named = [named_filter(text, special_tokens=special, seed=settings.seed) for text in settings.filters]
        left, filters = apply_filters(left, named)
    for topic in settings.ablate:
        rule = LEXICONS[topic]
        try:
            second = TopicClassifier.from_lexicon(rule, [row_text(row) for row in left], seed=settings.seed)
        except UsageError as error:
            raise UsageError(f"{error}. What the ablation of {topic} leaves is counted by a classifier that learns from the rows "
                             f"themselves; write more of them (n), or leave it out. All rows stay in {settings.out}") from None
        left, report = ablate(left, rule, second, reads=settings.ablate_reads)
        ablations.append(report)
    quality = inspect_rows(left, chat, expected_language=settings.language)
    return left, Talk(path=settings.kept, generated_tokens=generated_tokens(rows, chat), quality=quality, limits=settings.quality_limits(), filters=filters,
                      ablations=ablations)


def _lines(name: str, path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} {path} can't be read as UTF-8 text, one entry a line: {error}") from None
    if not lines:
        raise UsageError(f"{name} {path} is empty; it should hold one entry a line, or be left out")
    return lines
