"""The theory on a language model so small that all its responses can be enumerated.

    python -m studies.lab --profile quick

Expectations are sums over all responses, and training is gradient descent on them: no figure here has sampling noise, and intervals are over
seeds, each a world and a base model of its own. What was predicted stands in ``studies/lab/predictions.py``.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sasft.errors import UsageError
from sasft.files import ensure_writable
from sasft.terminal import exit_code
from sasft.versions import versions
from studies.claims import registered
from studies.lab import figures
from studies.lab.calibration import GROUPS, SLOW
from studies.lab.effects import effects
from studies.lab.experiment import Setup
from studies.lab.tables import make
from studies.stats import verdict


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the lab. ``repeats``: of each estimator; ``slow_repeats``: of those that cost seconds a dozen."""

    setup: Setup
    quick: bool
    repeats: int
    slow_repeats: int


PROFILES = {"quick": Profile(setup=Setup(seeds=3), quick=True, repeats=500, slow_repeats=50),
            "full": Profile(setup=Setup(seeds=12), quick=False, repeats=1000, slow_repeats=500)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lab from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.lab", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="quick: 3 seeds, 3 minutes; full: 12 seeds and all sweeps, 20 minutes (on 2 cores)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where finished parts are kept (default: runs)")
    parser.add_argument("--figures", type=Path, help="where figures go (default: figures; of the quick profile lab/figures in --runs, so that they don't "
                                                     "take the place of the full one's)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes side by side (default: one a core)")
    args = parser.parse_args(argv)
    folder = args.figures or (args.runs / "lab" / "figures" if args.profile == "quick" else Path("figures"))
    return exit_code(lambda: run(PROFILES[args.profile], args.runs, folder, args.workers))


def run(profile: Profile, runs: Path, folder: Path, workers: int) -> None:
    """Make the tables that are not on disk yet, draw the figures, print the verdicts."""
    began = time.monotonic()
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    ensure_writable(folder)
    repeats = {group: profile.slow_repeats if group in SLOW else profile.repeats for group in GROUPS}
    tables = make(profile.setup, runs / "lab", workers, quick=profile.quick, repeats=repeats)
    predictions, n = registered(), profile.setup.seeds
    found = {name: verdict(predictions[name], effect, n=n) for name, effect in effects(tables, n).items()}
    paths = figures.draw_all(tables, found, n, folder, {"profile": asdict(profile), "versions": versions()}, workers)
    for v in found.values():
        print(f"{v['claim']:<4}{v['verdict']:<13}{v['value']:>10.3g} [{v['low']:.3g}, {v['high']:.3g}] {v['unit']:<22}{v['statement']}")
    print("\npictures and tables:", *(f"  {path}" for path in paths), sep="\n")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
