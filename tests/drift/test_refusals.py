"""Bad input is refused before any work, by every instrument alike, with what came and what is needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import drift
from tests.drift import zoo


def model() -> nn.Module:
    return zoo.llama()


def batch(**changed) -> dict:
    return {**zoo.batch(vocabulary=32), **changed}


def probe(m: nn.Module, b: dict) -> None:
    held_out = drift.DivergenceProbe("held-out", [b])
    held_out.prepare(m, drift.Reference.snapshot(m))
    held_out.per_row(m)


MEASURED: dict[str, Callable[[nn.Module, dict], object]] = {
    "gradient_gram": drift.gradient_gram,
    "diagonal": lambda m, b: drift.fisher.diagonal(m, [b]),
    "rank_one": lambda m, b: drift.fisher.rank_one(m, [b]),
    "product": lambda m, b: drift.fisher.product(m, [b], {n: torch.ones_like(p) for n, p in drift.names.parameters(m).items()}),
    "sketch": drift.Sketch(2, 2).gradients,
    "check": drift.check,
    "divergence": probe,
    "alignment": lambda m, b: drift.AlignmentProbe("align", {"a": [b], "b": [b]}).rows(m, 0),
}
LABELS = batch()["labels"]
WRONG = [
    ({"labels": LABELS[:, :-1]}, r"input_ids and labels must have one shape \[B, T\], got \[5, 7\] and \[5, 6\]"),
    ({"labels": LABELS[:-1]}, r"got \[5, 7\] and \[4, 7\]"),
    ({"attention_mask": torch.ones(5, 5, dtype=torch.long)}, r"attention_mask and labels must have one shape \[B, T\], got \[5, 5\] and \[5, 7\]"),
    ({"labels": LABELS.float()}, r"must have labels, whole numbers .* got torch.float32 \[5, 7\]"),
    ({"labels": None}, "must have labels, .* got NoneType"),
    ({"labels": torch.full_like(LABELS, -100)}, "no label differs from -100"),
    ({"labels": LABELS.index_fill(0, torch.tensor([1, 3]), -100)}, r"no label of row 1, 3 differs from -100 .*leave such rows out"),
    ({"labels": LABELS.where(torch.arange(7) == 0, -100).where(torch.arange(5)[:, None] == 2, LABELS)}, "no label of row 2 differs from -100"),
]


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=range(len(WRONG)))
def test_a_batch_whose_parts_do_not_go_together(measure: str, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEASURED[measure](model(), batch(**changed))


@pytest.mark.parametrize("measure", sorted(set(MEASURED) - {"divergence", "product"}))
def test_frozen_models_and_models_without_values(measure: str) -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        MEASURED[measure](model().requires_grad_(False), batch())
    with pytest.raises(ValueError, match="parameters are on the meta device .*load the weights first"):
        MEASURED[measure](model().to("meta"), batch())


@pytest.mark.parametrize("measure", MEASURED)
def test_weights_that_are_not_finite_are_named(measure: str) -> None:
    bad = model()
    bad.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite in 1 of 20 parameters: model\.layers\.1\.mlp\.up_proj\.weight"):
        MEASURED[measure](bad, batch())


def test_a_batch_in_place_of_a_list_of_them() -> None:
    with pytest.raises(ValueError, match="must be a dictionary of tensors, got str .*give a list"):
        drift.fisher.diagonal(model(), batch())


def test_sources_of_frozen_models_and_models_without_values() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        drift.SourceGradients(model().requires_grad_(False), ["task", "self"])
    with pytest.raises(ValueError, match="meta device"):
        drift.SourceGradients(model().to("meta"), ["task", "self"])


NO_MODEL: dict[str, Callable[[list], object]] = {
    "record": drift.record,
    "SourceGradients": lambda m: drift.SourceGradients(m, ["task", "self"]),
    "Reference": drift.Reference.snapshot,
    **{name: lambda m, measure=measure: measure(m, batch()) for name, measure in MEASURED.items() if name != "product"},
}


@pytest.mark.parametrize("ask", NO_MODEL)
def test_what_is_no_model(ask: str) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        NO_MODEL[ask]([1])


def test_a_side_of_a_drift_that_is_none() -> None:
    for sides in (([1], model()), (model(), None)):
        with pytest.raises(TypeError, match=r"must be a model, a Reference, or the path .* got (list|NoneType)"):
            drift.parameter_drift(*sides)


def test_a_frozen_model_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        drift.record(model().requires_grad_(False), tmp_path / "run")
    with pytest.raises(ValueError, match="on the meta device"):
        drift.record(model().to("meta"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "message"), [(None, "step 1 was to be measured, .*tag was not called"),
                                              ("source", "step 1 was to be measured, .*not given 'source' .*remove_unused_columns=False")])
def test_a_step_whose_rows_belong_to_nobody(key: str | None, message: str) -> None:
    m = model()
    with drift.SourceGradients(m, ["task", "self"], key=key) as sources:
        m(**batch()).loss.backward()
        with pytest.raises(RuntimeError, match=message):
            sources.step()


@pytest.mark.parametrize("texts", ["one text", ["a", None], [b"bytes"]])
def test_texts_that_are_none(texts) -> None:
    with pytest.raises(ValueError, match="texts must be a list of strings, got a"):
        drift.style_matrix(texts)


def test_a_forward_that_gives_no_logits_of_the_batch() -> None:
    def wrong(m: nn.Module, b: dict) -> torch.Tensor:
        return m(b["input_ids"]).logits[:, 0]

    held_out = drift.DivergenceProbe("held-out", [batch()], forward=wrong)
    for measure in (lambda: drift.gradient_gram(model(), batch(), forward=wrong), lambda: held_out.prepare(model(), drift.Reference.snapshot(model()))):
        with pytest.raises(ValueError, match=r"forward must return logits \[B, T, V\], of 5 rows and 7 tokens here, got \[5, 32\]"):
            measure()
    with pytest.raises(TypeError, match="Linear takes no input_ids; give forward="):
        drift.gradient_gram(nn.Linear(2, 2), batch())


def test_labels_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"labels must be -100 or lie in 0 ... 31, the vocabulary, got \d+ ... 99"):
        drift.gradient_gram(model(), batch(labels=LABELS.where(torch.arange(7) != 3, 99)))


def test_factors_and_gradients_of_them_that_do_not_go_together() -> None:
    a, b = torch.ones(1, 3), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"d_a must be \[G, 1, 3\], got \[2, 2, 3\]"):
        drift.lowrank.induced_gram(a, b, torch.ones(2, 2, 3), None)
    with pytest.raises(ValueError, match=r"weight must have the update's shape \[4, 3\], got \[3, 4\]"):
        drift.lowrank.inner_with_dense(torch.ones(3, 4), a, b)
    with pytest.raises(ValueError, match=r"a \[r, n\] and b \[m, r\] must share r, got \(2, 3\) and \(4, 1\)"):
        drift.lowrank.norm(torch.ones(2, 3), b)


def test_rows_sources_and_bases_of_another_kind() -> None:
    with pytest.raises(ValueError, match="rows must be whole numbers from 0 on .* from -1 on"):
        drift.gradient_gram(model(), batch(), rows=torch.full((5, 7), -1))
    for sources, found in (([batch(), batch()], "got list"), ({"a": [batch()], "b": []}, "got {'a': 1, 'b': 0}")):
        with pytest.raises(ValueError, match=f"probe 'p': sources must name at least two sources with batches, {found}"):
            drift.AlignmentProbe("p", sources)
    with pytest.raises(TypeError, match="probe 'p': base must be None, 'without adapters', a model, a Reference or a path, got int"):
        drift.DivergenceProbe("p", [batch()], base=3)
    with drift.SourceGradients(model(), ["task", "self"]) as sources, pytest.raises(ValueError, match=r"sources must be names \[B\], .* got None"):
        sources.tag(None)
    for settings, message in (({"every": 0}, "every must be a whole number"), ({"metrics": ["l3"]}, r"metrics holds \['l3'\]")):
        with pytest.raises(ValueError, match=message):
            drift.DriftCallback(**settings)


def test_a_base_of_another_model_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    """One whose head is not the embedding, where the model ties them, and one of more layers."""
    untied, deeper = zoo.llama(tied=False), zoo.llama()
    deeper.model.layers.append(zoo.llama().model.layers[0])
    untied.save_pretrained(tmp_path / "untied")
    for base, name in ((untied, "lm_head.weight"), (drift.Reference.snapshot(untied), "lm_head.weight"), (tmp_path / "untied", "lm_head.weight"),
                       (deeper, "model.layers.2.self_attn.q_proj.weight")):
        with pytest.raises(ValueError, match=f"differ in their parameters: 0 only in the first .* only in the second .*{name}"):
            drift.parameter_drift(model(), base)
        with pytest.raises(ValueError, match=f"parameters that the model has not, or ties to others .*{name}"), \
                drift.record(model(), tmp_path / "run", reference=base):
            pass
        assert not list((tmp_path / "run" / "drift").iterdir())
    model().save_pretrained(tmp_path / "tied")
    assert max(d.l2 for d in drift.parameter_drift(model(), tmp_path / "tied")) == 0


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "torn.safetensors").write_bytes(b"1234")
    (tmp_path / "empty").mkdir()
    for path, kind, message in ((tmp_path / "none", FileNotFoundError, r"none is not there \(nothing is fetched from a hub: give a file or a folder"), (tmp_path / "empty", FileNotFoundError, "is a folder without .safetensors files$"),
                                (tmp_path / "torn.safetensors", ValueError, "torn.safetensors is no whole .safetensors file")):
        with pytest.raises(kind, match=message):
            drift.parameter_drift(model(), path)
    (tmp_path / "torn.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="without .safetensors files, but pytorch_model.bin: save it with safe_serialization=True"):
        drift.Reference.open(tmp_path)
