"""Bad input is refused before any work, by every instrument alike, with what came and what is needed."""

from collections.abc import Callable

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
