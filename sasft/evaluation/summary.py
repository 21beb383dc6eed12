"""Scores with their standard errors out of per-item records, what went wrong in answers counted beside them, and a table."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sasft.files import is_torn

Record = Mapping[str, Any]


def read_records(out: Path | str, suite: str) -> list[dict[str, Any]]:
    """The records of a suite in an evaluation's folder, in the order they were written; a torn last line is left out."""
    path = Path(out) / "items.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if is_torn(lines[-1]):
        lines.pop()
    records = (json.loads(line) for line in lines if line.strip())
    return [record for record in records if record["suite"] == suite]


def mean(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    r"""Score and standard error from every item's (total, weight).

    :math:`\hat\mu = \sum_i t_i / \sum_i w_i`; :math:`\mathrm{se}^2 = \frac{n}{n-1} \sum_i (t_i - \hat\mu w_i)^2 / (\sum_i
    w_i)^2`, which for weights of 1 is the sample variance over n. Items are independent, what is inside one need not be. NaN
    for a single item.

    >>> mean([(1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 1.0)])  # (½, √(⅓ / 4))
    (0.5, 0.28867513459481287)
    """
    weight, n = sum(w for _, w in scores), len(scores)
    value = sum(t for t, _ in scores) / weight
    if n < 2:
        return value, math.nan
    return value, math.sqrt(n / (n - 1) * sum((t - value * w) ** 2 for t, w in scores)) / weight


def summarise(records: Sequence[Record], metrics: Sequence[str], contaminated: Sequence[str] | None = None) -> dict[str, Any]:
    """What one suite came to.

    ``scores``: {metric: score, standard error, n}; ``groups``: the headline score of each part and its number of items, and
    ``macro``, their plain mean; ``prompts_sha256`` over ids and prompt hashes in the order of ids: scores of different hashes
    are not of the same questions. Of written answers: how many are ``unfinished`` (the length cap cut them: a model that does
    not stop seems to have forgotten), ``empty``, or ``off_template``. Of items found in the training data: their number and
    ids, and the scores without them.
    """
    named = [*metrics, *(m for r in records[:1] for m in r["scores"] if m not in metrics)]
    present = [m for m in named if any(m in r["scores"] for r in records)]
    told = sorted((r["id"], r["prompt_sha256"]) for r in records)
    result: dict[str, Any] = {"n": len(records), "scores": _scores(records, present),
                              "prompts_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}
    if "finished" in records[0]:
        result["answers"] = {"unfinished": sum(not r["finished"] for r in records),
                             "empty": sum(not r["answer"] for r in records),
                             "off_template": sum(r["off_template"] for r in records), "tokens": sum(r["tokens"] for r in records)}
    if groups := sorted({r["group"] for r in records if "group" in r}):
        headline = [(r.get("group"), r["scores"][present[0]]) for r in records if present[0] in r["scores"]]
        parts = {g: [score for group, score in headline if group == g] for g in groups}
        result["groups"] = {g: {"score": mean(scores)[0], "n": len(scores)} for g, scores in parts.items() if scores}
        result["macro"] = sum(g["score"] for g in result["groups"].values()) / len(result["groups"])
    if contaminated is not None:
        found = set(contaminated)
        clean = [r for r in records if r["id"] not in found]
        without = _scores(clean, present) if clean else {}
        result["contaminated"] = {"n": len(found), "ids": sorted(found), "scores_without": without}
    return result


def _scores(records: Sequence[Record], metrics: Sequence[str]) -> dict[str, dict[str, float | None]]:
    found = {}
    for metric in metrics:
        scores = [tuple(r["scores"][metric]) for r in records if metric in r["scores"]]
        value, error = mean(scores)
        found[metric] = {"score": value, "stderr": None if math.isnan(error) else error, "n": len(scores)}
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: what every score hangs on, then one line a score; unfinished answers beside written ones."""
    identity, head = summary["identity"], ("suite", "metric", "score", "± s.e.", "n", "unfinished", "off template", "in training")
    rows = [head]
    for name, suite in summary["suites"].items():
        answers, seen = suite.get("answers"), suite.get("contaminated")
        notes = [str(answers["unfinished"]) if answers else "", str(answers["off_template"]) if answers else "",
                 str(seen["n"]) if seen else ""]
        for i, (metric, score) in enumerate(suite["scores"].items()):
            error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
            rows.append((name if i == 0 else "", metric, f"{score['score']:.4f}", error, str(score["n"]),
                         *(notes if i == 0 else ("", "", ""))))
    kept = [c for c in range(len(head)) if c < 5 or any(row[c] for row in rows[1:])]
    widths = {c: max(len(row[c]) for row in rows) for c in kept}
    lines = ["  ".join(row[c].ljust(widths[c]) if c < 2 else row[c].rjust(widths[c]) for c in kept).rstrip() for row in rows]
    generation, packages = identity["generation"], identity["versions"]
    decoding = "greedy" if generation["temperature"] == 0 else f"T = {generation['temperature']:g}, seed {generation['seed']}"
    return "\n".join([
        f"weights {identity['weights_sha256'][:12]}, chat template {identity['chat_template_sha256'][:12]}, "
        f"{identity['precision']}, {decoding}",
        ", ".join(f"{package} {number}" for package, number in packages.items()), "", *lines])

