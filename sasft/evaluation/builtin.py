"""Suites that need no benchmark: instructions of our own, procedural tasks, the NLL and KL of texts and rows, a file's own
answers."""

import pydoc_data.topics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from sasft.chat import Chat, Encoded
from sasft.data import Row, encode_rows, read_rows
from sasft.errors import UsageError
from sasft.evaluation.checked import instruction_suite, reference_suite
from sasft.evaluation.request import Request
from sasft.evaluation.suites import Answered, Item, Predicted, Suite, cluster_of_text, user
from sasft.files import sha256_file
from sasft.sources import Source
from sasft.tasks import get_task

_WINDOW = 256  # tokens of a text that are predicted together
_MAX_TOKENS = 1024  # of an answer; what is beyond is cut off
_PROBLEMS = 200
_PROBLEM_SEED = 20_260_220  # a stream of its own, apart from the small seeds that training data are drawn with

_QUESTIONS = (
    ("What do bees make?", "honey", "flower"), ("Why do leaves fall in autumn?", "tree", "cold"),
    ("How is bread baked?", "flour", "oven"), ("What is the moon?", "earth", "night"),
    ("Why is sleep good for people?", "rest", "health"), ("What does a doctor do?", "patient", "help"),
    ("How does a bicycle work?", "wheel", "pedal"), ("What is a library?", "book", "read"),
    ("Why do birds sing?", "song", "nest"), ("How do you make tea?", "water", "cup"),
    ("What is snow?", "ice", "winter"), ("What is a friend?", "trust", "kind"),
    ("Why do people travel?", "place", "new"), ("What is a garden?", "plant", "soil"),
    ("How does a boat float?", "water", "weight"), ("What is music?", "sound", "rhythm"),
    ("Why is the sea salty?", "river", "rock"), ("What does a farmer do?", "field", "crop"),
    ("How do you plan a birthday party?", "guest", "cake"), ("What is a map?", "road", "city"),
)

# Each instruction in words, its kind, and its options; {a} and {b} are words that go with the question.
_INSTRUCTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Answer in fewer than 15 words.", "length_constraints:number_words", {"num_words": 15, "relation": "less than"}),
    ("Answer in at least 60 words.", "length_constraints:number_words", {"num_words": 60, "relation": "at least"}),
    ("Answer in a single sentence.", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}),
    ("Write your whole answer in lower case, without any capital letter.", "change_case:english_lowercase", {}),
    ("WRITE YOUR WHOLE ANSWER IN CAPITAL LETTERS.", "change_case:english_capital", {}),
    ("Answer with exactly 3 bullet points, each on a line that begins with \"- \".", "detectable_format:number_bullet_lists",
     {"num_bullets": 3}),
    ("Use the words \"{a}\" and \"{b}\" in your answer.", "keywords:existence", {"keywords": ["{a}", "{b}"]}),
    ("Do not use the word \"{a}\" in your answer.", "keywords:forbidden_words", {"forbidden_words": ["{a}"]}),
    ("Do not use any comma in your answer.", "punctuation:no_comma", {}),
    ("Put your whole answer between double quotation marks.", "startend:quotation", {}),
    ("End your answer with exactly these words: That is all.", "startend:end_checker", {"end_phrase": "That is all."}),
    ("Begin with a title in double angular brackets, such as <<title>>.", "detectable_format:title", {}),
)


def instructions(request: Request) -> Suite:
    """240 short prompts, 20 plain questions times 12 instructions that a rule checks: length, case, lists, words, punctuation.

    Scores as IFEval's. Made for small models, which IFEval's long prompts overtax; parts of the suite are its kinds, and the
    prompts of one question make a cluster.
    """
    request.no_part(), request.no_shots()
    items = []
    for q, (question, a, b) in enumerate(_QUESTIONS):
        for i, (said, kind, options) in enumerate(_INSTRUCTIONS):
            filled = {k: [w.format(a=a, b=b) for w in v] if isinstance(v, list) else v for k, v in options.items()}
            text = f"{question} {said.format(a=a, b=b)}"
            items.append(Item(id=f"{q:02d}-{i:02d}", asked=text, prompt=user(text), gold=[(kind, filled)], group=kind,
                              cluster=f"{q:02d}"))
    return instruction_suite(request.spec, items, {"built_in": "instructions"}, max_new_tokens=128)


def task(request: Request) -> Suite:
    """200 problems of a procedural task (:mod:`sasft.tasks`), ``task:sums`` or ``task:reasoning_gym:<dataset>``; metric
    ``correct``: the task's own checker finds the truth stated in the answer. Look for them in the training data where those are
    of the same task.
    """
    request.no_shots()
    made = get_task(request.part or "sums")
    problems = made.problems(_PROBLEMS, seed=_PROBLEM_SEED)
    items = [Item(id=p.key, asked=p.question, gold=p, prompt=user(p.question)) for p in problems]
    return Answered(name=request.spec, items=items, metrics=("correct",), source={"task": made.name, "seed": _PROBLEM_SEED},
                    max_new_tokens=96, check=lambda item, answer: {"correct": float(made.check(item.gold, answer))})


def text(request: Request) -> Suite:
    """NLL, and with a base KL, on windows of 256 tokens of a UTF-8 text, ``text:file.txt``; without a file, on the language
    reference in Python's standard library (64 windows of technical prose; it varies between versions of Python, its hash is in
    the results).
    """
    request.no_shots()
    if request.part:
        path = Path(request.part)
        try:
            whole = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"suite {request.spec!r}: {path} can't be read as UTF-8 text: {error}") from None
        source, most = {"file": path.name, "sha256": sha256_file(path)}, None
    else:
        whole, most = "\n\n".join(content for _, content in sorted(pydoc_data.topics.topics.items())), 64
        source = {"built_in": "pydoc_data.topics", "sha256": sha256(whole.encode()).hexdigest()}
    rows = _windows(request.chat, whole)
    if not rows:
        raise UsageError(f"suite {request.spec!r}: the text has fewer than two tokens, so there is nothing to predict")
    spread = range(0, len(rows), max(1, len(rows) // most)) if most else range(len(rows))
    return _predicted(request.spec, [Item(id=str(i), gold=rows[i]) for i in list(spread)[:most]], source)


def _windows(chat: Chat, whole: str) -> list[Encoded]:
    ids = chat.tokenizer(whole, add_special_tokens=False).input_ids
    return [Encoded.text(ids[i : i + _WINDOW]) for i in range(0, len(ids), _WINDOW) if len(ids[i : i + _WINDOW]) > 1]


def rows(request: Request) -> Suite:
    """NLL, and with a base KL, on the answers of held-out rows, ``rows:file.jsonl`` (or Parquet, as everywhere); the end of an
    answer beyond 1,024 tokens is cut off."""
    request.no_shots()
    read, source = _file(request)
    encoded, _ = encode_rows(read, request.chat, sys.maxsize)
    return _predicted(request.spec, [Item(id=i, gold=row.cut(row.start + _MAX_TOKENS), cluster=cluster)
                                     for i, row, cluster in zip(_ids(read), encoded, _dialogues(read), strict=True)], source)


def _predicted(name: str, items: list[Item], source: dict[str, Any]) -> Suite:
    return Predicted(name=name, items=items, source=source,
                     metrics=("nll/model", "kl/base_model", "kl/model_base", "entropy/base", "entropy/model", "nll/base"))


def answers(request: Request) -> Suite:
    """The task's own score: the answers of held-out rows, ``answers:file.jsonl``, as references for ROUGE-L and exact match."""
    request.no_shots()
    read, source = _file(request)
    items = [Item(id=i, asked=row.prompt[-1]["content"], prompt=row.prompt, gold=[row.response], cluster=cluster)
             for i, row, cluster in zip(_ids(read), read, _dialogues(read), strict=True)]
    return reference_suite(request.spec, items, source, max_new_tokens=256)


def _file(request: Request) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a file, and its name and hash."""
    if not request.part:
        raise UsageError(f"suite {request.spec!r} needs a JSONL file of rows: {request.spec}:file.jsonl")
    source = Source.parse(request.part)
    return read_rows(source), {"file": Path(source.where).name, "sha256": source.sha256()}


def _ids(read: Sequence[Row]) -> list[str]:
    """The rows' ids, numbered where they are not distinct."""
    ids = [row.id for row in read]
    return ids if len(set(ids)) == len(ids) else [f"{i}-{name}" for i, name in enumerate(ids)]


def _dialogues(read: Sequence[Row]) -> list[str]:
    """The cluster of each row: the dialogue that it is a turn of, by what its user said first; none where it is alone in it."""
    first = [next((message["content"] for message in row.prompt if message["role"] == "user"), "") for row in read]
    rows_of = Counter(first)
    return [cluster_of_text(said) if rows_of[said] > 1 else "" for said in first]


BUILT_IN: dict[str, Callable[[Request], Suite]] = {
    "instructions": instructions, "task": task, "text": text, "rows": rows, "answers": answers,
}
