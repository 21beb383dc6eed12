"""The page of drift's public names: its examples run, every name is there, and its signatures are the code's."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import drift

PAGE = Path(__file__).parents[1] / "docs" / "drift.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert "nats/token" in capsys.readouterr().out


def test_every_public_name_is_there() -> None:
    for name in drift.__all__:
        assert re.search(rf"\b{name}\b", TEXT), name
    for module in ("adapters", "alignment", "decompose", "fisher", "lowrank", "names", "schedules"):
        for name, value in vars(getattr(drift, module)).items():
            mine = inspect.isfunction(value) and value.__module__ == f"drift.{module}"
            assert not mine or name.startswith("_") or re.search(rf"\b{name}\b", TEXT), f"{module}.{name}"


def _stated() -> list[tuple[str, str]]:
    """(name, parameters) of all signatures on the page; in a module's section names are that module's."""
    found = []
    for section in re.split(r"^##+ ", TEXT, flags=re.MULTILINE)[1:]:
        module = re.match(r"`drift\.(\w+)`", section)
        for span in re.findall(r"`([\w.]+\([\w, *\n]*\))`", re.sub(r"```.*?```", "", section, flags=re.DOTALL)):
            name, parameters = span[:-1].split("(", 1)
            if name.startswith("drift."):
                found.append((name, parameters))
            elif module and hasattr(getattr(drift, module[1]), name):
                found.append((f"drift.{module[1]}.{name}", parameters))
    return found


def test_it_states_the_signatures_of_the_most_important_names() -> None:
    assert len(_stated()) > 40
    assert {"drift.record", "drift.fisher.diagonal", "drift.lowrank.norm"} <= {name for name, _ in _stated()}


@pytest.mark.parametrize(("name", "parameters"), _stated())
def test_signatures_are_those_of_the_code(name: str, parameters: str) -> None:
    if not parameters.strip():
        pytest.skip("named without its parameters")
    path = name.removeprefix("drift.").split(".")
    target = drift
    for part in path:
        target = getattr(target, part) if hasattr(target, part) else importlib.import_module(f"drift.{part}")
    real = [p.name for p in inspect.signature(target).parameters.values() if p.name != "self"]
    assert [p.strip() for p in parameters.split(",") if p.strip() != "*"] == real
