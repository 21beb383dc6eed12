"""The theory on a language model so small that all its responses can be enumerated.

    python -m studies.lab --profile quick

Expectations are sums over all responses, and training is gradient descent on them: no figure here has sampling noise, and intervals are over
seeds, each a world and a base model of its own. What was predicted stands in ``studies/lab/predictions.py``.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sasft.errors import UsageError
from sasft.files import ensure_writable, write_json
from sasft.versions import versions
from studies.claims import registered
from studies.lab import calibration, courses, figures, sweeps
from studies.lab.effects import effects
from studies.lab.experiment import Bases, Setup
from studies.stats import verdict


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the lab."""

    setup: Setup
    quick: bool
    repeats: int


PROFILES = {"quick": Profile(setup=Setup(seeds=3), quick=True, repeats=500), "full": Profile(setup=Setup(seeds=12), quick=False, repeats=2000)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lab from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.lab", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="quick: 3 seeds, 3 minutes; full: 12 seeds and all sweeps")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where finished parts are kept (default: runs)")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="where figures go (default: figures)")
    args = parser.parse_args(argv)
    try:
        run(PROFILES[args.profile], args.runs, args.figures)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(profile: Profile, runs: Path, folder: Path) -> None:
    """Make the tables that are not on disk yet, draw the figures, print the verdicts."""
    began = time.monotonic()
    ensure_writable(folder)
    identity = {"profile": asdict(profile), "code": _code()}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    home = runs / "lab" / key
    ensure_writable(home)

    def progress(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr)

    def keep(name: str, make: Callable[[], Any]) -> Any:
        return _kept(home / name, make)

    bases = Bases.make(profile.setup)
    progress(f"{profile.setup.seeds} base models pre-trained")
    tables = courses.run(bases, keep, progress)
    tables["sweeps"] = sweeps.run(
        profile.setup, quick=profile.quick, bases_of=lambda setup: bases if setup == profile.setup else Bases.make(setup), keep=keep,
        progress=progress)
    tables["calibration"] = keep("calibration.json", lambda: calibration.calibrate(bases, repeats=profile.repeats))
    progress("estimators calibrated")

    predictions, n = registered(), profile.setup.seeds
    found = {name: verdict(predictions[name], effect, n=n) for name, effect in effects(tables, n).items()}
    provenance = {"profile": asdict(profile), "versions": versions()}
    paths = figures.draw_all(tables, found, n, folder, provenance)
    for v in found.values():
        print(f"{v['claim']:<4}{v['verdict']:<13}{v['value']:>10.3g} [{v['low']:.3g}, {v['high']:.3g}] {v['unit']:<22}{v['statement']}")
    print("\npictures and tables:", *(f"  {path}" for path in paths), sep="\n")
    progress("done")


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is on disk under a name, or what ``make`` gives, kept there for the next time."""
    tensors = path.suffix == ".pt"
    if path.exists():
        return torch.load(path) if tensors else json.loads(path.read_text(encoding="utf-8"))
    found = make()
    if tensors:
        part = path.with_suffix(".part")
        torch.save(found, part)
        part.replace(path)
    else:
        write_json(path, found)
    return found


def _code() -> str:
    """Hash of the lab's own source: tables made by other code are not used again."""
    sources = sorted(p for p in Path(__file__).parent.glob("*.py") if p.stem not in ("figures", "effects", "predictions", "__main__"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
