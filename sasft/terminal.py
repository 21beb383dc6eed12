"""What is shown to people: rows coloured by what is in the loss and by whose they are, and tables."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from sasft.chat import Chat, Encoded
from sasft.data import Row
from sasft.errors import UsageError

_HUES = {32: "green", 36: "cyan", 35: "magenta", 33: "yellow", 34: "blue", 31: "red"}


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether to colour what is written to ``stream`` (standard output): a terminal that is not dumb, and no NO_COLOR set.

    FORCE_COLOR colours what is not a terminal, too. (The conventions are those of no-color.org and force-color.org.)
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def show_row(row: Row, encoded: Encoded, chat: Chat, sources: Sequence[str], *, colour: bool) -> str:
    """A row under a line that names it: its tokens in the loss in its source's colour, the others dim.

    ``sources``: all there are, which settles their colours (which come again after the sixth). Without ``colour``, tokens in the
    loss stand between ⟦ and ⟧.
    """
    hue = _hue(row.source, sources)
    ends = "ends its turn" if encoded.finished else "is cut: no end of turn"
    head = f"--- {row.source} {row.id}: {len(encoded.input_ids)} tokens, {encoded.loss_tokens} in the loss, {ends}"
    return (f"\x1b[{hue}m{head}\x1b[0m" if colour else head) + "\n" + chat.show(encoded, colour=colour, hue=hue)


def legend(sources: Sequence[str], *, colour: bool) -> str:
    """What the marks mean."""
    if not colour:
        return "between ⟦ and ⟧: in the loss"
    hues = {source: _hue(source, sources) for source in sources}
    told = ", ".join(f"\x1b[{hue}m{source} {_HUES[hue]}\x1b[0m" for source, hue in hues.items())
    return f"in the loss: bright, {told}; the rest: dim"


def _hue(source: str, sources: Sequence[str]) -> int:
    return list(_HUES)[list(sources).index(source) % len(_HUES)]


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of cells under a row of headings, in columns.

    >>> print(table([("name", "n"), ("a", "10")]))
    name  n
    a     10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def counted(n: int, what: str) -> str:
    """A number of things, in the plural unless it is one."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def gib(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """A duration as people say it.

    >>> duration(0.26), duration(95), duration(9000)
    ('0.3 seconds', '1.6 minutes', '2.5 hours')
    """
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def exit_code(work: Callable[[], Any], stopped: str = "the same command goes on from here") -> int:
    """Do the work of a command; 0, or what to end with where it was refused (2) or stopped (130), said on standard error."""
    try:
        work()
    except (UsageError, OSError) as error:  # a full disk, say, wherever it is met
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130
    return 0
