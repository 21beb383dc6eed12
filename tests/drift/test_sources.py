"""Gradients split by source inside one backward pass, against one backward pass a source."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import drift
from drift import source_collector
from drift import uses as uses_module
from drift.alignment import cosine, mean_inner
from drift.names import parameters
from drift.sources import SourceGradients, pooled
from tests.drift import families, zoo

TAGS = torch.tensor([0, 1, 1, 0, 0, 1])
FOLDS = [[0, 4], [3], [1, 5], [2]]  # rows of each source's folds: dealt in turn
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def zoo_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return zoo.forward(model, batch)


def hf_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def loss_of(logits, model: nn.Module, batch: Mapping[str, Tensor], count: int | None = None) -> Tensor:
    """Mean over counted tokens, of ``count`` of them if given."""
    labels = batch["labels"][:, 1:]
    total = nn.functional.cross_entropy(logits(model, batch)[:, :-1].flatten(0, 1).double(), labels.flatten(), reduction="sum")
    return total / (int((labels != -100).sum()) if count is None else count)


def separate(logits, model: nn.Module, batch: Mapping[str, Tensor], groups=FOLDS) -> dict[str, Tensor]:
    """Gradients [G, numel] of the groups' shares of the mean loss, one plain backward pass each."""
    named = {n: p for n, p in parameters(model).items() if p.requires_grad}
    count = int((batch["labels"][:, 1:] != -100).sum())
    found: dict[str, list[Tensor]] = {n: [] for n in named}
    for rows in groups:
        part = {k: v[rows] for k, v in batch.items()}
        gradients = torch.autograd.grad(loss_of(logits, model, part, count), list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            found[name].append((torch.zeros_like(p) if g is None else g).flatten().double())
    return {n: torch.stack(g) for n, g in found.items()}


def split(logits, model: nn.Module, batch: Mapping[str, Tensor], tags=TAGS, **settings) -> drift.SourceAlignment:
    with SourceGradients(model, ["task", "self"], **settings) as sources:
        sources.tag(tags)
        loss_of(logits, model, batch).backward()
        return sources.step()


def agree(alignment: drift.SourceAlignment, expected: Mapping[str, Tensor], rtol: float = 1e-12, metric: str = "sgd") -> None:
    scale = max(float((g @ g.T).abs().max()) for g in expected.values())
    for name, g in expected.items():
        if name in alignment.grams[metric]:
            np.testing.assert_allclose(alignment.grams[metric][name], (g @ g.T).numpy(), rtol=rtol, atol=rtol * scale, err_msg=name)
        else:
            assert float(g.abs().max()) == 0 or name in alignment.missing, name


@pytest.fixture(params=["kept whole", "block by block"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "block by block":
        monkeypatch.setattr(source_collector, "SMALL", 0)
        monkeypatch.setattr(uses_module, "BLOCK", 60)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", [k for k in zoo.ZOO if k is not zoo.Dropout], ids=lambda k: k.__name__)
def test_products_are_those_of_separate_backward_passes(kind) -> None:
    model, batch = zoo.make(kind), zoo.batch(rows=6)
    expected = separate(zoo_logits, model, batch)
    alignment = split(zoo_logits, model, batch)
    agree(alignment, expected)
    assert alignment.coverage == 1.0 and not alignment.missing
    for name, p in parameters(model).items():
        if p.requires_grad and p.grad is not None:
            torch.testing.assert_close(p.grad.flatten(), expected[name].sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_covered_whole(family: str) -> None:
    model, batch = families.make(family), zoo.batch(rows=6, vocabulary=families.V)
    expected, plain = separate(hf_logits, model, batch), loss_of(hf_logits, model, batch).item()
    alignment = split(hf_logits, model, batch)
    assert alignment.coverage == 1.0 and not alignment.missing
    agree(alignment, expected, rtol=1e-8)  # some of transformers' norms compute in float32
    with SourceGradients(model, ["task", "self"]) as sources:
        sources.tag(TAGS)
        assert loss_of(hf_logits, model, batch).item() == plain, "the forward pass is the model's own, to the bit"


@pytest.mark.parametrize("kind", ["zoo", "llama"])
def test_products_are_those_of_dattri(kind: str) -> None:
    """A second opinion: dattri-llm's products of rows' gradients, module by module, summed over the rows of each source's folds.

    Of weights that are used in two places it leaves out the products across, so these models have none.
    """
    dattri = pytest.importorskip("dattri_llm")
    model, logits = (zoo.make(zoo.Norms), zoo_logits) if kind == "zoo" else (zoo.llama(tied=False), hf_logits)
    batch = zoo.batch(rows=6, vocabulary=zoo.V)
    norms = {path: m for path, m in model.named_modules() if type(m).__name__ == "LlamaRMSNorm"}  # its own kind, which has to be said
    config = dattri.HookManagerConfig(linear_io=dattri.REGISTER_ALL, hook_types=dict.fromkeys(norms, "linear_io"), layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
                                      module_kwargs={path: {"has_bias": False, "normalized_shape": tuple(m.weight.shape), "eps": m.variance_epsilon}
                                                     for path, m in norms.items()})
    capture = dattri.CaptureCallback()
    with dattri.HookManager(model, config=config, callbacks=[capture]).collect(deregister_on_exit=True):
        loss_of(logits, model, batch).backward()
    rows = {path: k.double().numpy() for path, k in capture.record.gradient.similarity(capture.record.gradient).items()}
    gram, ours = drift.gradient_gram(model, batch, forward=logits), split(logits, model, batch)
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert set(rows) == {name.rpartition(".")[0] for name in gram.per_parameter}
    for path, theirs in rows.items():
        mine = [name for name in gram.per_parameter if name.rpartition(".")[0] == path]
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * np.abs(theirs).max(), "err_msg": path}
        np.testing.assert_allclose(sum(gram.per_parameter[name] for name in mine) / count**2, theirs, **tolerance)
        folds = np.array([[theirs[np.ix_(a, b)].sum() for b in FOLDS] for a in FOLDS])
        np.testing.assert_allclose(sum(ours.grams["sgd"][name] for name in mine), folds, **tolerance)


def test_products_in_float32_agree_within_1e_5() -> None:
    for family in families.FAMILIES:
        model, batch = families.make(family, torch.float32), zoo.batch(rows=6, vocabulary=families.V)
        agree(split(hf_logits, model, batch), separate(hf_logits, model, batch), rtol=1e-5)


def _packed(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows one after the other in one row, under a block-diagonal causal mask, and the row of every token."""
    lengths = batch["attention_mask"].sum(1)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    kept = batch["attention_mask"].bool()
    positions = torch.cat([torch.arange(n) for n in lengths])
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    seen = (rows[:, None] == rows[None]) & (positions[:, None] >= positions[None])
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return {"input_ids": batch["input_ids"][kept][None], "labels": labels[kept][None], "position_ids": positions[None],
            "attention_mask": mask[None, None]}, rows


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_packed_rows_give_the_numbers_of_rows_apart(family: str) -> None:
    model, batch = families.make(family), zoo.batch(rows=6, vocabulary=families.V)
    apart = split(hf_logits, model, batch)
    packed, rows = _packed(batch)
    if family == "gemma3":
        packed["attention_mask"] = dict.fromkeys(("sliding_attention", "full_attention"), packed["attention_mask"])
    with SourceGradients(model, ["task", "self"]) as sources:
        sources.tag(TAGS[rows][None], units=rows[None])
        loss_of(hf_logits, model, packed).backward()
        together = sources.step()
    assert together.coverage == 1.0 and (together.units == apart.units).all()
    for name, k in apart.grams["sgd"].items():
        # transformers' eager attention takes its softmax in float32 whatever the model's type
        np.testing.assert_allclose(together.grams["sgd"][name], k, rtol=1e-5, atol=1e-6 * np.abs(k).max(), err_msg=name)


def test_runs_of_one_source_are_taken_for_one_unit() -> None:
    with SourceGradients(zoo.make(zoo.Base), ["a", "b"]) as sources:
        sources.tag(torch.tensor([[0, 0, 1, 1, 1, 0, -1], [0, 0, 0, 0, 1, 1, 1]]))
        assert sources._interceptor.groups.index.tolist() == [[0, 0, 2, 2, 2, 1, 4], [0, 0, 0, 0, 3, 3, 3]]


def test_left_padding_changes_nothing() -> None:
    model, right = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    left = {k: torch.stack([row.roll(int((1 - mask).sum())) for row, mask in zip(v, right["attention_mask"], strict=True)])
            for k, v in right.items()}
    first = int(left["labels"][0, 0]) == -100
    assert first
    for batch in (left, right):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # In float64 transformers' eager attention turns the all-masked queries of left padding into nan: float32.
    model = model.float()
    a, b = split(hf_logits, model, left), split(hf_logits, model, right)
    np.testing.assert_allclose(a.gram(), b.gram(), rtol=1e-4)


def test_the_order_of_rows_and_sources_changes_nothing_but_the_order() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    first = split(hf_logits, model, batch, folds=1)
    order = torch.tensor([3, 5, 1, 0, 2, 4])
    moved = split(hf_logits, model, {k: v[order] for k, v in batch.items()}, TAGS[order], folds=1)
    np.testing.assert_allclose(moved.inner(), first.inner(), rtol=1e-12)
    exchanged = split(hf_logits, model, batch, 1 - TAGS, folds=1)
    np.testing.assert_allclose(exchanged.inner(), first.inner()[::-1, ::-1], rtol=1e-12)
    named = split(hf_logits, model, batch, ["task" if t == 0 else "self" for t in TAGS], folds=1)
    np.testing.assert_array_equal(named.inner(), first.inner())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model, batch = families.make(family), zoo.batch(rows=6, vocabulary=families.V)
    plain = split(hf_logits, model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = split(hf_logits, model, batch)
    assert again.coverage == 1.0
    np.testing.assert_allclose(again.gram(), plain.gram(), rtol=1e-10)


@pytest.mark.parametrize("kind", [zoo.Tied, zoo.Norms, zoo.Reused])
def test_accumulated_passes_give_the_numbers_of_one(kind) -> None:
    model, batch = zoo.make(kind), zoo.batch(rows=6)
    whole = split(zoo_logits, model, batch)
    count = int((batch["labels"][:, 1:] != -100).sum())
    with SourceGradients(model, ["task", "self"], accumulate=True) as sources:
        for rows in ([0, 1], [2, 3], [4, 5]):
            part = {k: v[rows] for k, v in batch.items()}
            sources.tag(TAGS[rows])
            loss_of(zoo_logits, model, part, count).backward()
        together = sources.step()
    assert (together.units == whole.units).all()
    np.testing.assert_allclose(together.gram(), whole.gram(), rtol=1e-12)


def test_what_is_nobodys_is_left_out_of_the_products_but_not_of_training() -> None:
    model, batch = zoo.make(zoo.Tied), zoo.batch(rows=6)
    tags = torch.tensor([0, 1, 1, 0, -1, -1])
    expected = separate(zoo_logits, model, batch, [[0], [3], [1], [2]])
    alignment = split(zoo_logits, model, batch, tags)
    agree(alignment, expected)
    assert not alignment.missing
    torch.testing.assert_close(model.embed.weight.grad.flatten(), separate(zoo_logits, model, batch, [range(6)])["embed.weight"][0])


def test_rows_of_which_nothing_is_in_the_loss_do_not_count_among_their_sources() -> None:
    """They have no gradient: the products are those of the others, and a mean over rows is one over the others."""
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    batch["labels"][[2, 3]] = -100
    with SourceGradients(model, ["task", "self"]) as sources:
        sources.tag(TAGS)
        model(**batch).loss.backward()
        hidden = sources.step()
        model.zero_grad()
        sources.tag([0, 1, -1, -1, 0, 1])
        model(**batch).loss.backward()
        nobody = sources.step()
    assert hidden.units.tolist() == [[2, 0], [2, 0]] and nobody.units.tolist() == [[1, 1], [1, 1]]
    np.testing.assert_allclose(hidden.inner(), nobody.inner(), rtol=1e-6)
    assert pooled([hidden], ["task"], lambda gram, a, b: gram[a[0], a[0]])[0] == pytest.approx(nobody.inner()[0, 0] / 2**2)


def test_packed_rows_of_which_nothing_is_in_the_loss_do_not_count_either() -> None:
    model, units = families.make("llama"), torch.tensor([[0, 0, 0, 1, 1, 2, 2]]).expand(5, -1)
    batch = zoo.batch(vocabulary=families.V)
    batch["labels"] = torch.where((units == 1) | (torch.arange(5)[:, None] == 4), -100, batch["input_ids"])
    batch["labels"][4, 0] = 7  # the first of all is predicted by nothing
    with SourceGradients(model, ["task", "self"], folds=1) as sources:
        sources.tag(torch.tensor([0, 0, 0, 1, 1]).unsqueeze(1).expand(5, 7), units=units)
        model(**batch).loss.backward()
        assert sources.step().units.tolist() == [[6], [2]]


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_bfloat16_gives_the_products_of_bfloat16_gradients(cast: str) -> None:
    model, batch = families.make("llama", torch.bfloat16 if cast == "weights" else torch.float32), zoo.batch(rows=6, vocabulary=families.V)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        expected = separate(hf_logits, model, batch)
        alignment = split(hf_logits, model, batch)
    assert alignment.coverage == 1.0
    agree(alignment, expected, rtol=2e-2)


def test_dropout_is_that_of_the_run() -> None:
    model, batch = zoo.make(zoo.Dropout).train(), zoo.batch(rows=6)
    torch.manual_seed(3)
    plain = torch.autograd.grad(loss_of(zoo_logits, model, batch), list(model.parameters()))
    torch.manual_seed(3)
    split(zoo_logits, model, batch)
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)


# --- other metrics ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
def test_the_adam_metric_divides_by_the_optimisers_root_second_moments() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-4)
    with SourceGradients(model, ["task", "self"], optimizer=optimizer) as sources:
        sources.tag(TAGS)
        loss_of(hf_logits, model, batch).backward()
        optimizer.step(), optimizer.zero_grad()
        assert "adam" not in sources.step().grams, "before its first step Adam has no second moments"
        expected = separate(hf_logits, model, batch)
        for name, p in parameters(model).items():
            state = optimizer.state[p]
            v = (state["exp_avg_sq"] / (1 - 0.95 ** float(state["step"]))).flatten()
            expected[name] = expected[name] / (v.sqrt() + 1e-4).sqrt()
        sources.tag(TAGS)
        loss_of(hf_logits, model, batch).backward()
        optimizer.step()
        agree(sources.step(), expected, rtol=1e-9, metric="adam")


def test_amsgrad_divides_by_the_largest_second_moments() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.5), amsgrad=True)
    with SourceGradients(model, ["task", "self"], optimizer=optimizer) as sources:
        for scale in (10.0, 1.0, 1.0):  # the moments fall, their largest do not
            optimizer.zero_grad()
            sources.tag(TAGS)
            (scale * loss_of(zoo_logits, model, batch)).backward()
            largest = {n: optimizer.state[p].get("max_exp_avg_sq", torch.zeros(())).clone() for n, p in parameters(model).items()}
            done = float(next(iter(optimizer.state.values()), {}).get("step", 0))
            optimizer.step()
            alignment = sources.step()
    expected = {n: g / ((largest[n].flatten() / (1 - 0.5**done)).sqrt() + 1e-8).sqrt() for n, g in separate(zoo_logits, model, batch).items()}
    agree(alignment, expected, rtol=1e-6, metric="adam")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_another_optimiser_than_adam_is_refused(kind) -> None:
    model = zoo.make(zoo.Base)
    with pytest.raises(ValueError, match=f"optimizer must be an Adam .*got {kind.__name__}"):
        SourceGradients(model, ["task", "self"], optimizer=kind(model.parameters(), lr=0.1))


def test_second_moments_under_another_name_are_refused() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    optimizer = torch.optim.Adamax(model.parameters())
    with pytest.raises(NotImplementedError, match=r"second moments \(exp_avg_sq\), and Adamax keeps .*exp_inf"), \
            SourceGradients(model, ["task", "self"], optimizer=optimizer) as sources:
        for _ in range(2):
            sources.tag(TAGS)
            loss_of(zoo_logits, model, batch).backward()
            optimizer.step()
            sources.step()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "v_proj"]}], ids=str)
def test_lora_in_factors_and_for_the_induced_step(settings: dict) -> None:
    model, batch = zoo.lora(families.make("llama"), **settings).double(), zoo.batch(rows=6, vocabulary=families.V)
    expected = separate(hf_logits, model, batch)
    alignment = split(hf_logits, model, batch)
    agree(alignment, expected, rtol=1e-9)
    for adapter in drift.adapters.adapters(model):
        gradients = [expected.get(n) for n in (adapter.name_a, adapter.name_b)]
        if not all(n in alignment.grams["sgd"] for n in (adapter.name_a, adapter.name_b)):
            assert adapter.name_a in alignment.missing, "LoRA on embeddings is named as not covered"
            continue
        steps = torch.stack([adapter.scaling * (d_b.view_as(adapter.b) @ adapter.a + adapter.b @ d_a.view_as(adapter.a)).flatten()
                             for d_a, d_b in zip(*gradients, strict=True)])
        np.testing.assert_allclose(alignment.grams["lora"][adapter.base], (steps @ steps.T).detach().numpy(), rtol=1e-7)


def test_several_adapters_of_one_weight_step_together() -> None:
    from peft import LoraConfig

    model, batch = zoo.lora(families.make("llama")).double(), zoo.batch(rows=6, vocabulary=families.V)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for parameter in drift.names.trainable(model).values():
            parameter.normal_()
    expected = separate(hf_logits, model, batch)
    alignment = split(hf_logits, model, batch)
    steps: dict[str, Tensor] = {}
    for x in drift.adapters.adapters(model):
        d_a, d_b = expected[x.name_a].view(-1, *x.a.shape), expected[x.name_b].view(-1, *x.b.shape)
        steps[x.base] = steps.get(x.base, 0) + (x.scaling * (d_b @ x.a + x.b @ d_a)).flatten(1)
    assert steps.keys() == alignment.grams["lora"].keys()
    for name, d in steps.items():
        np.testing.assert_allclose(alignment.grams["lora"][name], (d @ d.T).detach().numpy(), rtol=1e-9, err_msg=name)


def test_the_step_that_dora_induces_is_not_given_as_loras() -> None:
    model, batch = zoo.lora(families.make("llama"), use_dora=True).double(), zoo.batch(rows=6, vocabulary=families.V)
    alignment = split(hf_logits, model, batch)
    agree(alignment, separate(hf_logits, model, batch), rtol=1e-6)
    assert "lora" not in alignment.grams and all("lora_magnitude_vector" in n for n in alignment.missing)


# --- estimates --------------------------------------------------------------------------------------------------


class Score(nn.Module):
    """A model whose gradient on a row is that row."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Linear(n, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight(x)


def _steps(n: int, means: Tensor, *, rows: int = 8, folds: int = 2, seed: int = 0) -> list[drift.SourceAlignment]:
    torch.manual_seed(seed)
    model = Score(means.shape[1])
    found = []
    with SourceGradients(model, ["a", "b"], folds=folds) as sources:
        for _ in range(n):
            tags = torch.arange(rows) % 2
            sources.tag(tags)
            model(means[tags] + torch.randn(rows, means.shape[1])).mean().backward()
            found.append(sources.step())
    return found


def test_products_of_different_folds_carry_no_noise_and_raw_ones_do() -> None:
    means = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0]])
    steps = _steps(1200, means)
    value, error = pooled(steps, ["a", "b"], cosine)
    assert value == pytest.approx(0.6, abs=3 * error) and error < 0.03
    norm, error = pooled(steps, ["a"], mean_inner)
    assert norm == pytest.approx(1 / 64, abs=3 * error) and error < 1e-3  # of one row's share of a mean over 8
    assert np.mean([s.raw_cos("a", "b") for s in steps]) < 0.4
    raw = np.mean([s.inner()[0, 0] for s in steps]) / 4**2
    assert raw == pytest.approx((1 + 4 / 4) / 64, rel=0.05)  # ‖μ‖² + tr Σ / n


def test_the_standard_error_is_the_spread_of_the_estimate() -> None:
    means = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    found = [pooled(_steps(30, means, seed=s), ["a", "b"], cosine) for s in range(80)]
    assert np.sqrt(np.mean([e**2 for _, e in found])) == pytest.approx(np.std([v for v, _ in found]), rel=0.25)
    within = [pooled(_steps(1, 3 * means, rows=48, folds=4, seed=s), ["a", "b"], cosine) for s in range(150)]
    assert np.sqrt(np.mean([e**2 for _, e in within])) == pytest.approx(np.std([v for v, _ in within]), rel=0.3)


def test_a_source_without_rows_has_no_cosine() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    alignment = split(zoo_logits, model, batch, torch.zeros(6, dtype=torch.long))
    assert math.isnan(alignment.cos("task", "self")) and math.isnan(alignment.raw_cos("task", "self"))
    assert alignment.units.tolist() == [[3, 3], [0, 0]] and alignment.inner()[1, 1] == 0


def test_layers_and_modules_add_up_to_the_whole() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    alignment = split(hf_logits, model, batch)
    names = list(alignment.grams["sgd"])
    np.testing.assert_allclose(sum(alignment.gram(module=n) for n in names), alignment.gram())
    np.testing.assert_allclose(alignment.gram(layer=1), sum(alignment.gram(module=n) for n in names if ".layers.1." in n))
    with pytest.raises(ValueError, match="no parameter matches layer=7"):
        alignment.gram(layer=7)
    with pytest.raises(ValueError, match=r"metric must be one of \['sgd'\], got 'adam'"):
        alignment.gram(metric="adam")


# --- cost -------------------------------------------------------------------------------------------------------


def test_splitting_costs_less_than_a_hundredth_of_the_steps_products() -> None:
    model = families.make("llama", torch.float32)
    ids = torch.randint(0, families.V, (16, 128))
    batch = {"input_ids": ids, "labels": ids}
    with FlopCounterMode(display=False) as plain:
        loss_of(hf_logits, model, batch).backward()
    with FlopCounterMode(display=False) as measured:
        split(hf_logits, model, batch, torch.arange(16) % 2)
    assert plain.get_total_flops() < measured.get_total_flops() <= 1.01 * plain.get_total_flops()


# --- what is not taken apart ------------------------------------------------------------------------------------


class Fused(zoo.Base):
    """A head whose module is never called, as in fused losses."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids)) @ self.head.weight.T


class Mixing(nn.Module):
    """A vector of its own, in a layer that is no function of single tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(zoo.D))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).flip(1) if x.dim() == 3 and self.weight.dim() == 1 else x


class Mixed(zoo.Base):
    def make_body(self) -> nn.Module:
        return Mixing()


@pytest.mark.parametrize(("kind", "name", "why"), [
    (zoo.Functional, "head.weight", "part of its gradient comes from outside its module"),
    (Fused, "head.weight", "an operation that is not taken apart"),
    (Mixed, "body.weight", "an operation that is not taken apart")])
def test_what_is_not_covered_is_named_with_the_reason(kind, name: str, why: str) -> None:
    model, batch = zoo.make(kind), zoo.batch(rows=6)
    expected = separate(zoo_logits, model, batch)
    alignment = split(zoo_logits, model, batch)
    assert list(alignment.missing) == [name] and why in alignment.missing[name] and alignment.coverage < 1
    agree(alignment, expected)
    torch.testing.assert_close(parameters(model)[name].grad.flatten(), expected[name].sum(0))


@pytest.mark.parametrize("kind", [zoo.Functional, Fused])
@pytest.mark.parametrize("passes", [1, 2])
def test_it_is_named_at_every_step_and_over_accumulated_passes(kind, passes: int) -> None:
    model, batch = zoo.make(kind), zoo.batch(rows=6)
    with SourceGradients(model, ["task", "self"], accumulate=passes > 1) as sources:
        for _ in range(3):
            for _ in range(passes):
                sources.tag(TAGS)
                loss_of(zoo_logits, model, batch).backward()
            alignment = sources.step()
            assert list(alignment.missing) == ["head.weight"] and alignment.coverage < 1 and "head.weight" not in alignment.grams["sgd"]
    assert sources.coverage["missing"] == dict(alignment.missing)


# --- attaching --------------------------------------------------------------------------------------------------


def test_steps_off_the_schedule_run_the_models_own_code() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    measured = []
    with SourceGradients(model, ["task", "self"], every=3) as sources:
        for step in range(1, 8):
            sources.tag(TAGS)
            assert any("forward" in m.__dict__ for m in model.modules()) == (step % 3 == 0)
            loss_of(zoo_logits, model, batch).backward()
            measured.append(sources.step() is not None)
    assert measured == [False, False, True, False, False, True, False]


def test_nothing_stays_behind_even_after_an_error() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    own = model.head.forward = lambda x, f=model.head.forward: f(x)
    with pytest.raises(KeyError), SourceGradients(model, ["task", "self"]) as sources:
        sources.tag(TAGS)
        loss_of(zoo_logits, model, batch)
        raise KeyError
    assert [m for m in model.modules() if "forward" in m.__dict__] == [model.head] and model.head.forward is own
    assert not model._forward_pre_hooks and not any(p._backward_hooks for p in model.parameters())


def test_as_a_probe_it_follows_the_recorders_schedule() -> None:
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    sources = SourceGradients(model, ["task", "self"], key="whose")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with drift.record(model, every=2, probes=[sources]) as recorder:
        for _ in range(8):
            model(**batch, whose=TAGS).loss.backward()
            optimizer.step(), optimizer.zero_grad()
            logged = recorder.step()
    rows = [r for r in recorder.table().to_pylist() if r["metric"].startswith("align")]
    assert {r["step"] for r in rows} == {2, 4, 6, 8} and not model._forward_pre_hooks
    alignment = split(hf_logits, model, batch)
    whole = {(r["metric"], r["source"]): r["value"] for r in rows if r["step"] == 8 and r["layer"] is None and not r["module"]}
    assert whole["align/raw_inner", "task|self"] == pytest.approx(alignment.inner()[0, 1])
    assert whole["align/cos", "task|self"] == pytest.approx(alignment.cos("task", "self"), nan_ok=True)
    assert whole["align/raw_norm2", "self"] == logged["align/raw_norm2/self"] == pytest.approx(alignment.inner()[1, 1])
    assert ("align/pooled_inner", "task|self") in whole
    assert {r["module"] for r in rows} > set(alignment.grams["sgd"])


def test_what_recordings_have_in_common_is_pooled_though_the_first_lack_adam_and_a_layer() -> None:
    """Adam has no second moments before its first step, and layers are thawed on the way."""
    model, batch = families.make("llama"), zoo.batch(rows=6, vocabulary=families.V)
    thawed = dict(model.model.layers[1].named_parameters())
    for p in thawed.values():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    sources = SourceGradients(model, ["task", "self"], key="whose", optimizer=optimizer)
    reference = drift.Reference({n: p.detach().clone() for n, p in parameters(model).items()})
    with drift.record(model, probes=[sources], reference=reference) as recorder:
        for step in range(1, 7):
            if step == 4:
                for p in thawed.values():
                    p.requires_grad_(True)
            model(**batch, whose=TAGS).loss.backward()
            optimizer.step(), optimizer.zero_grad()
            recorder.step()
    rows = [r for r in recorder.table().to_pylist() if r["metric"].endswith("pooled_inner") and not r["module"]]
    first = {(r["metric"], r["layer"]): min(s["step"] for s in rows if (s["metric"], s["layer"]) == (r["metric"], r["layer"])) for r in rows}
    assert first == {("align/pooled_inner", None): 3, ("align/pooled_inner", 0): 3, ("align/pooled_inner", 1): 6,
                     ("align_adam/pooled_inner", None): 4, ("align_adam/pooled_inner", 0): 4}


@pytest.mark.parametrize(("tags", "message"), [
    ([0, 1, 2, 0, 0, 1], r"must lie in -1 ... 1, got 0 ... 2"),
    ([0, 1, 1], r"sources was \[3\] in tag, but the model is given a batch of shape \[6, 7\]"),
    (torch.zeros(6, 5, dtype=torch.long), r"sources was \[6, 5\] in tag"),
    ([0.5] * 6, r"whole numbers \[B\] or \[B, T\], got torch.float32 \(6,\)"),
    (["task", "mine"] * 3, r"sources holds \['mine'\]; the names are \['task', 'self'\]"),
    ([-1] * 6, "no source's gradient")])
def test_wrong_tags_are_refused(tags, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(zoo_logits, zoo.make(zoo.Base), zoo.batch(rows=6), tags)


def test_misuse_is_explained() -> None:
    model = zoo.make(zoo.Base)
    with pytest.raises(RuntimeError, match="not attached: use it in a with block"):
        SourceGradients(model, ["a", "b"]).tag([0, 1])
    with pytest.raises(ValueError, match="two or more different names"):
        SourceGradients(model, ["a", "a"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        SourceGradients(zoo.make(zoo.Base).requires_grad_(False), ["a", "b"])
    with SourceGradients(model, ["a", "b"]) as sources:
        sources.tag([0, 1])
        with pytest.raises(RuntimeError, match="tag was called twice in one step"):
            sources.tag([0, 1])
    with pytest.raises(ValueError, match="units must have the shape of sources"), SourceGradients(model, ["a", "b"]) as sources:
        sources.tag([[0, 1]], units=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="was made for another"), drift.record(zoo.make(zoo.Base), probes=[SourceGradients(model, ["a", "b"])]):
        pass


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    with torch.no_grad():
        model.head.weight[3, 2] = math.inf
    with pytest.raises(FloatingPointError, match="not finite in .* of 6 parameters: embed.weight"):
        split(zoo_logits, model, batch)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_an_evaluation_in_the_midst_of_a_step_is_no_part_of_it_and_a_step_without_gradient_is_refused() -> None:
    model, batch = zoo.make(zoo.Base), zoo.batch(rows=6)
    with SourceGradients(model, ["task", "self"]) as sources:
        sources.tag(TAGS)
        loss = loss_of(zoo_logits, model, batch)
        with torch.no_grad():
            model(batch["input_ids"][:2, :3])
        loss.backward()
        agree(sources.step(), separate(zoo_logits, model, batch))
        sources.tag(TAGS)
        with pytest.raises(RuntimeError, match="nothing was seen of its gradient"):
            sources.step()
