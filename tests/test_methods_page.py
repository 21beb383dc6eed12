"""The page of methods: every method is there with its options, its neutral setting and a test that exists; its examples run."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from sasft.cli import main
from sasft.methods import METHODS, method, parse_method
from tests.sasft import tiny_chat
from tests.sasft.methods.test_registry import NEUTRAL

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def row(name: str) -> dict[str, str]:
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    columns = ("method", "source", "does", "options", "neutral", "cost", "ours", "test")
    return dict(zip(columns, cells, strict=True))


def test_it_names_the_methods_that_there_are_in_their_order() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described_as_the_code_has_it(name: str) -> None:
    said, kind = row(name), METHODS[name]
    assert said["options"] == ", ".join(f"`{f.name}={f.default}`" for f in fields(kind))
    arxiv = re.search(r"arXiv \d{4}\.\d{5}", kind.paper)
    assert said["source"] == (arxiv[0] if arxiv else "not verified (2026)" if kind.paper else "")
    if said["neutral"]:
        neutral = parse_method(name, said["neutral"].strip("`"))
        assert name not in NEUTRAL or neutral == method(name, **NEUTRAL[name])
    else:
        assert name not in NEUTRAL
    file, _, test = said["test"].strip("`").partition("::")
    assert f"\ndef {test}(" in (ROOT / "tests" / "sasft" / "methods" / file).read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tiny_chat.save_chatty(tmp_path / "model")
    for name in ("my_task", "self", "web"):
        lines = [{"prompt": f"What is {i} + {i}?", "response": f"{name} {i + i}"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    for line in re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1].splitlines():
        argv = shlex.split(line)
        assert argv[0] == "sasft"
        assert main([*argv[1:], "--model", "model", "--precision", "fp32", "--record_every", "0", "--steps", "2"]) == 0, capsys.readouterr().err
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    scope: dict = {}
    exec(compile(code.replace("steps=100", 'steps=2, model="model", precision="fp32", record_every=0'), "methods.md", "exec"), scope)
    assert scope["summary"]["method"]["name"] == "grads" and scope["summary"]["costs"]["backward_tokens"] > 0
