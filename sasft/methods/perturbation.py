"""SFT on prompts with noise in them: typing errors, other words, other sentences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from sasft.content import read
from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Method, Workshop
from sasft.methods.checks import check_weights
from sasft.methods.written import writing
from sasft.mixing import TASK
from sasft.perturb import fixed_texts, mistype, reword
from sasft.sampling import Sampler, row_seed
from sasft.settings import option
from sasft.text_checks import stands_in
from sasft.writing import Job

_RATES = {"char": 0.05, "word": 0.1, "sentence": 1.0}
_LENGTHS = 0.5, 2.0  # of a paraphrase over the original, in characters
_PARAPHRASE = """Rewrite the following request in other words. Keep its meaning, and copy every number, name and piece of code \
as it stands. Do not answer it; write nothing but the rewritten request.

{text}"""


@dataclass(frozen=True, kw_only=True)
class Perturbed(Method):
    r"""SFT on perturbed prompts, :math:`L=-\log p_\theta(y\mid\pi(x))`: the user's turns of task rows change, answers never do.

    After work on the robustness of code models, known to us by its abstract only (of 2026; title and number not verified), which
    perturbs prompts at three levels. It is about noise in the input, not about forgetting, and serves as a control of noise in
    the data. Operators, rates and replacing rather than adding rows are our choices:

    - ``char``: each letter of longer words, with probability ``rate`` (:func:`sasft.perturb.mistype`);
    - ``word``: each free word, with probability ``rate`` (:func:`sasft.perturb.reword`);
    - ``sentence``: the last user turn of a share ``rate`` of the rows, paraphrased by the model to be trained. One that
      :func:`refused` finds fault with is not taken: the row stays as it is.

    Code, numbers, names and identifiers stay byte for byte (:func:`sasft.perturb.free_words`), so prompts that are nothing but
    code, docstrings included, stay whole. What happens to a row follows from the run's seed and the row's id. ``rate=0`` is SFT.
    Typing errors break words into more tokens, so prompts get longer.

    Cost: none; for ``sentence``, one generation a row. ``perturbed.json`` says how many rows have changed.
    """

    name: ClassVar[str] = "perturbed"
    paper: ClassVar[str] = "perturbed prompts for code models (2026, not verified)"
    writes: ClassVar[bool] = True

    level: Literal["char", "word", "sentence"] = option("char", f"what is perturbed: {', '.join(_RATES)}")
    rate: float | None = option(None, "share of letters, words or rows that change, in [0, 1]; none: 0.05 of letters, 0.1 of "
                                      "words, all rows; 0 is SFT")
    temperature: float = option(0.7, "temperature of the paraphrases")
    top_p: float = option(0.9, "nucleus of the paraphrases")
    max_new_tokens: int = option(256, "length cap of the paraphrases")

    def __post_init__(self) -> None:
        if self.level not in _RATES:
            raise UsageError(f"level must be one of {', '.join(_RATES)}, got {self.level!r}")
        if self.rate is not None:
            check_weights(0, 1, rate=self.rate)
        self._sampler()

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        found = super().rows(sources, workshop)
        before, rate = found[TASK], _RATES[self.level] if self.rate is None else self.rate
        if rate == 0:
            return found
        refusals: Counter[str] = Counter()
        if self.level == "sentence":
            found[TASK], refusals = self._paraphrased(before, rate, workshop)
        else:
            found[TASK] = [self._noisy(row, rate, workshop.seed) for row in before]
        changed = sum(new.prompt != old.prompt for new, old in zip(found[TASK], before, strict=True))
        why = "".join(f"; {count} paraphrases refused: {reason}" for reason, count in refusals.most_common())
        workshop.report(self.name, f"{changed} of {len(before)} task prompts changed ({self.level}, rate {rate:g}){why}",
                        rows=len(before), changed=changed, level=self.level, rate=rate, refused=dict(refusals))
        return found

    def _noisy(self, row: Row, rate: float, seed: int) -> Row:
        alter = mistype if self.level == "char" else reword
        return replace(row, prompt=tuple(
            {**message, "content": alter(message["content"], rate, np.random.default_rng(row_seed(seed, self.name, row.id, k)))}
            if message["role"] == "user" else message for k, message in enumerate(row.prompt)))

    def _paraphrased(self, rows: Sequence[Row], rate: float, workshop: Workshop) -> tuple[list[Row], Counter[str]]:
        found, refusals = list(rows), Counter[str]()
        draws = [np.random.default_rng(row_seed(workshop.seed, self.name, row.id)).random() for row in rows]
        chosen = [i for i, draw in enumerate(draws) if draw < rate and rows[i].prompt[-1]["role"] == "user"]
        jobs = [Job(f"paraphrase-{i:06d}", ({"role": "user", "content": _PARAPHRASE.format(text=rows[i].prompt[-1]["content"])},),
                    row_seed(workshop.seed, self.name, "paraphrase", rows[i].id)) for i in chosen]
        with writing(workshop, self.name, "paraphrases", self._sampler(), len(jobs)) as write:
            written = write(jobs)
        for i, paraphrase in zip(chosen, written, strict=True):
            *before, last = rows[i].prompt
            if reason := refused(paraphrase, last["content"], rows[i].response):
                refusals[reason] += 1
            else:
                found[i] = replace(rows[i], prompt=(*before, {**last, "content": paraphrase.response.strip()}))
        return found, refusals

    def _sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


def refused(paraphrase: Row, original: str, answer: str) -> str | None:
    """Why a paraphrase is not taken, the first reason; None if it is.

    It was cut; it is less than half or more than twice as long; it lost what is fixed, or has numbers or code of its own; it is
    no question although the original is one, or the other way round; it gives the answer away.

    >>> said = Row("1", "task", (), "How much is 3 apples at 2 dollars?")
    >>> refused(said, "What do 3 apples cost at 2 dollars?", "6"), refused(said, "What do 4 apples cost at 2 dollars?", "8")
    (None, 'fixed text lost')
    """
    text = paraphrase.response.strip()
    if not paraphrase.finished:
        return "unfinished"
    if not _LENGTHS[0] * len(original) <= len(text) <= _LENGTHS[1] * len(original):
        return "length"
    there = Counter(token.text for token in read(text))
    if fixed_texts(original) - there:
        return "fixed text lost"
    known = {token.text for token in read(original)}
    if any(token.kind in ("number", "span") and token.text not in known for token in read(text)):
        return "numbers or code made up"
    if ("?" in text) != ("?" in original):
        return "question or none"
    if stands_in(text, answer) and not stands_in(original, answer):
        return "answer given away"
    return None
