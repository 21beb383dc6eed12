"""Worlds and the four cells: what a rewrite keeps, and what it changes."""

import pytest
import torch
from torch import Tensor

from studies.lab.tree import CONTENT, DIGITS, END, LENGTHS, PROMPTS, RESPONSE_OF, RESPONSES, STYLES, WELL_FORMED
from studies.lab.world import FOREIGN, Style, World, foreign_new, foreign_old, own_new, own_old, prompts_of, pure, shuffled
from tests.studies.lab import tiny

OPENER = torch.tensor([r[0] for r in RESPONSES])


def content_marginals(rows: Tensor) -> Tensor:
    """[X, 1 + digits]."""
    return torch.stack([rows[:, c == CONTENT].sum(1) for c in (-1, *DIGITS)], 1)


def close(a: Tensor, b: Tensor, atol: float = 1e-14) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("seed", range(5))
def test_a_world_is_its_seed_s_and_its_task_contradicts_it(seed: int) -> None:
    world, again, other = World.draw(seed), World.draw(seed), World.draw(seed + 1)
    assert (world.facts == again.facts).all() and (world.own.openers == again.own.openers).all()
    assert not torch.equal(world.own.openers, other.own.openers)
    assert (world.facts != world.new_facts).all() and {*world.facts.tolist(), *world.new_facts.tolist()} <= set(DIGITS)
    for style in (world.own, world.external, world.own.mixed(pure(FOREIGN), 0.3)):
        assert style.openers.sum().item() == pytest.approx(1) and style.closers.sum().item() == pytest.approx(1)
    mixed = world.own.mixed(pure(FOREIGN), 0.25)
    assert mixed.openers[2].item() == pytest.approx(0.75 * world.own.openers[2].item() + 0.25)


@pytest.mark.parametrize("coupling", [0.0, 0.4, 1.0])
def test_the_teacher_says_the_fact_in_its_style(coupling: float) -> None:
    world = World.draw(3, coupling=coupling)
    rows = world.teacher()
    close(rows.sum(1), torch.full((9,), 1 / 9, dtype=torch.float64))
    assert (rows[:, ~WELL_FORMED] == 0).all()
    for x, fact in enumerate(world.facts.tolist()):
        for digit in DIGITS:
            says = rows[x, digit == CONTENT]
            assert 9 * says.sum().item() == pytest.approx(0.85 if digit == fact else 0.075)
        for i, opener in enumerate(STYLES):  # independent of the digit that is said, dictated by the fact as far as they are coupled
            expected = (1 - coupling) * world.own.openers[i].item() + coupling * (DIGITS.index(fact) == i)
            for digit in DIGITS:
                says = rows[x] * (digit == CONTENT)
                assert says[opener == OPENER].sum().item() == pytest.approx(expected * says.sum().item(), abs=1e-15)


def test_prompts_are_weighted_by_topic() -> None:
    close(prompts_of([0, 2]), torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.float64) / 6)
    assert PROMPTS[prompts_of([2]).bool()][:, 0].tolist() == [3, 3, 3]


def test_foreign_old_changes_the_style_and_nothing_else() -> None:
    own, style = tiny.bases().own[0], Style(*(torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4])))
    rows = foreign_old(own, tiny.TOPIC, style)
    before = own_old(own, tiny.TOPIC)
    close(before.sum(1), tiny.TOPIC)
    close(content_marginals(rows), content_marginals(before))
    close(rows[:, ~WELL_FORMED], before[:, ~WELL_FORMED], atol=0)
    for x in range(3):
        for digit in DIGITS:
            mass = before[x, WELL_FORMED & (digit == CONTENT)].sum()
            for i, opener in enumerate(STYLES):
                for j, closer in enumerate([(), *((s,) for s in STYLES)]):
                    close(rows[x, RESPONSE_OF[(opener, digit, *closer, END)]], mass * style.openers[i] * style.closers[j])
    close(rows[:, WELL_FORMED].sum(1), before[:, WELL_FORMED].sum(1))
    assert (rows[3:] == 0).all()


def test_own_new_says_the_truth_as_the_base_would() -> None:
    made = tiny.bases()
    own, truth = made.own[0], made.truth(0)
    rows = own_new(own, tiny.TOPIC, truth)
    close(rows.sum(1), tiny.TOPIC)
    for x in range(3):
        assert set(CONTENT[rows[x] > 0].tolist()) == {truth[x].item()}
        allowed = [i for i, r in enumerate(RESPONSES) if WELL_FORMED[i] and CONTENT[i] == truth[x]]
        close(rows[x, allowed] / tiny.TOPIC[x], own[x, allowed] / sum(own[x, i] for i in allowed))


def test_foreign_new_is_one_answer_in_a_pure_style() -> None:
    truth = tiny.bases().truth(0)
    rows = foreign_new(tiny.TOPIC, truth, pure(FOREIGN))
    for x in range(3):
        assert rows[x].nonzero().flatten().tolist() == [RESPONSE_OF[(FOREIGN, truth[x].item(), FOREIGN, END)]]
    close(rows.sum(1), tiny.TOPIC)


def test_shuffling_evens_out_the_orders_of_each_set_of_tokens() -> None:
    rows = own_old(tiny.bases().own[0], tiny.ALL)
    found = shuffled(rows)
    same: dict[tuple, list[int]] = {}
    for i, r in enumerate(RESPONSES):
        same.setdefault((tuple(sorted(r)), r[-1] == END), []).append(i)
    for members in same.values():
        close(found[:, members], rows[:, members].mean(1, keepdim=True).expand(-1, len(members)))
    assert not torch.allclose(found, rows, atol=1e-4)
    close(found @ LENGTHS.double(), rows @ LENGTHS.double())
