"""The README's examples, run as they stand on a model that takes no time."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from sasft.cli import COMMANDS, main
from sasft.data_quality import QualityLimits
from sasft.options import parse
from sasft.pipeline import RunSettings, parts_of
from tests.sasft import tiny_chat

README = Path(__file__).parents[1] / "README.md"
EMBEDDED = "smollm2-135m-instruct"
NO_LIMITS = [f"{limit.name}=none" for limit in dataclasses.fields(QualityLimits)]  # the tiny model babbles


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the model and the task file that the examples name."""
    tiny_chat.save_chatty(tmp_path / "model")
    lines = [{"prompt": f"What is {i} + {i}?", "response": f"{i + i}"} for i in range(24)]
    (tmp_path / "my_task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code: str) -> dict:
    scope: dict = {}
    exec(compile(code.replace(EMBEDDED, "model"), str(README), "exec"), scope)
    return scope


def test_a_plain_loop(here: Path, capsys: pytest.CaptureFixture) -> None:
    code = next(b for b in blocks("python") if "drift.record(" in b)
    run_python(code)
    assert (here / "runs" / "plain" / "drift" / "meta.json").exists()
    steps = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == sorted(steps) and steps[0] == 0 and len(steps) > 2


def test_somebodys_trainer(here: Path) -> None:
    loop = next(b for b in blocks("python") if "drift.record(" in b)
    callback = next(b for b in blocks("python") if "DriftCallback" in b)
    scope = run_python(loop + callback)
    assert any("kl/base_model/held-out" in entry for entry in scope["trainer"].state.log_history)


def test_gradients_of_sources(here: Path, capsys: pytest.CaptureFixture) -> None:
    loop = next(b for b in blocks("python") if "drift.record(" in b)
    sources = next(b for b in blocks("python") if "SourceGradients" in b)
    check = re.search(r"`(print\(drift\.check\(.*?\)\))`", README.read_text(encoding="utf-8"))[1]
    scope = run_python(f"{loop}\n{sources}\n{check}")
    assert scope["sources"].coverage["covered"] == 1.0
    assert "DIFFERS" not in capsys.readouterr().out


def test_the_commands_and_python(here: Path, capsys: pytest.CaptureFixture) -> None:
    talk = ["n", "24", "max_new_tokens", "10", "batch_size", "8"]
    small = {"talk": [*options("", *talk), "--limits", *NO_LIMITS, "--precision", "fp32"], "mix": ["--steps", "2", "--rows_per_step", "4"],
             "train": ["--precision", "fp32", "--record_every", "1"], "evaluate": ["--limit", "4", "--max_new_tokens", "4"],
             "run": [*options("talk_", *talk), "--talk_limits", *NO_LIMITS, "--mix_steps", "2", "--mix_rows_per_step", "4", "--precision",
                     "fp32", *options("evaluate_", "suites", "instructions", "limit", "4", "max_new_tokens", "4")]}
    ran = []
    for line in "\n".join(b for b in blocks("bash") if "sasft " in b).replace("\\\n", " ").splitlines():
        _, *argv = shlex.split(line, comments=True) or [""]
        if argv:
            ran.append(argv[0])
            model = [] if argv[0] == "restyle" or "--model" in argv else ["--model", "model"]
            steps = ["--steps", "2"] if argv[0] == "train" and "--mix" not in argv else []
            assert main([*argv, *small.get(argv[0], []), *model, *steps]) == 0, capsys.readouterr().err
    assert set(ran) == set(COMMANDS) - {"sweep"}
    code = next(b for b in blocks("python") if "TrainSettings" in b)
    code = re.sub(r"steps=\d+", 'steps=2, model="model", precision="fp32"', code)
    scope = run_python(code)
    assert scope["summary"]["mix"]["lambda_rows"] == pytest.approx(0.5)


def test_the_yaml_file_is_one_of_a_run(here: Path) -> None:
    (here / "run.yaml").write_text(blocks("yaml")[0])
    settings, _ = parse(RunSettings, ["--config", "run.yaml", "--out", "runs/yaml"], prog="sasft run")
    parts = parts_of(settings)
    assert parts.talk.ablate == ["mathematics"] and parts.mix.by == "tokens" and parts.train.lora_rank == 16
    assert parts.train.lr == 2e-5 and parts.before.suites == "instructions,task:sums,text"


def options(prefix: str, *pairs: str) -> list[str]:
    return [f"--{prefix}{text}" if i % 2 == 0 else text for i, text in enumerate(pairs)]


def test_the_pictures_that_it_shows_are_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).exists(), path
