"""One experiment of the lab: base models in worlds of their own, arms that they are trained in, and what is measured on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from studies.lab import exact, world
from studies.lab.descent import descend
from studies.lab.model import WIDTH, build, flat_stacked, pretrain
from studies.lab.tree import flow, response_probabilities
from studies.lab.walk import Walk
from studies.lab.world import EXTERNAL, FOREIGN, World, prompts_of, pure

TASK, OTHERS, DROPPED, ALL = (0,), (1, 2), (2,), (0, 1, 2)
"""Topics: the task's; those that are to be kept; the one that C9 leaves out of self-data; all."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the models of an experiment have in common. ``share``: of the task's facts, how many are new."""

    seeds: int
    width: int = WIDTH
    coupling: float = 0.0
    share: float = 1.0
    lr: float = 0.004
    record: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 40, 70)
    pretrain_steps: int = 400
    pretrain_lr: float = 0.03

    @property
    def pretraining(self) -> "Setup":
        """The same with everything at its default that the bases do not depend on."""
        return Setup(seeds=self.seeds, width=self.width, coupling=self.coupling, pretrain_steps=self.pretrain_steps, pretrain_lr=self.pretrain_lr)


@dataclass(frozen=True)
class Bases:
    """The S base models of a setup: worlds, weights [S, ...], tables ``log_p`` [S, X, N, V] and response probabilities ``own`` [S, X, R]."""

    setup: Setup
    model: nn.Module = field(repr=False)
    worlds: tuple[World, ...] = field(repr=False)
    params: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def make(cls, setup: Setup) -> "Bases":
        """Draw the worlds and pre-train a model in each."""
        models = [build(seed, setup.width) for seed in range(setup.seeds)]
        teachers = torch.stack([flow(w.teacher()) for w in _worlds(setup)])
        return cls.of(setup, pretrain(models, teachers, steps=setup.pretrain_steps, lr=setup.pretrain_lr))

    @classmethod
    def of(cls, setup: Setup, params: Mapping[str, Tensor]) -> "Bases":
        """The bases whose weights are known."""
        return cls(setup, build(0, setup.width), _worlds(setup), params)

    @cached_property
    def log_p(self) -> Tensor:
        return tables(self.model, flat_stacked(self.params), self.params)

    @cached_property
    def own(self) -> Tensor:
        return response_probabilities(self.log_p)

    def one(self, seed: int) -> dict[str, Tensor]:
        """The weights of one base."""
        return {name: p[seed] for name, p in self.params.items()}

    def truth(self, seed: int) -> Tensor:
        """What the task says, [X]: new facts on the first ``share`` of each topic's keys, old ones on the rest."""
        w, keys = self.worlds[seed], len(self.worlds[seed].facts) // 3
        new = torch.arange(keys).repeat(3) < round(self.setup.share * keys)
        return torch.where(new, w.new_facts, w.facts)


def _worlds(setup: Setup) -> tuple[World, ...]:
    return tuple(World.draw(seed, coupling=setup.coupling) for seed in range(setup.seeds))


def tables(model: nn.Module, weights: Tensor, like: Mapping[str, Tensor]) -> Tensor:
    """Next-token tables [M, X, N, V] of flat weights [M, P]; ``like``: stacked weights whose names and shapes they have."""
    pieces, walk = weights.split([p[0].numel() for p in like.values()], dim=1), Walk(model)
    params = {name: piece.unflatten(1, p.shape[1:]) for (name, p), piece in zip(like.items(), pieces, strict=True)}
    return torch.cat([walk.table(walk.log_probs({n: p[m : m + 1] for n, p in params.items()})) for m in range(len(weights))])


# --- arms ---------------------------------------------------------------------------------------------------------------

Arm = Callable[[Bases, int], Tensor]
"""What a seed's model is trained on: the flow [X, N, V]."""


def rows_of_cell(bases: Bases, seed: int, style: str, content: str, prompts: Sequence[int] = TASK) -> Tensor:
    """Rows [X, R] of one cell of the 2 × 2 design; ``style`` own or foreign, ``content`` old or new."""
    own, at = bases.own[seed], prompts_of(prompts)
    if content == "old":
        return world.own_old(own, at) if style == "own" else world.foreign_old(own, at, pure(FOREIGN))
    return world.own_new(own, at, bases.truth(seed)) if style == "own" else world.foreign_new(at, bases.truth(seed), pure(FOREIGN))


def self_rows(bases: Bases, seed: int, temperature: float = 1.0, top_p: float = 1.0, prompts: Sequence[int] = ALL) -> Tensor:
    """Self-dialogues on all topics."""
    return exact.sampled_rows(bases.log_p[seed], prompts_of(prompts), temperature, top_p)


def cell(style: str, content: str) -> Arm:
    """Training on one cell alone."""
    return lambda bases, seed: flow(rows_of_cell(bases, seed, style, content))


def mixed(lam: float, other: Callable[[Bases, int], Tensor]) -> Arm:
    """The task mixed with rows of another source, :math:`(1-\\lambda)` to :math:`\\lambda`."""
    return lambda bases, seed: flow((1 - lam) * rows_of_cell(bases, seed, "foreign", "new") + lam * other(bases, seed))


def external_rows(share: float) -> Callable[[Bases, int], Tensor]:
    """What another model says on all topics: the old facts, in a style that is ``share`` of the way from the base's to its own."""
    def rows(bases: Bases, seed: int) -> Tensor:
        w = bases.worlds[seed]
        return w.teacher(w.own.mixed(pure(EXTERNAL), share))
    return rows


TASK_ONLY = "task only"
LAMBDAS = (0.1, 0.25, 0.5, 0.75, 0.9)
DISTANCES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main_arms() -> dict[str, Arm]:
    """The arms of the main experiment. Two are controls of SA-SFT at λ = ½: the task alone has as many rows, at half rate as much of the task."""
    return {
        "own/old": cell("own", "old"),
        "own/new": cell("own", "new"),
        "foreign/old": cell("foreign", "old"),
        TASK_ONLY: cell("foreign", "new"),
        "task at half rate": lambda bases, seed: 0.5 * cell("foreign", "new")(bases, seed),
        **{f"SA-SFT {lam}": mixed(lam, self_rows) for lam in LAMBDAS},
        "SA-SFT paper": mixed(0.5, lambda b, s: self_rows(b, s, 0.7, 0.9)),
        "SA-SFT without a topic": mixed(0.5, lambda b, s: self_rows(b, s, prompts=(0, 1))),
        "SA-SFT on the task's topic": mixed(0.5, lambda b, s: self_rows(b, s, prompts=TASK)),
        **{f"external {share}": mixed(0.5, external_rows(share)) for share in DISTANCES},
        "external, as varied": mixed(0.5, lambda b, s: b.worlds[s].teacher(b.worlds[s].external)),
        "self shuffled": mixed(0.5, lambda b, s: world.shuffled(self_rows(b, s))),
    }


# --- training and measuring ---------------------------------------------------------------------------------------------


def train(bases: Bases, arms: Mapping[str, Arm]) -> Tensor:
    """Weights [A, K, S, P] of every arm and seed at the recorded steps; an arm's seeds are trained side by side."""
    setup = bases.setup
    flows = (torch.stack([arm(bases, seed) for seed in range(setup.seeds)]) for arm in arms.values())
    return torch.stack([descend(bases.model, bases.params, f, lr=setup.lr, record=setup.record) for f in flows])


def measure(bases: Bases, weights: Tensor) -> dict[str, Tensor]:
    """What models with ``weights`` [..., S, P] have learned and forgotten, each [..., S].

    ``kl``, ``kl_task``, ``kl_dropped``, ``kl_all``: KL(base ‖ model) in nats a token on the other topics' prompts, the task's, the dropped topic's, all.
    ``content``, ``content_dropped``: KL of *what* is said (the first digit, or none) whatever the style, nats a response. ``fact``: fall of the
    probability that an answer says the old fact. ``gain``: rise of the probability that a task's answer says what the task says. ``entropy``: of answers on other topics, nats a token of the base's. ``drift``: ‖δ‖₂.
    """
    lead, seeds = weights.shape[:-2], weights.shape[-2]
    log_p = tables(bases.model, weights.flatten(0, -2), bases.params).unflatten(0, (*lead, seeds))
    facts = torch.stack([w.facts for w in bases.worlds])
    truth = torch.stack([bases.truth(seed) for seed in range(seeds)])
    others, task, dropped, everything = (prompts_of(t) for t in (OTHERS, TASK, DROPPED, ALL))
    of_responses = (flow(bases.own) * (bases.log_p - log_p)).sum((-1, -2))  # at each prompt, nats a response

    def forgotten(prompts: Tensor) -> Tensor:
        return of_responses @ prompts / exact.tokens(bases.log_p, prompts)

    said, saying = exact.contents(bases.log_p), exact.contents(log_p)
    of_content = (said * (said / saying).log()).sum(-1)
    says_old, said_old = exact.says(log_p, facts), exact.says(bases.log_p, facts)
    says_true, said_true = exact.says(log_p, truth), exact.says(bases.log_p, truth)
    return {
        "kl": forgotten(others), "kl_task": forgotten(task), "kl_dropped": forgotten(dropped), "kl_all": forgotten(everything),
        "content": (of_content * others).sum(-1), "content_dropped": (of_content * dropped).sum(-1),
        "fact": ((said_old - says_old) * others).sum(-1),
        "gain": ((says_true - said_true) * task).sum(-1),
        "entropy": exact.entropy(log_p, others) / exact.tokens(bases.log_p, others),
        "drift": (weights - flat_stacked(bases.params)).norm(dim=-1),
    }
