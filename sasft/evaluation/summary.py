"""Scores with their standard errors out of per-item records, what went wrong in answers counted beside them, and a table."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sasft.evaluation.intervals import is_share, mean, share_interval
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


def cluster_of(record: Record) -> str:
    """The cluster of an item, its id where it shares nothing with others."""
    return record.get("cluster") or f"item {record['id']}"


def summarise(records: Sequence[Record], metrics: Sequence[str], contaminated: Sequence[str] | None = None) -> dict[str, Any]:
    """What one suite came to.

    ``scores``: {metric: score, standard error, n}; ``low`` and ``high``, the 95 % interval, where it is a share of items
    (:func:`sasft.evaluation.intervals.share_interval`); and ``clusters``, how many independent ones the n items make, where items
    share passages or questions; ``groups``: the headline score of each part, and ``macro``, their plain mean, whose standard
    error is of these parts (not of others that might have been chosen); ``prompts_sha256`` over ids and prompt hashes in the
    order of ids: scores of different hashes are not of the same questions. Of written answers: how many are ``unfinished`` (the
    length cap cut them: a model that does not stop seems to have forgotten), ``empty``, or ``off_template``. Of items found in
    the training data: their number and ids, and the scores without them.
    """
    named = dict.fromkeys([*metrics, *(m for r in records for m in r["scores"])])
    present = [m for m in named if any(m in r["scores"] for r in records)]
    told = sorted((r["id"], r["prompt_sha256"]) for r in records)
    result: dict[str, Any] = {"n": len(records), "scores": _scores(records, present),
                              "prompts_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}
    if "finished" in records[0]:
        result["answers"] = {"unfinished": sum(not r["finished"] for r in records),
                             "empty": sum(not r["answer"] for r in records),
                             "off_template": sum(r["off_template"] for r in records), "tokens": sum(r["tokens"] for r in records)}
    if groups := sorted({r["group"] for r in records if "group" in r}):
        headline = [r for r in records if present[0] in r["scores"]]
        parts = {g: [r for r in headline if r.get("group") == g] for g in groups}
        result["groups"] = {g: _score(of_group, present[0]) for g, of_group in parts.items() if of_group}
        result["macro"] = _macro(list(result["groups"].values()))
    if contaminated is not None:
        found = set(contaminated)
        clean = [r for r in records if r["id"] not in found]
        without = _scores(clean, present) if clean else {}
        result["contaminated"] = {"n": len(found), "ids": sorted(found), "scores_without": without}
    return result


def _scores(records: Sequence[Record], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    having = {metric: [r for r in records if metric in r["scores"]] for metric in metrics}
    return {metric: _score(those, metric) for metric, those in having.items() if those}


def _score(records: Sequence[Record], metric: str) -> dict[str, Any]:
    clusters = [cluster_of(r) for r in records]
    pairs = [tuple(r["scores"][metric]) for r in records]
    value, error = mean(pairs, clusters)
    found = {"score": value, "stderr": None if math.isnan(error) else error, "n": len(records)}
    totals, weights = np.array(pairs, dtype=float).T
    if is_share(totals, weights):
        found["low"], found["high"] = share_interval(totals[None], clusters)
    return found | ({"clusters": len(set(clusters))} if any(r.get("cluster") for r in records) else {})


def _macro(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [group["stderr"] for group in groups]
    return {"score": sum(group["score"] for group in groups) / len(groups), "n": len(groups),
            "stderr": None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(groups)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: what every score hangs on, then one line a score; the hash of a suite's prompts (as far as a
    glance can compare it) and unfinished answers beside it."""
    identity, head = summary["identity"], ("suite", "metric", "score", "± s.e.", "95 % interval", "n", "prompts", "unfinished",
                                           "off template", "in training")
    rows = [head]
    for name, suite in summary["suites"].items():
        answers, seen = suite.get("answers"), suite.get("contaminated")
        notes = [suite["prompts_sha256"][:8], *(str(answers[what]) if answers else "" for what in ("unfinished", "off_template")),
                 str(seen["n"]) if seen else ""]
        for i, (metric, score) in enumerate(suite["scores"].items()):
            error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
            interval = f"[{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else ""
            rows.append((name if i == 0 else "", metric, f"{score['score']:.4f}", error, interval, str(score["n"]),
                         *(notes if i == 0 else [""] * len(notes))))
    kept = [c for c in range(len(head)) if any(row[c] for row in rows[1:])]
    widths = {c: max(len(row[c]) for row in rows) for c in kept}
    lines = ["  ".join(row[c].ljust(widths[c]) if c < 2 else row[c].rjust(widths[c]) for c in kept).rstrip() for row in rows]
    generation, packages = identity["generation"], identity["versions"]
    decoding = "greedy" if generation["temperature"] == 0 else f"T = {generation['temperature']:g}, seed {generation['seed']}"
    return "\n".join([
        f"weights {identity['weights_sha256'][:12]}, chat template {identity['chat_template_sha256'][:12]}, "
        f"{identity['precision']}, {decoding}",
        ", ".join(f"{package} {number}" for package, number in packages.items()), "", *lines])

