"""Checks that methods share."""

from collections.abc import Mapping, Sequence

from sasft.chat import Encoded
from sasft.errors import UsageError


def source_names(on: str) -> tuple[str, ...]:
    """``task,web`` as names of sources."""
    names = tuple(filter(None, (name.strip() for name in on.split(","))))
    if not names:
        raise UsageError(f"on must name sources of the mix, as on=task or on=task,web; got {on!r}")
    return names


def check_weights(low: float = 0.0, high: float = float("inf"), **values: float) -> None:
    """Raise :class:`UsageError` for a value that is no number in [low, high], infinity left out."""
    for name, value in values.items():
        if not low <= value <= high or value == float("inf"):
            wanted = f"a number >= {low}" if high == float("inf") else f"a number in [{low}, {high}]"
            raise UsageError(f"{name} must be {wanted}, got {value}")


def check_counts(least: int = 1, **values: int) -> None:
    """Raise :class:`UsageError` for a value below ``least``."""
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")


def need_rows(method: str, rows: Mapping[str, Sequence[Encoded]], on: str) -> list[Encoded]:
    """The rows of the sources that the method works on, one source after the other.

    Raises :class:`UsageError` if one has none.
    """
    for name in source_names(on):
        if not rows.get(name):
            having = ", ".join(source for source, found in rows.items() if found)
            raise UsageError(f"the method {method} works on rows of the source {name!r}, which has none; there are rows of "
                             f"{having or 'no source'}")
    return [row for name in source_names(on) for row in rows[name]]
