"""The ledger of claims: what was predicted, what was found, and what follows.

    studies ledger

Reads the results beside the figures (``figures/*.json``) and the registered predictions (``studies.claims``); runs nothing. Every
effect is judged again by its registered prediction, and a file that disagrees, or that was made for another prediction, is an error.
Writes ``ledger.csv`` and ``ledger.md`` to ``--figures``.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from studies.claims import CLAIMS, Claim, Prediction, registered
from studies.stats import Effect, Verdict, config_hash, verdict

UNTESTED = "not tested yet"
OUTCOMES = ("supported", "contradicted", "inconclusive", UNTESTED)


class LedgerError(ValueError):
    """Results that do not fit the registry; the message names the file and the row. (Importing sasft's own error takes seconds.)"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a study found about one prediction."""

    effect: Effect
    n: int
    conditions: Mapping[str, Any]
    verdict: Verdict
    config: str
    figure: str


@dataclass(frozen=True)
class Entry:
    """A registered prediction, with its result if there is one."""

    prediction: Prediction
    result: Result | None

    @property
    def outcome(self) -> str:
        """The verdict, or that there is none yet."""
        return self.result.verdict if self.result else UNTESTED


def main(argv: Sequence[str] | None = None) -> int:
    """Read the results, write and print the ledger; returns the exit code."""
    parser = argparse.ArgumentParser(prog="studies ledger", description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=Path, default=Path("figures"),
                        help="where the studies wrote their results, and the ledger goes (default: figures)")
    folder = parser.parse_args(argv).figures
    try:
        entries = read(folder, registered())
        texts = {folder / "ledger.csv": table(entries), folder / "ledger.md": page(entries)}
        for path, text in texts.items():
            _write(path, text)
    except (LedgerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(entries), *texts, sep="\n")
    return 0


# --- reading --------------------------------------------------------------------------------------------------


def read(folder: Path, predictions: Mapping[str, Prediction]) -> list[Entry]:
    """An entry for every prediction, claim by claim, with the results found in ``folder``."""
    if not folder.is_dir():
        raise LedgerError(f"the figures' folder {folder} does not exist; name the one that the studies wrote to")
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        for place, prediction, result in _results(path, predictions):
            if prediction.id in found:
                raise LedgerError(f"{place}: {found[prediction.id].figure} has a result of this prediction, too; keep one of the two")
            found[prediction.id] = result
    return [Entry(p, found.get(p.id)) for claim in CLAIMS for p in predictions.values() if p.claim == claim]


def _results(path: Path, predictions: Mapping[str, Prediction]) -> Iterator[tuple[str, Prediction, Result]]:
    """(where it stands, prediction, result) of each row about a claim; the rest are notes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [(k, row) for k, row in enumerate(content["verdicts"], 1) if row["claim"] != "none"]
        config = config_hash(content["provenance"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"{path} is not what studies.figures.save writes, verdicts and their provenance ({error!r}); move it "
                          "elsewhere, or run the study that drew it again") from None
    again = f"run {_command(path, predictions)} again"
    if rows and ("config_sha256" not in content or not all("prediction" in row for _, row in rows)):
        raise LedgerError(f"{path} is in an older format, without the configuration's hash and the ids of predictions; {again}")
    if rows and content["config_sha256"] != config:
        raise LedgerError(f"{path}: config_sha256 is {content['config_sha256']!r} there, and its provenance gives {config!r}; {again}")
    for k, row in rows:
        place = f"{path}, row {k} ({row['prediction']})"
        if row["prediction"] not in predictions:
            raise LedgerError(f"{place}: no study has registered this prediction; register it (studies/claims.py), or {again}")
        prediction = predictions[row["prediction"]]
        yield place, prediction, _judged(row, prediction, config, f"{path.stem}.png", place)


def _judged(row: Mapping[str, Any], prediction: Prediction, config: str, figure: str, place: str) -> Result:
    """The result in a row, which must be what the rule makes of its effect and the registered prediction."""
    row = {**row, **{name: nan for name in ("value", "low", "high") if name in row and row[name] is None}}  # JSON has no such numbers
    for name in ("value", "low", "high", "level"):
        if not isinstance(row.get(name), (int, float)):
            raise LedgerError(f"{place}: {name} must be a number, got {row.get(name)!r}")
    for name, kind, needed in (("n", int, "a whole number"), ("conditions", dict, "an object")):
        if not isinstance(row.get(name), kind):
            raise LedgerError(f"{place}: {name} must be {needed}, got {row.get(name)!r}")
    effect = Effect(row["value"], row["low"], row["high"], row["level"])
    if effect.low > effect.high:
        raise LedgerError(f"{place}: low must not be above high, got {effect.low} and {effect.high}")
    try:
        ruled = verdict(prediction, effect, n=row["n"], **row["conditions"])
    except (ValueError, TypeError) as error:
        raise LedgerError(f"{place}: {error}") from None
    for name in ("claim", "statement", "predicted", "sesoi", "unit"):
        if row.get(name) != ruled[name]:
            raise LedgerError(f"{place}: {name} is {row.get(name)!r} there and {ruled[name]!r} in the registry; if the registry is "
                              f"right, run `studies {prediction.study}` again")
    if row.get("verdict") != ruled["verdict"]:
        raise LedgerError(f"{place}: verdict is {row.get('verdict')!r} there; by rule {_interval(effect)}, predicted "
                          f"{_expected(prediction)}, is {ruled['verdict']!r}; run `studies {prediction.study}` again")
    return Result(effect=effect, n=row["n"], conditions=row["conditions"], verdict=ruled["verdict"], config=config, figure=figure)


def _command(path: Path, predictions: Mapping[str, Prediction]) -> str:
    """The study that drew a figure, by the figure's name."""
    studies = {p.study for p in predictions.values()}
    return next((f"`studies {s}`" for s in sorted(studies) if path.stem.startswith(s)), "the study that drew it")


# --- writing --------------------------------------------------------------------------------------------------


def table(entries: Sequence[Entry]) -> str:
    """The ledger as CSV, a row for every prediction; numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("claim", "prediction", "statement", "predicted", "sesoi", "unit", "verdict", "value", "low", "high", "level", "n",
                     "conditions", "config_sha256", "figure"))
    for e in entries:
        p, r = e.prediction, e.result
        found = (r.effect.value, r.effect.low, r.effect.high, r.effect.level, r.n, _words(r.conditions), r.config,
                 r.figure) if r else ("",) * 8
        writer.writerow((p.claim, p.id, p.statement, p.predicted, p.sesoi, p.unit, e.outcome, *found))
    return text.getvalue()


def page(entries: Sequence[Entry]) -> str:
    """The ledger as Markdown: claims and their counts, then the predictions of each."""
    counts = {claim.id: Counter(e.outcome for e in _about(claim, entries)) for claim in CLAIMS.values()}
    lines = [
        "# Ledger of claims", "",
        "Written by `studies ledger` from the results in this folder and the registered predictions; not to be edited by hand. A "
        "prediction is *supported* if the whole 95 % interval lies where it was expected, *contradicted* if none of it does, else "
        "*inconclusive*. n: what the interval resamples, seeds unless it says otherwise.", "",
        f"| claim | | {' | '.join(OUTCOMES)} |", f"|---|---|{'--:|' * len(OUTCOMES)}",
        *(f"| {c.id} | {c.statement} | {' | '.join(str(counts[c.id][o]) for o in OUTCOMES)} |" for c in CLAIMS.values()),
    ]
    for claim in CLAIMS.values():
        about = _about(claim, entries)
        lines += ["", f"## {claim.id}: {claim.statement}", "", f"Would be refuted by: {claim.refuted_by}.", "", f"{_counted(about)}."]
        tested = [e for e in about if e.result]
        if tested:
            lines += ["", "| prediction | expected | effect [95 % interval] | unit | n | verdict | configuration | figure |",
                      "|---|---|---|---|---|---|---|---|", *map(_line, tested)]
        untested = [f"`{e.prediction.id}`" for e in about if not e.result]
        if untested:
            lines += ["", f"Not tested yet: {', '.join(untested)}."]
    return "\n".join(lines) + "\n"


def summary(entries: Sequence[Entry]) -> str:
    """The ledger for a terminal: a line for every claim, and one for each of its results."""
    lines = []
    for claim in CLAIMS.values():
        about = _about(claim, entries)
        lines.append(f"{claim.id:<4}{claim.statement}\n    {_counted(about)}")
        lines += [f"      {e.outcome:<13}{_interval(e.result.effect):<28} {e.prediction.unit:<11} {e.prediction.statement}"
                  for e in about if e.result]
    return "\n".join(lines) + "\n"


def _about(claim: Claim, entries: Sequence[Entry]) -> list[Entry]:
    return [e for e in entries if e.prediction.claim == claim.id]


def _counted(entries: Sequence[Entry]) -> str:
    counts = Counter(e.outcome for e in entries)
    return ", ".join(f"{counts[o]} {o}" for o in OUTCOMES) if entries else "No study has registered a prediction yet"


def _line(entry: Entry) -> str:
    p, r = entry.prediction, entry.result
    n = f"{r.n} ({_words(r.conditions)})" if r.conditions else str(r.n)
    cells = (p.statement, _expected(p), _interval(r.effect), p.unit, n, r.verdict, f"`{r.config[:12]}`",
             f"[{Path(r.figure).stem}]({r.figure})")
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _expected(prediction: Prediction) -> str:
    return f"> {prediction.sesoi:g}" if prediction.predicted == "+" else f"< {0 - prediction.sesoi:g}"


def _interval(effect: Effect) -> str:
    return f"{effect.value:.3g} [{effect.low:.3g}, {effect.high:.3g}]"


def _words(conditions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def _write(path: Path, text: str) -> None:
    """Write by way of a temporary file: ``path`` holds its old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LedgerError(f"writing {path} failed: {error.strerror}; what was there before is unchanged") from error


if __name__ == "__main__":
    sys.exit(main())
