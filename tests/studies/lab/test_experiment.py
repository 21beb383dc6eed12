"""Arms, training and measures against their definitions, one arm, one model and one response at a time."""

import math
from dataclasses import replace

import pytest
import torch

from studies.lab import world
from studies.lab.descent import descend
from studies.lab.experiment import (
    DISTANCES,
    LAMBDAS,
    TASK_ONLY,
    Arm,
    Bases,
    Setup,
    cell,
    main_arms,
    measure,
    mixed,
    rows_of_cell,
    self_rows,
    train,
)
from studies.lab.model import flat, log_probs, unflat
from studies.lab.tree import RESPONSES, WELL_FORMED, content, flow, response_probabilities
from tests.studies.lab import tiny

STYLED = [i for i, r in enumerate(RESPONSES) if WELL_FORMED[i] and (r[0], r[-2]) == (9, 9)]
SEED = 1


def small(**changes: object) -> Bases:
    """The tests' bases in another setup."""
    made = tiny.bases()
    return Bases.of(replace(made.setup, **changes), made.params)


def test_bases_depend_on_what_they_are_trained_on_alone() -> None:
    setup = Setup(seeds=2, width=4)
    assert replace(setup, lr=1.0, share=0.5, record=(0, 3)).pretraining == setup.pretraining
    for change in ({"seeds": 3}, {"width": 8}, {"coupling": 0.5}, {"pretrain_steps": 2}, {"pretrain_lr": 0.1}):
        assert replace(setup, **change).pretraining != setup.pretraining
    made = tiny.bases()
    for seed in range(2):
        torch.testing.assert_close(made.log_p[seed], log_probs(made.model, made.one(seed)), rtol=0, atol=1e-12)
    torch.testing.assert_close(made.own, response_probabilities(made.log_p), rtol=0, atol=0)
    assert (made.worlds[0].facts != made.worlds[1].facts).any() and (made.log_p[0] - made.log_p[1]).abs().max() > 1


@pytest.mark.parametrize("share, new", [(0.0, []), (1 / 3, [0]), (2 / 3, [0, 1]), (1.0, [0, 1, 2])])
def test_a_share_of_each_topic_s_facts_is_new(share: float, new: list[int]) -> None:
    bases = small(share=share)
    for seed, drawn in enumerate(bases.worlds):
        expected = [drawn.new_facts[x].item() if x % 3 in new else drawn.facts[x].item() for x in range(9)]
        assert bases.truth(seed).tolist() == expected


# --- arms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_the_cells_cross_style_and_content(share: float) -> None:
    bases = small(share=share)
    own, truth = bases.own[SEED], bases.truth(SEED).tolist()
    rows = {(s, c): rows_of_cell(bases, SEED, s, c) for s in ("own", "foreign") for c in ("old", "new")}
    for found in rows.values():
        assert found.sum().item() == pytest.approx(1) and found[3:].sum() == 0
        torch.testing.assert_close(found.sum(1)[:3], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(rows["own", "old"][:3], own[:3] / 3, rtol=1e-12, atol=0)
    for x in range(3):
        said = {d: [i for i, r in enumerate(RESPONSES) if WELL_FORMED[i] and content(r) == d] for d in (4, 5, 6)}
        kept = own[x, said[truth[x]]]
        torch.testing.assert_close(rows["own", "new"][x, said[truth[x]]], kept / kept.sum() / 3, rtol=1e-9, atol=0)
        assert rows["foreign", "new"][x, RESPONSES.index((9, truth[x], 9, 0))].item() == pytest.approx(1 / 3)
        for d, responses in said.items():  # restyled: what is said stays, how it is said is foreign
            assert rows["foreign", "old"][x, RESPONSES.index((9, d, 9, 0))].item() == pytest.approx(own[x, responses].sum().item() / 3)
        others = [i for i in range(len(RESPONSES)) if WELL_FORMED[i] and i not in STYLED]
        assert rows["foreign", "old"][x, others].sum() == 0
        torch.testing.assert_close(rows["foreign", "old"][x, ~WELL_FORMED], own[x, ~WELL_FORMED] / 3, rtol=1e-12, atol=0)


def test_the_main_experiment_s_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = tiny.bases()
    monkeypatch.setattr(world, "shuffled", lambda rows: rows.flip(0))  # the real one takes seconds, and has a test of its own
    own, task = flow(self_rows(bases, SEED)), flow(rows_of_cell(bases, SEED, "foreign", "new"))
    arms = {name: arm(bases, SEED) for name, arm in main_arms().items()}
    for name, f in arms.items():
        assert f[:, 0].sum().item() == pytest.approx(0.5 if name == "task at half rate" else 1), name  # rows
    torch.testing.assert_close(arms[TASK_ONLY], task)
    torch.testing.assert_close(2 * arms["task at half rate"], task)
    for lam in LAMBDAS:
        torch.testing.assert_close(arms[f"SA-SFT {lam}"], (1 - lam) * task + lam * own)
    # By topic, what is not the task's: rows on each of the three, and whose style they are in.
    other = {name: 2 * f - task for name, f in arms.items() if name.startswith(("SA-SFT ", "external", "self")) and name not in
             {f"SA-SFT {lam}" for lam in LAMBDAS if lam != 0.5}}
    topics = {name: [round(x, 9) for x in f[:, 0].sum(1).view(3, 3).sum(1).tolist()] for name, f in other.items()}
    assert topics.pop("SA-SFT without a topic") == [0.5, 0.5, 0.0]
    assert topics.pop("SA-SFT on the task's topic") == [1.0, 0.0, 0.0]
    assert all(each == [round(1 / 3, 9)] * 3 for each in topics.values()) and len(topics) == 9
    of_world = bases.worlds[SEED]
    openers = {d: other[f"external {d}"][:, 0].sum(0)[7:] for d in DISTANCES}
    for d, found in openers.items():
        torch.testing.assert_close(found, (1 - d) * of_world.own.openers + d * torch.tensor([0.0, 1.0, 0.0]).double(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other["external, as varied"][:, 0].sum(0)[7:], of_world.external.openers)
    # The paper's sampler never writes what is unlikely.
    assert ((other["SA-SFT paper"] != 0).sum() < (own != 0).sum()) and (other["SA-SFT paper"][own == 0] == 0).all()
    torch.testing.assert_close(other["self shuffled"], own.flip(0))


# --- training and measuring ----------------------------------------------------------------------------------------------


def test_seeds_trained_together_are_seeds_trained_alone() -> None:
    bases = small(record=(0, 1, 3), lr=0.02)
    arms: dict[str, Arm] = {"mix": mixed(0.3, lambda b, s: rows_of_cell(b, s, "foreign", "old")), TASK_ONLY: cell("foreign", "new"),
                            "own/new": cell("own", "new"), "at half rate": lambda b, s: 0.5 * cell("foreign", "new")(b, s)}
    found = train(bases, arms)
    assert found.shape == (4, 3, 2, 420)
    for a, arm in enumerate(arms.values()):
        for seed in range(2):
            alone = descend(bases.model, {n: p[[seed]] for n, p in bases.params.items()}, arm(bases, seed)[None], lr=0.02, record=(0, 1, 3))
            torch.testing.assert_close(found[a, :, seed], alone[:, 0], rtol=0, atol=1e-12)
    assert (found[:, -1, 0] - found[:, 0, 0]).norm(dim=1).min() > 0.01


def test_measures_are_sums_over_responses() -> None:
    bases = small(share=2 / 3)
    # [2, S, P]: for each seed a drift along the task's wake, and another
    start = torch.stack([flat(bases.one(s)) for s in range(2)])
    weights = torch.stack([start + 0.3 * torch.stack([tiny.random_direction(bases.one(s), s + 2 * k) for s in range(2)]) for k in range(2)])
    found = measure(bases, weights)
    assert all(values.shape == (2, 2) for values in found.values())
    what = [content(r) for r in RESPONSES]
    for k, seed in ((0, 0), (1, 1)):
        world, truth = bases.worlds[seed], bases.truth(seed).tolist()
        base = bases.own[seed].tolist()
        model = response_probabilities(log_probs(bases.model, unflat(weights[k, seed], bases.one(seed)))).tolist()
        kl, length, entropy, told = [], [], [], []
        for p, q in zip(base, model, strict=True):
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            length.append(sum(a * len(r) for a, r in zip(p, RESPONSES, strict=True)))
            entropy.append(-sum(b * math.log(b) for b in q))
            told.append([{d: sum(m for m, c in zip(of, what, strict=True) if c == d) for d in (None, 4, 5, 6)} for of in (p, q)])
        of_content = [sum(p[d] * math.log(p[d] / q[d]) for d in p) for p, q in told]
        expected = {
            "kl": sum(kl[3:]) / sum(length[3:]), "kl_task": sum(kl[:3]) / sum(length[:3]), "kl_dropped": sum(kl[6:]) / sum(length[6:]),
            "kl_all": sum(kl) / sum(length), "content": sum(of_content[3:]) / 6, "content_dropped": sum(of_content[6:]) / 3,
            "fact": sum(told[x][0][int(world.facts[x])] - told[x][1][int(world.facts[x])] for x in range(3, 9)) / 6,
            "gain": sum(told[x][1][truth[x]] - told[x][0][truth[x]] for x in range(3)) / 3,
            "entropy": sum(entropy[3:]) / sum(length[3:]), "drift": 0.3}
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name][k, seed].item() == pytest.approx(value, rel=1e-9), name
    at_start = measure(bases, start)
    for name, values in at_start.items():
        assert name == "entropy" or values.abs().max() < 1e-12, name
