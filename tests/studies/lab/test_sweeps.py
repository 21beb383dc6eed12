"""Conditions: each varies what it says and nothing else."""

from dataclasses import asdict, replace

import pytest
import torch

from studies.lab import exact
from studies.lab.experiment import TASK_ONLY, Bases, Setup, measure, rows_of_cell, self_rows, train
from studies.lab.sweeps import SA_SFT, Sweep, condition, four_arms, sweeps
from studies.lab.tree import flow
from tests.studies.lab import tiny

FIELDS = {"learning rate": "lr", "share of new facts": "share"}


def conditions(**changes: object) -> list[Sweep]:
    return list(sweeps(replace(tiny.bases().setup, **changes), quick=False))


def test_each_varies_one_thing() -> None:
    base = Setup(seeds=3)
    full, quick = list(sweeps(base, quick=False)), list(sweeps(base, quick=True))
    names = list(dict.fromkeys(s.name for s in full))
    assert names == ["phase", "learning rate", "share of new facts", "number of self-rows", "temperature", "top-p"]
    assert {s.name for s in quick} <= set(names) and len(quick) < len(full) / 3
    identities = [(s.name, s.value, s.setup) for s in full]
    assert len(set(identities)) == len(full)  # each is kept on disk under its own name
    for s in full:
        changed = {name for name, value in asdict(s.setup).items() if value != getattr(base, name)}
        if s.name == "phase":
            assert changed <= {"coupling", "width"} and s.value == s.setup.coupling
        elif s.name in FIELDS:
            assert changed == {FIELDS[s.name]} and getattr(s.setup, FIELDS[s.name]) == s.value
        else:
            assert changed == set() and list(s.arms) == [TASK_ONLY, SA_SFT]
    assert {s.setup.coupling for s in quick} == {0.0, 1.0} and len({s.setup.width for s in quick}) > 1
    assert {s.setup.width for s in full if s.name == "phase"} >= {s.setup.width for s in quick}


def test_each_has_the_self_data_that_it_names() -> None:
    bases = tiny.bases()
    task = flow(rows_of_cell(bases, 0, "foreign", "new"))
    assert list(four_arms()) == ["own/new", "foreign/old", TASK_ONLY, SA_SFT]
    seen = set()
    for s in conditions():
        torch.testing.assert_close(s.arms[TASK_ONLY](bases, 0), task)
        source = 2 * s.arms[SA_SFT](bases, 0) - task
        if s.name in ("temperature", "top-p"):  # all are made in a loop: each must keep its own value
            expected = flow(self_rows(bases, 0, **{"temperature": s.value} if s.name == "temperature" else {"top_p": s.value}))
        elif s.name == "number of self-rows":
            expected = flow(exact.drawn_rows(self_rows(bases, 0), s.value, 0))
            drawn = source[:, 0].sum().item()
            assert drawn == pytest.approx(1) and (source * s.value - (source * s.value).round()).abs().max() < 1e-9  # whole rows
            assert not torch.allclose(s.arms[SA_SFT](bases, 1), s.arms[SA_SFT](bases, 0))
        else:
            expected = flow(self_rows(bases, 0))
        torch.testing.assert_close(source, expected, rtol=0, atol=1e-12)
        seen.add(round(float((source**2).sum()), 12))
    assert len(seen) == 12  # eleven with data of their own, and exact self-data


def test_a_condition_s_table_is_its_arms_trained_and_measured() -> None:
    sweep = next(s for s in conditions(record=(0, 2)) if s.name == "share of new facts" and 0 < s.value < 0.5)
    bases = Bases.of(sweep.setup, tiny.bases().params)
    narrow = replace(sweep, arms={name: sweep.arms[name] for name in (TASK_ONLY, "own/new")})
    rows = condition(narrow, bases)
    found = measure(bases, train(bases, narrow.arms))
    assert len(rows) == 2 * 2 * 2
    for r in rows:
        assert (r["sweep"], r["value"], r["share"], r["width"], r["coupling"], r["lr"]) == ("share of new facts", 1 / 3, 1 / 3, 4, 0.0, 0.004)
        at = list(narrow.arms).index(r["arm"]), (0, 2).index(r["step"]), r["seed"]
        assert r["kl"] == pytest.approx(found["kl"][at].item()) and r["gain"] == pytest.approx(found["gain"][at].item(), abs=1e-12)
