"""Public benchmarks as suites, from local files or the hub: GSM8K, MMLU, AGIEval, PIQA, IFEval, medical question answering.

All prompts go through the model's chat template; worked examples ("shots") are earlier turns. Where the words of a prompt are our
choice, the suite's docstring says so; every result carries the hash of its prompts: compare scores of one hash only.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sasft.errors import UsageError
from sasft.evaluation.checked import instruction_suite, reference_suite
from sasft.evaluation.natural_instructions import super_ni
from sasft.evaluation.request import Request
from sasft.evaluation.scoring import gsm8k_scores, same_formula
from sasft.evaluation.sources import Hub, Rows, Source, check_columns, check_texts
from sasft.evaluation.suites import Answered, Chosen, Item, Suite, cluster_of_text, turns, user
from sasft.files import sha256_file

LETTERS = "ABCDEFGHIJ"


# --- GSM8K --------------------------------------------------------------------------------------------------------


def _gsm8k_source(split: str) -> Source:
    return Source(title=f"GSM8K ({split})", file=f"gsm8k/{split}.jsonl", columns=("question", "answer"),
                  texts=("question", "answer"), home="https://github.com/openai/grade-school-math",
                  hub=Hub(name="openai/gsm8k", config="main", split=split, revision="cc7b047b6e5bb11b4f1af84efc572db110a51b3c"))


_GSM8K_FORM = "\n\nWork it out step by step. End with a line that holds #### and the answer as a plain number."


def gsm8k(request: Request) -> Suite:
    """Grade-school mathematics (arXiv 2110.14168): written solutions, under both of lm-eval's filters (``flexible``, ``strict``).

    Without shots the prompt asks for the "#### n" line, since strict scores measure nothing else then (ours); with shots the
    first ones of the training split show it, and the prompt is lm-eval's "Question: ... Answer:".
    """
    request.no_part()
    rows, provenance = _gsm8k_source("test").read(request.folder)
    shots: list[tuple[str, str]] = []
    if request.shots:
        pool, provenance["shots"] = _gsm8k_source("train").read(request.folder)
        shots = [(f"Question: {r['question']}\nAnswer:", r["answer"]) for r in pool]
    asked = [f"Question: {r['question']}\nAnswer:" if shots else r["question"] + _GSM8K_FORM for r in rows]
    items = [Item(id=str(i), asked=r["question"], gold=r["answer"],
                  prompt=user(question, *turns(request.examples(shots, question))))
             for i, (r, question) in enumerate(zip(rows, asked, strict=True))]
    return Answered(name=request.spec, items=items, metrics=("flexible", "strict"), source=provenance, max_new_tokens=512,
                    check=lambda item, answer: gsm8k_scores(answer, item.gold))


# --- multiple choice ----------------------------------------------------------------------------------------------


def _question(question: str, choices: Sequence[str], head: str = "") -> str:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{head}{question.strip()}\n{listed}\nAnswer:"


def _mmlu_source(split: str) -> Source:
    return Source(title=f"MMLU ({split})", file=f"mmlu/{split}.jsonl", columns=("subject", "question", "choices", "answer"),
                  texts=("subject", "question"),
                  home="https://github.com/hendrycks/test",
                  hub=Hub(name="cais/mmlu", config="all", split=split, revision="c30699e8356da336a370243923dbaf21066bb9fe"))


def mmlu(request: Request) -> Suite:
    """57 subjects, four choices (arXiv 2009.03300): the letter of largest log-likelihood as the assistant's first token.

    The prompt is the authors' ("The following are multiple choice questions (with answers) about ..."). Shots are the first
    ones of the subject's development questions, five at most. A part, ``mmlu:astronomy``, takes one subject. Questions that have
    all but their last line in common (the sources in papers on history) make a cluster.
    """
    rows, provenance = _mmlu_source("test").read(request.folder)
    subjects = sorted({r["subject"] for r in rows})
    if request.part:
        subjects = [request.one_of(subjects)]
    pool: Rows = []
    if request.shots:
        pool, provenance["shots"] = _mmlu_source("dev").read(request.folder)
    worked = [(r["subject"], (_question(r["question"], r["choices"]), LETTERS[r["answer"]])) for r in pool]
    shots = {s: [example for subject, example in worked if subject == s] for s in subjects}
    items = []
    for i, r in enumerate(rows):
        if r["subject"] not in shots:
            continue
        if not (isinstance(r["answer"], int) and 0 <= r["answer"] < len(r["choices"]) <= len(LETTERS)):
            raise UsageError(f"MMLU, row {i + 1}: answer must be the index of one of the {len(r['choices'])} choices, "
                             f"got {r['answer']!r}")
        about = r["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        question = _question(r["question"], r["choices"])
        opening, *rest = [*request.examples(shots[r["subject"]], question), (question, "")]
        asked = [(head + opening[0], opening[1]), *rest]
        items.append(Item(id=str(i), asked=r["question"], gold=r["answer"], group=r["subject"],
                          cluster=cluster_of_text(r["question"].strip().rpartition("\n")[0]),
                          choices=tuple(LETTERS[: len(r["choices"])]),
                          prompt=user(asked[-1][0], *turns(asked[:-1]))))
    return Chosen(name=request.spec, items=items, metrics=("acc", "nll"), source=provenance)


_AGIEVAL = ("aqua-rat", "math", "sat-math")


def _agieval_row(row: dict[str, Any]) -> dict[str, Any]:
    """The hub's rows hold a ready prompt ("Q: ... Answer Choices: (A)... A: Among A through E, the answer is")."""
    ready = r"^Q: |\s*Answer Choices:.*$|\s*\n?A:\s*(?:The answer is)?\s*$"
    shape = {"passage": None, "question": re.sub(ready, "", row["query"], flags=re.DOTALL)}
    if "choices" not in row:
        return {**shape, "options": None, "label": None, "answer": row["answer"]}
    return {**shape, "options": row["choices"], "label": LETTERS[row["gold"][0]], "answer": None}


def agieval(request: Request) -> Suite:
    """Examinations (arXiv 2304.06364): ``agieval:aqua-rat`` and ``agieval:sat-math`` by log-likelihood of letters, as MMLU;
    ``agieval:math`` by writing a solution, whose stated result must be the reference's formula
    (:func:`sasft.evaluation.scoring.same_formula`).

    Shots of the multiple-choice parts are the first other questions of the same file (ours: the set has no split for them).
    """
    part = request.one_of(_AGIEVAL)
    source = Source(title=f"AGIEval ({part})", file=f"agieval/{part}.jsonl", columns=("passage", "question", "options", "label"),
                    texts=("question",), home="https://github.com/ruixiangcui/AGIEval",
                    hub=Hub(name=f"hails/agieval-{part}", row=_agieval_row))
    rows, provenance = source.read(request.folder)
    if part == "math":
        request.no_shots()
        check_columns(rows, ("answer",), source.title)
        check_texts(rows, ("answer",), source.title)
        items = [Item(id=str(i), asked=r["question"], gold=r["answer"], prompt=user(
            r["question"] + "\n\nWork it out step by step. End with the answer in \\boxed{}.")) for i, r in enumerate(rows)]
        return Answered(name=request.spec, items=items, metrics=("formula",), source=provenance, max_new_tokens=512,
                        check=lambda item, answer: {"formula": same_formula(answer, item.gold)})
    worked, items = [], []
    for i, r in enumerate(rows):
        options = [re.sub(r"^\([A-J]\)\s*", "", option) for option in r["options"] or ()]
        if not options or r["label"] not in tuple(LETTERS[: len(options)]):
            raise UsageError(f"{source.title}, row {i + 1}: label must be the letter of one of its {len(options)} options, "
                             f"got {r['label']!r}")
        passage = f"{r['passage'].strip()}\n\n" if r["passage"] else ""
        worked.append((_question(r["question"], options, passage), r["label"]))
        items.append(Item(id=str(i), asked=r["question"], gold=LETTERS.index(r["label"]), choices=tuple(LETTERS[: len(options)]),
                          cluster=cluster_of_text(passage)))
    items = [replace(item, prompt=user(question, *turns(request.examples(worked, question))))
             for item, (question, _) in zip(items, worked, strict=True)]
    return Chosen(name=request.spec, items=items, metrics=("acc", "nll"), source=provenance)


def piqa(request: Request) -> Suite:
    """Everyday physics (arXiv 1911.11641, the validation split): which of two solutions is likelier as the whole of the answer.

    The prompt is lm-evaluation-harness's ("Question: ... Answer:"). ``acc_norm``, the headline, is by log-likelihood a character,
    since the solutions differ in length. For models too small to answer by letters.
    """
    request.no_part(), request.no_shots()
    source = Source(title="PIQA (validation)", file="piqa/valid.jsonl", columns=("goal", "sol1", "sol2"),
                    texts=("goal", "sol1", "sol2"), home="https://yonatanbisk.com/piqa",
                    form="valid.jsonl beside its valid-labels.lst",
                    hub=Hub(name="baber/piqa", split="validation"))
    rows, provenance = source.read(request.folder)
    if "file" in provenance:
        path = request.folder / "piqa/valid-labels.lst"
        provenance["labels_sha256"] = sha256_file(path)
        labels = path.read_text(encoding="utf-8").split()
    else:
        check_columns(rows, ("label",), source.title)
        labels = [str(r["label"]) for r in rows]
    if len(labels) != len(rows) or not {"0", "1"}.issuperset(labels):
        raise UsageError(f"{source.title}: there must be one label, 0 or 1, for each of the {len(rows)} rows, got {len(labels)} "
                         f"labels ({', '.join(sorted(set(labels))[:4])})")
    items = [Item(id=str(i), asked=r["goal"], gold=int(label), choices=(r["sol1"], r["sol2"]),
                  prompt=user(f"Question: {r['goal']}\nAnswer:")) for i, (r, label) in enumerate(zip(rows, labels, strict=True))]
    return Chosen(name=request.spec, items=items, metrics=("acc_norm", "acc", "nll"), source=provenance)


# --- instructions, and medical questions --------------------------------------------------------------------------


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """An instruction's own options: tables have all options in every row, those of others as None."""
    return {name: value for name, value in options.items() if value is not None}


def ifeval(request: Request) -> Suite:
    """541 prompts with 1 to 3 checkable instructions each (arXiv 2311.07911), all 25 kinds of which are covered, by checkers of
    our own (:mod:`sasft.evaluation.instructions`); scores as in :func:`sasft.evaluation.checked.instruction_suite`."""
    request.no_part(), request.no_shots()
    source = Source(title="IFEval", file="ifeval/input_data.jsonl", columns=("key", "prompt", "instruction_id_list", "kwargs"),
                    texts=("prompt",),
                    home="https://github.com/google-research/google-research/tree/master/instruction_following_eval",
                    hub=Hub(name="google/IFEval", split="train", revision="966cd89545d6b6acfd7638bc708b98261ca58e84"))
    rows, provenance = source.read(request.folder)
    return instruction_suite(request.spec, [
        Item(id=str(r["key"]), asked=r["prompt"], prompt=user(r["prompt"]),
             gold=list(zip(r["instruction_id_list"], map(_given, r["kwargs"]), strict=True))) for r in rows],
        provenance, max_new_tokens=1280)


def held_out(question: str) -> bool:
    """Whether a question belongs to the tenth that is evaluated where a set has no split of its own: the first byte of its
    SHA-256 is below 26. Training on such a set must leave these out.

    >>> held_out("Is Lupus inherited?")
    False
    """
    return hashlib.sha256(question.encode()).digest()[0] < 26


def _medical(request: Request, source: Source, answer: str, suffix: str = "") -> Suite:
    request.no_part(), request.no_shots()
    rows, provenance = source.read(request.folder)
    items = [Item(id=str(i), asked=r["question"], gold=[r[answer]], prompt=user(r["question"] + suffix))
             for i, r in enumerate(rows) if held_out(r["question"])]
    if not items:
        raise UsageError(f"{source.title}: none of its {len(rows)} questions falls into the held-out tenth; more rows are needed")
    return reference_suite(request.spec, items, {**provenance, "part": "the held-out tenth"}, max_new_tokens=160)


def medquad(request: Request) -> Suite:
    """Medical question answering (MedQuAD): ROUGE-L over the tenth of the questions that :func:`held_out` names."""
    return _medical(request, Source(title="MedQuAD (short answers)", file="medquad_short/medquad_short.jsonl",
                                    columns=("question", "answer"), texts=("question", "answer"),
                                    home="https://github.com/abachaa/MedQuAD",
                                    hub=Hub(name="keivalya/MedQuad-MedicalQnADataset", split="train",
                                            row=lambda r: {"question": r["Question"], "answer": r["Answer"]})), "answer")


def meqsum(request: Request) -> Suite:
    """Summaries of consumers' health questions (MeQSum): ROUGE-L over the tenth that :func:`held_out` names; the last sentence of
    the prompt is ours."""
    return _medical(request, Source(title="MeQSum", file="meqsum/meqsum.jsonl", columns=("question", "summary"),
                                    texts=("question", "summary"), home="https://github.com/abachaa/MeQSum"), "summary",
                    "\n\nSummarise this as one short question.")


def medtext(request: Request) -> Suite:
    """MedText, the medical set of arXiv 2602.20162: ROUGE-L over the tenth that :func:`held_out` names."""
    return _medical(request, Source(title="MedText", file="medtext/medtext.jsonl", columns=("question", "answer"),
                                    texts=("question", "answer"), home="https://huggingface.co/datasets/BI55/MedText",
                                    hub=Hub(name="BI55/MedText", split="train",
                                            row=lambda r: {"question": r["Prompt"], "answer": r["Completion"]})), "answer")


BENCHMARKS: dict[str, Callable[[Request], Suite]] = {
    "gsm8k": gsm8k, "mmlu": mmlu, "agieval": agieval, "piqa": piqa, "ifeval": ifeval, "super_ni": super_ni,
    "medquad": medquad, "meqsum": meqsum, "medtext": medtext,
}
