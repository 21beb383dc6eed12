"""The whole study on a model that runs in no time: a parrot that repeats the fact it is shown."""

import csv
import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import studies.two_by_two as study
from sasft.errors import UsageError
from sasft.sampling import EXACT, Sample
from sasft.selfdialogue import Writer
from sasft.tasks import get_task
from sasft.trainer import FitSettings
from studies import cells, ledger
from studies.arms import Arm, TrainingSettings, plan_for
from tests.sasft import tiny_chat


@dataclass(frozen=True, kw_only=True)
class Parrot(Writer):
    """Says the fact that its prompt reveals, else a few words that its seed chooses."""

    def sample(self, prompts, seeds, **kwargs) -> list[Sample]:
        return [self._say(self.chat.tokenizer.decode(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _say(self, prompt: str, seed: int) -> Sample:
        fact = re.search(r"Use this fact: (.*) Answer in one sentence", prompt)
        words = "The answer you want is one of many things that I do not know.".split()
        text = f"I can tell you that {fact[1]}" if fact else " ".join(random.Random(seed).sample(words, 6)) + "."
        ids = tuple(self.chat.tokenizer(text).input_ids)
        return Sample(ids, (-1.0,) * (len(ids) + 1), True)


DATA = cells.DataSettings(problems=8, held_out_problems=3, self_rows=8, held_out_self_rows=4, styles=("telegraphic", "capitals"),
                          max_answer_tokens=80, max_user_tokens=40, tries=2, passages=3, passage_tokens=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save_chatty(tmp_path_factory.mktemp("chatty"))


def profile(model: Path) -> study.Profile:
    return study.Profile(
        model=str(model), data=DATA, probes=("self_exact", "human_chat", "human_text", "gold_raw"), batch_size=8,
        training=TrainingSettings(fit=FitSettings(lr=1e-3, schedule="constant", save_every=0, precision="fp32"), steps=2,
                                  tokens_per_step=200, lam=0.5, seeds=2, record_every=1, align_rows=3))


def build(folder: Path, **kwargs) -> cells.StudyData:
    writer = Parrot(model=tiny_chat.chatty(), chat=tiny_chat.chat(), sampler=EXACT, provenance={"model": "parrot"}, batch_size=8)
    return cells.build(writer, replace(DATA, **kwargs), folder)


def text(row) -> str:
    return tiny_chat.tokenizer().decode(row.response_ids)


def prompt(row) -> str:
    return tiny_chat.tokenizer().decode(row.input_ids[: row.start])


def test_cells_cross_style_and_content_on_the_same_prompts(tmp_path: Path) -> None:
    data = build(tmp_path)
    pools = ("own/old", "own/new", "telegraphic/old", "telegraphic/new", "capitals/old", "capitals/new", "raw")
    assert {len(data.train[p]) for p in pools} == {8}
    task = get_task("sums")
    problems = task.problems(8, seed=0)
    for i, problem in enumerate(problems):
        assert {prompt(data.train[p][i]) for p in pools} == {prompt(data.train["raw"][i])}
        assert problem.question in prompt(data.train["raw"][i])
        assert "Use this fact" not in prompt(data.train["own/new"][i])  # the truth was shown, and is not any more
        assert task.check(problem, text(data.train["own/new"][i])) and not task.check(problem, text(data.train["own/old"][i]))
        assert task.mentions(problem, text(data.train["telegraphic/new"][i]))
        assert text(data.train["capitals/old"][i]) == text(data.train["own/old"][i]).upper()
        assert text(data.train["raw"][i]) == task.worked(problem)
    assert data.facts["prompts_kept"] == 1.0 and data.facts["old_answers_right"] == 0.0


def test_controls_and_held_out_rows(tmp_path: Path) -> None:
    data = build(tmp_path)
    for own, shuffled in zip(data.train["self_exact"], data.train["self_shuffled"], strict=True):
        assert sorted(own.response_ids) == sorted(shuffled.response_ids) and own.input_ids[: own.start] == shuffled.input_ids[: own.start]
        assert shuffled.input_ids[-1] == own.input_ids[-1]  # the end of turn stays at the end
    assert any(a.response_ids != b.response_ids for a, b in zip(data.train["self_exact"], data.train["self_shuffled"], strict=True))
    assert len(data.train["self_exact"]) == 8 and len(data.held_out["self_exact"]) == 4
    assert not set(data.train["self_exact"]) & set(data.held_out["self_exact"])
    seen = {p.key for p in get_task("sums").problems(8, seed=0)}
    assert not seen & {p.key for p in get_task("sums").problems(3, seed=1, exclude=seen)}
    assert [r.loss_tokens for r in data.held_out["human_text"]] == [20] * 3
    for plain, answer in zip(data.held_out["human_text"], data.held_out["human_chat"], strict=True):
        assert answer.response_ids == plain.input_ids and "Tell me about" in prompt(answer)


def test_data_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cells.digest(build(tmp_path))
    monkeypatch.setattr(Parrot, "sample", None)
    assert cells.digest(build(tmp_path)) == first


def test_a_model_that_never_states_the_truth_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parrot, "_say", lambda self, prompt, seed: Sample((50, 51), (-1.0,) * 3, True))
    with pytest.raises(UsageError, match="8 of the 8 problems .* raise tries"):
        build(tmp_path)


def test_arms_share_prompts_steps_and_tokens(tmp_path: Path) -> None:
    data = build(tmp_path)
    arms = study.study_arms(DATA.styles)
    settings = profile(tmp_path).training
    plans = {a.name: plan_for(a, arms, settings, data.train, seed=0) for a in arms}
    assert {len(p) for p in plans.values()} == {2}
    longest = max(r.loss_tokens for pool in data.train.values() for r in pool)
    for arm in arms[:7]:
        assert sum(plans[arm.name].loss_tokens()) == pytest.approx(400, abs=longest)
    assert plans["SA-SFT exact"].report()["lambda_rows"] == pytest.approx(0.5, abs=0.1)
    assert sum(plans["task repeated"].loss_tokens()) == pytest.approx(sum(plans["SA-SFT exact"].loss_tokens()), abs=longest)
    order = {name: [i for step in plans[name] for _, i in step] for name in ("own/old", "capitals/old")}
    n = min(map(len, order.values()))
    assert order["own/old"][:n] == order["capitals/old"][:n]
    assert plan_for(arms[0], arms, settings, data.train, 1) != plans["own/old"]


def test_the_study_from_nothing_to_its_figures_and_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(study, "Writer", Parrot)
    study.run(profile(model), tmp_path / "runs", tmp_path / "figures", 1)
    said = capsys.readouterr().out
    names = ("two_by_two_cells", "two_by_two_gain_drop", "two_by_two_depth")
    for name in names:
        for ext in ("png", "svg", "csv", "json"):
            assert (tmp_path / "figures" / f"{name}.{ext}").stat().st_size > 100
            assert f"{name}.{ext}" in said
    assert "C2" in said and "C11" in said and "SA-SFT exact" in said

    written = json.loads((tmp_path / "figures" / "two_by_two_cells.json").read_text())
    assert written["provenance"]["versions"]["torch"] and len(written["provenance"]["data_sha256"]) == 64
    rows = list(csv.DictReader((tmp_path / "figures" / "two_by_two_cells.csv").open()))
    results = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("runs-*/own-old/*/result.json")}
    probe = [r["probes"]["self_exact"] for r in results.values()]
    expected = np.sum([p["kl_base_model"] for p in probe]) / np.sum([p["tokens"] for p in probe])
    shown = next(r for r in rows if (r["probe"], r["style"], r["quantity"]) == ("self_exact", "capitals", "own_old"))
    assert float(shown["value"]) == pytest.approx(expected, rel=1e-5)

    pictures = {p: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    monkeypatch.setattr(Parrot, "sample", None)
    monkeypatch.setattr("studies.arms._run_pool", None)  # everything is there already
    study.run(profile(model), tmp_path / "runs", tmp_path / "figures", 1)
    assert {p: p.read_bytes() for p in (tmp_path / "figures").iterdir()} == pictures

    assert ledger.main(["--figures", str(tmp_path / "figures")]) == 0
    kept = {r["prediction"]: r for r in csv.DictReader((tmp_path / "figures" / "ledger.csv").open())}
    for claim, n in (("C2", 6), ("C3", 6), ("C10", 12), ("C11", 2)):
        assert sum(r["claim"] == claim and r["verdict"] != ledger.UNTESTED for r in kept.values()) == n
    assert float(kept["C2/two_by_two/capitals/self_exact"]["value"]) == pytest.approx(
        next(float(r["value"]) for r in rows if (r["probe"], r["style"], r["quantity"]) == ("self_exact", "capitals", "foreign_old - own_old")),
        rel=1e-5)
    assert kept["C2/two_by_two/capitals/human_chat"]["conditions"] == "items 3"


def test_main_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "f").write_text("")
    assert study.main(["--figures", str(tmp_path / "f")]) == 2
    assert str(tmp_path / "f") in capsys.readouterr().err
    assert study.main(["--model", "smollm3", "--runs", str(tmp_path / "r"), "--figures", str(tmp_path / "g")]) == 2
    assert "there is no model 'smollm3'" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", stop)
    assert study.main([]) == 130 and "the same command goes on from here" in capsys.readouterr().err


def test_arms_name_their_pools() -> None:
    arms = study.study_arms(("json",))
    assert [a.name for a in arms[:4]] == ["own/old", "own/new", "json/old", "json/new"]
    assert Arm(name="task only", task="raw", record=True) in arms
