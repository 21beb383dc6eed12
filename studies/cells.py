"""The data of the 2 x 2 design: own and foreign style, old and new content, on the same prompts.

=================  ==========================================  ===============================================
..                 old content (the model's own answer)        new content (the truth of the task)
=================  ==========================================  ===============================================
own style          ``own/old``: sampled from the model, T = 1  ``own/new``: sampled with the truth revealed,
                                                               kept if a checker finds the truth in it
foreign style s    ``s/old``: own/old rewritten by rule        ``s/new``: own/new rewritten by the same rule
=================  ==========================================  ===============================================

Both columns are rewritten by the same deterministic rule, so style and content are crossed exactly. The task as
it comes (``raw``: worked sums in shorthand, style and content both new) stands beside the four cells.
"""

import hashlib
import json
import pydoc_data.topics
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sasft.chat import Chat, Encoded
from sasft.errors import UsageError
from sasft.files import write_json
from sasft.restyle import restyle
from sasft.sampling import EXACT, PAPER, Sampler
from sasft.selfdialogue import Writer, answer, answer_until, write_dialogues
from sasft.tasks import Problem, get_task

ONE_SENTENCE = "Answer in one sentence."
SAMPLERS = {"exact": EXACT, "paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is sampled once, before any arm trains. All arms and seeds share it."""

    task: str = "sums"
    problems: int
    held_out_problems: int
    self_rows: int
    held_out_self_rows: int
    styles: tuple[str, ...]
    max_answer_tokens: int
    max_user_tokens: int
    tries: int
    passages: int
    passage_tokens: int
    data_seed: int = 0


@dataclass(frozen=True)
class StudyData:
    """Encoded rows by pool. Pools of the 2 x 2 design are aligned: row i answers the same prompt in each."""

    train: Mapping[str, list[Encoded]]
    held_out: Mapping[str, list[Encoded]]
    facts: Mapping[str, float]


def build(writer: Writer, settings: DataSettings, folder: Path) -> StudyData:
    """Sample, rewrite and encode all pools; what is in ``folder`` already is kept (every row is appended as it comes)."""
    chat, task = writer.chat, get_task(settings.task)
    problems = task.problems(settings.problems, seed=settings.data_seed)
    test = task.problems(settings.held_out_problems, seed=settings.data_seed + 1,
                         exclude=frozenset(p.key for p in problems))
    prompts = {p.key: f"{p.question} {ONE_SENTENCE}" for p in problems}
    by_key = {p.key: p for p in problems}

    exact = _with_sampler(writer, EXACT, settings.max_answer_tokens)
    own_new = answer_until(
        exact, {k: (text, _reveal(by_key[k], task.sentence(by_key[k]))) for k, text in prompts.items()},
        lambda key, row: row.finished and task.check(by_key[key], row.response),
        folder / "own_new.jsonl", source="own_new", tries=settings.tries, seed=settings.data_seed)
    if 4 * len(own_new) < len(prompts):
        raise UsageError(f"the model stated the truth in its own words for too few problems: it failed {len(prompts) - len(own_new)} "
                         f"of the {len(prompts)} problems in {settings.tries} tries each; raise tries, or choose an easier task")
    kept = [row.id.rsplit("/", 1)[0] for row in own_new]
    own_old = answer(exact, {k: prompts[k] for k in prompts}, folder / "own_old.jsonl", source="own_old",
                     seed=settings.data_seed)
    old_by_key = {row.id: row for row in own_old}
    cells = {"own/old": [old_by_key[k] for k in kept], "own/new": own_new}

    train = {name: [chat.encode(r.prompt, r.response_ids, finished=r.finished) for r in rows]
             for name, rows in cells.items()}
    for style in settings.styles:
        for content in ("old", "new"):
            train[f"{style}/{content}"] = [
                chat.encode(r.prompt, restyle(r.response, style), finished=r.finished) for r in cells[f"own/{content}"]]
    train["raw"] = [_encode_gold(chat, prompts[k], task.worked(by_key[k])) for k in kept]

    held_out = {
        "gold_raw": [_encode_gold(chat, f"{p.question} {ONE_SENTENCE}", task.worked(p)) for p in test],
        **_human(chat, settings.passages, settings.passage_tokens),
    }
    for name, sampler in SAMPLERS.items():
        rows = write_dialogues(_with_sampler(writer, sampler, settings.max_answer_tokens),
                               settings.self_rows + settings.held_out_self_rows, folder / f"self_{name}.jsonl",
                               seed=settings.data_seed, max_user_tokens=settings.max_user_tokens)
        encoded = [chat.encode(r.prompt, r.response_ids, finished=r.finished) for r in rows]
        held_out[f"self_{name}"] = encoded[: settings.held_out_self_rows]
        train[f"self_{name}"] = encoded[settings.held_out_self_rows :]
    train["self_shuffled"] = shuffled(train["self_exact"], settings.data_seed)
    facts = {
        "prompts_kept": len(kept) / len(prompts),
        "old_answers_right": float(np.mean([task.check(by_key[k], old_by_key[k].response) for k in kept])),
        **{f"loss_tokens_a_row/{name}": float(np.mean([r.loss_tokens for r in rows])) for name, rows in train.items()},
    }
    write_json(folder / "facts.json", facts)
    _write_examples(folder / "examples.json", chat, train)
    return StudyData(train, held_out, facts)


def _with_sampler(writer: Writer, sampler: Sampler, max_new_tokens: int) -> Writer:
    return replace(writer, sampler=replace(sampler, max_new_tokens=max_new_tokens))


def _reveal(problem: Problem, sentence: str) -> str:
    return f"{problem.question} Use this fact: {sentence} {ONE_SENTENCE}"


def _encode_gold(chat: Chat, prompt: str, text: str) -> Encoded:
    return chat.encode(({"role": "user", "content": prompt},), text, finished=True)


def shuffled(rows: Sequence[Encoded], seed: int) -> list[Encoded]:
    """The control: every answer's tokens in random order, its end-of-turn token left in place."""
    rng = np.random.default_rng([seed, 1])
    return [row.with_response(rng.permutation(row.response_ids).tolist()) for row in rows]


def _human(chat: Chat, n: int, tokens: int) -> dict[str, list[Encoded]]:
    """``n`` passages of human prose as plain text and as answers in a chat: the language reference in the standard library.

    Its text varies between Python versions; the study records the hash of what it read.
    """
    found: dict[tuple[int, ...], str] = {}  # topics share paragraphs
    for topic, content in sorted(pydoc_data.topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", content):
            if len(paragraph.split()) >= 50 and not re.search(r"::=|\n {6,}|>>>|\*\*\*", paragraph):
                ids = chat.tokenizer(" ".join(paragraph.split()), add_special_tokens=False).input_ids
                if len(ids) > tokens:
                    found.setdefault(tuple(ids[: tokens + 1]), topic)
                    break
    passages = list(found)
    chosen = [passages[i] for i in np.random.default_rng(0).permutation(len(passages))[:n]]
    return {
        "human_text": [Encoded.text(ids) for ids in chosen],
        "human_chat": [chat.encode(({"role": "user", "content": f"Tell me about {found[ids]!r} in Python."},), ids,
                                   finished=False) for ids in chosen],
    }


def _write_examples(path: Path, chat: Chat, train: Mapping[str, list[Encoded]]) -> None:
    """Three rows of every pool as text, to be read by people."""
    write_json(path, {name: [chat.tokenizer.decode(row.response_ids) for row in rows[:3]] for name, rows in train.items()})


def digest(data: StudyData) -> str:
    """SHA-256 over every token of every pool: what the results hang on."""
    pools = {kind: {name: [[list(r.input_ids), list(r.labels)] for r in rows] for name, rows in pool.items()}
             for kind, pool in (("train", data.train), ("held_out", data.held_out))}
    return hashlib.sha256(json.dumps(pools, sort_keys=True).encode()).hexdigest()
