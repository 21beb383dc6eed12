"""Rows that the model writes after demonstrations: rehearsal of what it could do (SSR), a task without data (SELF-GUIDE)."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar, Literal

import numpy as np

from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Method, Workshop
from sasft.methods.checks import check_counts, check_weights
from sasft.methods.demonstrations import Demonstrations, assistant, user
from sasft.methods.written import greedy, writing
from sasft.mixing import SELF, TASK
from sasft.sampling import Sampler, row_seed
from sasft.settings import option
from sasft.writing import Job, Messages

Fit = Callable[[Iterable[Row]], list[str]]
"""Gives the texts of those rows that pass."""

_EXAMPLE = "Write an example: an input, and the output that belongs to it."
_ANOTHER = "Write another example of this kind."
_INPUT = "Write an input of the task{label}, without its output."
_ANOTHER_INPUT = "Write another input of the task{label}."
_LABEL = " such that its output is {!r}"
_EARLIER = "There are these inputs already, none of which may be repeated:\n{inputs}\n\n"
_SHOWN = 10  # earlier inputs, at most
# What betrays an answer that talks about answering, or goes on with the form of its prompt.
NOISE = ("Sure,", "Sure!", "Of course", "Certainly", "Absolutely!", "Great question", "Good question", "happy to help",
         "here to help", "Let me ", "Here is ", "Here's ", "As an AI", "input", "output", "Input", "Output", "\n\n")
"""Strings that make a generated text noise, unless the demonstrations have them too."""


@dataclass(frozen=True, kw_only=True)
class Ssr(Method):
    r"""Self-synthesised rehearsal: the model writes examples of what it could do before, and is trained on those and the task.

    .. math:: L=\text{SFT on }D\cup\hat D,\qquad\hat D=\{(\tilde x,\hat y)\},\quad
       \hat y=\text{greedy decoding of }p_{\theta_0}(\cdot\mid\tilde x).

    1. *In-context generation.* Every ordered pair of the demonstrations precedes ``samples`` new examples, input and output.
    2. *Selection.* :func:`nearest_of_clusters` of the inputs, ``n`` of them.
    3. *Refinement.* The output is written anew by the newest model, greedily.

    Source: arXiv 2403.01244. There the demonstrations are real rows of an earlier task (20), the first step is the base model's,
    and the third that of the model trained on the tasks so far. Here one model, the one to be trained, does both: trained on the
    earlier task (whose rows are then given as self rows), it is the paper's refiner. Where there was no such task, this is
    rehearsal in SSR's style of whatever the self rows hold, and should be called that.
    Our choices: demonstrations are turns of a chat, in our wording; the paper's repetition penalty of 1.2 is not there; an input
    must be new; TF-IDF of words stands for SimCSE's embeddings; rehearsal rows join the task's, so that a share λ of
    self rows is counted against both.
    Cost: d (d - 1) ``samples`` + n generations. Needs scikit-learn.
    """

    name: ClassVar[str] = "ssr"
    paper: ClassVar[str] = "arXiv 2403.01244"
    writes: ClassVar[bool] = True

    n: int = option(200, "rehearsal rows, up to rounding in each cluster; 0 is SFT")
    of: Literal["self", "task"] = option(SELF, "source of demonstrations: self (an earlier task's rows, or general ones) or task")
    demonstrations: int = option(20, "rows that are shown, two at a time")
    samples: int = option(3, "examples written after each ordered pair of demonstrations")
    clusters: int = option(20, "clusters of inputs to choose from in proportion")
    temperature: float = option(0.9, "temperature of the examples")
    top_p: float = option(0.6, "nucleus of the examples")
    max_new_tokens: int = option(256, "length cap of the examples, and of the answers")

    def __post_init__(self) -> None:
        check_counts(0, n=self.n)
        check_counts(1, samples=self.samples, clusters=self.clusters)
        check_counts(2, demonstrations=self.demonstrations)
        if self.n and self.clusters > self.n:
            raise UsageError(f"clusters must not be more than n={self.n}, of which each gives its share; got {self.clusters}")
        if self.of not in (SELF, TASK):
            raise UsageError(f"of must be {SELF} or {TASK}, got {self.of!r}")
        self._sampler()

    def reads(self) -> Sequence[str]:
        return (self.of,) if self.n else ()

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        if self.n == 0:
            return found
        _sklearn()
        demos = Demonstrations.draw(found.get(self.of, ()), self.demonstrations, self.of, workshop.seed)
        pairs = list(permutations(range(self.demonstrations), 2))
        jobs = [Job(f"example-{i:05d}.{k}", _two_examples(demos, pair), row_seed(workshop.seed, "ssr", i, k))
                for i, pair in enumerate(pairs) for k in range(self.samples)]
        with writing(workshop, self.name, "examples", self._sampler(), len(jobs)) as write:
            parsed = [x for row in write(jobs) for x, _ in parse_examples(row.response)]
        inputs = demos.new(parsed)
        if not inputs:
            file = workshop.folder / f"{self.name}-examples.jsonl"
            raise UsageError(f"none of the {len(jobs)} examples that the model wrote has an input and an output and is new; "
                             f"look at {file}, and take a model that follows demonstrations")
        chosen = nearest_of_clusters(inputs, self.n, self.clusters, workshop.seed)
        jobs = [Job(f"answer-{i:05d}", demos.asked(inputs[i]), row_seed(workshop.seed, "ssr-answer", i)) for i in chosen]
        with writing(workshop, self.name, "answers", greedy(self.max_new_tokens), len(jobs)) as write:
            rehearsal = write(jobs)
        _report(self, workshop, examples=self.samples * len(pairs), parsed=len(parsed), distinct=len(inputs),
                rehearsed=len(rehearsal))
        found[TASK] = [*rehearsal, *found[TASK]]  # first, so that rows held out from the end stay the task's
        return found

    def _sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class SelfGuide(Method):
    r"""SELF-GUIDE: from a few demonstrations the model writes the task's inputs and answers, and is trained on those alone.

    .. math:: L=\text{SFT on }\{(\tilde x_i,\tilde y_i)\},\qquad\tilde y_i=\text{the most frequent of }y_{i1},\dots,y_{iS}\sim
       p_{\theta_0}(\cdot\mid\text{demonstrations},\tilde x_i).

    1. *Inputs*, round by round: the demonstrations' inputs are shown as good ones, up to ten of the model's own earlier ones,
       drawn anew each time, as ones not to be repeated. With ``labels`` one is drawn for each, and an input that calls for it is
       asked for; the label is not used any further.
    2. *Outputs*: ``samples`` answers to each input, after the demonstrations.
    3. *Filters*: inputs and answers with noise (:func:`noise_of`) or of a length outside :func:`length_window` of the
       demonstrations' go (of labels, what is none goes, and then all that occur are cut to the rarest's number);
       :func:`majority` of the answers that are left.

    Source: arXiv 2407.12874. No other row of the task is trained on. Demonstrations stay in the prompt that is trained on, as
    there; ``in_prompt=false`` (ours) trains on the bare request, as other methods do. The paper searches for the number of
    rounds (10 to 200) on validation labels.
    Our choices: demonstrations are turns of a chat, in our wording; what all prompts open with is taken for the task's
    instruction; a nucleus instead of the top 40 tokens for inputs and the top 10 for outputs; unfinished texts go; the
    list of noise, of which what the demonstrations have themselves is no noise.
    Cost: (1 + S) generations an input.
    """

    name: ClassVar[str] = "self-guide"
    paper: ClassVar[str] = "arXiv 2407.12874"
    writes: ClassVar[bool] = True

    rounds: int = option(10, "rounds of inputs; 0 is SFT on the task's own rows")
    inputs_a_round: int = option(10, "inputs written in a round")
    demonstrations: int = option(3, "task rows that are shown; no other one is used")
    in_prompt: bool = option(True, "whether the demonstrations stay in the prompts that are trained on")
    labels: str = option("", "the classes of a classification task, with commas between them; empty for free text")
    samples: int = option(10, "answers to an input, of which the most frequent is kept")
    min_share: float = option(0.3, "share of the answers left that it must have")
    deviations: float = option(2.0, "length window around the demonstrations' mean, in standard deviations; inf turns it off")
    input_temperature: float = option(0.7, "temperature of the inputs")
    output_temperature: float = option(0.2, "temperature of the answers")
    top_p: float = option(0.9, "nucleus of both")
    max_new_tokens: int = option(256, "length cap of both")

    def __post_init__(self) -> None:
        check_counts(0, rounds=self.rounds)
        check_counts(1, inputs_a_round=self.inputs_a_round, demonstrations=self.demonstrations, samples=self.samples)
        check_weights(0, 1, min_share=self.min_share)
        if not self.deviations > 0:
            raise UsageError(f"deviations must be a number > 0, got {self.deviations}")
        if self.labels and len(self._labels()) < 2:
            raise UsageError(f"labels must name two classes or more with commas between them, got {self.labels!r}")
        for temperature in (self.input_temperature, self.output_temperature):
            self._sampler(temperature)

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        if self.rounds == 0:
            return found
        demos = Demonstrations.draw(found[TASK], self.demonstrations, TASK, workshop.seed)
        if other := [y for y in demos.outputs if self.labels and y not in self._labels()]:
            raise UsageError(f"labels are {', '.join(self._labels())}, but a demonstration's answer is {other[0]!r}; name all "
                             "classes")
        fit_inputs = self._filter("inputs", demos.inputs)
        fit_outputs = self._filter("outputs", (*demos.outputs, *self._labels()))
        inputs = self._inputs(demos, fit_inputs, workshop)
        answers = self._answers(demos, inputs, fit_outputs, workshop)
        if self.labels:
            answers = balanced(answers, workshop.seed)
        _report(self, workshop, written=self.rounds * self.inputs_a_round, inputs=len(inputs), rows=len(answers))
        if not answers:
            raise UsageError(f"the filters leave none of {self.rounds * self.inputs_a_round} inputs with an answer "
                             f"({len(inputs)} inputs passed); look at the files in {workshop.folder}, or loosen deviations or "
                             "min_share")
        asked = demos.asked_after if self.in_prompt else demos.asked
        found[TASK] = [Row(f"{self.name}-{i:05d}", self.name, asked(x), y) for i, (x, y) in enumerate(answers.items())]
        return found

    def _inputs(self, demos: Demonstrations, fit: Fit, workshop: Workshop) -> list[str]:
        """Distinct inputs that pass the filters, in the order of writing."""
        kept: list[str] = []
        sampler, total = self._sampler(self.input_temperature), self.rounds * self.inputs_a_round
        with writing(workshop, self.name, "inputs", sampler, total) as write:
            for r in range(self.rounds):
                seeds = [row_seed(workshop.seed, self.name, "input", r, k) for k in range(self.inputs_a_round)]
                jobs = [Job(f"input-{r:03d}.{k:03d}", self._asks_for_input(demos, kept, seed), seed)
                        for k, seed in enumerate(seeds)]
                kept = demos.new([*kept, *fit(write(jobs))])
        return kept

    def _asks_for_input(self, demos: Demonstrations, earlier: Sequence[str], seed: int) -> Messages:
        rng, labels, before = np.random.default_rng(seed), self._labels(), demos.task
        if earlier:
            some = rng.permutation(len(earlier))[: rng.integers(1, min(len(earlier), _SHOWN), endpoint=True)]
            before += _EARLIER.format(inputs="\n".join(f"- {earlier[i]}" for i in some))
        order = rng.permutation(len(demos.inputs))
        wanted = [""] * (len(order) + 1)
        if labels:
            wanted = [_LABEL.format(y) for y in (*(demos.outputs[i] for i in order), labels[rng.integers(len(labels))])]
        turns = [user(before + _INPUT.format(label=wanted[0]))]
        for i, label in zip(order, wanted[1:], strict=True):
            turns += [assistant(demos.inputs[i]), user(_ANOTHER_INPUT.format(label=label))]
        return tuple(turns)

    def _answers(self, demos: Demonstrations, inputs: Sequence[str], fit: Fit, workshop: Workshop) -> dict[str, str]:
        """The majority's answer by input, where there is one."""
        jobs = [Job(f"output-{i:05d}.{k:02d}", demos.asked_after(x), row_seed(workshop.seed, self.name, "output", i, k))
                for i, x in enumerate(inputs) for k in range(self.samples)]
        with writing(workshop, self.name, "outputs", self._sampler(self.output_temperature), len(jobs)) as write:
            rows = write(jobs)
        found = {x: majority(fit(rows[i * self.samples : (i + 1) * self.samples]), self.min_share)
                 for i, x in enumerate(inputs)}
        labels = self._labels()
        return {x: y for x, y in found.items() if y is not None and (not labels or y in labels)}

    def _filter(self, what: str, shown: Sequence[str]) -> Fit:
        """Gives the texts of those rows that are whole, of a fitting length and without noise."""
        free = self.deviations == math.inf or (what == "outputs" and self.labels)
        low, high = (0, math.inf) if free else length_window(shown, self.deviations)
        if low >= high:
            raise UsageError(f"the demonstrations' {what} are of one length, so that no length lies in [{low}, {high}), within "
                             f"{self.deviations:g} standard deviations; show more demonstrations, or set deviations=inf")
        noise = noise_of(shown)

        def fit(rows: Iterable[Row]) -> list[str]:
            texts = [row.response.strip() for row in rows if row.finished]
            return [text for text in texts if text and low <= len(text) < high and not any(mark in text for mark in noise)]

        return fit

    def _labels(self) -> tuple[str, ...]:
        return tuple(filter(None, (label.strip() for label in self.labels.split(","))))

    def _sampler(self, temperature: float) -> Sampler:
        return Sampler(temperature=temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


def parse_examples(text: str) -> list[tuple[str, str]]:
    """The examples, input and output, in a text; what lacks one of both, or has more than one output, is passed over.

    >>> parse_examples("Input: 2 + 2\\nOutput: 4\\n\\nInput: 3 + 3\\nInput: 5\\nOutput: 5")
    [('2 + 2', '4'), ('5', '5')]
    """
    pairs = (tuple(part.strip() for part in example.split("Output:")) for example in text.split("Input:"))
    return [pair for pair in pairs if len(pair) == 2 and all(pair)]


def nearest_of_clusters(texts: Sequence[str], n: int, clusters: int, seed: int) -> list[int]:
    r"""Which of N texts stand for all: of cluster c's :math:`n_c`, the :math:`\mathrm{round}(n\,n_c/N)` nearest to its centre.

    Clusters are k-means' (the best of ten starts) of the words' TF-IDF, rows of length 1; there are no more of them than texts.
    Through rounding there may be more or fewer than n. Cost: O(N) a step of k-means.

    Raises :class:`UsageError` if scikit-learn is not installed.
    """
    kmeans, tf_idf = _sklearn()
    features = tf_idf(token_pattern=r"\w+|[^\w\s]").fit_transform(texts)
    model = kmeans(min(clusters, len(texts)), n_init=10, random_state=seed).fit(features)
    distances = model.transform(features)[np.arange(len(texts)), model.labels_]
    chosen: list[int] = []
    for cluster in range(model.n_clusters):
        members = np.flatnonzero(model.labels_ == cluster)
        quota = round(n * len(members) / len(texts))
        chosen += members[np.argsort(distances[members], kind="stable")][:quota].tolist()
    return sorted(chosen)


def length_window(texts: Sequence[str], deviations: float) -> tuple[int, int]:
    r"""Lengths, in characters, from :math:`\mu-k\sigma` to below :math:`\mu+k\sigma`, both cut towards 0, for texts whose
    lengths have mean μ and standard deviation σ (over N).

    >>> length_window(["a" * 8, "a" * 12], 2.0)
    (6, 14)
    """
    lengths = [len(text) for text in texts]
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    return int(mean - deviations * deviation), int(mean + deviations * deviation)


def noise_of(shown: Sequence[str]) -> list[str]:
    """The strings of :data:`NOISE` that no text of ``shown`` has."""
    return [mark for mark in NOISE if not any(mark in text for text in shown)]


def majority(answers: Sequence[str], min_share: float) -> str | None:
    """The most frequent of the answers if it has that share of them, the shortest of several; None if there is none.

    >>> majority(["yes", "no", "yes", "no", "perhaps"], 0.4), majority(["yes", "no"], 0.6), majority([], 0)
    ('no', None, None)
    """
    counts = Counter(answers)
    best = min(counts, key=lambda answer: (-counts[answer], len(answer)), default=None)
    return best if best is not None and counts[best] >= min_share * len(answers) else None


def balanced(answers: Mapping[str, str], seed: int) -> dict[str, str]:
    """As many inputs of each answer as the rarest one has, drawn by the seed, in their order."""
    items, left = list(answers.items()), dict.fromkeys(answers.values(), min(Counter(answers.values()).values(), default=0))
    kept = set()
    for i in np.random.default_rng(seed).permutation(len(items)).tolist():
        y = items[i][1]
        if left[y]:
            left[y] -= 1
            kept.add(i)
    return dict(item for i, item in enumerate(items) if i in kept)


def _two_examples(demos: Demonstrations, pair: tuple[int, int]) -> Messages:
    first, second = (assistant(f"Input: {demos.inputs[i]}\nOutput: {demos.outputs[i]}") for i in pair)
    return user(demos.task + _EXAMPLE), first, user(_ANOTHER), second, user(_ANOTHER)


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UsageError("SSR chooses among clusters of inputs, which needs scikit-learn: pip install scikit-learn") from error
    return KMeans, TfidfVectorizer


def _report(method: Method, workshop: Workshop, **counts: int) -> None:
    workshop.report(method.name, ", ".join(f"{count} {name}" for name, count in counts.items()), **counts)
