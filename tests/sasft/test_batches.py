"""How steps are cut into micro-batches, and rows packed end to end."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drift.names import parameters
from sasft.batches import MicroBatches, alike, balanced, batch_of
from sasft.chat import Encoded, collate
from sasft.errors import UsageError
from sasft.methods import response_loss, score
from sasft.methods.frozen_base import subset
from sasft.mixing import Plan
from sasft.packing import check_rows_apart, pack
from tests.drift import families

ROWS = [Encoded((5, 6, 7, 8, 9), (-100, -100, -100, 8, 9)), Encoded((11, 12), (-100, 12)), Encoded((9, 8, 7, 6), (-100, 8, -100, 6)),
        Encoded((13, 14, 15, 16, 17, 18, 19), (-100, -100, 15, 16, 17, 18, 19))]
KEYS = [("task", 0), ("self", 0), ("task", 1), ("self", 1)]
WEIGHTS = {"self": 3.0}


def rows_of(lengths: list[int]) -> list[Encoded]:
    return [Encoded.text(range(1, n + 1)) for n in lengths]


def plan_of(steps: list[list[int]], lengths: list[int]) -> Plan:
    return Plan(tuple(tuple(("task", i) for i in step) for step in steps), {"task": tuple(n - 1 for n in lengths)}, 0.0)


def largest(parts: list[list[int]], lengths: list[int]) -> int:
    return max(sum(lengths[k] for k in part) for part in parts)


# --- the cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [alike, balanced])
def test_every_row_is_in_one_part_and_no_part_is_empty(cut) -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(3, 12))]
        n = rng.randint(1, len(lengths))
        parts = cut(lengths, n)
        assert len(parts) == n and all(parts)
        assert sorted(k for part in parts for k in part) == list(range(len(lengths)))


def test_balanced_parts_are_nearly_as_small_as_can_be() -> None:
    rng = random.Random(1)
    for _ in range(20):
        lengths = [rng.randint(1, 20) for _ in range(6)]
        for n in (2, 3):
            least = min(max(sum(length for length, at in zip(lengths, places, strict=True) if at == part) for part in range(n))
                        for places in itertools.product(range(n), repeat=len(lengths)))
            assert largest(balanced(lengths, n), lengths) <= (4 / 3 - 1 / (3 * n)) * least + 1e-9


def test_more_balanced_parts_never_hold_more() -> None:
    rng = random.Random(2)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(9)]
        sizes = [largest(balanced(lengths, n), lengths) for n in range(1, 10)]
        assert sizes == sorted(sizes, reverse=True)


def test_micro_tokens_are_kept_to_with_as_few_micro_batches_as_that_takes() -> None:
    rng = random.Random(3)
    lengths = [rng.randint(2, 20) for _ in range(24)]
    plan = plan_of([list(range(8)), list(range(8, 16)), list(range(16, 24))], lengths)
    batches = MicroBatches(plan, {"task": rows_of(lengths)}, 1, packing=True, micro_tokens=40)
    sizes = [sum(lengths[i] for _, i in keys) for keys in batches]
    assert max(sizes) <= 40 and len(sizes) == len(batches) == 3 * batches.per_step
    fewer = [largest(balanced([lengths[i] for _, i in step], batches.per_step - 1), [lengths[i] for _, i in step]) for step in plan]
    assert max(fewer) > 40


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"packing": True, "micro_tokens": 30}])
def test_processes_share_out_each_step(options) -> None:
    rng = random.Random(4)
    lengths = [rng.randint(2, 12) for _ in range(16)]
    plan = plan_of([list(range(8)), list(range(8, 16))], lengths)
    dealt = [list(MicroBatches(plan, {"task": rows_of(lengths)}, 2, 2, process, **options)) for process in (0, 1)]
    a_step = len(dealt[0]) // 2
    assert len(dealt[0]) == len(dealt[1])
    for k, step in enumerate(plan):
        mine = [keys for process in dealt for keys in process[k * a_step : (k + 1) * a_step]]
        assert sorted(key for keys in mine for key in keys) == sorted(step)


def test_what_cannot_be_cut_is_refused() -> None:
    lengths = [4, 4, 9]
    rows = {"task": rows_of(lengths)}
    with pytest.raises(UsageError, match="micro_tokens=8 is less than the 9 tokens of row 2 of the source 'task'"):
        MicroBatches(plan_of([[0, 1, 2]], lengths), rows, 1, packing=True, micro_tokens=8)
    with pytest.raises(UsageError, match="micro_tokens=9 cuts the largest step into 2 micro-batches, more than the 1 rows of the "
                                         "smallest step; raise micro_tokens"):
        MicroBatches(plan_of([[0], [1, 2]], lengths), rows, 1, packing=True, micro_tokens=9)


# --- packed rows ----------------------------------------------------------------------------------------------


def made(family: str, attention: str) -> nn.Module:
    model = families.make(family, torch.float32).eval()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_packed_rows_give_the_loss_and_the_gradients_of_rows_side_by_side(family: str, attention: str) -> None:
    model = made(family, attention)
    items = list(zip(KEYS, ROWS, strict=True))
    found = []
    for packing in (False, True):
        batch = batch_of(items, 0, WEIGHTS, packing=packing)
        model.zero_grad()
        loss = response_loss(model, batch)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in parameters(model).items()}))
    (apart, gradients), (packed, same) = found
    assert packed == pytest.approx(apart, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_no_token_sees_another_row(family: str, attention: str) -> None:
    """The derivative of one row's logits by the other rows' embeddings is 0, exactly; by its own it is not."""
    model, batch = made(family, attention), pack(ROWS)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits[0]
    for number in range(len(ROWS)):
        mine = batch["rows"][0] == number
        (gradient,) = torch.autograd.grad(logits[mine].square().sum(), embedded, retain_graph=True)
        assert (gradient[0, ~mine] == 0).all() and (gradient[0, mine] != 0).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_models_that_keep_rows_apart_pass_the_check_and_are_left_as_they_were(family: str) -> None:
    model = families.make(family, torch.float32)
    check_rows_apart(model, ROWS[3])
    assert model.training and all(p.grad is None for p in model.parameters())


class Recurrent(nn.Module):
    """A language model with a state that it carries along."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(20, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 20)

    def forward(self, input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.cell(self.embed(input_ids))[0]))


class Counting(Recurrent):
    """One whose logits depend on the place in the whole sequence."""

    def forward(self, input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)) + torch.arange(input_ids.shape[1])[None, :, None])


def test_models_that_do_not_are_refused() -> None:
    with pytest.raises(UsageError, match="tokens of one row see those of another in a Recurrent .attention: its own.; turn packing off"):
        check_rows_apart(Recurrent(), ROWS[0])
    with pytest.raises(UsageError, match="tokens of one row see those of another in a OPTForCausalLM .attention: eager."):
        check_rows_apart(families.make("opt", torch.float32), ROWS[0])  # its mask knows nothing of positions
    with pytest.raises(UsageError, match="rows do not begin at position 0 in a Counting"):
        check_rows_apart(Counting(), ROWS[0])


def test_scores_of_packed_rows_are_those_of_rows_side_by_side() -> None:
    model, items = made("llama", "sdpa"), list(zip(KEYS, ROWS, strict=True))
    apart, packed = (score(model, batch_of(items, 0, WEIGHTS, packing=packing)) for packing in (False, True))
    whole = score(model, {**batch_of(items, 0, WEIGHTS, packing=True), "whole": True})
    for other in (packed, whole):
        assert torch.equal(other.labels, apart.labels) and torch.equal(other.rows, apart.rows) and torch.equal(other.weights, apart.weights)
        torch.testing.assert_close(other.logits, apart.logits, rtol=1e-4, atol=1e-4)


def test_a_subset_of_packed_rows_is_those_rows_packed() -> None:
    items = list(zip(KEYS, ROWS, strict=True))
    chosen = torch.tensor([True, False, False, True])
    found, expected = subset(batch_of(items, 0, WEIGHTS, packing=True), chosen), batch_of([items[0], items[3]], 0, WEIGHTS, packing=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_nothing_is_padding_and_a_first_token_in_the_loss_is_refused() -> None:
    assert pack(ROWS)["input_ids"].shape == (1, sum(len(row.input_ids) for row in ROWS)) and collate(ROWS, 0)["input_ids"].numel() > 18
    with pytest.raises(UsageError, match="a row's first token is in the loss, and nothing comes before it"):
        pack([Encoded((5, 6), (5, 6))])
