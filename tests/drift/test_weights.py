"""Parameter drift against brute force in float64, and references that restore to the bit."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import drift
from drift.names import canonical_name, layer_index, parameters, tied
from drift.numerics import inner, squared_distance, squared_norm
from drift.weights import METRICS
from tests.drift import families, zoo


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 65536, 65536 * 3 + 17])
def test_inner_products_equal_float64_sums(dtype, n):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    assert inner(x, y).item() == pytest.approx((x.double() * y.double()).sum().item(), abs=1e-6 * n**0.5)
    assert squared_norm(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)
    assert squared_distance(x, y).item() == pytest.approx((x.double() - y.double()).square().sum().item(), rel=1e-6)


def test_the_norm_of_many_numbers_keeps_its_digits():
    x = torch.full((20_000_000,), 0.1)
    exact = 20_000_000 * float(x[0].double()) ** 2
    assert squared_norm(x).item() == pytest.approx(exact, rel=1e-6)


def test_bfloat16_differences_are_widened_first():
    base = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    moved = base + torch.tensor(2**-7, dtype=torch.bfloat16)
    assert squared_distance(moved, base).item() == 4096 * 2.0**-14


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        inner(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("kind", zoo.ZOO, ids=lambda k: k.__name__)
def test_drift_of_every_parameter_equals_brute_force(kind):
    model = zoo.make(kind)
    reference = drift.Reference.snapshot(model)
    assert all(p.l2 == 0 for p in drift.parameter_drift(model, reference))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    found = {p.name: p for p in drift.parameter_drift(model, reference)}
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].l2 == pytest.approx((parameter - before[name]).norm().item(), rel=1e-12)
        norm = before[name].norm().item()
        assert found[name].rel == pytest.approx(found[name].l2 / norm, rel=1e-12) if norm else math.isnan(found[name].rel)


ALL = tuple(METRICS)


def dense_metrics(now: torch.Tensor, before: torch.Tensor) -> dict[str, float]:
    """Every metric of two dense matrices by the textbook, in float64."""
    now, before = now.detach().double(), before.detach().double()
    d = now - before
    u, s, _ = torch.linalg.svd(d)
    base, tuned = torch.linalg.svd(before)[0], torch.linalg.svd(now)[0]
    k = min(10, *d.shape)
    inside = base[:, :k].T @ u[:, 0]
    closest = (base[:, : min(d.shape)].T @ tuned[:, :k]).abs().amax(0)
    return {"l2": d.norm().item(), "rel": (d.norm() / before.norm()).item(), "max": d.abs().max().item(),
            "cos": ((now * before).sum() / now.norm() / before.norm()).item(), "spectral": s[0].item(),
            "stable_rank": (s.square().sum() / s[0] ** 2).item(),
            "base_angle": math.acos(min(1.0, inside.norm().item())), "intruders": float((closest < 0.6).sum())}


def check_all(found, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor], rel: float = 1e-6) -> None:
    for p in found:
        expected = dense_metrics(now[p.name], before[p.name]) if now[p.name].dim() == 2 else {
            "l2": (now[p.name].double() - before[p.name].double()).norm().item()}
        for metric, value in expected.items():
            assert getattr(p, metric) == pytest.approx(value, rel=rel, abs=1e-6), f"{metric} of {p.name}"


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """Merged weights by canonical name, the model left as it was."""
    return {canonical_name(n): p.detach().clone() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}


def test_every_metric_of_dense_weights_equals_the_textbook():
    model = zoo.llama(tied=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    reference = drift.Reference.snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    check_all(drift.parameter_drift(model, reference, metrics=ALL), dict(model.named_parameters()), before, rel=1e-5)


VARIANTS = {"lora": {}, "rank-stabilised": {"use_rslora": True}, "embedding": {"target_modules": ["embed_tokens"]},
            "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"},
            "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}}}


def moved(model: nn.Module, seed: int = 3) -> None:
    """Random steps of everything that is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_drift_is_that_of_the_merged_weight(variant: str):
    wrapped = zoo.lora(zoo.llama(tied=False), nonzero=False, **VARIANTS[variant]).double()
    before, reference = effective(wrapped), drift.Reference.snapshot(wrapped)
    assert all(p.l2 == pytest.approx(0, abs=1e-6) for p in drift.parameter_drift(wrapped, reference))
    moved(wrapped)
    found = drift.parameter_drift(wrapped, reference, metrics=ALL)
    adapted = ["embed_tokens"] if variant == "embedding" else ["q_proj", "down_proj"]
    assert sorted(p.name for p in found) == sorted(n for n in before if any(a in n for a in adapted))
    check_all(found, effective(wrapped), before)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_lora_drift_from_the_base_models_files(variant: str, tmp_path):
    model = zoo.llama(tied=False)
    model.save_pretrained(tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = zoo.lora(model, nonzero=False, **VARIANTS[variant])
    moved(wrapped)
    check_all(drift.parameter_drift(wrapped, tmp_path, metrics=ALL), effective(wrapped), before, rel=1e-4)


def test_lora_on_transposed_weights():
    model = families.make("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for settings in ({}, {"use_dora": True}):
        wrapped = zoo.lora(copy.deepcopy(model), nonzero=False, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings).double()
        reference = drift.Reference.snapshot(wrapped)
        moved(wrapped)
        check_all(drift.parameter_drift(wrapped, reference, metrics=ALL), effective(wrapped), before)


def test_two_adapters_add_up():
    from peft import LoraConfig

    model = zoo.lora(zoo.llama(tied=False).double()).double()
    base = drift.Reference({canonical_name(n): p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n})
    before = {n: base.get(n) for n in base.names()}
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    moved(model)
    merged = effective(model)
    check_all(drift.parameter_drift(model, base, metrics=ALL), merged, before)


@pytest.mark.parametrize("variant", ["lora", "rank-stabilised", "embedding", "dora", "patterns"])
def test_adapter_folders_after_the_fact(variant: str, tmp_path):
    model = zoo.llama(tied=False)
    model.save_pretrained(tmp_path / "base")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = zoo.lora(model, nonzero=False, **VARIANTS[variant])
    moved(wrapped)
    wrapped.save_pretrained(tmp_path / "one")
    one = effective(wrapped)
    found = drift.parameter_drift(tmp_path / "one", tmp_path / "base", metrics=ALL)
    assert {p.name for p in found} == {n for n in before if not torch.equal(one[n], before[n])}
    check_all(found, one, before, rel=1e-4)
    if variant == "dora":
        with pytest.raises(NotImplementedError, match="DoRA"):
            drift.parameter_drift(drift.Reference.open(tmp_path / "one"), drift.Reference.snapshot(wrapped))
        return
    moved(wrapped, seed=5)
    wrapped.save_pretrained(tmp_path / "two")
    two = effective(wrapped)
    for p in drift.parameter_drift(tmp_path / "two", tmp_path / "one", metrics=("l2", "spectral", "rel", "cos")):
        assert p.l2 == pytest.approx((two[p.name] - one[p.name]).norm().item(), rel=1e-4)
        if variant != "embedding":  # with these PEFT stores the base weights
            assert math.isnan(p.rel) and math.isnan(p.cos), "the base weights are not at hand"


def test_modules_that_peft_trains_whole_go_by_their_own_names(tmp_path):
    model = zoo.llama(tied=False)
    model.save_pretrained(tmp_path / "base")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = zoo.lora(model, nonzero=False, modules_to_save=["lm_head"])
    reference = drift.Reference.snapshot(wrapped)
    moved(wrapped)
    wrapped.save_pretrained(tmp_path / "tuned")
    now = effective(wrapped)
    for base in (reference, tmp_path / "base"):
        found = drift.parameter_drift(wrapped, base, metrics=ALL)
        assert sorted(p.name for p in found) == sorted(n for n in before if any(part in n for part in ("lm_head", "q_proj", "down_proj")))
        check_all(found, now, before, rel=1e-4)
    check_all(drift.parameter_drift(tmp_path / "tuned", tmp_path / "base", metrics=ALL), now, before, rel=1e-4)
    batch = {"input_ids": torch.arange(8).unsqueeze(0)}
    with drift.Reference.open(tmp_path / "base").swapped_into(wrapped):
        torch.testing.assert_close(wrapped(**batch).logits, zoo.llama(tied=False)(**batch).logits)


def test_adapters_that_are_not_covered_are_refused_by_name(tmp_path):
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    biased = zoo.lora(zoo.llama(), lora_bias=True)
    with pytest.raises(NotImplementedError, match=r"down_proj.lora_B.default.bias is a bias of a LoRA factor \(lora_bias=True\)"):
        drift.parameter_drift(biased, drift.Reference.snapshot(biased))
    biased.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="lora_bias=True"):
        drift.parameter_drift(tmp_path, zoo.llama())
    with pytest.raises(NotImplementedError, match="q_proj has adalora; only LoRA on linear layers, embeddings and bare parameters is covered"):
        drift.Reference.snapshot(get_peft_model(zoo.llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10)))
    experts = get_peft_model(families.make("mixtral", torch.float32), LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]))
    experts.save_pretrained(tmp_path / "experts")
    with pytest.raises(NotImplementedError, match=r"target_parameters=\['mlp.experts.gate_up_proj'\], and its files don't say"):
        drift.Reference.open(tmp_path / "experts")


class Experts(nn.Module):
    """Three experts whose weights are stacked as [E, in, out], and all asked."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, zoo.D, 2 * zoo.D))
        self.bias = nn.Parameter(torch.randn(2 * zoo.D, zoo.D))

    def forward(self, x):
        return torch.einsum("bti,eio->bto", x, self.weight) @ self.bias


class Stacked(zoo.Base):
    def make_body(self) -> nn.Module:
        return Experts()


EXPERTS = {
    "mixtral": (lambda: families.make("mixtral"), {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "rank-stabilised": (lambda: families.make("mixtral"), {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
    "transposed": (lambda: zoo.make(Stacked), {"target_modules": ["head"], "target_parameters": ["body.weight", "body.bias"]}),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_lora_on_stacked_experts_is_that_of_pefts_own_updates(kind: str):
    """Expert by expert from the factors, against the update that PEFT would merge, also from a start that is not 0."""
    from peft import LoraConfig, get_peft_model

    make, settings = EXPERTS[kind]
    base = make()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3.0, **settings))

    def updates() -> dict[str, torch.Tensor]:
        wrappers = {canonical_name(f"{path}.base_layer.{m.parameter_name}"): m for path, m in model.named_modules() if hasattr(m, "parameter_name")}
        return {name: m.get_delta_weight("default").detach().clone() for name, m in wrappers.items()}

    fresh = drift.Reference.snapshot(model)
    moved(model)
    start, first = drift.Reference.snapshot(model), updates()
    moved(model)
    assert len(first) == len(settings["target_parameters"]) * (1 if kind == "transposed" else 2)
    for reference, began in ((fresh, {n: 0.0 for n in first}), (start, first)):
        found = {p.name: p for p in drift.parameter_drift(model, reference, metrics=("l2", "rel", "max", "cos", "spectral"))}
        for name, update in updates().items():
            delta, from_ = update - began[name], before[name] + began[name]
            p = found[name]
            assert p.numel == delta.numel() and p.l2 == pytest.approx(float(delta.norm()), rel=1e-9)
            assert p.rel == pytest.approx(float(delta.norm() / from_.norm()), rel=1e-9) and p.max == pytest.approx(float(delta.abs().max()), rel=1e-9)
            assert p.cos == pytest.approx(float((from_ * (from_ + delta)).sum() / from_.norm() / (from_ + delta).norm()), rel=1e-9)
            assert math.isnan(p.spectral) == (delta.dim() == 3)
            sketch = drift.Sketch(3, 3)
            assert np.allclose(sketch.change(model, reference).of(module=name).ravel(), sketch.project(name, delta).flatten().numpy())
    moved_base = {n: p + 0.1 for n, p in before.items()}
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            if name in first:
                parameter.copy_(moved_base[name])
    for p in drift.parameter_drift(model, drift.Reference(before)):
        if p.name in first:
            assert p.l2 == pytest.approx(float((moved_base[p.name] + updates()[p.name] - before[p.name]).norm()), rel=1e-9)


def test_gradients_of_factors_of_stacked_experts_are_named_as_not_covered():
    from peft import LoraConfig, get_peft_model

    make, settings = EXPERTS["mixtral"]
    model, batch = get_peft_model(make(), LoraConfig(r=2, **settings)), zoo.batch(vocabulary=families.V)
    gram = drift.gradient_gram(model, batch)
    with drift.SourceGradients(model, ["task", "self"]) as sources:
        sources.tag([0, 1, 0, 1, 0])
        model(**batch).loss.backward()
        split = sources.step()
    for missing in (gram.missing, split.missing):
        assert len(missing) == 2 * 2 * 2 and all(".mlp.experts." in name for name in missing)
    assert drift.record(model).__enter__().latest()["drift/l2"] == 0


def test_a_moved_base_needs_the_adapter_of_the_start(tmp_path):
    model = zoo.llama(tied=False)
    model.save_pretrained(tmp_path / "base")
    wrapped = zoo.lora(model, nonzero=False, init_lora_weights="pissa")
    wrapped.save_pretrained(tmp_path / "start")
    before = effective(wrapped)
    moved(wrapped)
    wrapped.save_pretrained(tmp_path / "end")
    with pytest.raises(ValueError, match="was initialised by pissa.*Give the adapter that was saved at the start"):
        drift.parameter_drift(tmp_path / "end", tmp_path / "base")
    after = effective(wrapped)
    for p in drift.parameter_drift(tmp_path / "end", tmp_path / "start"):
        assert p.l2 == pytest.approx((after[p.name] - before[p.name]).norm().item(), rel=1e-4)


def test_checkpoint_folders_after_the_fact(tmp_path):
    model = zoo.llama()
    model.save_pretrained(tmp_path / "one")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved(model)
    model.save_pretrained(tmp_path / "two", max_shard_size="4KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    found = drift.parameter_drift(tmp_path / "two", tmp_path / "one", metrics=ALL)
    assert {p.name for p in found} == set(before)
    check_all(found, dict(model.named_parameters()), before, rel=1e-5)


def _own_memory() -> int:
    """Bytes of memory that are this process's own and not a file's."""
    line = next(x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("Private_Dirty"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_the_base_in_files_is_mapped_and_not_copied(tmp_path):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))  # 403 MB
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "base.safetensors")
    size = sum(p.numel() * 4 for p in model.parameters())
    drift.parameter_drift(model, tmp_path / "base.safetensors")
    seen = []

    class Watched(drift.Reference):
        def get(self, name):
            seen.append(_own_memory())
            return super().get(name)

    before = _own_memory()
    drift.parameter_drift(model, Watched.open(tmp_path / "base.safetensors"))
    assert max(*seen, _own_memory()) - before < 0.1 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_of_sixty_million_numbers_within_1e_6(dtype):
    model = nn.ParameterList([torch.full((60_000_000,), 0.1).to(dtype)])
    reference = drift.Reference.snapshot(model)
    step = torch.tensor(2.0**-9).to(dtype)
    with torch.no_grad():
        model[0] += step
    exact = math.sqrt(60_000_000) * (float(model[0][0].double()) - float(torch.tensor(0.1).to(dtype).double()))
    assert drift.parameter_drift(model, reference)[0].l2 == pytest.approx(exact, rel=1e-6)


def test_a_reference_from_files_agrees_with_a_snapshot(tmp_path):
    model = zoo.make(zoo.Tied)
    file = tmp_path / "model.safetensors"
    save_file({n: p.detach() for n, p in model.named_parameters()}, file)
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    stored = {p.name: p.l2 for p in drift.parameter_drift(model, drift.Reference.open(file))}
    assert stored["embed.weight"] == pytest.approx((zoo.V * zoo.D) ** 0.5)
    assert stored["body.0.weight"] == 0
    assert drift.Reference.open(tmp_path).names() == set(parameters(model))
    with pytest.raises(FileNotFoundError, match="nothing is not there"):
        drift.Reference.open(tmp_path / "nothing")


def test_swapping_restores_every_bit_also_after_an_error():
    for model in (zoo.llama(), zoo.lora(zoo.llama(), nonzero=False)):
        reference = drift.Reference.snapshot(model)
        ids = {"input_ids": torch.arange(8).unsqueeze(0)}
        at_start = model(**ids).logits
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        moved = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(KeyError), reference.swapped_into(model):
            assert torch.equal(model(**ids).logits, at_start)
            raise KeyError
        assert all(torch.equal(p, moved[n]) for n, p in model.named_parameters())


def test_a_base_checkpoint_serves_a_lora_model_by_switching_its_adapters_off(tmp_path):
    model = zoo.llama()
    ids = {"input_ids": torch.arange(8).unsqueeze(0)}
    at_start = model(**ids).logits
    model.save_pretrained(tmp_path)
    wrapped = zoo.lora(model)
    assert not torch.equal(wrapped(**ids).logits, at_start)
    with drift.Reference.open(tmp_path).swapped_into(wrapped):
        assert torch.equal(wrapped(**ids).logits, at_start)


def test_a_reference_of_another_model_is_refused_by_name():
    reference = drift.Reference.snapshot(zoo.make(zoo.Base))
    with pytest.raises(ValueError, match=r"lacks 4 of the model's 8.*body\.0\.bias|lacks .* of the model's"):
        reference.check(zoo.make(zoo.Norms))
    other = zoo.make(zoo.Base)
    other.head = nn.Linear(zoo.D, zoo.V + 1, bias=False).double()
    with pytest.raises(ValueError, match=r"head.weight is \(14, 6\), reference \(13, 6\)"):
        reference.check(other)


def test_nothing_trainable_is_an_error():
    model = zoo.make(zoo.Base).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        drift.parameter_drift(model, drift.Reference.snapshot(model))


class Packed(nn.Linear):
    """A linear layer whose weight is kept as bytes, two by two, as 4-bit layers keep theirs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.kept = linear.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.kept)


def test_on_a_quantised_base_the_adapters_are_measured_and_what_is_not_is_nan(tmp_path):
    model = zoo.lora(zoo.llama(), nonzero=False)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer = Packed(module.base_layer)
    reference = drift.Reference.snapshot(model)
    sources = drift.SourceGradients(model, ["task", "self"], key="source")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    with drift.record(model, tmp_path, reference=reference, probes=[drift.DivergenceProbe("held-out", [zoo.batch(vocabulary=32)]), sources]) as rec:
        for _ in range(2):
            model(**zoo.batch(rows=4, vocabulary=32), source=[0, 1, 0, 1]).loss.backward()
            optimizer.step(), optimizer.zero_grad()
            assert rec.step()["kl/base_model/held-out"] > 0
    assert drift.load(tmp_path).meta["coverage"]["sources"]["covered"] == 1.0
    found = drift.parameter_drift(model, reference, metrics=["l2", "rel", "cos", "spectral", "max"])
    assert {d.name for d in found} == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")}
    for d in found:
        layer = model.get_submodule(f"base_model.model.{d.name.removesuffix('.weight')}")
        update = layer.get_delta_weight("default").detach().double()
        assert d.l2 == pytest.approx(float(update.norm()), rel=1e-6) and d.max == pytest.approx(float(update.abs().max()), rel=1e-6)
        assert d.spectral == pytest.approx(float(torch.linalg.matrix_norm(update, 2)), rel=1e-6)
        assert np.isnan(d.rel) and np.isnan(d.cos)
    with pytest.raises(ValueError, match="quantised"):
        drift.parameter_drift(model, reference, metrics=["base_angle"])


def test_names_are_those_of_the_unwrapped_model():
    assert canonical_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight") == "model.layers.0.q_proj.lora_A.default.weight"
    assert canonical_name("module._orig_mod.layers.1._checkpoint_wrapped_module.weight") == "_orig_mod.layers.1.weight".removeprefix("_orig_mod.")
    assert layer_index("transformer.h.3.attn.c_attn.weight") == 3
    assert tied(zoo.make(zoo.Tied)) == {"head.weight": "embed.weight"}
    assert list(parameters(torch.compile(zoo.make(zoo.Base), backend="eager"))) == list(parameters(zoo.make(zoo.Base)))


def test_wrong_questions_are_explained(tmp_path):
    model = zoo.make(zoo.Base)
    reference = drift.Reference.snapshot(model)
    with pytest.raises(ValueError, match=r"metrics holds \['l3'\]; there are l2, rel, max"):
        drift.parameter_drift(model, reference, metrics=["l3"])
    with pytest.raises(ValueError, match="metrics must be a list of names, got the string 'l2'"):
        drift.parameter_drift(model, reference, metrics="l2")
    with pytest.raises(ValueError, match=r"Norms and the reference differ in their parameters: 4 only in the first \(body.0.bias|differ in their parameters"):
        drift.parameter_drift(zoo.make(zoo.Norms), reference)
    with pytest.raises(ValueError, match="2 parameters are on the meta device"):
        drift.Reference.snapshot(nn.Linear(2, 2, device="meta"))
    other = zoo.make(zoo.Base)
    other.head = nn.Linear(zoo.D, zoo.V + 1, bias=False).double()
    with pytest.raises(ValueError, match=r"head.weight is \(14, 6\), base \(13, 6\)"):
        drift.parameter_drift(other, reference)
    with torch.no_grad():
        model.body[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite in 1 of 6 parameters: body.0.weight"):
        drift.parameter_drift(model, reference)


@pytest.mark.parametrize("where", ["snapshot", "file"])
def test_a_parameter_that_is_frozen_on_the_way_counts_as_far_as_it_has_moved(where: str, tmp_path):
    """Layers are frozen and thawed in turn, and what they have moved by stays."""
    model = zoo.make(zoo.Base)
    model.scale = nn.Parameter(torch.ones(()), requires_grad=False)
    base = drift.Reference.snapshot(model)
    if where == "file":
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, tmp_path / "base.safetensors")
        base = drift.Reference.open(tmp_path / "base.safetensors")

    def measured() -> dict[str, float]:
        return {d.name: d.l2 for d in drift.parameter_drift(model, base)}

    model.head.requires_grad_(False)
    assert "head.weight" not in measured()
    for size in (0.1, 0.2):
        with torch.no_grad():
            model.head.weight += 0.1
        assert measured()["head.weight"] == pytest.approx(size * model.head.weight.numel() ** 0.5, rel=1e-6)
    base.load_into(model)
    assert "head.weight" not in measured() and set(measured().values()) == {0.0}


def test_a_parameter_unfrozen_after_the_snapshot_is_refused():
    model = zoo.make(zoo.Frozen)
    reference = drift.Reference.snapshot(model)
    model.embed.requires_grad_(True)
    with pytest.raises(ValueError, match="embed.weight was frozen when the snapshot was taken"):
        drift.parameter_drift(model, reference)
