"""The command line: ``sasft talk``, ``sasft train``, ``sasft show``, ``sasft restyle``.

Every option is a field of the command's settings, documented there once; ``--config file.yaml`` reads them from a file, and
options on the command line go before it.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import write_jsonl
from sasft.filters import NAMED
from sasft.mixture import load_chat
from sasft.options import parse
from sasft.restyle import STYLES, restyle
from sasft.settings import option
from sasft.talk import TalkSettings, talk
from sasft.train import TrainSettings, train


@dataclass(kw_only=True)
class ShowSettings:
    """Print rows as the model will see them: what is in the loss bright, the rest dim."""

    file: str = option("", "JSONL file of rows")
    model: str = option("smollm2-135m-instruct", "whose chat template: embedded model name, local folder, or hub id")
    n: int = option(3, "how many rows")


@dataclass(kw_only=True)
class RestyleSettings:
    """Rewrite the answers of a JSONL file in another style, their content kept and checked."""

    file: str = option("", "JSONL file of rows")
    style: str = option("", f"one of {', '.join(STYLES)}")
    out: str = option("", "JSONL file to write")


def _talk(settings: TalkSettings) -> None:
    done = talk(settings)
    print(f"{done}\nself-dialogues to train on: {done.path}")
    done.check()


def _train(settings: TrainSettings) -> None:
    summary = train(settings)
    print(json.dumps({"mix": summary["mix"], "recorded": summary["recorded"]}, indent=1))
    print(f"run folder: {settings.out}")


def _show(settings: ShowSettings) -> None:
    _need(settings, "file")
    rows = read_rows(settings.file)[: settings.n]
    chat = load_chat(settings.model)
    for row, encoded in zip(rows, encode_rows(rows, chat, sys.maxsize)[0], strict=True):
        print(f"--- {row.id}: {len(encoded.input_ids)} tokens, {encoded.loss_tokens} in the loss\n{chat.show(encoded)}")


def _restyle(settings: RestyleSettings) -> None:
    _need(settings, "file", "style", "out")
    rows = read_rows(settings.file)
    if Path(settings.out).exists():
        raise UsageError(f"out {settings.out} exists already; name another file, or remove it")
    restyled = [replace(row, response=restyle(row.response, settings.style), response_ids=None, meta={"style": settings.style})
                for row in rows]
    write_jsonl(settings.out, (row.as_json() for row in restyled))
    print(f"{len(rows)} rows in {settings.style} style: {settings.out}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its settings, what it does with them, and examples for ``--help`` (options or whole lines below them)."""

    settings: type
    run: Callable[[Any], None]
    examples: str
    notes: str = ""

    @property
    def about(self) -> str:
        """The settings' first sentence."""
        return (self.settings.__doc__ or "").partition("\n")[0]


COMMANDS: dict[str, Command] = {
    "talk": Command(settings=TalkSettings, run=_talk, examples="""\
  sasft talk --out self.jsonl --n 500 --sampler exact
  sasft talk --out self.jsonl --n 500 --turns 2 --topics topics.txt
  sasft talk --out self.jsonl --n 500 --filters distinct prompt_words=3-60 --ablate mathematics --limits unfinished=0.5
  accelerate launch -m sasft.cli talk --out self.jsonl --n 5000""",
                    notes="filters, by name:\n" + "\n".join(f"  {name:<20}{what}" for name, what in NAMED.items())),
    "train": Command(settings=TrainSettings, run=_train, examples="""\
  sasft train --task my_task.jsonl --self_data self.jsonl --lam 0.5 --steps 100 --out runs/mine"""),
    "show": Command(settings=ShowSettings, run=_show, examples="""\
  sasft show --file my_task.jsonl --n 2"""),
    "restyle": Command(settings=RestyleSettings, run=_restyle, examples="""\
  sasft restyle --file my_task.jsonl --style telegraphic --out terse.jsonl"""),
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
    try:
        settings, _ = parse(command.settings, argv[1:], prog=f"sasft {name}", teach=teach, elsewhere=_owners(name))
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            command.run(settings)
    except (UsageError, OSError) as error:  # a full disk, say, wherever it is met
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was written stays, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _owners(name: str) -> dict[str, str]:
    """The options of the other commands, and whose they are."""
    return {field.name: f"sasft {other}" for other, command in COMMANDS.items() if other != name
            for field in dataclasses.fields(command.settings)}


def _need(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise UsageError(f"--{name} is missing: {type(settings).__dataclass_fields__[name].metadata['help']}")


if __name__ == "__main__":
    sys.exit(main())
