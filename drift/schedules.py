"""When to record: functions step -> bool."""

import math
from collections.abc import Callable

Schedule = Callable[[int], bool]


def schedule(every: "int | Schedule | None") -> Schedule:
    """Each so many steps, or the function itself; None: each step.

    >>> [step for step in range(10) if schedule(4)(step)]
    [0, 4, 8]
    """
    if every is None:
        return lambda step: True
    if callable(every):
        return every
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of steps, at least 1, or a function of the step, got {every!r}")
    return lambda step: step % every == 0


def log_spaced(per_decade: int = 8) -> Schedule:
    r"""Steps spaced evenly in the logarithm: :math:`\operatorname{round}(10^{k/n})` for whole k, and step 0.

    >>> [step for step in range(101) if log_spaced(3)(step)]
    [0, 1, 2, 5, 10, 22, 46, 100]
    """
    if per_decade < 1:
        raise ValueError(f"per_decade must be at least 1, got {per_decade}")

    def due(step: int) -> bool:
        if step < 1:
            return step == 0
        k = round(per_decade * math.log10(step))
        return any(round(10 ** (j / per_decade)) == step for j in (k - 1, k, k + 1))

    return due


def dense_start(dense: int = 150, every: int = 50) -> Schedule:
    """Every step up to ``dense``, then each ``every`` steps: fast early drift is seen, and long runs stay cheap.

    >>> [step for step in range(12) if dense_start(3, 5)(step)]
    [0, 1, 2, 3, 5, 10]
    """
    later = schedule(every)
    return lambda step: step <= dense or later(step)
