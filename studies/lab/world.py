r"""A world with two factors: what is said (a fact) and how (opener and closer), and distributions of rows in it.

Rows are joint weights [X, R] over prompts and responses that sum to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from studies.lab.tree import CONTENT, DIGITS, END, N_RESPONSES, PROMPTS, RESPONSE_OF, RESPONSES, STYLES, TOPICS, WELL_FORMED

OWN, EXTERNAL, FOREIGN = STYLES


@dataclass(frozen=True)
class Style:
    """Probabilities of the openers [3], and of (no closer, closers) [4]."""

    openers: Tensor
    closers: Tensor

    def mixed(self, other: "Style", share: float) -> "Style":
        """A style between this one (``share`` 0) and another (1)."""
        return Style((1 - share) * self.openers + share * other.openers, (1 - share) * self.closers + share * other.closers)


def pure(token: int) -> Style:
    """Always this opener, always this closer."""
    at = [float(s == token) for s in STYLES]
    return Style(torch.tensor(at, dtype=torch.float64), torch.tensor([0.0, *at], dtype=torch.float64))


@dataclass(frozen=True)
class World:
    """What is true, what will be said to be true by a task, and in which style the base speaks.

    ``facts``, ``new_facts`` [X]: digits, different everywhere. ``known``: probability that the base's teacher says the fact (else another
    digit). ``coupling`` in [0, 1]: share of the own opener that the fact dictates: at 0 style and content are independent.
    """

    facts: Tensor
    new_facts: Tensor
    own: Style
    external: Style
    known: float = 0.85
    coupling: float = 0.0

    @classmethod
    def draw(cls, seed: int, *, coupling: float = 0.0) -> "World":
        """A world of its own for each seed: facts, and the base's habits."""
        rng = np.random.default_rng(seed)
        facts = rng.integers(0, len(DIGITS), len(PROMPTS))
        shifts = rng.integers(1, len(DIGITS), len(PROMPTS))
        openers, closers = rng.dirichlet([12, 5, 2]), rng.dirichlet([10, 6, 3, 1])
        own = Style(torch.from_numpy(openers), torch.from_numpy(closers))
        external = Style(torch.from_numpy(openers[[1, 0, 2]]), torch.from_numpy(closers[[0, 2, 1, 3]]))
        digits = torch.tensor(DIGITS)
        return cls(digits[facts], digits[(facts + shifts) % len(DIGITS)], own, external, coupling=coupling)

    def teacher(self, style: Style | None = None) -> Tensor:
        """What a base is pre-trained on: each prompt's fact, in the base's own style (or another)."""
        style = self.own if style is None else style
        rows = torch.zeros(len(PROMPTS), N_RESPONSES, dtype=torch.float64)
        for x, fact in enumerate(self.facts.tolist()):
            openers = (1 - self.coupling) * style.openers
            openers[DIGITS.index(fact)] += self.coupling
            for digit in DIGITS:
                says = self.known if digit == fact else (1 - self.known) / (len(DIGITS) - 1)
                rows[x] += says * _spoken(digit, Style(openers, style.closers))
        return rows / len(PROMPTS)


def _spoken(digit: int, style: Style) -> Tensor:
    """One content in a style, [R]."""
    rows = torch.zeros(N_RESPONSES, dtype=torch.float64)
    for opener, p in zip(STYLES, style.openers.tolist(), strict=True):
        for closer, q in zip([(), *((s,) for s in STYLES)], style.closers.tolist(), strict=True):
            rows[RESPONSE_OF[(opener, digit, *closer, END)]] += p * q
    return rows


def prompts_of(topics: Sequence[int]) -> Tensor:
    """Which prompts [X] are about these topics (numbered from 0), as weights that sum to 1.

    >>> prompts_of([1]).tolist()[2:7]
    [0.0, 0.3333333333333333, 0.3333333333333333, 0.3333333333333333, 0.0]
    """
    of = torch.tensor([TOPICS.index(t) in topics for t in PROMPTS[:, 0].tolist()], dtype=torch.float64)
    return of / of.sum()


# --- the four cells, on prompts with weights [X] -----------------------------------------------------------------------
#
# ``own`` [X, R]: the probabilities of the base's responses given each prompt.


def own_old(own: Tensor, prompts: Tensor) -> Tensor:
    """The base's own answers."""
    return prompts[:, None] * own


def foreign_old(own: Tensor, prompts: Tensor, style: Style) -> Tensor:
    """The base's own answers, their openers and closers put into another style; ill-formed ones are left as they are."""
    rows = own * ~WELL_FORMED
    for digit in DIGITS:
        rows = rows + (own * (WELL_FORMED & (digit == CONTENT))).sum(1, keepdim=True) * _spoken(digit, style)
    return prompts[:, None] * rows


def own_new(own: Tensor, prompts: Tensor, truth: Tensor) -> Tensor:
    """The base's own answers, of which those are kept that are well-formed and say the truth [X]."""
    kept = own * (WELL_FORMED & (truth[:, None] == CONTENT))
    return prompts[:, None] * kept / kept.sum(1, keepdim=True)


def foreign_new(prompts: Tensor, truth: Tensor, style: Style) -> Tensor:
    """The truth [X] in another style: the task as it comes."""
    return prompts[:, None] * torch.stack([_spoken(digit, style) for digit in truth.tolist()])


def shuffled(rows: Tensor) -> Tensor:
    """Every response with the tokens before its end in all orders alike: the control that keeps tokens and loses language."""
    source, target, share = _orders()
    return torch.zeros_like(rows).index_add(1, target, rows[:, source] * share)


@cache
def _orders() -> tuple[Tensor, Tensor, Tensor]:
    """Every response with each of its orders (numbers of responses), and the order's share."""
    found = []
    for i, response in enumerate(RESPONSES):
        end = (END,) if response[-1] == END else ()
        orders = list(permutations(response[: len(response) - len(end)]))
        found += [(i, RESPONSE_OF[(*order, *end)], 1 / len(orders)) for order in orders]
    source, target, share = zip(*found, strict=True)
    return torch.tensor(source), torch.tensor(target), torch.tensor(share, dtype=torch.float64)
