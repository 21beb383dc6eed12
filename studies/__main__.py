"""The command line of the studies: ``studies two_by_two``, ``studies lab``, ``studies forces``, ``studies drift_cost``, ``studies ledger``."""

import sys
from collections.abc import Sequence
from importlib import import_module

# Imported when asked for: a study brings torch along, the ledger does not.
COMMANDS = {
    "two_by_two": ("studies.two_by_two", "Does style or content make a model forget? A real model, four cells and their controls."),
    "lab": ("studies.lab.__main__", "The theory's facts and claims on a model so small that all its responses can be enumerated."),
    "forces": ("studies.forces", "Do a real model's own dialogues exert a force on it before training?"),
    "drift_cost": ("studies.drift_cost", "What one recording of drift costs, from 10 million to a billion parameters."),
    "ledger": ("studies.ledger", "Every prediction, what was found, and the verdict: figures/ledger.md, from the results on disk."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study, or print the ledger; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        lines = [f"  {name:<12}{purpose}" for name, (_, purpose) in COMMANDS.items()]
        unknown = f"error: unknown command {argv[0]!r}\n" if argv and not asked else ""
        print(f"{unknown}usage: studies COMMAND [options]; `studies COMMAND --help` lists them\n" + "\n".join(lines),
              file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
