"""The page on how much to mix in: its figures are those of the tables beside the pictures, its example runs."""

import ast
import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "mixing.md").read_text(encoding="utf-8")


def table(name: str) -> list[dict[str, str]]:
    with (ROOT / "figures" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_dose_is_that_of_the_lab() -> None:
    kl = {row["lam"]: row for row in table("lab_dose") if row["quantity"] == "kl" and row["step"] == "70"}
    stated = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert [row[0] for row in stated] == list(kl)
    for lam, *numbers, share in stated:
        assert [float(n) for n in numbers] == [round(float(kl[lam][name]), 2) for name in ("value", "low", "high")]
        assert float(share) == pytest.approx(float(kl[lam]["value"]) / float(kl["0"]["value"]), abs=0.005)


def test_the_gain_at_which_they_are_compared() -> None:
    rows = [{"method": r["arm"], "gain": float(r["gain"]), "drop": float(r["drop"])}
            for r in table("lab_gain_drop") if r["metric"] == "kl"]
    ends = {r["method"]: r for r in rows}  # the last of each arm
    half, alone = ends["SA-SFT 0.5"], ends["task only"]
    assert f"λ = 0.5 ends at a gain of {half['gain']:.2f}, λ = 0 at {alone['gain']:.2f}" in TEXT
    text = " ".join(TEXT.split())
    saved = {r["arm"]: tuple(f"{float(r[name]):.2f}".replace("-", "−") for name in ("saved", "saved_low", "saved_high"))
             for r in table("lab_gain_drop") if r["metric"] == "kl" and r["saved"]}
    for lam, told in ((0.1, "at λ = 0.1"), (0.25, "at 0.25"), (0.5, "at 0.5"), (0.75, "at 0.75")):
        value, low, high = saved[f"SA-SFT {lam}"]
        assert f"{value} [{low}, {high}] {told}" in text
    real = {r["arm"]: float(r["kl_self_exact"]) for r in table("two_by_two_gain_drop")}
    told = (f"λ = 0.5 forgets {real['SA-SFT exact']:.3f} nats a token with the exact sampler, the task alone "
            f"{real['task only']:.3f}, and the paper's sampler {real['SA-SFT paper']:.3f}")
    assert told in text


def test_how_many_rows_are_needed() -> None:
    kl = {r["setting"]: f"{float(r['value']):.2f}" for r in table("lab_limits")
          if (r["varied"], r["quantity"], r["metric"]) == ("number of self-rows", "SA-SFT", "kl")}
    assert kl["100"] == kl["1000"]
    assert f"10 rows forget {kl['10']}, 30 rows {kl['30']}, 100 rows and 1000 rows {kl['100']}" in TEXT


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def evaluated(cell: str, right: int, kept: int) -> None:
        """What an evaluation leaves: of ten items each, so many right on the task and so many instructions followed."""
        folder = tmp_path / "sweeps/dose/cells" / cell / "evaluation"
        folder.mkdir(parents=True)
        records = [{"suite": suite, "id": str(i), "prompt_sha256": "p", "scores": {"score": [float(i < n), 1.0]}}
                   for suite, n in (("answers:test.jsonl", right), ("instructions", kept)) for i in range(10)]
        (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    evaluated("base", 2, 8)
    for k, lr in enumerate(("1e-5", "2e-5", "4e-5"), start=1):
        for j, lam in enumerate((0, 0.25, 0.5, 0.75)):
            for seed in range(2):
                evaluated(f"sft,lam={lam},lr={lr},seed={seed}", 2 + k, 8 - max(k - j, 0))
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(example, "docs/mixing.md", "exec"), {})
    assert (tmp_path / "dose.png").stat().st_size > 0
    drops = ast.literal_eval(capsys.readouterr().out)
    assert drops == {"λ = 0": pytest.approx(0.05), "λ = 0.25": 0, "λ = 0.5": 0, "λ = 0.75": 0}
