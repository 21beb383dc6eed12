"""The page on evaluation: its example runs, and its suites and commands are those that there are."""

import dataclasses
import re
from pathlib import Path

import pytest

from sasft.data import read_rows
from sasft.evaluation import SUITES, EvaluateSettings, MeasureSettings
from sasft.evaluation.run import make_suite
from tests.sasft import tiny_chat
from tests.sasft.evaluation import small_sets

TEXT = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    small_sets.write(tmp_path / "sets")
    names = ("base", "sft, seed 0", "sft, seed 1", "sa-sft")
    models = {name: tiny_chat.chatty(seed) for seed, name in enumerate(names)}
    _, block = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block.replace("limit=200", "limit=2, max_new_tokens=3"), "evaluation.md", "exec"),
         {"models": models, "tokenizer": tiny_chat.tokenizer()})
    assert "MMLU " in capsys.readouterr().out and (tmp_path / "gain_drop.png").stat().st_size > 1000


def test_rows_to_train_on_are_asked_as_they_are_measured_and_none_of_them_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_sets.write(tmp_path / "sets")
    block, _ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block.replace("task024_cosmosqa_answer_generation", "task007_on_the_quay"), "evaluation.md", "exec"), {})
    measured = {name: make_suite(name, tiny_chat.chat(), MeasureSettings(data="sets")).items for name in ("super_ni:task007", "medquad")}
    trained = {row.response: row.prompt for row in read_rows("super_ni.jsonl")}
    assert trained["Sad."] == next(item.prompt for item in measured["super_ni:task007"] if item.gold == ["Sad."])
    asked = {row.prompt[0]["content"] for row in read_rows("medquad.jsonl")}
    assert len(asked) + len(measured["medquad"]) == len(small_sets.MEDICAL) and not asked & {item.asked for item in measured["medquad"]}


def test_every_suite_is_on_the_page() -> None:
    named = set(re.findall(r"`(\w+)", TEXT[TEXT.index("| suite |") : TEXT.index("Everything goes")]))
    assert SUITES.keys() <= named


def test_the_commands_options_are_there() -> None:
    options = set(re.findall(r"--(\w+)", TEXT))
    assert options and options <= {"task"} | {f.name for f in dataclasses.fields(EvaluateSettings)}
