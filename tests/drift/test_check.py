"""The self-check agrees on what is covered, and finds what is wrong."""

import pytest
import torch

import drift
from drift import alignment
from drift.check import check
from tests.drift import families, zoo


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_agrees_on_every_family(family: str, dtype: torch.dtype) -> None:
    report = check(families.make(family, dtype), zoo.batch(rows=6, vocabulary=families.V))
    assert report.agrees, str(report)
    assert repr(report) == str(report)
    assert str(report).count("agrees") == len(report.checks) == 6 and "covers 100.0%" in str(report)


def test_it_agrees_with_adapters_and_names_what_is_left_out() -> None:
    report = check(zoo.lora(zoo.llama(), target_modules=["embed_tokens", "q_proj"]), zoo.batch(rows=4, vocabulary=32))
    assert report.agrees, str(report)
    assert "LoRA norms" in str(report) and "not model.embed_tokens.lora_embedding_A" in str(report)


class Scaled(zoo.Base):
    """One number among a thousand that is not covered."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(zoo.V, 800, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(ids), self.wide(super().forward(ids))], -1) * self.scale


def test_what_is_not_wholly_covered_does_not_show_as_such() -> None:
    report = check(zoo.make(Scaled), zoo.batch(rows=4), forward=zoo.forward)
    assert report.agrees and str(report).count("covers 99.9%; not scale") == 2


def test_it_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = alignment.gram_of
    monkeypatch.setattr(alignment, "gram_of", lambda parts: 1.1 * wrong(parts))
    report = check(zoo.llama(), zoo.batch(rows=4, vocabulary=32))
    assert not report.agrees and str(report).startswith("DIFFERS  products of rows' gradients")


class Mixing(zoo.Base):
    """Rows that see each other, as in a batch norm."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        return self.head(self.body(hidden) + hidden.mean(0, keepdim=True))


def test_it_finds_rows_that_see_each_other() -> None:
    report = check(zoo.make(Mixing), zoo.batch(rows=4), forward=zoo.forward)
    assert not report.agrees and str(report).startswith("DIFFERS  products of rows' gradients")


def test_it_needs_rows_and_something_trained() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        drift.check(zoo.llama(), zoo.batch(rows=1, vocabulary=32))
    with pytest.raises(ValueError, match="no trainable parameter"):
        drift.check(zoo.llama().requires_grad_(False), zoo.batch(vocabulary=32))
