"""Configurations that must give one trajectory of losses and gradient norms, and one that must give it in expectation."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import drift
from sasft.chat import Encoded
from sasft.errors import UsageError
from sasft.methods import Costs, method
from sasft.mixing import SELF, TASK, Plan, mix
from sasft.trainer import FitSettings, fit
from tests.sasft import tiny_chat
from tests.sasft.methods import cases

BATCHES = sys.modules["sasft.batches"]
METHODS = {
    "sft": {}, "kl-self": {}, "asft": {}, "stm": {"tau": 100.0}, "ual": {}, "l2-sp": {"weight": 3.0},
    "online-replay": {"rows_per_step": 2, "buffer": 2, "max_new_tokens": 6}, "spin": {"max_new_tokens": 6},
}


class Gradients(TrainerCallback):
    """The gradients of every step; nothing is clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trained(folder: Path, name: str = "sft", *, plan: Plan | None = None, attention: str | None = None, lora: bool = False,
            callbacks: Sequence[TrainerCallback] = (), costs: Costs | None = None, **settings) -> list[tuple[float, float]]:
    """Losses and gradient norms of four steps."""
    model, costs = cases.tiny(folder, lora), Costs() if costs is None else costs
    if attention is not None:
        model.set_attn_implementation(attention)
    chosen = method(name, **METHODS[name])
    data = chosen.encoded(cases.rows(), model, 0, costs)
    objective = chosen.objective(model, data, 0, costs)
    log = fit(model, data, plan or cases.plan_of(data), FitSettings(**{**cases.SETTINGS, **settings}), pad_id=0, out=folder, objective=objective,
              callbacks=callbacks, progress=False)
    return [(e["loss"], e["grad_norm"]) for e in log if "loss" in e]


def the_same(found: Sequence[tuple[float, float]], expected: Sequence[tuple[float, float]], rel: float = 1e-4) -> bool:
    return len(found) == len(expected) and all(a == pytest.approx(b, rel=rel) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("settings", [
    {"micro_rows": 4}, {"micro_rows": 3}, {"micro_rows": 1},
    {"packing": True, "micro_rows": 2}, {"packing": True, "micro_tokens": 150},
    {"activation_checkpointing": True}, {"activation_checkpointing": True, "packing": True, "micro_rows": 2},
    {"attention": "eager"}, {"attention": "eager", "packing": True},
], ids=str)
def test_one_trajectory(settings: dict, plain, tmp_path: Path) -> None:
    found = trained(tmp_path, **settings)
    assert the_same(found, plain)
    assert not the_same(found, [(loss * 1.001, norm) for loss, norm in plain])


def passes(folder: Path, **settings) -> tuple[list[tuple[int, int]], int]:
    """The shapes of the batches that the model is given in training, and how often its first layer runs."""
    model, data = cases.tiny(), cases.rows()
    shapes: list[tuple[int, int]] = []
    runs: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)) if module.training else None)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: runs.append(1) if module.training else None)
    fit(model, data, cases.plan_of(data), FitSettings(**{**cases.SETTINGS, **settings}), pad_id=0, out=folder, progress=False)
    return shapes, len(runs)


def test_what_is_asked_for_is_what_runs(tmp_path: Path) -> None:
    """The trajectories above are of batches that do differ: no padding, so many tokens at most, layers run anew."""
    data = cases.rows()
    tokens = sum(len(data[s][i].input_ids) for step in cases.plan_of(data) for s, i in step)
    plain, layers = passes(tmp_path / "a")
    assert plain[0][0] == 4 and sum(rows * width for rows, width in plain) > tokens and layers == len(plain) == 4
    packed, _ = passes(tmp_path / "b", packing=True)
    assert len(packed) == 4 and {rows for rows, _ in packed} == {1} and sum(width for _, width in packed) == tokens
    limited, layers = passes(tmp_path / "c", packing=True, micro_tokens=150, activation_checkpointing=True)
    assert max(width for _, width in limited) <= 150 < max(width for _, width in packed) and sum(width for _, width in limited) == tokens
    assert layers == 2 * len(limited)


def side_by_side(rows: Sequence[Encoded], pad_id: int, left: bool) -> dict:
    """As :func:`sasft.chat.collate`, with all padding on one side."""
    width = max(len(row.input_ids) for row in rows)

    def padded(of, fill: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(torch.tensor(of(row)), (n, 0) if left else (0, n), value=fill)
                            for row in rows for n in [width - len(row.input_ids)]])

    mask = padded(lambda row: [1] * len(row.input_ids), 0)
    return {"input_ids": padded(lambda row: row.input_ids, pad_id), "attention_mask": mask, "labels": padded(lambda row: row.labels, -100),
            "position_ids": mask.cumsum(-1).sub(1).clamp(min=0), "response_start": 1}


@pytest.mark.parametrize("left", [True, False])
def test_the_side_of_padding_changes_nothing(left: bool, plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BATCHES, "collate", lambda rows, pad_id: side_by_side(rows, pad_id, left))
    assert the_same(trained(tmp_path), plain)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_is_that_of_the_settings_under_any_launcher(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path / "a", precision=precision)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if precision == "fp32" else "no")
    assert trained(tmp_path / "b", precision=precision) == expected


def test_self_rows_that_are_not_read_change_nothing(tmp_path: Path) -> None:
    tokens = {source: [row.loss_tokens for row in of] for source, of in cases.rows().items()}
    alone = mix({TASK: tokens[TASK]}, {TASK: 1}, steps=4, rows_per_step=4)
    beside = Plan(alone.steps, {s: tuple(t) for s, t in tokens.items()}, 0.0)
    assert trained(tmp_path / "a", plan=alone) == trained(tmp_path / "b", plan=beside)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sft"])
def test_methods_on_packed_rows(name: str, tmp_path: Path) -> None:
    """Losses, gradient norms and costs, in two micro-batches and with layers run anew."""
    apart, packed = Costs(), Costs()
    expected = trained(tmp_path / "a", name, costs=apart)
    found = trained(tmp_path / "b", name, costs=packed, packing=True, micro_rows=2, activation_checkpointing=True)
    assert the_same(found, expected, rel=5e-4) and packed == apart


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return trained(tmp_path_factory.mktemp("adapted"), "kl-self", lora=True, micro_rows=1)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True, "packing": True}], ids=str)
def test_adapters_on_packed_rows(settings: dict, adapted, tmp_path: Path) -> None:
    assert the_same(trained(tmp_path, "kl-self", lora=True, **settings), adapted)


# --- in expectation -------------------------------------------------------------------------------------------


def mean_gradient(folder: Path, plan: Plan, **settings) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    seen = Gradients()
    trained(folder, plan=plan, callbacks=[seen], lr=1e-30, max_grad_norm=0.0, **settings)
    return {n: torch.stack([step[n] for step in seen.steps]).mean(0) for n in seen.steps[0]}, seen.steps


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_weights_in_the_loss_are_ratios_of_rows_in_expectation(loss: str, packing: bool, tmp_path: Path) -> None:
    """Of a step drawn from the plan, at fixed weights; exactly, as both plans read each source an equal number of times to its end.

    ``mean`` divides each step by its own tokens, so there only the directions of steps' sums agree: it is shown to differ.
    """
    tokens = {source: [row.loss_tokens for row in of[:4]] for source, of in cases.rows().items()}
    shares = {TASK: 3, SELF: 1}
    by_rows = mix(tokens, shares, by="rows", steps=8, rows_per_step=2, seed=1)
    by_loss = mix(tokens, shares, by="loss", steps=8, rows_per_step=2, seed=2)
    assert by_loss.report()["rows"] == {TASK: 8, SELF: 8} and by_rows.report()["rows"] == {TASK: 12, SELF: 4}
    (rows, steps), (weighted, others) = (mean_gradient(tmp_path / plan.by, plan, loss=loss, packing=packing) for plan in (by_rows, by_loss))
    apart = cases.apart(weighted, rows)
    assert apart < 1e-5 if loss == "sum" else apart > 1e-3
    assert all(cases.apart(b, a) > 0.01 for a, b in zip(steps, others, strict=True))  # single steps are not the same


# --- gradients by source ----------------------------------------------------------------------------------------


def by_source(folder: Path, **settings) -> Mapping[tuple, float]:
    """Products of the sources' gradients, by step and layer."""
    model, data = cases.tiny(), cases.rows()
    sources = drift.SourceGradients(model, [TASK, SELF], folds=1, accumulate=settings.get("micro_rows", 8) < 4)
    fit(model, data, cases.plan_of(data, 2), FitSettings(**{**cases.SETTINGS, **settings}), pad_id=0, out=folder, progress=False,
        callbacks=[drift.DriftCallback(folder / "drift", probes=[sources])])
    recording = drift.load(folder / "drift")
    assert recording.meta["coverage"]["sources"] == {"covered": 1.0, "missing": {}}
    return {(r["step"], r["layer"], r["source"]): r["value"] for r in recording.table.to_pylist()
            if r["metric"] == "align/raw_inner" and not r["module"]}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple, float]:
    return by_source(tmp_path_factory.mktemp("apart"))


@pytest.mark.parametrize("settings", [{"packing": True, "activation_checkpointing": True}, {"micro_rows": 1},
                                      {"packing": True, "micro_rows": 2}], ids=str)
def test_gradients_by_source_are_those_of_rows_side_by_side(settings: dict, apart, tmp_path: Path) -> None:
    """Each step's products, covering every parameter, whatever lies where in memory."""
    found = by_source(tmp_path, **settings)
    assert apart.keys() == found.keys() and {step for step, _, _ in apart} == {1, 2}
    scale = max(map(abs, apart.values()))
    for key, value in apart.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5 * scale), key


# --- what does not go together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["packing", "activation_checkpointing"])
def test_an_objective_inside_the_layers_is_refused_by_name(option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{option} can't be had with the objective Lfu, which reaches into the model's layers"):
        cases.run(method("lfu"), cases.tiny(), tmp_path, **{option: True})


def test_gradients_by_source_say_what_they_need(tmp_path: Path) -> None:
    def run(name: str, sources: Sequence[str], **settings) -> None:
        model = cases.tiny()
        probe = drift.SourceGradients(model, sources)
        cases.run(method(name), model, tmp_path, callbacks=[drift.DriftCallback(None, probes=[probe])], **settings)

    with pytest.raises(UsageError, match="SourceGradients can't be had with the objective Spin, which does more than one pass with gradients"):
        run("spin", [TASK, SELF])
    with pytest.raises(UsageError, match="the plan reads the source 'self', which SourceGradients does not name"):
        run("sft", [TASK, "web"])
    with pytest.raises(UsageError, match="a step has 4 micro-batches, so SourceGradients needs accumulate=True"):
        run("sft", [TASK, SELF], micro_rows=1)


@pytest.mark.parametrize("kwargs, message", [
    ({"micro_tokens": 100}, "micro_tokens=100 is for packed rows; set packing too, or leave it out"),
    ({"micro_tokens": 0, "packing": True}, "micro_tokens must be at least 1, got 0"),
])
def test_options_that_contradict_each_other_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FitSettings(**kwargs)


def test_the_model_is_left_without_checkpoints(tmp_path: Path) -> None:
    model = tiny_chat.chatty()
    data = cases.rows()
    fit(model, data, cases.plan_of(data), FitSettings(**{**cases.SETTINGS, "activation_checkpointing": True}), pad_id=0, out=tmp_path, progress=False)
    assert not model.is_activation_checkpointing and not any(module._forward_hooks for module in model.modules())
