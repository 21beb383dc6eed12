"""Training against a loop written out, and the ways in which two trainings must be one."""

import json
import random
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import drift
import sasft.methods
from sasft.chat import Chat, Encoded, collate
from sasft.data import read_rows
from sasft.dryrun import of_training
from sasft.errors import UsageError
from sasft.methods import Costs, response_loss
from sasft.mixing import SELF, TASK, Plan, make_plan, mix
from sasft.mixture import MixSettings, hold_out, make_mixture, read_mixture
from sasft.models import LoraSettings, load_model, weights_hash
from sasft.train import TrainSettings, train
from sasft.trainer import FitSettings, fit
from tests.sasft import tiny_chat
from tests.sasft.methods import cases

MODULE = sys.modules["sasft.train"]  # the package's attribute of that name is the function
TRAINER = sys.modules["sasft.trainer"]
QUESTIONS = ["What is it?", "Why?", "Say a word, please.", "How many are there?", "Go on", "And then?", "Who says so?", "Where?"]


def encoded(n: int = 8, answer: str = "it is so") -> list[Encoded]:
    chat = tiny_chat.chat()
    return [chat.encode(({"role": "user", "content": q},), f"{answer}{' indeed' * (i % 3)}") for i, q in enumerate(QUESTIONS[:n])]


def rows() -> dict[str, list[Encoded]]:
    return {TASK: encoded(), SELF: encoded(6, "well well")}


def plan_of(rows, lam: float = 0.5, steps: int = 6, **kwargs):
    return make_plan([r.loss_tokens for r in rows[TASK]], [r.loss_tokens for r in rows[SELF]] if lam else [], steps=steps,
                     lam=lam, **{"rows_per_step": 4, **kwargs})


SETTINGS = {"lr": 1e-2, "precision": "fp32", "schedule": "constant", "save_every": 0, "micro_rows": 8}


def run(out: Path, *, lam: float = 0.5, callbacks=(), steps: int = 6, rows_per_step: int = 4, **settings):
    model, data = tiny_chat.chatty(), rows()
    log = fit(model, data, plan_of(data, lam, steps, rows_per_step=rows_per_step), FitSettings(**{**SETTINGS, **settings}),
              pad_id=0, out=out, callbacks=callbacks, progress=False)
    return model, [e["loss"] for e in log if "loss" in e]


def distance(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_loss_is_the_sum_over_response_tokens() -> None:
    model, data = tiny_chat.chatty(), encoded()
    expected = 0.0
    for row in data:
        log_p = torch.log_softmax(model(torch.tensor([row.input_ids])).logits[0], -1)
        expected -= sum(log_p[t - 1, label].item() for t, label in enumerate(row.labels) if label != -100)
    assert response_loss(model, collate(data, 0)).item() == pytest.approx(expected, rel=1e-5)
    assert sum(r.loss_tokens for r in data) == sum(len(r.response_ids) + 1 for r in data)  # end of turn included


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_training_is_a_plain_loop(tmp_path: Path, loss: str) -> None:
    trained, losses = run(tmp_path, loss=loss, rows_per_step=5)
    model, data = tiny_chat.chatty(), rows()
    plan = plan_of(data, rows_per_step=5)
    divisor = sum(plan.loss_tokens()) / len(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step, tokens, logged in zip(plan, plan.loss_tokens(), losses, strict=True):
        total = sum(response_loss(model, collate([data[source][i]], 0)) for source, i in step)
        value = total / (divisor if loss == "sum" else tokens)
        assert logged == pytest.approx(value.item(), rel=1e-3)  # the Trainer rounds what it logs
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(trained, model) < 2e-4
    assert distance(tiny_chat.chatty(), model) > 1e-2


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole, losses = run(tmp_path / "a")
    parts, same = run(tmp_path / "b", micro_rows=1)
    assert same == pytest.approx(losses, rel=1e-3) and distance(whole, parts) < 2e-4


def test_without_self_rows_it_is_the_task_alone(tmp_path: Path) -> None:
    """λ = 0 with self rows at hand, and no self rows at all: one and the same run."""
    data = rows()
    a, b = tiny_chat.chatty(), tiny_chat.chatty()
    for model, given, own in ((a, data, [r.loss_tokens for r in data[SELF]]), (b, {TASK: data[TASK], SELF: []}, [])):
        plan = make_plan([r.loss_tokens for r in data[TASK]], own, steps=4, rows_per_step=4, lam=0.0)
        fit(model, given, plan, FitSettings(**SETTINGS), pad_id=0, out=tmp_path, progress=False)
    assert distance(a, b) == 0


def test_a_seed_gives_the_same_run_twice(tmp_path: Path) -> None:
    (a, first), (b, second) = run(tmp_path / "a"), run(tmp_path / "b")
    assert weights_hash(a) == weights_hash(b) and first == second


def test_a_stopped_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole, losses = run(tmp_path / "whole", schedule="linear", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", schedule="linear", save_every=2, callbacks=[Stop()])
    resumed, rest = run(tmp_path / "parts", schedule="linear", save_every=2)
    assert distance(whole, resumed) == 0 and rest == losses


def broken_from(step: int, monkeypatch: pytest.MonkeyPatch, break_) -> None:
    """From some step on, whose number is that of the calls, losses are what ``break_`` makes of them."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        return break_(model, response_loss(model, batch)) if len(calls) >= step else response_loss(model, batch)

    monkeypatch.setattr(TRAINER, "response_loss", loss)


@pytest.mark.parametrize("break_, what", [
    (lambda model, loss: loss * float("nan"), "the loss is nan, the gradient norm is nan"),
    (lambda model, loss: loss + float("inf"), "the loss is inf"),
    (lambda model, loss: loss + (0 * next(model.parameters()).sum()).sqrt(), "the gradient norm is nan")])
def test_a_step_that_is_not_finite_is_not_taken(break_, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder goes on as that of a run that was stopped there."""
    def recorded(name: str, steps: int = 6):
        model = tiny_chat.chatty()
        callback = drift.DriftCallback(tmp_path / name, every=1, reference=drift.Reference.snapshot(model))
        data = rows()
        log = fit(model, data, plan_of(data, steps=steps), FitSettings(**{**SETTINGS, "save_every": 2}), pad_id=0, out=tmp_path / name,
                  callbacks=[callback], progress=False)
        return model, [e["loss"] for e in log if "loss" in e]

    whole, losses = recorded("whole")
    broken_from(4, monkeypatch, break_)
    with pytest.raises(UsageError, match=f"training has diverged, step 4: {what}; the losses until then: {losses[0]:.4g}, .*{losses[2]:.4g}. "
                                         r"Lower lr \(0.01\) or raise warmup_steps \(0\)"):
        recorded("parts")
    assert set(drift.load(tmp_path / "parts").table["step"].to_pylist()) == {0, 1, 2, 3}
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    resumed, rest = recorded("parts")
    assert distance(whole, resumed) == 0 and rest == losses


def test_weights_that_the_last_step_has_broken_are_not_handed_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training has diverged, step 1: the largest weight is (nan|inf); the losses until then: 3"):
        run(tmp_path, steps=1, lr=1e39)


def test_a_model_that_is_broken_to_begin_with_is_not_said_to_diverge(tmp_path: Path) -> None:
    model, data = tiny_chat.chatty(), rows()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    for callbacks, message in (([], "step 1: the loss is nan"), ([drift.DriftCallback(None)], "after step 0: the drift is not finite")):
        with pytest.raises(UsageError, match=f"^{message}.*, though nothing is trained yet; look at the model's weights"):
            fit(model, data, plan_of(data), FitSettings(**SETTINGS), pad_id=0, out=tmp_path, callbacks=callbacks, progress=False)


def test_bf16_leaves_the_weights_in_float32(tmp_path: Path) -> None:
    model, _ = run(tmp_path, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "autocast" not in repr(type(model.forward)) and model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_a_step_that_cannot_be_cut_evenly_is_refused(tmp_path: Path) -> None:
    data = {TASK: encoded(), SELF: []}
    plan = Plan((((TASK, 0),), ((TASK, 1), (TASK, 2))), {TASK: tuple(r.loss_tokens for r in data[TASK])}, 0.0)
    with pytest.raises(UsageError, match="micro_rows=1 cuts the largest step into .* raise micro_rows"):
        fit(tiny_chat.chatty(), data, plan, FitSettings(**{**SETTINGS, "micro_rows": 1}), pad_id=0, out=tmp_path)


# --- from files -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat.save_chatty(tmp_path / "model")
    task = [{"prompt": f"{q} {i}", "response": "it is so"} for i, q in enumerate(QUESTIONS * 2)]
    own = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "well well"}]} for q in QUESTIONS * 2]
    for name, lines in (("task", task), ("self", own)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def settings(folder: Path, **kwargs) -> TrainSettings:
    return TrainSettings(**{**SETTINGS, "model": str(folder / "model"), "task": str(folder / "task.jsonl"), "steps": 4,
                            "self_data": str(folder / "self.jsonl"), "out": str(folder / "run"), "rows_per_step": 4,
                            "record_every": 2, "probe_rows": 4, "save_every": 2, **kwargs})


def read(path: Path):
    return json.loads(path.read_text())


def test_a_run_folder_says_how_it_came_about(folder: Path) -> None:
    summary = train(settings(folder))
    out = folder / "run"
    config = read(out / "config.json")
    assert config["identity"]["settings"]["lr"] == 1e-2 and set(config["identity"]["data_sha256"]) == {"task", "self"}
    assert config["versions"]["torch"] == torch.__version__
    assert read(out / "mix.json") == summary["mix"] and summary["mix"]["lambda_rows"] == 0.5
    assert len((out / "plan.jsonl").read_text().splitlines()) == 4
    assert len(summary["loss"]) == 4 and read(out / "summary.json") == summary
    assert not (out / "checkpoints").exists()
    model, _ = load_model(str(out / "model"), device="cpu")
    assert weights_hash(model) == summary["weights_sha256"]


def test_everything_asked_for_is_recorded(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    train(settings(folder, general_text=str(folder / "text.txt")))
    table = drift.load(folder / "run").table.to_pylist()
    found = {(r["metric"], r["source"]) for r in table}
    for source in ("task", "self", "general_text"):
        assert {(m, source) for m in ("kl/base_model", "kl/model_base", "nll/model", "entropy/model")} <= found
    assert {("align/cos", "task|self"), ("align/inner", "task|self"), ("style/distance", "self-prompts")} <= found
    assert {r["step"] for r in table} == {0, 2, 4}
    assert {r["layer"] for r in table if r["metric"] == "align/inner"} == {None, 0, 1}
    at_base = {(r["metric"], r["source"]): r["value"] for r in table if r["step"] == 0 and r["layer"] is None and not r["module"]}
    assert at_base["kl/base_model", "self"] == 0 and at_base["drift/l2", ""] == 0


def test_a_tenth_of_the_run_lies_between_recordings(folder: Path) -> None:
    train(asked := settings(folder, record_every=None, steps=21, save_every=0))
    assert sorted(set(drift.load(asked.out).table["step"].to_pylist())) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert asked.steps_between(1000) == 100 and asked.steps_between(5) == 1


def test_the_same_call_again_returns_the_finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(settings(folder))
    monkeypatch.setattr(MODULE, "load_model", None)  # nothing is loaded any more
    assert train(settings(folder)) == first


def test_what_is_not_a_number_is_none_the_first_time_and_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift.Recorder, "latest", lambda self: {"align/cos/task|self": float("nan")})
    first = train(settings(folder, method="stm", method_options="tau=inf"))
    assert first["recorded"] == {"align/cos/task|self": None} and first["method"]["tau"] is None
    assert train(settings(folder, method="stm", method_options="tau=inf")) == first
    json.loads((folder / "run" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_another_configuration_in_the_same_folder_is_refused(folder: Path) -> None:
    train(settings(folder))
    with pytest.raises(UsageError, match=r"holds another run \(settings.lr is 0.01, now 0.001\); name another folder"):
        train(settings(folder, lr=1e-3))
    with (folder / "task.jsonl").open("a") as file:
        file.write('{"prompt": "One more?", "response": "yes"}\n')
    with pytest.raises(UsageError, match="data_sha256.task is .*, now "):
        train(settings(folder))


@pytest.mark.parametrize("refused, mended, message", [
    ({"method": "freeze", "method_options": "layers=99"}, {"method": "freeze", "method_options": "layers=0"}, "layers names 99"),
    ({"max_tokens": 20}, {}, "more than max_tokens=20"),
    ({"method": "lfu", "packing": True}, {"method": "lfu"}, "packing can't be had with the objective Lfu")])
def test_a_refused_configuration_leaves_its_folder_to_another(folder: Path, refused, mended, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(settings(folder, **refused))
    assert train(settings(folder, **mended))["loss"]


def test_a_failed_run_keeps_its_folder_once_it_has_left_something(folder: Path) -> None:
    with pytest.raises(UsageError, match="training has diverged"):
        train(settings(folder, lr=1e30, save_every=1, record_every=0))
    with pytest.raises(UsageError, match="holds another run"):
        train(settings(folder, save_every=1, record_every=0))


def test_rows_longer_than_the_models_positions_are_refused_by_name(folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2, n_positions=70, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    with (folder / "self.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Why?", "response": "so " * 20}) + "\n")
    with pytest.raises(UsageError, match=r"1 of \d+ rows of self have more tokens than the 70 that the model takes \(the longest 1\d\d\)") as refused:
        train(settings(folder))
    with pytest.raises(UsageError, match=re.escape(str(refused.value))):
        of_training(settings(folder))
    assert train(settings(folder, max_tokens=70, too_long="truncate", record_every=0))["loss"]  # the last position is used
    data = {TASK: encoded(answer="so " * 20)}
    with pytest.raises(UsageError, match=r"8 of 8 rows of task have more tokens than the 70 .*; set max_tokens to 70 \(of a mix, when it is mixed\)"):
        fit(load_model(str(folder / "model"), device="cpu")[0], data, make_plan([1] * 8, [], steps=1, rows_per_step=4, lam=0.0),
            FitSettings(**SETTINGS), pad_id=0, out=folder / "fitted")


@pytest.mark.parametrize("record_every, message", [(0, "step 2: the loss is nan"), (1, "after step 1: probe 'task': log-probabilities")])
def test_a_run_that_diverges_is_not_finished(folder: Path, record_every: int, message: str) -> None:
    for _ in range(2):
        with pytest.raises(UsageError, match=f"training has diverged, {message}"):
            train(settings(folder, lr=1e30, record_every=record_every))
    assert not (folder / "run" / "summary.json").exists() and not (folder / "run" / "model").exists()
    assert (folder / "run" / "drift").exists() == bool(record_every)


def test_an_interrupted_run_from_files_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(settings(folder, out=str(folder / "whole")))
    original = response_loss

    def interrupted(model, batch, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(model, batch)

    monkeypatch.setattr(TRAINER, "response_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(folder))
    monkeypatch.undo()
    resumed = train(settings(folder))
    assert resumed["weights_sha256"] == whole["weights_sha256"] and resumed["recorded"] == whole["recorded"]
    assert (drift.load(folder / "run").table.drop(["run"]) == drift.load(folder / "whole").table.drop(["run"]))


def test_lora_moves_the_adapters_alone(folder: Path) -> None:
    summary = train(settings(folder, lora_rank=2, lr=0.05))
    out = folder / "run"
    assert (out / "model" / "adapter_model.safetensors").exists() and not (out / "model" / "model.safetensors").exists()
    last = [r for r in drift.load(out).table.to_pylist() if r["metric"] == "drift/l2" and r["step"] == 4 and r["layer"] is not None and r["module"]]
    assert last and all("lora" not in r["module"] for r in last)
    base, _ = load_model(str(folder / "model"), device="cpu")
    tuned, _ = load_model(str(out / "model"), device="cpu")
    merged = tuned.merge_and_unload()
    for row in last:
        moved = merged.get_parameter(row["module"]) - base.get_parameter(row["module"])
        assert row["value"] == pytest.approx(moved.double().norm().item(), rel=1e-4)
    assert summary["recorded"]["kl/base_model/self"] > 0


def test_the_full_interface_of_fit_takes_adapters_too(tmp_path: Path) -> None:
    tiny_chat.save_chatty(tmp_path / "model")
    model, _ = load_model(str(tmp_path / "model"), lora=LoraSettings(r=2), device="cpu")
    before = {n: p.clone() for n, p in model.named_parameters()}
    fit(model, rows(), plan_of(rows()), FitSettings(**SETTINGS), pad_id=0, out=tmp_path, progress=False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)


def test_rows_too_long_are_counted_and_refused_or_treated_as_chosen(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UsageError, match="16"):
        train(settings(folder, max_tokens=20))
    capsys.readouterr()
    long = {"prompt": "Why?", "response": "so " * 200}
    with (folder / "task.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    train(settings(folder, max_tokens=120, too_long="drop", out=str(folder / "drop")))
    assert "dropped" in capsys.readouterr().err


def test_what_is_measured_on_is_set_aside_before_a_method_makes_rows(folder: Path) -> None:
    asked = settings(folder, probe_rows=3, record_every=1)
    material = MODULE.read_material(asked)
    read = read_rows(folder / "task.jsonl")
    assert (material.rows["task"], material.held_out["task"]) == hold_out(read, 3)
    chat = Chat(MODULE.load(asked)[1])
    rewritten = {name: [replace(row, response="No.", response_ids=None) for row in rows] for name, rows in material.rows.items()}
    as_they_came, made = (MODULE.encode(asked, material, rows, chat) for rows in (material.rows, rewritten))
    assert made[1] == as_they_came[1] and made[0]["task"] != as_they_came[0]["task"]


@pytest.mark.parametrize("kwargs, message", [
    ({"lam": 1.0}, r"lam \(the share of self rows\) must lie in \[0, 1\), got 1.0"),
    ({"lam": 0.5, "self_data": None}, "lam is 0.5, but self_data names no file; write self-dialogues with `sasft talk`"),
    ({"task": ""}, "task is missing"),
    ({"out": ""}, "out is missing"),
    ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
    ({"lr": float("inf")}, "lr must be > 0 and finite, got inf"),
    ({"lr": float("nan")}, "lr must be > 0 and finite, got nan"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0 and finite, got -1"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0 and finite, got -1.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm must be at least 0 and finite, got nan"),
    ({"seed": -1}, r"seed must lie in \[0, 2.32\), got -1"),
    ({"seed": 2**32}, r"seed must lie in \[0, 2.32\), got 4294967296"),
    ({"loss": "median"}, "loss must be sum or mean, got 'median'"),
    ({"precision": "fp8"}, "precision must be auto, bf16 or fp32, got 'fp8'"),
    ({"lora_alpha": 32.0}, "lora_alpha=32.0 is for adapters, but lora_rank is 0"),
    ({"lora_rank": 4, "method": "lora"}, "lora_rank=4 and the method lora would each add adapters"),
    ({"general_text": "t.txt", "record_every": 0}, "general_text t.txt is to be recorded on, but record_every is 0"),
    ({"record_every": -1}, "record_every must be at least 0"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"micro_rows": 0}, "micro_rows must be at least 1, got 0"),
    ({"schedule": "zigzag"}, "unknown schedule 'zigzag'; there are: .*constant"),
])
def test_impossible_settings_are_refused(folder: Path, kwargs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(folder, **kwargs)


def test_an_unreadable_general_text_is_named_before_any_work(folder: Path) -> None:
    with pytest.raises(UsageError, match="general_text .*none.txt can't be read as UTF-8 text"):
        train(settings(folder, general_text=str(folder / "none.txt")))


def test_an_unwritable_folder_is_named_before_any_work(folder: Path) -> None:
    (folder / "run").write_text("a file in the way")
    with pytest.raises(UsageError, match="run"):
        train(settings(folder))


# --- sources, weights and methods ---------------------------------------------------------------------------------


def three() -> dict[str, list[Encoded]]:
    return {TASK: encoded(), SELF: encoded(6, "well well"), "web": encoded(5, "a page")}


def test_any_number_of_sources_is_trained_on(tmp_path: Path) -> None:
    data = three()
    plan = mix({s: [r.loss_tokens for r in of] for s, of in data.items()}, dict.fromkeys(data, 1), steps=3, rows_per_step=6)
    model, plain = tiny_chat.chatty(), tiny_chat.chatty()
    fit(model, data, plan, FitSettings(**SETTINGS), pad_id=0, out=tmp_path, progress=False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step in plan:
        assert {source for source, _ in step} == set(data)
        (sum(response_loss(plain, collate([data[s][i]], 0)) for s, i in step) / plan.divisor).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    assert distance(model, plain) < 2e-4


@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("micro_rows", [8, 1])
def test_loss_weights_multiply_the_losses_of_their_rows(loss: str, micro_rows: int, tmp_path: Path) -> None:
    data = three()
    plan = mix({s: [r.loss_tokens for r in of] for s, of in data.items()}, {TASK: 2, SELF: 1, "web": 5}, by="loss", steps=3,
               rows_per_step=6)
    assert plan.loss_weights[SELF] != plan.loss_weights["web"] != 1
    model, plain = tiny_chat.chatty(), tiny_chat.chatty()
    fit(model, data, plan, FitSettings(**{**SETTINGS, "loss": loss, "micro_rows": micro_rows}), pad_id=0, out=tmp_path, progress=False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step in plan:
        weighted = [(plan.loss_weights[s], data[s][i]) for s, i in step]
        divisor = plan.divisor if loss == "sum" else sum(w * row.loss_tokens for w, row in weighted)
        (sum(w * response_loss(plain, collate([row], 0)) for w, row in weighted) / divisor).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    assert distance(model, plain) < 2e-4


def test_a_plan_of_other_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="step 1 of the plan reads row . of the source 'self', which has 0 rows; rows are given for task"):
        fit(tiny_chat.chatty(), {TASK: encoded()}, plan_of(rows()), FitSettings(**SETTINGS), pad_id=0, out=tmp_path)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole, losses = run(tmp_path / "whole", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", save_every=2, callbacks=[Stop()])
    torn = tmp_path / "parts" / "checkpoints" / "checkpoint-6"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "trainer_state.json").write_text('{"epoch": 0.')
    resumed, rest = run(tmp_path / "parts", save_every=2)
    assert distance(whole, resumed) == 0 and rest == losses


@contextmanager
def small_disk(largest: int):
    """Files can't grow beyond so many bytes: what writes more fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("largest", [60_000, 20_000])  # the model fits, and the optimiser's moments don't; neither does
def test_a_checkpoint_that_the_disk_has_no_room_for(largest: int, folder: Path) -> None:
    whole = train(settings(folder, out=str(folder / "whole"), record_every=0))
    with small_disk(largest), pytest.raises(UsageError, match=r"the checkpoint of step 2 can't be written to .*checkpoint-2 \(.*MiB are free now; "
                                                              "make room, and the same command goes on"):
        train(settings(folder, record_every=0))
    assert not list((folder / "run" / "checkpoints").iterdir())
    assert train(settings(folder, record_every=0)) == whole


def test_a_model_that_the_disk_has_no_room_for(folder: Path) -> None:
    with small_disk(20_000), pytest.raises(UsageError, match="the trained model can't be written to .*model .*; make room"):
        train(settings(folder, record_every=0, save_every=0))
    assert not (folder / "run" / "summary.json").exists()
    assert train(settings(folder, record_every=0, save_every=0))["loss"]


@pytest.mark.parametrize("method, options", [
    ("online-replay", {"rows_per_step": 2, "buffer": 4, "max_new_tokens": 6}), ("spin", {"max_new_tokens": 6}), ("ewc", {}), ("wise-ft", {})])
def test_a_stopped_method_ends_where_a_whole_one_does(method: str, options, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    whole, parts = Costs(), Costs()
    a = cases.run(sasft.methods.method(method, **options), cases.tiny(), tmp_path / "a", save_every=2, costs=whole)
    with pytest.raises(KeyboardInterrupt):
        cases.run(sasft.methods.method(method, **options), cases.tiny(), tmp_path / "b", save_every=2, callbacks=[Stop()])
    b = cases.run(sasft.methods.method(method, **options), cases.tiny(), tmp_path / "b", save_every=2, costs=parts)
    assert distance(a, b) == 0
    if method != "online-replay":  # which writes the answers of a stopped buffer once more, and says so
        assert parts == whole
    else:
        assert parts.backward_tokens == whole.backward_tokens and parts.generated_tokens > whole.generated_tokens


@pytest.mark.parametrize("lam, method, options, counted", [
    (0.5, "sft", "", True), (0.5, "kl-self", "", True), (0.0, "sft", "", False), (0.0, "ewc", "", True), (0.0, "ewc", "weight=0", False)])
def test_what_self_rows_took_to_be_written_is_counted_where_they_are_used(lam: float, method: str, options: str, counted: bool,
                                                                           folder: Path) -> None:
    written = sum(len("well well") + 1 for _ in QUESTIONS * 2)  # a token is a letter here; those held out had to be written too
    summary = train(settings(folder, lam=lam, method=method, method_options=options))
    assert summary["costs"]["self_data_tokens"] == (written if counted else 0) and summary["costs"]["generated_tokens"] == 0
    if lam:
        mixed(folder, steps=8)
        assert train(on_mix(folder, method=method))["costs"]["self_data_tokens"] == written


@pytest.mark.parametrize("method, options, lam, spent", [
    ("stm", "tau=20", 0.5, {"forward_tokens"}), ("spin", "max_new_tokens=6", 0.5, {"forward_tokens", "backward_tokens", "generated_tokens"}),
    ("freeze", "layers=0", 0.0, set()), ("lora", "r=2", 0.5, set()), ("kl-self", "", 0.5, {"forward_tokens"}), ("low-lr", "", 0.5, set())])
def test_methods_run_from_files(method: str, options: str, lam: float, spent: set[str], folder: Path) -> None:
    summary = train(settings(folder, method=method, method_options=options, lam=lam))
    assert summary["method"]["name"] == method and set(summary["costs"]) == set(Costs().describe())
    assert {cost for cost, n in summary["costs"].items() if n} - {"self_data_tokens"} == spent
    assert read(folder / "run" / "config.json")["identity"]["settings"]["method"] == method
    if method == "stm":
        assert summary["mix"]["loss_tokens"]["task"] < train(settings(folder, out=str(folder / "sft")))["mix"]["loss_tokens"]["task"]


def test_a_method_that_there_is_not_is_refused_before_any_work(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no method 'kl'. .*There are: sft"):
        settings(folder, method="kl")
    with pytest.raises(UsageError, match="the method stm has no option 'weight'; it is an option of "):
        settings(folder, method="stm", method_options="weight=1")
    assert not (folder / "run").exists()


_KILLED = """
import sys
from tests.sasft import test_train
from sasft.models import weights_hash
from pathlib import Path
model, losses = test_train.run(Path(sys.argv[1]), steps=150, save_every=3, schedule="linear")
print(weights_hash(model))
"""


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL at random moments, saving included: whenever a new checkpoint appears, and a random while after."""
    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", _KILLED, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def checkpoints() -> set[str]:
        return {path.name for path in (tmp_path / "parts" / "checkpoints").glob("checkpoint-*")}

    whole = start(tmp_path / "whole").communicate()[0].strip()
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        process, before = start(tmp_path / "parts"), checkpoints()
        while process.poll() is None and not checkpoints() - before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills == 10
    assert whole and start(tmp_path / "parts").communicate()[0].strip() == whole


# --- from a mix -------------------------------------------------------------------------------------------------------


def mixed(folder: Path, **kwargs) -> MixSettings:
    made = MixSettings(**{"sources": [f"task={folder}/task.jsonl", f"self={folder}/self.jsonl"], "steps": 4, "rows_per_step": 4,
                          "hold_out": 4, "model": str(folder / "model"), "out": str(folder / "mix"), **kwargs})
    make_mixture(made)
    return made


def on_mix(folder: Path, **kwargs) -> TrainSettings:
    without = {"task": "", "self_data": None, "steps": None, "rows_per_step": None, "probe_rows": None}
    return settings(folder, **{**without, "mix": str(folder / "mix"), "out": str(folder / "on_mix"), **kwargs})


def test_a_mix_trains_as_the_files_that_it_is_made_of(folder: Path) -> None:
    mixed(folder)
    ours, theirs = train(on_mix(folder)), train(settings(folder))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert all(ours["mix"][name] == theirs["mix"][name] for name in ("rows", "loss_tokens", "shares"))
    assert ours["recorded"]["kl/base_model/self"] == pytest.approx(theirs["recorded"]["kl/base_model/self"], rel=1e-2)
    a, b = (load_model(str(folder / name / "model"), device="cpu")[0] for name in ("on_mix", "run"))
    assert distance(a, b) < 2e-4
    hashes = read(folder / "on_mix" / "config.json")["identity"]["data_sha256"]
    assert hashes["rows_sha256"] == read(folder / "mix" / "mix.json")["rows_sha256"]


def test_a_mix_of_any_sources_brings_its_weights_along(folder: Path) -> None:
    web = [{"prompt": f"{q}?", "response": "a page"} for q in QUESTIONS]
    (folder / "web.jsonl").write_text("".join(json.dumps(line) + "\n" for line in web))
    mixed(folder, sources=[f"{name}={folder}/{name}.jsonl" for name in ("task", "self", "web")], shares=[4, 1, 1], by="loss")
    summary = train(on_mix(folder))
    assert summary["mix"]["loss_weights"] == {"task": 2.0, "self": 0.5, "web": 0.5}
    assert all(f"nll/model/{name}" in summary["recorded"] for name in ("task", "self", "web"))
    mixture = read_mixture(folder / "mix")
    chat, plain = tiny_chat.chat(), tiny_chat.chatty()
    data = {s: [chat.encode(row.prompt, row.response) for row in of] for s, of in mixture.rows.items()}
    fit(plain, data, mixture.plan, FitSettings(**SETTINGS), pad_id=0, out=folder / "plain", progress=False)
    assert distance(load_model(str(folder / "on_mix" / "model"), device="cpu")[0], plain) < 2e-4


def test_a_mix_for_another_tokenizer_is_refused(folder: Path) -> None:
    mixed(folder)
    tiny_chat.chatty().save_pretrained(folder / "other")
    tiny_chat.tokenizer(merges=[("i", "t")]).save_pretrained(folder / "other")
    with pytest.raises(UsageError, match="the rows of task have other lengths for .*other than .*mix was laid out for; mix them"):
        train(on_mix(folder, model=str(folder / "other")))


def test_a_mix_that_was_edited_is_refused_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(folder)
    with (folder / "mix" / "rows.jsonl").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(MODULE, "load_model", None)
    with pytest.raises(UsageError, match="rows.jsonl is not the file that mix.json describes"):
        train(on_mix(folder))
    assert not (folder / "on_mix" / "config.json").exists()


def test_a_method_that_selects_rows_does_not_fit_a_mix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(sasft.methods.Method):
        name = "half"

        def encoded(self, rows, model, pad_id, costs, folder=None):
            return {**rows, TASK: rows[TASK][::2]}

    monkeypatch.setitem(sasft.methods.METHODS, "half", Half)
    mixed(folder)
    assert train(settings(folder, method="half"))["method"] == {"name": "half"}
    with pytest.raises(UsageError, match="the method half makes . rows of the . of task, so the steps of the mix no longer fit"):
        train(on_mix(folder, method="half"))


@pytest.mark.parametrize("kwargs, message", [
    ({"task": "t.jsonl"}, "task is t.jsonl, but the mix .* has settled that"),
    ({"lam": 0.0}, "lam is 0.0, but the mix"),
    ({"steps": 4}, "steps is 4, but the mix"),
    ({"too_long": "drop"}, "too_long is drop, but the mix"),
])
def test_what_a_mix_has_settled_is_not_asked_for_again(folder: Path, kwargs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        on_mix(folder, **kwargs)
