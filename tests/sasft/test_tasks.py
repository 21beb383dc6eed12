import importlib
import json

import pytest

from sasft.errors import UsageError
from sasft.restyle import STYLES, restyle
from sasft.tasks import TASKS, Problem, Sums, get_task, reasoning_gym_task


@pytest.fixture(scope="module")
def problems():
    return Sums().problems(300, seed=7)


# --- the stream --------------------------------------------------------------------------------


def test_the_first_problems_are_these():
    """Golden: a change here changes every data set that anyone has made from a seed."""
    assert [(p.question, p.answer) for p in Sums().problems(3, seed=0)] == [
        ("Work out 209 + 587 - 10.", "786"),
        ("How much is 861 - 90 + 47?", "818"),
        ("Calculate 569 + 554 - 76.", "1047"),
    ]


def test_streams_are_deterministic_and_nested(problems):
    again = Sums().problems(300, seed=7)
    assert [(p, p.meta) for p in again] == [(p, p.meta) for p in problems]
    assert Sums().problems(100, seed=7) == problems[:100]
    assert Sums().problems(300, seed=8) != problems


def test_an_item_depends_on_its_seed_and_index_alone():
    task = Sums()
    forwards = [task.item(5, i) for i in range(20)]
    assert [task.item(5, i) for i in reversed(range(20))] == forwards[::-1]


def test_problems_are_distinct(problems):
    assert len({p.key for p in problems}) == len({p.question for p in problems}) == 300


def test_excluded_keys_are_passed_over_in_order(problems):
    gone = {problems[0].key, problems[2].key}
    expected = [p for p in problems if p.key not in gone]
    assert Sums().problems(298, seed=7, exclude=gone) == expected


def test_train_and_test_are_disjoint():
    task = Sums(terms=(2, 2), digits=(1, 1))  # so few problems that two seeds collide
    train = task.problems(60, seed=0)
    keys = {p.key for p in train}
    assert keys & {p.key for p in task.problems(30, seed=1)}
    assert not keys & {p.key for p in task.problems(30, seed=1, exclude=keys)}


def test_every_problem_there_is_and_no_more():
    task = Sums(terms=(2, 2), digits=(1, 1), operators="+")
    every = {tuple(sorted((a, b))) for a in range(1, 10) for b in range(1, 10)}
    assert {tuple(sorted(p.meta["terms"])) for p in task.problems(45, seed=0)} == every
    with pytest.raises(UsageError, match="'sums' made only 45 of the 46 problems"):
        task.problems(46, seed=0)
    with pytest.raises(UsageError, match=r"made only 0 of the 1 .*\(45 keys excluded\)"):
        task.problems(1, seed=0, exclude={p.key for p in task.problems(45, seed=1)})


def test_no_problems_is_an_error():
    with pytest.raises(UsageError, match="n .* at least 1, got 0"):
        Sums().problems(0, seed=0)


# --- sums --------------------------------------------------------------------------------------


def test_sums_are_right_and_within_their_options(problems):
    for p in problems:
        assert int(p.answer) == sum(p.meta["terms"]) == eval(p.meta["expression"])
        assert p.meta["expression"] in p.question
        assert 2 <= len(p.meta["terms"]) <= 3
        assert all(10 <= abs(t) <= 999 for t in p.meta["terms"])
    assert {len(p.meta["terms"]) for p in problems} == {2, 3}
    assert {len(str(abs(t))) for p in problems for t in p.meta["terms"]} == {2, 3}
    assert any("-" in p.meta["expression"] for p in problems)
    assert any("+" in p.meta["expression"] for p in problems)


def test_operators_and_difficulty():
    plus = Sums(operators="+", terms=(4, 4), digits=(5, 5)).problems(20, seed=0)
    assert all(t >= 10_000 for p in plus for t in p.meta["terms"])
    minus = Sums(operators="-").problems(20, seed=0)
    assert all(t < 0 for p in minus for t in p.meta["terms"][1:])


def test_order_of_terms_is_the_same_problem():
    keys = [p.key for p in Sums(digits=(1, 1), terms=(2, 3)).problems(100, seed=0)]
    assert len({tuple(sorted(k.split())) for k in keys}) == 100


def test_restating_the_question_is_no_answer(problems):
    task = Sums()
    for p in problems:
        assert not task.check(p, p.question)
        assert not task.mentions(p, p.question)


def test_both_golds_pass_and_a_wrong_one_fails(problems):
    task = Sums()
    for p in problems:
        assert task.raw_answer(p) == p.answer
        for gold in (task.raw_answer(p), task.sentence(p)):
            assert task.check(p, gold) and task.mentions(p, gold)
        wrong = Problem(p.key, p.question, str(int(p.answer) + 1), p.meta)
        assert not task.check(p, task.sentence(wrong))
    starts = {task.sentence(p).replace(p.meta["expression"], "E").replace(p.answer, "A")
              for p in problems}
    assert starts == {"E is A.", "E equals A.", "E = A.", "The result of E is A."}


@pytest.mark.parametrize("style", STYLES)
def test_restyled_golds_still_state_the_truth(problems, style):
    """The style changes and the checker agrees that the content does not."""
    task = Sums()
    for p in problems[:100]:
        assert task.check(p, restyle(task.sentence(p), style))


def test_mentions_is_weaker_than_check():
    task, p = Sums(), Problem("k", "", "214", {"terms": (42, 57, 115)})
    for text in ("214 or 215", "not 214", "is it 214?", "215 - 214", "1 or 214."):
        assert task.mentions(p, text) and not task.check(p, text)
    assert not task.mentions(p, "2140, x214, -214")


def test_meta_survives_json(problems):
    p = problems[0]
    loaded = Problem(p.key, p.question, p.answer, json.loads(json.dumps(p.meta)))
    assert Sums().check(loaded, Sums().sentence(p))
    assert Sums().sentence(loaded) == Sums().sentence(p)


@pytest.mark.parametrize(("options", "message"), [
    ({"terms": (3, 2)}, r"terms must be .*2 <= least <= most, got \(3, 2\)"),
    ({"terms": (1, 2)}, "terms must be"),
    ({"digits": (0, 2)}, "digits must be"),
    ({"operators": "*"}, "operators must be .* got '\\*'"),
])
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        Sums(**options)


def test_get_task():
    assert get_task("sums", terms=(2, 2)) == Sums(terms=(2, 2))
    assert list(TASKS) == ["sums"]
    with pytest.raises(UsageError, match="'products' does not exist; use one of: sums, reason"):
        get_task("products")
    with pytest.raises(UsageError, match="'sums' refuses options {'bases': 3}"):
        get_task("sums", bases=3)


# --- reasoning-gym -----------------------------------------------------------------------------


def test_missing_library_names_the_extra(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UsageError, match=r"_gym:chain_sum' .* pip install 'sasft\[tasks\]'"):
        get_task("reasoning_gym:chain_sum")


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", [
    "chain_sum", "gcd", "leg_counting", "spell_backward", "family_relationships", "letter_counting",
    "prime_factorization", "fraction_simplification", "number_sorting", "calendar_arithmetic",
])
def test_gym_golds_pass_and_nonsense_fails(gym, name):
    task = get_task(f"reasoning_gym:{name}")
    problems = task.problems(10, seed=0)
    for p, other in zip(problems, problems[1:] + problems[:1], strict=True):
        for gold in (task.raw_answer(p), task.sentence(p), f"<answer>{p.answer}</answer>"):
            assert task.check(p, gold)
            assert task.mentions(p, gold)
        assert not task.check(p, "I do not know.")
        assert task.check(p, task.sentence(other)) == (p.answer == other.answer)


def test_gym_scores_agree_with_the_librarys_own(gym):
    """Oracle: on bare answers, check is score_answer == 1."""
    task = reasoning_gym_task("chain_sum")
    dataset = gym.create_dataset("chain_sum", seed=0, size=1)
    for p in task.problems(20, seed=0):
        for bare in (p.answer, f"{p.answer}.0", f"+{p.answer}", str(int(p.answer) + 1), "12", ""):
            if "+-" not in bare:
                scored = dataset.score_answer(bare, p.meta["entry"]) == 1.0
                assert task.check(p, bare) == scored


def test_gym_numbers_are_found_in_free_text(gym):
    task = reasoning_gym_task("gcd", min_value=50, max_value=500)
    for p in task.problems(20, seed=0):
        assert task.check(p, f"They share factors, so the GCD is **{p.answer}**.")
        assert not task.check(p, f"It is {p.answer} or {int(p.answer) + 1}.")
        assert not task.check(p, p.question)


def test_gym_streams(gym):
    task = reasoning_gym_task("chain_sum", min_terms=2, max_terms=2)
    train = task.problems(1100, seed=0)  # beyond one block of the library's
    assert reasoning_gym_task("chain_sum", min_terms=2, max_terms=2).problems(1100, seed=0) == train
    assert task.problems(50, seed=0) == train[:50]
    keys = {p.key for p in train}
    assert len(keys) == 1100
    assert not keys & {p.key for p in task.problems(50, seed=1, exclude=keys)}


def test_gym_neighbouring_seeds_do_not_share_their_items(gym):
    """The library's own seeds are added to the index: seed 1 is seed 0 moved on by one item."""
    ours = [{p.key for p in reasoning_gym_task("chain_sum", min_digits=4, max_digits=4).problems(
        50, seed=s)} for s in (0, 1)]
    assert not ours[0] & ours[1]


@pytest.mark.parametrize(("name", "config", "message"), [
    ("chain_sums", {}, "no dataset 'chain_sums'; it has .* chain_sum"),
    ("chain_sum", {"seed": 1, "size": 5}, "must not hold seed and size"),
    ("chain_sum", {"colour": 1}, "refuses 'chain_sum' with config {'colour': 1}"),
    ("chain_sum", {"min_terms": 9, "max_terms": 2}, "refuses 'chain_sum'"),
    ("graph_color", {}, "states no gold answer"),
    ("game_of_life_halting", {}, "full marks to any answer"),
])
def test_gym_refusals(gym, name, config, message):
    with pytest.raises(UsageError, match=message):
        reasoning_gym_task(name, **config)
