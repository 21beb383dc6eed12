"""Settings are keyword-only dataclasses whose fields carry their own help text."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str, group: str = "") -> Any:
    """A dataclass field with its default and the one description that Python, the command line and YAML share.

    ``group``: the heading under which ``--help`` lists it; without one, what the dataclass says it is about.
    """
    metadata = {"help": text, **({"group": group} if group else {})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
