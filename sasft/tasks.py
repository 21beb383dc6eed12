r"""Procedural tasks with a checker: any number of problems from a seed, each with one right answer.

They supply the *new content* of the 2 x 2 design. The raw answer ("214") says it in the style of
raw task data, :meth:`Task.sentence` in a plain sentence, and :meth:`Task.check` finds the truth in
a model's own words, which is how answers in the model's own style are accepted or turned down.

``sums`` is built in; ``reasoning_gym:<dataset>`` takes any of reasoning-gym's generators that state
a gold answer (``pip install sasft[tasks]``).

Seeds: item ``i`` of a stream depends on the task's options and ``(seed, i)`` alone; repeats and
excluded keys are passed over in order. So ``problems(n, seed)`` begins ``problems(n + k, seed)``.
"""

import difflib
import hashlib
import importlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import ModuleType
from typing import Any

from sasft.errors import UsageError
from sasft.stated import numbers, stated_number

_BLOCK = 1000  # reasoning-gym datasets have a size, and some draw all their items by it
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_ANSWER_CUE = re.compile(r"\b(?:answer|result|solution)\b(?:\s+is\b)?\s*:?", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A question with its one right answer.

    ``key`` identifies the problem whatever its wording: equal keys, same problem. ``meta`` holds
    what the task needs to check answers.
    """

    key: str
    question: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Task(ABC):
    """A family of problems with a checker."""

    name: str

    @abstractmethod
    def item(self, seed: int, index: int) -> Problem:
        """Item ``index`` of the stream ``seed``, repeats included."""

    @abstractmethod
    def check(self, problem: Problem, text: str) -> bool:
        """Whether the answer that ``text`` states is the truth."""

    @abstractmethod
    def mentions(self, problem: Problem, text: str) -> bool:
        """Whether the truth occurs anywhere in ``text``, stated or not."""

    @abstractmethod
    def sentence(self, problem: Problem) -> str:
        """The truth in a plain sentence."""

    def raw_answer(self, problem: Problem) -> str:
        """The truth and nothing else, as raw task data state it."""
        return problem.answer

    def worked(self, problem: Problem) -> str:
        """The truth with the steps to it in shorthand; the raw answer where the task knows no steps."""
        return self.raw_answer(problem)

    def problems(
        self, n: int, seed: int, exclude: Collection[str] = frozenset(),
    ) -> list[Problem]:
        """The first ``n`` distinct problems of the stream ``seed`` whose keys are not in
        ``exclude``.

        Pass the keys of the training problems as ``exclude`` to draw test problems: different seeds
        alone do not keep two sets apart. Raises :class:`~sasft.errors.UsageError` if the task's
        options leave too few distinct problems.

        >>> train = Sums().problems(3, seed=0)
        >>> test = Sums().problems(3, seed=1, exclude={p.key for p in train})
        >>> {p.key for p in train} & {p.key for p in test}
        set()
        """
        if n < 1:
            raise UsageError(f"n (the number of problems) must be at least 1, got {n}")
        taken, found = set(exclude), list[Problem]()
        draws = 1000 + 20 * (n + len(taken))
        for index in range(draws):
            problem = self.item(seed, index)
            if problem.key not in taken:
                taken.add(problem.key)
                found.append(problem)
                if len(found) == n:
                    return found
        raise UsageError(
            f"task {self.name!r} made only {len(found)} of the {n} problems asked for in {draws} "
            f"draws ({len(exclude)} keys excluded); ask for fewer or make the task more varied")


@dataclass(frozen=True, kw_only=True)
class Sums(Task):
    """Sums and differences of a few whole numbers: "What is 42 + 57 - 73?".

    ``terms`` and ``digits`` are the least and the most terms of a problem and digits of a term;
    ``operators`` is "+", "-" or "+-". The answer is never one of the terms, with either sign, so
    that restating the question never mentions it. The key is the set of signed terms: sums that
    differ in the order of their terms are the same problem.

    >>> task = Sums()
    >>> p = task.problems(1, seed=0)[0]
    >>> p.question, p.answer
    ('Work out 209 + 587 - 10.', '786')
    >>> task.sentence(p)
    '209 + 587 - 10 equals 786.'
    >>> task.check(p, f"Let me see. That makes {p.answer}!"), task.check(p, p.question)
    (True, False)
    """

    terms: tuple[int, int] = (2, 3)
    digits: tuple[int, int] = (2, 3)
    operators: str = "+-"

    name = "sums"
    _WORDINGS = ("What is {}?", "Calculate {}.", "Work out {}.", "How much is {}?", "Compute {}.")
    _SENTENCES = ("{} is {}.", "{} equals {}.", "{} = {}.", "The result of {} is {}.")

    def __post_init__(self) -> None:
        for option, value, least in (("terms", self.terms, 2), ("digits", self.digits, 1)):
            if not (len(value) == 2 and least <= value[0] <= value[1]):
                raise UsageError(f"{option} must be (least, most) with {least} <= least <= most, "
                                 f"got {value}")
        if self.operators not in ("+", "-", "+-"):
            raise UsageError(f"operators must be '+', '-' or '+-', got {self.operators!r}")

    def item(self, seed: int, index: int) -> Problem:
        rng = random.Random(f"{self.name}|{seed}|{index}")
        while True:
            terms = [self._term(rng) for _ in range(rng.randint(*self.terms))]
            signed = [terms[0]]
            signed += [t if rng.choice(self.operators) == "+" else -t for t in terms[1:]]
            if abs(sum(signed)) not in terms:
                break
        more = (f"{'-' if t < 0 else '+'} {abs(t)}" for t in signed[1:])
        expression = " ".join([str(signed[0]), *more])
        return Problem(
            key=" ".join(f"{t:+d}" for t in sorted(signed)),
            question=rng.choice(self._WORDINGS).format(expression),
            answer=str(sum(signed)),
            meta={"expression": expression, "terms": tuple(signed)},
        )

    def _term(self, rng: random.Random) -> int:
        digits = rng.randint(*self.digits)
        return rng.randint(10 ** (digits - 1), 10**digits - 1)

    def check(self, problem: Problem, text: str) -> bool:
        """Whether the number that ``text`` states (:mod:`sasft.stated`) is the sum."""
        return stated_number(text, expression=problem.meta["terms"]) == int(problem.answer)

    def mentions(self, problem: Problem, text: str) -> bool:
        return int(problem.answer) in numbers(text)

    def sentence(self, problem: Problem) -> str:
        template = self._SENTENCES[_digest(problem.key) % len(self._SENTENCES)]
        return template.format(problem.meta["expression"], problem.answer)

    def worked(self, problem: Problem) -> str:
        """The running totals from left to right.

        >>> task = Sums()
        >>> task.worked(task.problems(1, seed=0)[0])
        '209 + 587 = 796; 796 - 10 = 786'
        """
        total, *others = problem.meta["terms"]
        steps = []
        for term in others:
            steps.append(f"{total} {'-' if term < 0 else '+'} {abs(term)} = {total + term}")
            total += term
        return "; ".join(steps)


class ReasoningGym(Task):
    """A generator of reasoning-gym; made by :func:`reasoning_gym_task`.

    The gold is the dataset's own; answers are judged by its own ``score_answer``, full marks only.
    Numeric answers are found in free text as for ``sums``. Any other answer has to follow "answer
    is", stand in an ``<answer>`` tag, or be the whole text.
    """

    def __init__(self, dataset: str, library: ModuleType, config: Mapping[str, Any]) -> None:
        self.name = f"reasoning_gym:{dataset}"
        self._dataset, self._library, self._config = dataset, library, dict(config)
        self._blocks: dict[tuple[int, int], Any] = {}
        try:
            entries = [self._block(0, 0)[i] for i in range(10)]
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"reasoning-gym refuses {dataset!r} with config {self._config}: "
                             f"{error}") from error
        if not all(isinstance(e["answer"], str) for e in entries):
            raise UsageError(f"dataset {dataset!r} states no gold answer, so there is nothing to "
                             "train on; choose another")
        if any(self._full_marks("no such answer", e) for e in entries):
            raise UsageError(f"dataset {dataset!r} gives full marks to any answer at all, so its "
                             "scores mean nothing; choose another")

    def _block(self, seed: int, block: int) -> Any:
        # reasoning-gym seeds item i with seed + i, so that neighbouring seeds share their items:
        # a hash spreads them.
        if (seed, block) not in self._blocks:
            spread = _digest(f"{self.name}|{seed}|{block}") % 2**31
            self._blocks[seed, block] = self._library.create_dataset(
                self._dataset, seed=spread, size=_BLOCK, **self._config)
        return self._blocks[seed, block]

    def item(self, seed: int, index: int) -> Problem:
        entry = self._block(seed, index // _BLOCK)[index % _BLOCK]
        return Problem(key=hashlib.sha256(entry["question"].encode()).hexdigest()[:16],
                       question=entry["question"], answer=entry["answer"], meta={"entry": entry})

    def check(self, problem: Problem, text: str) -> bool:
        entry, gold = problem.meta["entry"], _number(problem.answer)
        tags = _ANSWER_TAG.findall(text)
        text = tags[-1] if tags else text
        if gold is not None:
            stated = stated_number(text, restated=numbers(problem.question))
            return stated is not None and (stated == gold or self._full_marks(str(stated), entry))
        said = (text, *(text[m.end():] for m in _ANSWER_CUE.finditer(text)))
        return any(self._full_marks(form, entry) for s in said for form in _bare(s))

    def mentions(self, problem: Problem, text: str) -> bool:
        gold = _number(problem.answer)
        if gold is not None:
            return gold in numbers(text)
        whole = rf"(?<!\w){re.escape(problem.answer)}(?!\w)"
        return re.search(whole, text, re.IGNORECASE) is not None

    def sentence(self, problem: Problem) -> str:
        gap = "\n" if "\n" in problem.answer else " "
        return f"The answer is{':' * (gap != ' ')}{gap}{problem.answer}{'.' * (gap == ' ')}"

    def _full_marks(self, answer: str, entry: Mapping[str, Any]) -> bool:
        try:
            return float(self._block(0, 0).score_answer(answer, entry)) == 1.0
        except Exception:  # some scorers raise whatever their parsing meets: no full marks
            return False


def reasoning_gym_task(name: str, **config: Any) -> ReasoningGym:
    """The reasoning-gym dataset ``name`` as a task; ``config`` holds the dataset's own options.

    ``seed`` and ``size`` are not options: :meth:`Task.problems` takes the seed and the number.
    Raises :class:`~sasft.errors.UsageError` if reasoning-gym is missing, there is no such dataset,
    its options are refused, or it has no usable gold answer.
    """
    try:
        library = importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise UsageError(f"task 'reasoning_gym:{name}' needs reasoning-gym, which is not "
                         "installed; run: pip install 'sasft[tasks]'") from error
    if taken := sorted({"seed", "size"} & config.keys()):
        raise UsageError(f"config must not hold {' and '.join(taken)}: problems(n, seed) sets them")
    datasets = sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=3) or datasets[:3]
        raise UsageError(f"reasoning-gym has no dataset {name!r}; it has {len(datasets)}, "
                         f"such as {', '.join(near)}")
    return ReasoningGym(name, library, config)


TASKS: dict[str, Callable[..., Task]] = {"sums": Sums}
"""Built-in tasks by name; ``reasoning_gym:<dataset>`` names one of reasoning-gym's."""


def get_task(name: str, **options: Any) -> Task:
    """The task called ``name`` with its options.

    >>> get_task("sums", terms=(2, 2)).problems(1, seed=3)[0].question
    'How much is 585 - 432?'
    """
    if name.startswith("reasoning_gym:"):
        return reasoning_gym_task(name.removeprefix("reasoning_gym:"), **options)
    if name not in TASKS:
        raise UsageError(f"task {name!r} does not exist; use one of: {', '.join(sorted(TASKS))}, "
                         "reasoning_gym:<dataset>")
    try:
        return TASKS[name](**options)
    except TypeError as error:
        raise UsageError(f"task {name!r} refuses options {options}: {error}") from error


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _number(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else None


def _bare(text: str) -> tuple[str, ...]:
    """An answer as written, and without emphasis and the full stop of its sentence."""
    stripped = text.strip()
    plain = stripped.strip("*`_ ")
    return tuple(dict.fromkeys((stripped, plain, plain.removesuffix(".").strip("*`_ "))))
