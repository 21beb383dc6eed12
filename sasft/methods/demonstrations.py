"""A few rows of a task, as prompts show them to a model that is to write more of the kind."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sasft.data import Row
from sasft.errors import UsageError
from sasft.writing import Messages


@dataclass(frozen=True)
class Demonstrations:
    r"""``inputs`` and ``outputs`` of a task's rows, and what these share.

    ``instruction``: what all prompts open with, up to a blank line (empty if they share no paragraph), an input being the rest;
    ``system``: the system's message, if it is the same for all.

    >>> rows = [Row("1", "task", (user("Is it even?\n\n12"),), "yes"), Row("2", "task", (user("Is it even?\n\n7"),), "no")]
    >>> demos = Demonstrations.draw(rows, 2, "task", seed=0)
    >>> demos.task, sorted(zip(demos.inputs, demos.outputs))
    ('The task: Is it even?\n\n', [('12', 'yes'), ('7', 'no')])
    >>> demos.asked("90")
    ({'role': 'user', 'content': 'Is it even?\n\n90'},)
    """

    instruction: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    system: Messages = ()

    @classmethod
    def draw(cls, rows: Sequence[Row], n: int, source: str, seed: int) -> "Demonstrations":
        """``n`` rows with a single user turn and a whole answer, drawn by the seed.

        Raises :class:`UsageError` if there are fewer.
        """
        fit = [row for row in rows if row.finished and row.response.strip()
               and [message["role"] for message in row.prompt if message["role"] != "system"] == ["user"]]
        if len(fit) < n:
            raise UsageError(f"demonstrations is {n}, but the source {source!r} has {len(fit)} rows with one user turn and a "
                             "whole answer; set demonstrations lower, or give more rows")
        drawn = [fit[i] for i in np.random.default_rng(seed).permutation(len(fit))[:n]]
        systems = [tuple(dict(message) for message in row.prompt[:-1]) for row in drawn]
        texts = [row.prompt[-1]["content"] for row in drawn]
        shared = os.path.commonprefix(texts) if n > 1 else ""
        instruction = shared[: shared.rfind("\n\n") + 2] if "\n\n" in shared else ""
        return cls(instruction, tuple(text.removeprefix(instruction) for text in texts), tuple(row.response for row in drawn),
                   systems[0] if all(system == systems[0] for system in systems) else ())

    @property
    def task(self) -> str:
        """The instruction as a prompt states it, or nothing."""
        return f"The task: {self.instruction.strip()}\n\n" if self.instruction else ""

    def asked(self, text: str) -> Messages:
        """The request with this input, as a row of the task has it."""
        return (*self.system, user(self.instruction + text))

    def asked_after(self, text: str) -> Messages:
        """The request with this input after the demonstrations, which are turns of the conversation."""
        pairs = zip(self.inputs, self.outputs, strict=True)
        shown = (turn for x, y in pairs for turn in (user(self.instruction + x), assistant(y)))
        return (*self.system, *shown, user(self.instruction + text))

    def new(self, inputs: Iterable[str]) -> list[str]:
        """Those of the inputs that are none of the demonstrations', each once."""
        own = {x.strip() for x in self.inputs}
        return [x for x in dict.fromkeys(inputs) if x not in own]


def user(text: str) -> dict[str, str]:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}
