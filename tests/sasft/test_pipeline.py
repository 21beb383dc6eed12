"""The whole run: its parts get their options, go on where they were stopped, and end in the tables."""

import csv
import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

import sasft.pipeline
from sasft.data import read_rows
from sasft.data_quality import QualityLimits
from sasft.dryrun import of_run
from sasft.errors import UsageError
from sasft.evaluation import curve, figure, forgetting, gain_drop
from sasft.evaluation.sources import FOLDER_VARIABLE
from sasft.mixture import read_mixture
from sasft.pipeline import RunSettings, forgetting_table, gain_drop_table, parts_of, recorded_table, run
from tests.sasft import tiny_chat

NO_LIMITS = [f"{limit.name}=none" for limit in fields(QualityLimits)]  # the tiny model babbles
NO_TALK = {"talk_n": 500, "talk_max_new_tokens": 128, "talk_max_user_tokens": 64, "talk_batch_size": 64, "talk_limits": []}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_chat.save_chatty(folder / "model")
    lines = [{"prompt": f"What is {i} + {i}?", "response": f"It is {i + i}."} for i in range(24)]
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def given(files: Path) -> dict:
    return {"task": str(files / "task.jsonl"), "model": str(files / "model"), "precision": "fp32", "seed": 3,
            "talk_n": 16, "talk_max_new_tokens": 8, "talk_max_user_tokens": 30, "talk_batch_size": 8, "talk_limits": NO_LIMITS,
            "mix_steps": 3, "mix_rows_per_step": 4, "mix_hold_out": 3, "train_lr": 1e-2, "train_record_every": 0,
            "evaluate_suites": "instructions", "evaluate_limit": 4, "evaluate_max_new_tokens": 6}


@pytest.fixture
def settings(given, tmp_path: Path):
    return lambda **kwargs: RunSettings(**{**given, "out": str(tmp_path / "run"), **kwargs})


def quiet(text: str) -> None:
    """Says nothing."""


def test_one_command_from_a_task_to_the_tables(settings, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    report, out = run(settings(train_record_every=3), said.append), tmp_path / "run"
    assert len(read_rows(out / "self.jsonl")) == 16 and report["talk"]["quality"]["rows"] == 16
    assert report["mix"]["rows"] == {"task": 6, "self": 6} and report["mix"]["epochs"]["task"] == 6 / 21
    assert report["recorded"]["kl/base_model/self"] > 0 and report["method"] == {"name": "sft"}
    found = {f["suite"]: f for f in report["forgetting"]}
    gain, own = f"answers:{out}/mix/held_out/task.jsonl", f"rows:{out}/mix/held_out/self.jsonl"
    assert list(found) == [gain, "instructions", own] and found[own]["n"] == 3
    assert found[own]["change"] == forgetting(out / "before", out / "after", own).change != 0
    assert "kl/base_model" in json.loads((out / "after" / "summary.json").read_text())["suites"][own]["scores"]
    table = list(csv.DictReader((out / "gain_drop.csv").open()))
    assert [(row["kind"], row["suite"]) for row in table] == [("gain", gain), ("drop", "instructions"), ("mean drop", "")]
    assert (out / "gain_drop.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "item by item" in "".join(said) and "1→0" in "".join(said)

    monkeypatch.setattr(sys.modules["sasft.train"], "load_model", None)  # nothing is trained any more
    again = run(settings(train_record_every=3), quiet)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(report))
    with pytest.raises(UsageError, match=r"run holds another run \(mix_steps is 3, now 4"):
        run(settings(train_record_every=3, mix_steps=4), quiet)


def test_training_that_was_refused_is_set_right_in_the_same_folder(settings, tmp_path: Path) -> None:
    """What was written and mixed before stays."""
    with pytest.raises(UsageError, match="layers"):
        run(settings(evaluate_suites="", train_method="freeze", train_method_options="layers=99"), quiet)
    written = (tmp_path / "run" / "self.jsonl").read_bytes()
    report = run(settings(evaluate_suites="", train_method="freeze", train_method_options="layers=0"), quiet)
    assert report["method"]["name"] == "freeze" and (tmp_path / "run" / "self.jsonl").read_bytes() == written
    with pytest.raises(UsageError, match="train holds another run .settings.method_options is 'layers=0', now 'layers=1'"):
        run(settings(evaluate_suites="", train_method="freeze", train_method_options="layers=1"), quiet)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory: pytest.TempPathFactory):
    return run(RunSettings(**given, out=str(tmp_path_factory.mktemp("whole"))), quiet)


@pytest.mark.parametrize("part", ["talk", "make_mixture", "train", "evaluate"])
def test_a_run_goes_on_after_the_part_in_which_it_was_stopped(settings, whole, part: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sasft.pipeline, part, stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings(), quiet)
    stopped = run(settings(), quiet)
    assert stopped["mix"] == whole["mix"]
    assert [f["after"] for f in stopped["forgetting"]] == [f["after"] for f in whole["forgetting"]]


def test_plain_fine_tuning_writes_no_dialogues(settings, tmp_path: Path) -> None:
    report = run(settings(lam=0.0, **NO_TALK), quiet)
    assert set(report["mix"]["rows"]) == {"task"} and not (tmp_path / "run" / "self.jsonl").exists()
    assert [f["suite"].partition(":")[0] for f in report["forgetting"]] == ["answers", "instructions"]


def test_rows_of_ones_own_are_mixed_and_measured_on(settings, files: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"Go on {i}", "response": "well"}) + "\n" for i in range(12)))
    report = run(settings(self_data=str(own), task_test=str(files / "task.jsonl"), **NO_TALK), quiet)
    assert report["forgetting"][0]["suite"] == f"answers:{files / 'task.jsonl'}" and report["forgetting"][0]["n"] == 4
    assert {row.response for row in read_mixture(tmp_path / "run" / "mix").rows["self"]} == {"well"}


def test_bad_dialogues_stop_the_run_before_training(settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not fit for training"):
        run(settings(talk_limits=["nats_per_token=0.1"]), quiet)
    assert not (tmp_path / "run" / "mix").exists()
    run(settings(evaluate_suites=""), quiet)  # other limits are no other run
    assert (tmp_path / "run" / "train" / "summary.json").exists() and not (tmp_path / "run" / "after").exists()


def test_options_reach_their_parts(settings) -> None:
    given = settings(lam=0.25, talk_topics=None, talk_filters=["finished"], mix_by="loss", train_method="l2-sp",
                     train_method_options="weight=2", train_lora_rank=4, evaluate_temperature=0.5, evaluate_seed=9)
    parts = parts_of(given)
    assert parts.talk.max_new_tokens == 8 and parts.talk.seed == parts.mix.seed == parts.train.seed == 3
    assert parts.mix.sources[1] == f"self={given.out}/self.kept.jsonl"
    assert parts.mix.shares == [0.75, 0.25] and parts.mix.by == "loss"
    assert parts.train.mix == parts.mix.out and parts.train.chosen_method().describe() == {"name": "l2-sp", "weight": 2.0}
    assert (parts.before.temperature, parts.before.seed, parts.after.base) == (0.5, 9, given.model)
    assert replace(parts.after, model=given.model, out=parts.before.out, base=None) == parts.before
    after = parts_of(settings(model="org/name", revision="v1")).after
    assert (after.revision, after.base, after.base_revision) == (None, "org/name", "v1")


@pytest.mark.parametrize("unknown", [None, math.nan], ids=["as the report's file has it", "as the report has it"])
def test_tables_leave_open_what_is_not_known(unknown: float | None, tmp_path: Path) -> None:
    for name, score in (("b", 0.25), ("a", 0.5)):
        (tmp_path / name).mkdir()
        record = {"suite": "answers", "id": "0", "prompt_sha256": "", "scores": {"rouge_l": (score, 1.0)}}
        (tmp_path / name / "items.jsonl").write_text(json.dumps(record))
    found = asdict(forgetting(tmp_path / "b", tmp_path / "a", "answers"))  # one item, and no share
    rows = gain_drop(tmp_path / "b", {"sft": [tmp_path / "a"]}, "answers", ["answers"])
    assert math.isnan(found["low"]) and all(math.isnan(row["value_high"]) for row in rows)
    assert figure(curve(rows)).axes
    found |= {"low": unknown, "high": unknown}
    rows = [{**row, "value_low": unknown, "value_high": unknown} for row in rows]
    assert forgetting_table([found]).splitlines()[-1].split() == ["answers", "rouge_l", "1", "0.2500", "0.5000", "+0.2500"]
    assert gain_drop_table(rows).splitlines()[-1].split() == ["mean", "drop", "-0.2500"]
    assert "ppl" in recorded_table({"ppl": unknown, "kl": 0.5}) and "0.5" in recorded_table({"ppl": unknown, "kl": 0.5})


@pytest.mark.parametrize("kwargs, message", [
    ({"task": ""}, "task is missing"),
    ({"out": ""}, "out is missing"),
    ({"lam": 1.0}, r"lam \(the share of self-dialogues\) must lie in \[0, 1\), got 1.0"),
    ({"lam": 0.0}, "talk_n is for self-dialogues that are to be written, but lam is 0"),
    ({"self_data": "own.jsonl"}, "talk_n is for self-dialogues that are to be written, but self_data names own.jsonl"),
    ({"lam": 0.0, "self_data": "own.jsonl"}, "lam is 0, so nothing of self_data own.jsonl would be read"),
    ({"talk_sampler": "exact", "talk_top_p": 0.5}, "the sampler exact has"),
    ({"mix_tokens_per_step": 9}, "give either rows_per_step or tokens_per_step"),
    ({"train_lr": 0.0}, "lr must be > 0"),
    ({"train_method": "magic"}, "there is no method 'magic'"),
    ({"evaluate_limit": -1}, "limit must be at least 0"),
])
def test_contradictory_settings_are_refused_before_any_work(settings, kwargs, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings(**kwargs), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kwargs, message", [
    ({"task": "none.jsonl"}, "none.jsonl can't be read"),
    ({"task": "bad.jsonl"}, "bad.jsonl, line 1: the columns found, 'q', make none of the shapes needed"),
    ({"mix_max_tokens": 20}, "24 of 24 rows have more than max_tokens=20 tokens"),
    ({"task_test": "none.jsonl"}, "none.jsonl can't be read"),
    ({"evaluate_suites": "instructions,gsm8k,mmlu"}, r"GSM8K \(test\) is missing: .*\nMMLU \(test\) is missing: "),
    ({"evaluate_suites": "instructions,magic"}, "there is no suite 'magic'"),
])
def test_what_is_not_there_is_named_before_any_work(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # no hub
    (tmp_path / "bad.jsonl").write_text('{"q": "Hi"}\n')
    with pytest.raises(UsageError, match=message):
        run(settings(**kwargs), quiet)
    assert not (tmp_path / "run").exists()


def test_names_of_files_may_hold_commas(settings, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    test = tmp_path / "a,b" / "x, y.jsonl"
    test.write_text('{"prompt": "Hi", "response": "Yo"}\n')
    own = f"answers:{tmp_path}/own.jsonl:prompt=q,response=a"
    (tmp_path / "own.jsonl").write_text('{"q": "Hi", "a": "Yo"}\n' * 2)
    given = settings(out=str(tmp_path / "a,b" / "run,1"), task_test=str(test), evaluate_suites=f"instructions,{own}")
    assert f"answers:{test}: 1 items" in of_run(given).text
    found = {f["suite"]: f["n"] for f in run(given, quiet)["forgetting"]}
    assert found == {f"answers:{test}": 1, "instructions": 4, own: 2, f"rows:{given.out}/mix/held_out/self.jsonl": 3}
