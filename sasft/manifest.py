"""A folder belongs to one configuration: claimed by the first run, checked by every later one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift.table import as_json
from sasft.errors import UsageError
from sasft.files import write_json


def claim(path: Path, identity: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> None:
    """Write ``identity`` to ``path`` (JSON), or find it there; refuse the folder of a run that differs, saying in what.

    ``beside``: what is written with it, under names of its own, and not compared; the identity then stands under ``identity``.

    Values are compared as JSON has them. Raises :class:`UsageError`, also if ``path`` is something else's.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     claim(Path(folder) / "run.json", {"lr": 1e-3})
    ...     claim(Path(folder) / "run.json", {"lr": 1e-3})
    ...     try:
    ...         claim(Path(folder) / "run.json", {"lr": 1e-2})
    ...     except UsageError as error:
    ...         print(str(error).replace(folder, "FOLDER"))
    FOLDER holds another run (lr is 0.001, now 0.01); name another folder, or remove this one
    """
    now = as_json(identity)
    if not path.exists():
        write_json(path, now if beside is None else {"identity": now, **beside})
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = dict(found if beside is None else found["identity"])
    except (OSError, ValueError, TypeError, KeyError):
        before = {}
    if not before.keys() & now.keys():
        raise UsageError(f"{path} is not the {path.name} of such a run, so {path.parent} holds something else; name another folder")
    if differing := differences(before, now):
        raise UsageError(f"{path.parent} holds another run ({'; '.join(differing)}); name another folder, or remove this one")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two nested configurations differ in, one phrase each: ``part.name is 1, now 2``.

    >>> differences({"fit": {"lr": 1, "seed": 0}}, {"fit": {"lr": 2, "seed": 0}, "n": 3})
    ['fit.lr is 1, now 2', 'n is None, now 3']
    """
    found: list[str] = []
    for name in {**before, **now}:
        was, is_ = before.get(name), now.get(name)
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            found += differences(was, is_, f"{prefix}{name}.")
        elif was != is_:
            found.append(f"{prefix}{name} is {was!r}, now {is_!r}")
    return found
