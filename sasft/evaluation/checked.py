"""Suites of written answers: instructions that rules check, and tasks with reference answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from sasft.errors import UsageError
from sasft.evaluation.instructions import check_instruction, follows, follows_loosely
from sasft.evaluation.scoring import exact_match, rouge_l
from sasft.evaluation.suites import Answered, Item, Score, Suite


def instruction_suite(name: str, items: Sequence[Item], source: Mapping[str, Any], max_new_tokens: int) -> Suite:
    """Items whose ``gold`` lists (kind, options) of instructions, each looked at before anything is generated.

    ``prompt_strict``: share of prompts of which every instruction is followed; ``instruction_strict``: share of instructions;
    ``..._loose``: also where an introduction, a last line or asterisks stand in the way.
    """
    for item in items:
        for kind, options in item.gold:
            try:
                check_instruction(kind, options)
            except UsageError as error:
                raise UsageError(f"{name}, item {item.id}: {error}") from None
    return Answered(name=name, items=items, source=source, max_new_tokens=max_new_tokens, check=_instruction_scores,
                    metrics=("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"))


def _instruction_scores(item: Item, answer: str) -> dict[str, float | Score]:
    scores: dict[str, float | Score] = {}
    for name, check in (("strict", follows), ("loose", follows_loosely)):
        kept = [check(kind, options, answer) for kind, options in item.gold]
        scores |= {f"prompt_{name}": float(all(kept)), f"instruction_{name}": (float(sum(kept)), float(len(kept)))}
    return scores


def reference_suite(name: str, items: Sequence[Item], source: Mapping[str, Any], max_new_tokens: int) -> Suite:
    """Items whose ``gold`` lists reference answers: ROUGE-L F1 and exact match, the best over the references."""
    return Answered(name=name, items=items, source=source, max_new_tokens=max_new_tokens, check=_overlap_scores,
                    metrics=("rouge_l", "exact_match"))


def _overlap_scores(item: Item, answer: str) -> dict[str, float]:
    return {"rouge_l": rouge_l(answer, item.gold), "exact_match": exact_match(answer, item.gold)}
