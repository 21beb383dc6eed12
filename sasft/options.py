"""Settings from a command line and a YAML file: both go through one parser, so both are checked alike.

The parser is transformers' ``HfArgumentParser``, which makes options out of the fields of dataclasses; what is added here are
headings, a YAML file, and errors that say what would be right.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from sasft.errors import UsageError

DRY_RUN = "dry_run"


def parse(kind: type, argv: Sequence[str], *, prog: str, teach: str = "", dry_run: bool = False,
          elsewhere: Mapping[str, str] | None = None) -> tuple[Any, bool]:
    """Settings of the dataclass ``kind`` from ``--name value`` pairs, over those of ``--config file.yaml``, over its defaults,
    and whether a dry run was asked for (if there is a ``dry_run``).

    YAML may nest: ``talk: {n: 50}`` is ``talk_n: 50``. ``teach`` is shown below the options by ``--help``; ``elsewhere`` says of
    options of other commands where they belong.

    Raises :class:`UsageError` for a file that cannot be read, and for options and values that there are not.
    """
    first = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    before, argv = first.parse_known_args(argv)
    names = [field.name for field in dataclasses.fields(kind)]
    parser = _Parser(_groups(kind), prog=prog, usage=f"{prog} [--config FILE] [--option value ...]", epilog=teach,
                     description=inspect.cleandoc(kind.__doc__ or ""), formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options by name; those given here go before it")
    if dry_run:
        parser.add_argument("--dry_run", "--dry-run", action="store_true", help="say what would be done and what it would take "
                            "in time and memory, and do nothing")
    from_file = [] if before.config is None else _from_yaml(Path(before.config), names)
    given, unknown = parser.parse_known_args([*from_file, *argv])
    if unknown:
        raise UsageError(_unknown(prog, unknown[0], names, elsewhere or {}))
    return kind(**{name: getattr(given, name) for name in names}), dry_run and given.dry_run


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Options have a twin with hyphens, and switches one that turns them off: one spelling is enough to read.
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        if action.nargs == 0:
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"the opposite of --{action.dest}"
        none = action.default in (None, "", False, argparse.SUPPRESS) or action.default == []
        return action.help if none else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; --help explains it")


def headed(kind: type) -> dict[str, list[dataclasses.Field]]:
    """The settings' fields by the headings of the help: in their order, but those of a class before those that it inherits.

    A field that names no heading stands under how the description of its class begins.
    """
    found: dict[str, list[dataclasses.Field]] = {}
    left = {field.name: field for field in dataclasses.fields(kind)}
    for owner in kind.__mro__:
        for field in [left.pop(name) for name in list(left) if name in inspect.get_annotations(owner)]:
            about = re.split(r"[.,:]", (owner.__doc__ or " "), maxsplit=1)[0]
            found.setdefault(field.metadata.get("group") or about[:1].lower() + about[1:], []).append(field)
    return found


def _groups(kind: type) -> list[type]:
    """The fields under each heading as a dataclass of their own, without the checks, which are for finished settings."""
    def plain(field: dataclasses.Field) -> tuple[str, Any, Any]:
        text = field.metadata["help"].replace("%", "%%")  # which argparse would fill in
        return field.name, field.type, dataclasses.field(metadata={"help": text}, **default_of(field))

    return [dataclasses.make_dataclass(kind.__name__, map(plain, fields), kw_only=True,
                                       namespace={"_argument_group_name": heading})
            for heading, fields in headed(kind).items()]


def default_of(field: dataclasses.Field) -> dict[str, Any]:
    """What gives another field the same default."""
    if field.default_factory is not dataclasses.MISSING:
        return {"default_factory": field.default_factory}
    return {"default": field.default}


def _from_yaml(path: Path, names: Sequence[str]) -> list[str]:
    """The file's settings as they would be written on a command line."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} can't be read: {error}") from None
    if not isinstance(read, dict):
        raise UsageError(f"--config {path} must hold `name: value` lines, got {str(read)[:60]!r}")
    flat: dict[str, Any] = {}
    for name, value in read.items():
        flat |= {f"{name}_{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {str(name): value}
    if unknown := [name for name in flat if name not in names]:
        raise UsageError(f"--config {path} has unknown settings: {', '.join(unknown)}{_guess(unknown[0], names)}; there are "
                         f"{', '.join(names)}")
    if empty := [name for name, value in flat.items() if value is None]:
        raise UsageError(f"--config {path} gives {empty[0]} no value; leave it out for the default")
    return [part for name, value in flat.items()
            for part in ([f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"])]


def _unknown(prog: str, option: str, names: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    if not option.startswith("-"):
        return f"{prog} takes options by name, as --{names[0]} ..., got {option!r} without one"
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    of_a_part = any(own.endswith(f"_{name}") for own in names)
    hint = f"; it is an option of {elsewhere[name]}" if name in elsewhere and not of_a_part else _guess(name, names)
    return f"{prog} has no option {option}{hint or '; --help lists all'}"


def _guess(name: str, names: Sequence[str]) -> str:
    near = [own for own in names if own.endswith(f"_{name}")] or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
