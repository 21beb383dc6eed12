"""What holds of every method, and what the registry refuses."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from sasft.errors import UsageError
from sasft.methods import METHODS, Costs, method, parse_method
from sasft.methods.base import Method
from sasft.mixing import SELF, TASK
from tests.sasft.methods import cases

# The options with which a method is plain SFT, and options with which it is not.
NEUTRAL = {
    "low-lr": {"factor": 1.0}, "wise-ft": {"alpha": 1.0}, "l2-sp": {"weight": 0.0}, "ewc": {"weight": 0.0}, "kl-self": {"weight": 0.0},
    "kl-task": {"weight": 0.0}, "online-replay": {"weight": 0.0}, "stm": {"tau": float("inf")}, "ual": {"v_max": 0.0},
    "lfu": {"weight": 0.0}, "spin": {"weight": 0.0}, "grads": {"share": 1.0},
}
# As good as none: the path that computes the method's term must end where the one that leaves it out does.
NEARLY = {
    "wise-ft": {"alpha": 1 - 1e-7}, "l2-sp": {"weight": 1e-9}, "ewc": {"weight": 1e-9}, "kl-self": {"weight": 1e-7},
    "kl-task": {"weight": 1e-7}, "online-replay": {"weight": 1e-7, "rows_per_step": 2, "buffer": 2, "max_new_tokens": 6},
    "stm": {"tau": 1e30}, "ual": {"v_max": 1e-7}, "lfu": {"weight": 1e-7}, "spin": {"weight": 1e-7, "max_new_tokens": 6},
}
ACTIVE = {
    "freeze": {"layers": "0"}, "wise-ft": {"alpha": 0.5}, "l2-sp": {"weight": 3.0}, "ewc": {"weight": 30.0},
    "online-replay": {"rows_per_step": 2, "buffer": 2, "max_new_tokens": 6}, "spin": {"max_new_tokens": 6}, "stm": {"tau": 100.0},
    "lfu": {"variant": "steering"},
}
NOT_FROM_ROWS = [name for name in METHODS if not METHODS[name].writes]
TRAINED = [name for name in NOT_FROM_ROWS if name not in ("sft", "sa-sft", "external", "low-lr", "lora", "freeze")]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict]:
    """Weights after SFT, in full and of adapters."""
    found = {}
    for lora in (False, True):
        folder = tmp_path_factory.mktemp("sft")
        found[lora] = cases.weights(cases.run(Method(), cases.tiny(folder, lora), folder))
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", NEUTRAL)
def test_of_weight_0_it_is_sft_step_for_step(name: str, lora: bool, sft, tmp_path: Path) -> None:
    trained = cases.run(method(name, **NEUTRAL[name]), cases.tiny(tmp_path, lora), tmp_path)
    assert all(torch.equal(p, sft[lora][n]) for n, p in trained.named_parameters())


@pytest.mark.parametrize("name", NEARLY)
def test_of_a_weight_near_0_it_is_sft_up_to_rounding(name: str, sft, tmp_path: Path) -> None:
    trained = cases.run(method(name, **NEARLY[name]), cases.tiny(), tmp_path)
    assert max((p - sft[False][n]).abs().max().item() for n, p in trained.named_parameters()) < 1e-3


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_all_weights_and_adapters(name: str, lora: bool, sft, tmp_path: Path) -> None:
    """Something else than SFT, in bf16 as well, with weights left in fp32 and the base below adapters untouched."""
    model = cases.tiny(tmp_path, lora)
    before = cases.weights(model)
    trained = cases.run(method(name, **ACTIVE.get(name, {})), model, tmp_path, precision="bf16")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in trained.parameters())
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, before[n])}
    assert moved and (not lora or all("lora_" in n for n in moved))
    assert max((p - sft[lora][n]).abs().max().item() for n, p in trained.named_parameters()) > 1e-3


@pytest.mark.parametrize("name", ["kl-self", "asft", "ewc", "online-replay", "ual", "lfu", "spin"])
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    """Loss and gradients of one step, whole and cut into single rows."""
    found = []
    for micro_rows in (8, 1):
        seen, costs = {}, Costs()

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, seen=seen, **kwargs) -> None:
                seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

        model = cases.wander(cases.tiny())
        cases.run(method(name, **ACTIVE.get(name, {})), model, tmp_path / str(micro_rows), steps=1, callbacks=[Look()], costs=costs,
                  micro_rows=micro_rows)
        found.append((seen, costs))
    assert cases.apart(found[1][0], found[0][0]) < 1e-4
    assert found[0][1] == found[1][1]


def test_the_registry_names_each_method_once_with_help_for_each_option() -> None:
    for name, kind in METHODS.items():
        assert kind.name == name and kind.__doc__ and (kind.paper or name in ("sft", "low-lr"))
        assert all(f.metadata.get("help") for f in fields(kind))


@pytest.mark.parametrize("name, text, message", [
    ("l2sp", "", "no method 'l2sp'. Did you mean l2-sp\\? There are: sft, "),
    ("l2-sp", "tau=3", "the method l2-sp has no option 'tau'; it is an option of stm. Its options: weight"),
    ("l2-sp", "zeta=3", "the method l2-sp has no option 'zeta'. Its options: weight"),
    ("l2-sp", "weight", "options of a method are given as name=value .* got 'weight'"),
    ("l2-sp", "weight=much", "weight must be a number, got 'much'"),
    ("l2-sp", "weight=-1", "weight must be a number >= 0.0, got -1.0"),
    ("ewc", "fisher_rows=1.5", "fisher_rows must be a whole number, got '1.5'"),
    ("ewc", "fisher_rows=0", "fisher_rows must be at least 1, got 0"),
    ("ual", "v_max=2", r"v_max must be a number in \[0, 1\], got 2.0"),
    ("stm", "tau=0.5", "tau is a perplexity, so it must be >= 1, got 0.5"),
    ("online-replay", "loss=mse", "loss must be kl or ntp, got 'mse'"),
    ("online-replay", "buffer=0", "buffer must be at least 1, got 0"),
    ("lfu", "variant=sam", "variant must be lora or steering, got 'sam'"),
    ("lfu", "rank=0", "rank must be at least 1, got 0"),
    ("spin", "max_new_tokens=0", "max_new_tokens must be at least 1"),
    ("low-lr", "factor=0", "factor must be a number > 0, got 0.0"),
    ("freeze", "", "nothing is to be frozen: give layers"),
    ("freeze", "layers=a", "layers are given as numbers and ranges, as 0-5,7; got 'a'"),
    ("freeze", "embeddings=ja", "embeddings must be true or false, got 'ja'"),
    ("lora", "r=0", "r \\(the rank of the adapters\\) must be at least 1"),
    ("sa-sft", "sampler=greedy", "sampler must be any, exact or paper"),
    ("kl-task", "on=,", "on must name sources of the mix"),
])
def test_what_there_is_not_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method(name, text)


def test_options_as_text_are_options() -> None:
    assert parse_method("freeze", "layers=0-3 parameters='lm_head.*, model.norm.weight' embeddings=true") == method(
        "freeze", layers="0-3", parameters="lm_head.*, model.norm.weight", embeddings=True)
    assert parse_method("stm", "tau=inf").tau == float("inf")


@pytest.mark.parametrize("name", ["kl-self", "ewc", "online-replay"])
def test_methods_without_their_rows_say_so(name: str) -> None:
    data = {**cases.rows(), "self": []}
    with pytest.raises(UsageError, match=f"the method {name} works on rows of the source 'self', which has none; there are rows of task"):
        method(name).objective(cases.tiny(), data, 0, Costs())


def test_rows_are_taken_from_as_many_sources_as_are_named() -> None:
    data = cases.rows()
    tokens = sum(len(row.input_ids) for rows in data.values() for row in rows)
    method("ewc", on="task, self", weight=1.0).objective(cases.tiny(), data, 0, costs := Costs())
    assert costs.backward_tokens == tokens
    replay = method("online-replay", prompts="task,self").objective(cases.tiny(), data, 0, Costs())
    assert replay.prompts == [*data["task"], *data["self"]]
    assert method("kl-task", on="task,self").objective(cases.tiny(), data, 0, Costs()).on == ("task", "self")


def test_methods_name_the_sources_that_they_read_beyond_the_steps() -> None:
    required = {"external": {"file": "web.jsonl"}}
    found = {name: set(method(name, **required.get(name, {})).reads()) for name in METHODS if name != "freeze"}
    assert {name: sources for name, sources in found.items() if sources} == {"ewc": {SELF}, "online-replay": {SELF}, "ssr": {SELF}}
    assert set(method("ewc", on="task, self").reads()) == {TASK, SELF} and method("ssr", of="task").reads() == (TASK,)
    for name, off in (("ewc", {"weight": 0}), ("online-replay", {"weight": 0}), ("ssr", {"n": 0})):
        assert not method(name, **off).reads()
