"""Settings are keyword-only dataclasses whose fields carry their own help text."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the one description that Python, the command line and YAML share."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})
