"""lm-evaluation-harness as one more source of scores (``pip install sasft[eval]``), with its per-item results in our records."""

import copy
import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from drift.modes import measuring
from sasft.errors import UsageError
from sasft.evaluation.subject import Subject
from sasft.evaluation.suites import Item, Suite


@dataclass(frozen=True, kw_only=True)
class Harness(Suite):
    """A task or group of lm-eval, ``lm_eval:hellaswag``, run through ``lm_eval.simple_evaluate`` on the model in hand.

    The chat template is on and shots are turns; without shots named, the task's own number of them. ``task_folder``: lm-eval's
    YAML files of tasks of one's own, which may name local data files; without it tasks come from the hub. Precision, the length
    cap and the temperature of the evaluation hold here too; with neither of the last two, each task's own. A limit takes a
    task's first items. lm-eval batches and caches by itself, so that a stopped task starts anew.
    """

    task: str
    shots: int | None = None
    task_folder: str | None = None
    items: Sequence[Item] = ()
    metrics: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _library("lm_eval")

    def prompt_ids(self, subject: Subject, item: Item) -> Sequence[int]:
        raise NotImplementedError("lm-eval renders its own prompts")

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        raise NotImplementedError("lm-eval measures whole tasks: see run()")

    def run(self, subject: Subject, limit: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Records of all items, and what lm-eval says of its tasks: their versions and its own aggregate scores."""
        lm_eval = _library("lm_eval")
        tokenizer = copy.deepcopy(subject.chat.tokenizer)
        tokenizer.chat_template = subject.chat.template  # of the same day
        manager = _library("lm_eval.tasks").TaskManager(include_path=self.task_folder)
        try:
            with measuring(subject.model), _random_state_kept():
                wrapped = _library("lm_eval.models.huggingface").HFLM(
                    pretrained=subject.model, tokenizer=tokenizer, batch_size=subject.batch_size,
                    mixed_precision_dtype="bfloat16" if subject.precision == "bf16" else None,
                    chat_template_args=dict(subject.chat._mode))  # a reasoning template in the mode that our own suites use
                found = lm_eval.simple_evaluate(
                    model=wrapped, tasks=[self.task], num_fewshot=self.shots, limit=limit, log_samples=True,
                    task_manager=manager, apply_chat_template=True, fewshot_as_multiturn=True, gen_kwargs=_generation(subject),
                    random_seed=subject.seed, numpy_random_seed=subject.seed, torch_random_seed=subject.seed,
                    fewshot_random_seed=subject.seed)
        except (KeyError, ValueError, OSError) as error:
            raise UsageError(f"lm-eval can't run {self.task!r} ({type(error).__name__}: {error}); `lm-eval ls tasks` lists its "
                             "tasks, task_folder names YAML files of your own, which may read local data, and hub sets need a "
                             "connection") from error
        records = harness_records(found["samples"])
        if not records:
            raise UsageError(f"lm-eval gave no item of {self.task!r} a score that is a number")
        return records, {"lm_eval": lm_eval.__version__, "task_versions": found.get("versions", {}),
                         "shots": found.get("n-shot", {}), "results": found["results"]}


def _generation(subject: Subject) -> dict[str, Any] | None:
    """What the evaluation says of written answers, in lm-eval's words; None where it leaves all to the tasks."""
    length = {"max_gen_toks": subject.max_new_tokens} if subject.max_new_tokens else {}
    sampling = {"do_sample": True, "temperature": subject.temperature} if subject.temperature else {}
    return {**length, **sampling} or None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Python's and numpy's random states, which lm-eval seeds, are as before after the block."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])


def harness_records(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One record an item of lm-eval's logged samples ({task: samples}), scores of several filters side by side.

    A metric is called ``metric,filter``, as lm-eval's results call it. A list of rights and wrongs (IFEval's instructions) is a
    total and a weight. Scores of other kinds (the counts that make up a corpus perplexity, say) are left to the aggregates.

    >>> sample = {"doc_id": 3, "prompt_hash": "ab", "filter": "strict-match", "metrics": ["exact_match"], "exact_match": 1.0}
    >>> harness_records({"gsm8k": [sample, {**sample, "filter": "flexible-extract"}]})[0]["scores"]
    {'exact_match,strict-match': (1.0, 1.0), 'exact_match,flexible-extract': (1.0, 1.0)}
    """
    records: dict[tuple[str, Any], dict[str, Any]] = {}
    for task, logged in samples.items():
        for sample in logged:
            key = (task, sample["doc_id"])
            record = records.setdefault(key, {"id": f"{task}/{sample['doc_id']}", "group": task, "scores": {},
                                              "prompt_sha256": sample["prompt_hash"]})
            scores = ((f"{name},{sample['filter']}", _score(sample.get(name))) for name in sample["metrics"])
            record["scores"] |= {name: score for name, score in scores if score is not None}
    return [record for record in records.values() if record["scores"]]


def _score(value: Any) -> tuple[float, float] | None:
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return float(value), 1.0
    if isinstance(value, list) and value and all(isinstance(one, (bool, np.bool_)) for one in value):
        return float(sum(value)), float(len(value))
    return None


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # something that lm-eval needs itself
        raise UsageError("suites that begin with lm_eval: need lm-evaluation-harness, which is not installed; run: pip install "
                         "'sasft[eval]'") from error
