"""The tree of responses against loops over its prefixes."""

import re

import pytest
import torch

from studies.lab.tree import (
    CONTENT,
    DIGITS,
    END,
    FINISHED,
    FIRST_DIGIT,
    LENGTH,
    LENGTHS,
    NODES,
    RESPONSES,
    STYLES,
    VOCABULARY,
    WELL_FORMED,
    flow,
    response_probabilities,
)
from tests.studies.lab import tiny


def test_every_way_of_speaking_is_there_once() -> None:
    for r in RESPONSES:
        assert all(r[:t] in NODES[sum(9**k for k in range(t)):] for t in range(len(r)))  # its prefixes are nodes
        assert END not in r[:-1] and (r[-1] == END or len(r) == LENGTH)
    assert len(set(RESPONSES)) == len(RESPONSES) and len(set(NODES)) == len(NODES)
    # No response begins another, and none is missing: Kraft's sum is 1.
    assert sum((VOCABULARY ** (LENGTH - len(r)) for r in RESPONSES), 0) == VOCABULARY**LENGTH


def test_probabilities_and_flows_are_those_of_a_loop() -> None:
    log_p = tiny.random_tables(2, 3)
    fast = response_probabilities(log_p)
    rows = torch.rand(2, 3, len(RESPONSES), generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.3
    fast_flow = flow(rows)
    number = {node: i for i, node in enumerate(NODES)}
    for a, b in [(0, 0), (1, 2)]:
        table, weights = log_p[a, b].exp().tolist(), rows[a, b].tolist()
        slow_flow = [[0.0] * VOCABULARY for _ in NODES]
        for i, r in enumerate(RESPONSES):
            p = 1.0
            for t, v in enumerate(r):
                p *= table[number[r[:t]]][v]
                slow_flow[number[r[:t]]][v] += weights[i]
            assert fast[a, b, i].item() == pytest.approx(p, rel=1e-13)
        torch.testing.assert_close(fast_flow[a, b], torch.tensor(slow_flow, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close(fast.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_model_s_own_flow_is_reach_times_probability() -> None:
    log_p = tiny.random_tables(seed=2)
    found = flow(response_probabilities(log_p))
    torch.testing.assert_close(found, tiny.reach(log_p)[:, None] * log_p.exp(), rtol=0, atol=1e-15)
    arriving = torch.tensor([1.0, *(found[NODES.index(n[:-1]), n[-1]].item() for n in NODES[1:91])], dtype=torch.float64)
    torch.testing.assert_close(found[:91].sum(1), arriving, rtol=0, atol=1e-15)


def test_content_and_form_are_those_of_a_regular_expression() -> None:
    letter = {END: ".", **dict.fromkeys((1, 2, 3), "t"), **dict.fromkeys(DIGITS, "d"), **dict.fromkeys(STYLES, "s")}
    for r, said, formed, finished, length in zip(RESPONSES, CONTENT.tolist(), WELL_FORMED.tolist(), FINISHED.tolist(), LENGTHS.tolist(), strict=True):
        text = "".join(letter[v] for v in r)
        first = text.find("d")
        assert said == (r[first] if first >= 0 else -1)
        assert formed == bool(re.fullmatch(r"s?ds?\.", text)) and finished == text.endswith(".") and length == len(text)


def test_content_is_decided_where_the_first_digit_is_written() -> None:
    p = response_probabilities(tiny.random_tables(seed=3))
    decided = (flow(p) * FIRST_DIGIT).sum(0)
    for digit in DIGITS:
        assert decided[digit].item() == pytest.approx(p[digit == CONTENT].sum().item(), abs=1e-14)
    assert decided.sum().item() == pytest.approx(p[CONTENT > 0].sum().item(), abs=1e-14)
