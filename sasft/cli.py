"""The command line: ``sasft talk | mix | train | evaluate | run``, and beside them ``sasft sweep``, ``show`` and ``restyle``.

Every option is a field of the command's settings, documented there once; ``--config file.yaml`` reads them from a file, and
options on the command line go before it.
"""

import dataclasses
import io
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sasft import dryrun
from sasft.chat import Turns
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.evaluation import SUITES, EvaluateSettings
from sasft.evaluation import run as evaluate
from sasft.files import write_jsonl
from sasft.filters import NAMED
from sasft.methods import METHODS, Method
from sasft.mixture import MixSettings, load_chat, make_mixture
from sasft.options import parse
from sasft.pipeline import RunSettings, mix_table, recorded_table, run
from sasft.processes import join
from sasft.restyle import STYLES, ContentLost, restyle
from sasft.settings import option
from sasft.sweep import SweepSettings, sweep
from sasft.sweep_dryrun import of_sweep
from sasft.talk import TalkSettings, talk
from sasft.terminal import exit_code, has_colour, legend, show_row
from sasft.train import TrainSettings, train

DRY_RUNS = {**dryrun.DRY_RUNS, "sweep": of_sweep}


@dataclass(kw_only=True)
class ShowSettings:
    """Print rows as the model will see them, coloured by whose they are: what is in the loss bright, the rest dim."""

    file: str = option("", "what to show: FILE[:field=column,...] (JSONL or Parquet), a hub dataset, or the folder of a mix")
    n: int = option(3, "how many rows of each source")
    turns: Turns = option("last", "assistant turns in the loss: the last one of a row, or all")
    model: str = option("smollm2-135m-instruct", "whose chat template: embedded model name, local folder, or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")

    def __post_init__(self) -> None:
        _need(self, "file")
        if self.n < 1:
            raise UsageError(f"n must be at least 1, got {self.n}")


@dataclass(kw_only=True)
class RestyleSettings:
    """Rewrite the answers of a JSONL file in another style, their content kept and checked."""

    file: str = option("", "JSONL file of rows")
    style: str = option("", f"one of {', '.join(STYLES)}")
    out: str = option("", "JSONL file to write")

    def __post_init__(self) -> None:
        _need(self, "file", "style", "out")
        if Path(self.out).exists():
            raise UsageError(f"out {self.out} exists already; name another file, or remove it")
        if self.style not in STYLES:
            raise UsageError(f"style {self.style!r} does not exist; use one of: {', '.join(STYLES)}")


def _talk(settings: TalkSettings) -> None:
    done = talk(settings)
    print(f"{done}\nself-dialogues to train on: {done.path}")
    done.check()


def _mix(settings: MixSettings) -> None:
    report = make_mixture(settings)
    print(mix_table(report))
    print(f"mix: {settings.out} (train on it with `sasft train --mix {settings.out}`)")


def _train(settings: TrainSettings) -> None:
    summary = train(settings)
    print(mix_table(summary["mix"]))
    print(recorded_table(summary["recorded"]))
    spent = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in summary["costs"].items() if n)
    print(f"the method {settings.method} has cost beyond SFT: {spent or 'nothing'}")
    print(f"run: {settings.out}" + (f" (the model: {settings.out}/model)" if settings.save_model else ""))


def _sweep(settings: SweepSettings) -> None:
    done = sweep(settings)
    print(done)
    done.check()


def _show(settings: ShowSettings) -> None:
    path = Path(settings.file) / "rows.jsonl"
    rows = read_rows(path if path.exists() else settings.file)
    sources = list(dict.fromkeys(row.source for row in rows))
    chosen, taken = [], Counter()
    for row in rows:
        if taken[row.source] < settings.n:
            chosen.append(row)
            taken[row.source] += 1
    chat, colour = load_chat(settings.model, settings.revision), has_colour()
    print(legend(sources, colour=colour))
    for row, encoded in zip(chosen, encode_rows(chosen, chat, sys.maxsize, turns=settings.turns)[0], strict=True):
        print(show_row(row, encoded, chat, sources, colour=colour))


def _restyle(settings: RestyleSettings) -> None:
    rows = read_rows(settings.file)
    restyled = []
    for row in rows:
        try:
            response = restyle(row.response, settings.style)
        except (UsageError, ContentLost) as error:
            raise UsageError(f"{settings.file}, row {row.id}: {error}") from None
        restyled.append(replace(row, response=response, response_ids=None, meta={"style": settings.style}))
    write_jsonl(settings.out, (row.as_json() for row in restyled))
    print(f"{len(rows)} rows in {settings.style} style: {settings.out}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its settings, what it does with them, and what ``--help`` teaches below the options.

    ``together``: whether all processes of ``accelerate launch`` take part, or the first does it alone.
    """

    settings: type
    run: Callable[[Any], Any]
    examples: str
    notes: str = ""
    together: bool = False

    @property
    def about(self) -> str:
        """The settings' first line."""
        return (self.settings.__doc__ or "").partition("\n")[0]


def _listed(title: str, about: Mapping[str, str]) -> str:
    return f"{title}:\n" + "\n".join(textwrap.fill(what, 128, initial_indent=f"  {name:<20}", subsequent_indent=" " * 22)
                                     for name, what in about.items())


def _first_sentence(documented: Any) -> str:
    """How a docstring begins, without its markup."""
    text = " ".join((documented.__doc__ or "").split()).partition(". ")[0].rstrip(".:")
    return re.sub(r"(:\w+:)?`+~?([^`]*)`+", r"\2", text)


def _method(kind: type[Method]) -> str:
    options = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(kind))
    return _first_sentence(kind) + (f" [{options}]" if options else "")


COMMANDS: dict[str, Command] = {
    "talk": Command(
        settings=TalkSettings, run=_talk, together=True, notes=_listed("filters, by name", NAMED), examples="""\
  sasft talk --out self.jsonl --n 500 --sampler exact
  sasft talk --out self.jsonl --n 500 --turns 2 --topics topics.txt
  sasft talk --out self.jsonl --n 500 --filters distinct prompt_words=3-60 --ablate mathematics --limits unfinished=0.5
  accelerate launch -m sasft.cli talk --out self.jsonl --n 5000"""),
    "mix": Command(
        settings=MixSettings, run=_mix, examples="""\
  sasft mix --sources task=my_task.jsonl self=self.jsonl --shares 0.5 0.5 --steps 100 --out mixes/half
  sasft mix --sources task=my_task.jsonl self=self.jsonl web=pages.parquet:prompt=q,response=a --by tokens --out mixes/three
  sasft mix --sources task=my_task.jsonl --like mixes/half --out mixes/task_repeated"""),
    "train": Command(
        settings=TrainSettings, run=_train, together=True,
        notes=_listed("methods, by name [with their options]", {name: _method(kind) for name, kind in METHODS.items()}),
        examples="""\
  sasft train --task my_task.jsonl --self_data self.jsonl --lam 0.5 --steps 100 --out runs/mine
  sasft train --mix mixes/half --lora_rank 16 --lr 2e-4 --out runs/lora
  sasft train --task my_task.jsonl --lam 0 --method l2-sp --method_options "weight=0.1" --out runs/l2sp
  accelerate launch -m sasft.cli train --mix mixes/half --out runs/ddp"""),
    "evaluate": Command(
        settings=EvaluateSettings, run=evaluate,
        notes=_listed("suites, by name", {name: _first_sentence(suite) for name, suite in SUITES.items()}), examples="""\
  sasft evaluate --model runs/mine/model --suites instructions,text,answers:test.jsonl --out scores/mine
  sasft evaluate --model runs/mine/model --base smollm2-135m-instruct --suites rows:self.jsonl,gsm8k@5 --out scores/kl"""),
    "run": Command(
        settings=RunSettings, run=run, together=True, examples="""\
  sasft run --task my_task.jsonl --out runs/whole
  sasft run --task my_task.jsonl --talk_sampler exact --talk_n 800 --mix_steps 100 --train_lr 2e-5 --out runs/whole
  sasft run --config run.yaml --out runs/whole, where run.yaml holds
      task: my_task.jsonl
      talk: {n: 800, sampler: exact}
      mix: {steps: 100, rows_per_step: 16}
      train: {lr: 2e-5, method: sa-sft}
      evaluate: {suites: "instructions,text"}"""),
    "sweep": Command(
        settings=SweepSettings, run=_sweep, examples="""\
  sasft sweep --file plan.yaml --out sweeps/rates --workers 2 --dry_run
  sasft sweep --file plan.yaml --out sweeps/rates --workers 2
  sasft sweep --file plan.yaml --out sweeps/rates --ray auto --cpus 8 --gpus 1, where plan.yaml holds
      train: {task: [sums.jsonl, letters.jsonl], self_data: self.jsonl, seed: [0, 1, 2], lr: [1e-5, 2e-5]}
      arms: [{name: task-only, lam: 0}, {name: sa-sft, lam: 0.5}, {name: l2-sp, lam: 0, method: l2-sp}]
      evaluate: {suites: "instructions,text"}"""),
    "show": Command(
        settings=ShowSettings, run=_show, examples="""\
  sasft show --file my_task.jsonl --n 2
  sasft show --file mixes/half"""),
    "restyle": Command(
        settings=RestyleSettings, run=_restyle, examples=f"""\
  sasft restyle --file my_task.jsonl --style {next(iter(STYLES))} --out restyled.jsonl"""),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input (its message on stderr), 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:<10}{command.about}" for name, command in COMMANDS.items()]
        unknown = f"error: unknown command {argv[0]!r}\n" if argv and not asked else ""
        print(f"{unknown}usage: sasft COMMAND [options]; `sasft COMMAND --help` lists them\n" + "\n".join(lines),
              file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, command = argv[0], COMMANDS[argv[0]]
    teach = "examples:\n" + command.examples + (f"\n\n{command.notes}" if command.notes else "")

    def work() -> None:
        settings, dry = parse(command.settings, argv[1:], prog=f"sasft {name}", teach=teach, dry_run=name in DRY_RUNS,
                              elsewhere=_owners(name))
        first = join()
        if not first and (dry or not command.together):
            return
        with warnings.catch_warnings(), redirect_stdout(sys.stdout if first else io.StringIO()):
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            if dry:
                print(f"{DRY_RUNS[name](settings).text}\nnothing was done: leave out --dry_run to do it")
            else:
                command.run(settings)

    return exit_code(work, stopped="what was written stays, and the same command goes on from there")


def _owners(name: str) -> dict[str, str]:
    """The options of the other commands, and whose they are."""
    return {field.name: f"sasft {other}" for other, command in reversed(COMMANDS.items()) if other != name
            for field in dataclasses.fields(command.settings)}


def _need(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise UsageError(f"--{name} is missing: {type(settings).__dataclass_fields__[name].metadata['help']}")


if __name__ == "__main__":
    sys.exit(main())
