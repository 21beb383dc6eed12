"""What is asked and how it is scored: items, and the three ways of measuring a model on them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drift.divergence import METRICS
from sasft.chat import Encoded
from sasft.evaluation.subject import Subject

Messages = tuple[Mapping[str, str], ...]
Score = tuple[float, float]  # a total and its weight: a suite's score is the ratio of their sums


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. ``asked`` is its own text, without what the suite's prompts share, and is what is looked for in training
    data; ``gold`` is what the suite's scorer needs; ``group`` is a part of the suite that is also averaged by itself (MMLU's
    subjects); items of one ``cluster`` share a passage or a question, so their scores go together: standard errors and intervals
    take clusters, not items, for independent.
    """

    id: str
    prompt: Messages = ()
    asked: str = ""
    gold: Any = None
    choices: tuple[str, ...] = ()
    group: str = ""
    cluster: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite(ABC):
    """Items under one name. ``metrics``: the names of the scores, the headline first. ``source``: where the items come from."""

    name: str
    items: Sequence[Item]
    metrics: tuple[str, ...]
    source: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def prompt_ids(self, subject: Subject, item: Item) -> Sequence[int]:
        """The tokens that the model is shown before what is scored."""

    @abstractmethod
    def measure(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Records of one batch of items: ``scores`` maps each metric to (total, weight); what else there is says how they came
        about."""


@dataclass(frozen=True, kw_only=True)
class Answered(Suite):
    """The model writes an answer, ``check(item, answer)`` scores it: {metric: score, or (total, weight)}.

    An answer is cut at the first special token, since what follows is another turn (``off_template`` counts such answers);
    one that the length cap of ``max_new_tokens`` has cut is scored as it is, and counted as not ``finished``.
    """

    check: Callable[[Item, str], Mapping[str, float | Score]]
    max_new_tokens: int

    def prompt_ids(self, subject: Subject, item: Item) -> list[int]:
        return subject.chat.prompt_ids(item.prompt)

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [self.prompt_ids(subject, item) for item in items]
        answers = subject.answers(prompts, [(self.name, item.id) for item in items], self.max_new_tokens)
        return [{"scores": {m: _score(s) for m, s in self.check(item, answer.text).items()}, "answer": answer.text,
                 "tokens": answer.tokens, "finished": answer.finished, "off_template": answer.off_template}
                for item, answer in zip(items, answers, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Chosen(Suite):
    r"""The model takes the choice of largest log-likelihood: :math:`\arg\max_c \log p_\theta(c \mid \text{prompt})`, the first
    if equal.

    ``choices`` are what the assistant's turn would begin with (letters, or whole answers); ``gold`` is the index of the right
    one. Metrics: ``acc``; ``nll``, the right choice's negative log-likelihood in nats, which moves before accuracy does; and
    ``acc_norm`` where the suite names it: the choice of largest log-likelihood a character is taken, as lm-evaluation-harness
    does, since a sum over tokens favours short answers.
    """

    def prompt_ids(self, subject: Subject, item: Item) -> list[int]:
        return subject.chat.prompt_ids(item.prompt)

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        rows = [subject.chat.encode(item.prompt, choice, finished=False) for item in items for choice in item.choices]
        found = iter(subject.loglikelihoods([(r.input_ids[: r.start], r.input_ids[r.start :]) for r in rows]))
        records = []
        for item in items:
            logprobs = [next(found) for _ in item.choices]
            by_length = [total / len(choice) for total, choice in zip(logprobs, item.choices, strict=True)]
            chosen = logprobs.index(max(logprobs))
            scores = {"acc": float(chosen == item.gold), "nll": -logprobs[item.gold],
                      "acc_norm": float(by_length.index(max(by_length)) == item.gold)}
            records.append({"scores": {metric: _score(scores[metric]) for metric in self.metrics},
                            "choice": item.choices[chosen], "right": item.choices[item.gold], "logprobs": logprobs,
                            "choices": len(item.choices)})
        return records


@dataclass(frozen=True, kw_only=True)
class Predicted(Suite):
    """The model predicts given tokens (``gold`` is a :class:`sasft.chat.Encoded`): NLL, and with a base the KL both ways and
    entropies.

    Weights are tokens, so scores are nats a token over all items. Always in the precision of the weights: logits rounded to
    bf16 can double a small KL.
    """

    def prompt_ids(self, subject: Subject, item: Item) -> Sequence[int]:
        return item.gold.input_ids

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        rows: list[Encoded] = [item.gold for item in items]
        if subject.base is None:
            found = subject.loglikelihoods([(r.input_ids[: r.start], r.input_ids[r.start :]) for r in rows], rounded=False)
            return [{"scores": {"nll/model": (-total, float(row.loss_tokens))}, "tokens": row.loss_tokens}
                    for total, row in zip(found, rows, strict=True)]
        measured = subject.divergences(rows)
        sums = {key: getattr(measured, name).to(torch.float64).tolist() for name, key in METRICS.items()}
        return [{"scores": {key: (sums[key][i], float(row.loss_tokens)) for key in sums}, "tokens": row.loss_tokens}
                for i, row in enumerate(rows)]


def cluster_of_text(shared: str) -> str:
    """A short name for the cluster of items that share this passage; none where they share nothing.

    >>> cluster_of_text("Once upon a time") == cluster_of_text("Once upon a time "), cluster_of_text(" ")
    (True, '')
    """
    return hashlib.sha256(shared.strip().encode()).hexdigest()[:16] if shared.strip() else ""


def user(text: str, *before: Mapping[str, str]) -> Messages:
    """A conversation that ends in this user turn."""
    return (*before, {"role": "user", "content": text})


def turns(shots: Sequence[tuple[str, str]]) -> Messages:
    """Worked examples as turns of the conversation, each question answered by the assistant."""
    roles = ("user", "assistant")
    return tuple({"role": role, "content": text} for shot in shots for role, text in zip(roles, shot, strict=True))


def _score(score: float | Score) -> Score:
    return score if isinstance(score, tuple) else (score, 1.0)
