"""Where the claims stop holding: the same few arms in other worlds, models and settings."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from studies.lab import exact
from studies.lab.courses import Rows, arms_table
from studies.lab.experiment import TASK_ONLY, Arm, Bases, Setup, cell, mixed, self_rows, train

SA_SFT = "SA-SFT"


@dataclass(frozen=True)
class Sweep:
    """One condition: what is varied (``name``), its ``value``, the setup, and arms of its own where they differ."""

    name: str
    value: float
    setup: Setup
    arms: Mapping[str, Arm]


def four_arms(self_data: Arm = self_rows) -> dict[str, Arm]:
    """What C2, C3 and SA-SFT's benefit need (own/old stays where it is)."""
    return {"own/new": cell("own", "new"), "foreign/old": cell("foreign", "old"), TASK_ONLY: cell("foreign", "new"),
            SA_SFT: mixed(0.5, self_data)}


def _drawn(n: int) -> Arm:
    return lambda bases, seed: exact.drawn_rows(self_rows(bases, seed), n, seed)


def sweeps(base: Setup, *, quick: bool) -> Iterator[Sweep]:
    """Every condition, one thing varied at a time but for the phase picture (coupling × width)."""
    def only(arm: Arm) -> dict[str, Arm]:
        return {TASK_ONLY: cell("foreign", "new"), SA_SFT: mixed(0.5, arm)}

    for coupling in (0.0, 1.0) if quick else (0.0, 0.5, 1.0):
        for width in (4, 8) if quick else (2, 4, 8, 16):
            yield Sweep("phase", coupling, replace(base, coupling=coupling, width=width), four_arms())
    for lr in () if quick else (base.lr / 4, base.lr * 4):
        yield Sweep("learning rate", lr, replace(base, lr=lr), four_arms())
    for share in (1 / 3,) if quick else (0.0, 1 / 3, 2 / 3):
        yield Sweep("share of new facts", share, replace(base, share=share), four_arms())
    for n in (30,) if quick else (10, 30, 100, 300, 1000):
        yield Sweep("number of self-rows", n, base, only(_drawn(n)))
    for t in () if quick else (0.5, 0.7, 1.3):
        yield Sweep("temperature", t, base, only(lambda b, s, t=t: self_rows(b, s, t)))
    for p in (0.9,) if quick else (0.5, 0.8, 0.9):
        yield Sweep("top-p", p, base, only(lambda b, s, p=p: self_rows(b, s, 1.0, p)))


def condition(sweep: Sweep, bases: Bases) -> Rows:
    """The table of one condition."""
    setting = {k: v for k, v in asdict(sweep.setup).items() if k in ("width", "coupling", "share", "lr")}
    return [{"sweep": sweep.name, "value": sweep.value, **setting, **row} for row in arms_table(bases, sweep.arms, train(bases, sweep.arms))]
