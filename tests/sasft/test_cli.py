"""The command line: what it does, and what it says when it can't."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import sasft.cli
from sasft.cli import COMMANDS, main
from sasft.data import read_rows
from sasft.data_quality import QualityLimits
from sasft.restyle import STYLES
from tests.sasft import tiny_chat

NO_LIMITS = [f"{limit.name}=none" for limit in fields(QualityLimits)]  # the tiny model babbles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat.save_chatty(tmp_path / "model")
    lines = [{"prompt": f"Tell me {i}", "response": f"It is {i}, and nothing else."} for i in range(12)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def sasft_command(folder: Path, command: str, **options) -> int:
    given = {"model": folder / "model", **options} if command != "restyle" else options
    return main([command, *(str(x) for k, v in given.items() for x in (f"--{k}", *(v if isinstance(v, list) else [v])))])


def talk(folder: Path, **options) -> int:
    return sasft_command(folder, "talk", **{"out": folder / "self.jsonl", "n": 12, "max_new_tokens": 12, "batch_size": 4,
                                            "precision": "fp32", "limits": NO_LIMITS, **options})


def test_every_command_after_the_other(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(folder) == 0
    assert f"self-dialogues to train on: {folder / 'self.jsonl'}" in capsys.readouterr().out
    sources = [f"task={folder / 'task.jsonl'}", f"self={folder / 'self.jsonl'}"]
    assert sasft_command(folder, "mix", sources=sources, steps=2, rows_per_step=4, hold_out=3, out=folder / "mix") == 0
    mixed = capsys.readouterr().out
    assert f"`sasft train --mix {folder / 'mix'}`" in mixed and "task    0.500  0.500" in mixed
    assert sasft_command(folder, "train", mix=folder / "mix", out=folder / "run", record_every=1, precision="fp32") == 0
    said = capsys.readouterr()
    assert f"run: {folder / 'run'} (the model: {folder / 'run'}/model)" in said.out and "task    0.500  0.500" in said.out
    assert "kl/base_model/self" in said.out and "held out" in said.err
    assert re.search(r"the method sft has cost beyond SFT: \d+ self data tokens\n", said.out)
    assert main(["evaluate", "--model", f"{folder}/run/model", "--suites", f"rows:{folder}/self.jsonl", "--out", f"{folder}/scores"]) == 0
    assert "nll/model" in capsys.readouterr().out
    assert sasft_command(folder, "show", file=folder / "mix", n=1) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 2 and "--- self self-0-" in shown and "--- task task-" in shown and "⟦It is " in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert sasft_command(folder, "show", file=folder / "task.jsonl", n=2) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 2 and "\x1b[1;32m" in shown and "in the loss: bright" in shown
    assert sasft_command(folder, "restyle", file=folder / "task.jsonl", style="capitals", out=folder / "caps.jsonl") == 0
    assert read_rows(folder / "caps.jsonl")[3].response == "IT IS 3, AND NOTHING ELSE."


def test_a_yaml_file_gives_what_the_command_line_leaves_open(folder: Path) -> None:
    (folder / "c.yaml").write_text(f"model: {folder / 'model'}\nn: 4\nmax_new_tokens: 8\nprecision: fp32\ntop_p: 8e-1\n"
                                   f"limits: [{', '.join(NO_LIMITS)}]\n")
    assert main(["talk", "--config", str(folder / "c.yaml"), "--out", str(folder / "s.jsonl"), "--n", "3"]) == 0
    rows = read_rows(folder / "s.jsonl")
    assert len(rows) == 3 and rows[0].meta["sampler"] == {"temperature": 0.7, "top_p": 0.8, "max_new_tokens": 8}


def test_yaml_may_nest_the_parts_of_a_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "run.yaml").write_text(
        f"task: {folder / 'task.jsonl'}\nmodel: {folder / 'model'}\nlam: 0\nmix: {{steps: 2, rows_per_step: 2, hold_out: 2}}\n"
        "train: {lr: 1e-3, record_every: 0, packing: true, save_every: 0}\nevaluate: {suites: text, limit: 2}\nprecision: fp32\n")
    assert main(["run", "--config", str(folder / "run.yaml"), "--out", str(folder / "run"), "--mix_steps", "3"]) == 0
    config = json.loads((folder / "run" / "train" / "config.json").read_text())["identity"]["settings"]
    assert config["lr"] == 1e-3 and config["packing"] is True
    assert json.loads((folder / "run" / "mix" / "mix.json").read_text())["steps"] == 3
    assert "item by item" in capsys.readouterr().out


def test_help_lists_the_commands_and_their_options(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        said = capsys.readouterr().out
        for option in fields(command.settings):
            assert f"--{option.name}" in said
            assert "".join(option.metadata["help"].split())[:40] in "".join(said.split())
        assert f"sasft {name} --" in said.split("examples:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_options_that_it_has(name: str) -> None:
    for line in COMMANDS[name].examples.splitlines():
        options = {word.lstrip("-") for word in line.split() if word.startswith("--")}
        assert options <= {option.name for option in fields(COMMANDS[name].settings)} | {"config", "dry_run"}, line


@pytest.mark.parametrize("argv, message", [
    ([], "usage: sasft COMMAND"),
    (["fly"], "unknown command 'fly'"),
    (["talk"], "out is missing: name a JSONL file"),
    (["show"], "--file is missing"),
    (["train"], "task is missing"),
    (["train", "--mix", "m", "--lam", "0.3", "--out", "o"], "lam is 0.3, but the mix m has settled that; leave out one of the two"),
    (["train", "--mix", "{tmp}", "--out", "{tmp}/o"], "holds no mix (no mix.json); write one with `sasft mix`"),
    (["train", "--task", "t", "--lam", "0", "--out", "o", "--method", "l2sp"], "there is no method 'l2sp'. Did you mean l2-sp?"),
    (["train", "--task", "t", "--lam", "0", "--out", "o", "--too_long", "cut"], "invalid choice: 'cut' (choose from"),
    (["mix"], "sources are missing: name at least one, as --sources task=my_task.jsonl self=self.jsonl"),
    (["mix", "--sources", "a.jsonl", "--shares", "1", "2", "--out", "o"], "shares must be one number a source: got 2 for 1"),
    (["evaluate"], "out is missing: name a folder for the results"),
    (["run"], "task is missing: name a file of task rows"),
    (["run", "--n", "5"], "sasft run has no option --n; did you mean talk_n?"),
    (["show", "--file", "{tmp}/t.jsonl", "--n", "0"], "n must be at least 1, got 0"),
    (["train", "--task", "t", "--out", "o", "--lam", "1.5"], "lam (the share of self rows) must lie in [0, 1), got 1.5"),
    (["train", "--task", "t", "--out", "o"], "lam is 0.5, but self_data names no file"),
    (["train", "--task", "none.jsonl", "--lam", "0", "--out", "{tmp}/o"], "none.jsonl"),
    (["train", "--temperature", "1"], "sasft train has no option --temperature; it is an option of sasft talk"),
    (["train", "--record_evry", "1"], "sasft train has no option --record_evry; did you mean record_every?"),
    (["talk", "self.jsonl"], "sasft talk takes options by name, as --out ..., got 'self.jsonl' without one"),
    (["talk", "--out", "{tmp}/s.jsonl", "--model", "smollm2"], "smollm2-135m-instruct"),
    (["talk", "--out", "{tmp}/s.jsonl", "--temperature", "0"], "temperature must be > 0"),
    (["talk", "--out", "{tmp}/s.jsonl", "--n", "many"], "--n: invalid int value: 'many'"),
    (["talk", "--out", "{tmp}/s.jsonl", "--sampler", "exact", "--top_p", "0.9"],
     "the sampler exact has a temperature and a top_p of its own, but top_p 0.9 is asked for as well"),
    (["talk", "--config"], "--config: expected one argument"),
    (["talk", "--config", "{tmp}/none.yaml"], "none.yaml can't be read"),
    (["talk", "--config", "{tmp}/odd.yaml"], "unknown settings: fun; there are out, n"),
    (["talk", "--config", "{tmp}/empty.yaml"], "gives n no value"),
    (["restyle", "--file", "{tmp}/t.jsonl", "--style", "baroque", "--out", "{tmp}/r.jsonl"], "telegraphic"),
    (["restyle", "--file", "{tmp}/t.jsonl", "--style", "capitals", "--out", "{tmp}/t.jsonl"], "exists already"),
])
def test_bad_input_is_named_without_a_traceback(tmp_path: Path, argv, message: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "odd.yaml").write_text("fun: 3\n")
    (tmp_path / "empty.yaml").write_text("n:\n")
    (tmp_path / "t.jsonl").write_text('{"prompt": "Hi", "response": "Hello there."}\n')
    assert main([a.replace("{tmp}", str(tmp_path)) for a in argv]) == 2
    assert message in capsys.readouterr().err


def test_a_restyle_that_fails_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "Hi", "response": "Hello there."}\n')
    out = tmp_path / "r.jsonl"
    assert main(["restyle", "--file", str(tmp_path / "t.jsonl"), "--style", "baroque", "--out", str(out)]) == 2
    assert not out.exists()


def test_an_answer_that_cannot_be_restyled_is_named_with_its_row(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    rows = [{"prompt": "Hi", "response": "Yo"}, {"prompt": "Hi", "response": "", "response_ids": []}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["restyle", "--file", str(tmp_path / "t.jsonl"), "--style", "capitals", "--out", str(tmp_path / "r.jsonl")]
    assert main(argv) == 2
    assert "t.jsonl, row t-2: text is empty" in capsys.readouterr().err
    monkeypatch.setitem(STYLES, "capitals", replace(STYLES["capitals"], check=lambda original, restyled: ["lost negation 'not'"]))
    assert main(argv) == 2
    assert "t.jsonl, row t-1: style 'capitals' would change what the text says: lost negation 'not'" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def test_ctrl_c_says_that_the_command_goes_on(folder: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sasft.cli, "talk", stop)
    assert talk(folder) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_a_full_disk_is_an_error_in_one_line(folder: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(sasft.cli, "train", full)
    assert sasft_command(folder, "train", task="t", lam=0, out=folder / "o") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'model.safetensors'\n"
