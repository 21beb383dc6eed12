"""The command line: ``sasft generate``, ``sasft train``, ``sasft show``, ``sasft restyle``.

Every option is a field of the command's settings, documented there once; ``--config file.yaml`` reads them from a file, and
options on the command line go before it.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from sasft.chat import Chat
from sasft.data import encode_rows, read_rows
from sasft.errors import UsageError
from sasft.files import JsonlWriter
from sasft.models import load_model, weights_hash
from sasft.precision import Precision
from sasft.restyle import STYLES, restyle
from sasft.sampling import Sampler
from sasft.selfdialogue import Writer, generate, quality
from sasft.settings import option
from sasft.train import TrainSettings, train


@dataclass(kw_only=True)
class GenerateSettings:
    """Self-dialogues, written by the model itself through its chat template, into a JSONL file."""

    out: str = option("", "JSONL file to write; rows already there are kept, and the run goes on after them")
    n: int = option(500, "number of self-dialogues")
    model: str = option("smollm2-135m-instruct", "embedded model name, local folder, or hub id (org/name)")
    revision: str | None = option(None, "revision of a hub model")
    temperature: float = option(0.7, "sampling temperature; 1 with top_p 1 samples the model's own distribution, "
                                "which is what makes self-data force-free")
    top_p: float = option(0.9, "nucleus: smallest share of probability that is sampled from")
    max_new_tokens: int = option(128, "length cap of an answer; cut answers are kept, without an end-of-turn token")
    max_user_tokens: int = option(64, "length cap of a user turn; longer ones are passed over")
    seed: int = option(0, "seed; every row depends on it and on its own number alone")
    batch_size: int = option(64, "rows sampled together")
    precision: Precision = option("auto", "precision of the forward pass: bf16, fp32, or auto, as in training; best that of the training to come")


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


def _generate(settings: GenerateSettings) -> None:
    _need(settings, "out")
    sampler = Sampler(temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens)
    model, tokenizer = load_model(settings.model, revision=settings.revision)
    writer = Writer(model=model, chat=Chat(tokenizer), sampler=sampler, precision=settings.precision,
                    batch_size=settings.batch_size,
                    provenance={"model": settings.model, "revision": settings.revision, "weights_sha256": weights_hash(model)})
    rows = generate(writer, settings.n, Path(settings.out), seed=settings.seed, max_user_tokens=settings.max_user_tokens)
    print(json.dumps(quality(rows), indent=1))


def _train(settings: TrainSettings) -> None:
    summary = train(settings)
    print(json.dumps({"mix": summary["mix"], "recorded": summary["recorded"]}, indent=1))
    print(f"run folder: {settings.out}")


def _show(settings: ShowSettings) -> None:
    _need(settings, "file")
    rows = read_rows(settings.file)[: settings.n]
    _, tokenizer = load_model(settings.model)
    chat = Chat(tokenizer)
    for row, encoded in zip(rows, encode_rows(rows, chat, sys.maxsize)[0], strict=True):
        print(f"--- {row.id}: {len(encoded.input_ids)} tokens, {encoded.loss_tokens} in the loss\n{chat.show(encoded)}")


def _restyle(settings: RestyleSettings) -> None:
    _need(settings, "file", "style", "out")
    rows = read_rows(settings.file)
    if Path(settings.out).exists():
        raise UsageError(f"out {settings.out} exists already; name another file, or remove it")
    restyled = [{"id": row.id, "source": row.source, "finished": row.finished, "style": settings.style,
                 "messages": [*row.prompt, {"role": "assistant", "content": restyle(row.response, settings.style)}]}
                for row in rows]
    with JsonlWriter(settings.out) as sink:
        sink.write(restyled)
    print(f"{len(rows)} rows in {settings.style} style: {settings.out}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "generate": (GenerateSettings, _generate),
    "train": (TrainSettings, _train),
    "show": (ShowSettings, _show),
    "restyle": (RestyleSettings, _restyle),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input (its message on stderr), 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:<10}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
        unknown = f"error: unknown command {argv[0]!r}\n" if argv and not asked else ""
        print(f"{unknown}usage: sasft COMMAND [options]; `sasft COMMAND --help` lists them\n" + "\n".join(lines),
              file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    kind, run = COMMANDS[argv[0]]
    try:
        run(_settings(kind, argv[0], argv[1:]))
    except (UsageError, OSError) as error:  # a full disk, say, wherever it is met
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was written stays, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _settings(kind: type, command: str, argv: Sequence[str]) -> Any:
    """Settings from the command line, over those of ``--config``, over the defaults."""
    argv = list(argv)
    from_file: dict[str, Any] = {}
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UsageError("--config needs the name of a YAML file")
        path = Path(argv[at + 1])
        del argv[at : at + 2]
        try:
            from_file = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"--config {path} can't be read: {error}") from None
        if not isinstance(from_file, dict):
            raise UsageError(f"--config {path} must hold `name: value` lines")
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := from_file.keys() - known:
            raise UsageError(f"--config {path} has unknown settings: {', '.join(sorted(unknown))}; "
                             f"there are {', '.join(sorted(known))}")
    parser = HfArgumentParser(_plain(kind), prog=f"sasft {command}", description=(kind.__doc__ or "").splitlines()[0])
    parser.set_defaults(**from_file)
    return kind(**vars(parser.parse_args(argv)))


def _plain(kind: type) -> type:
    """The settings' fields without their checks, which are for the finished settings only."""
    fields = [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(kind)]
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _need(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise UsageError(f"--{name} is missing: {type(settings).__dataclass_fields__[name].metadata['help']}")


if __name__ == "__main__":
    sys.exit(main())
