"""Rows that the model writes itself: rehearsal in SSR's way, and a task from a few demonstrations."""

import json
import math
import re
import sys
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest

import sasft.writing
from sasft.data import Row, read_rows
from sasft.errors import UsageError
from sasft.methods import Costs, Workshop, method, parse_method
from sasft.methods.demonstrations import Demonstrations
from sasft.methods.synthesis import balanced, length_window, majority, nearest_of_clusters, noise_of, parse_examples
from sasft.methods.written import greedy
from sasft.mixing import SELF, TASK
from sasft.sampling import sample
from sasft.train import train
from tests.sasft import tiny_chat
from tests.sasft.methods import scripted

MODULE = sys.modules["sasft.train"]
RULE = "Is the number even?\n\n"
EARLIER = [scripted.row(f"{RULE}number {i}", "yes" if i % 2 == 0 else "no", "self") for i in range(6)]
TASK_ROWS = [scripted.row(f"Say it in French: word {i}", f"le mot {i}") for i in range(5)]


def turns(text: str) -> list[tuple[str, str]]:
    """(role, content) of a rendered prompt."""
    return re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)


# --- demonstrations -----------------------------------------------------------------------------------------------


def test_demonstrations_are_drawn_by_the_seed_from_whole_single_turns() -> None:
    rows = [*EARLIER, scripted.row("cut", "so", finished=False),
            Row("m", "self", (*EARLIER[0].prompt, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}), "c")]
    demos = Demonstrations.draw(rows, 6, SELF, seed=0)
    assert sorted(demos.inputs) == [f"number {i}" for i in range(6)] and demos.instruction == RULE
    assert Demonstrations.draw(rows, 3, SELF, seed=0).inputs == demos.inputs[:3]
    assert len({Demonstrations.draw(rows, 6, SELF, seed=s).inputs for s in range(5)}) > 1
    with pytest.raises(UsageError, match="demonstrations is 7, but the source 'self' has 6 rows with one user turn and a whole answer"):
        Demonstrations.draw(rows, 7, SELF, seed=0)


def test_what_prompts_share_is_their_instruction_up_to_a_blank_line() -> None:
    assert Demonstrations.draw(TASK_ROWS, 3, TASK, 0).instruction == ""  # they share words, and no paragraph
    assert Demonstrations.draw(EARLIER, 1, TASK, 0).instruction == ""  # of one, no part can be told from another
    with_system = [Row("1", "task", ({"role": "system", "content": s}, {"role": "user", "content": "x"}), "y") for s in "ab"]
    assert Demonstrations.draw(with_system, 2, TASK, 0).system == ()
    assert Demonstrations.draw([with_system[0]] * 2, 2, TASK, 0).asked("z") == (with_system[0].prompt[0], {"role": "user", "content": "z"})


# --- SSR ----------------------------------------------------------------------------------------------------------


def ssr_script(text: str, seed: int) -> str:
    """Examples as asked for, some of them of no use; and answers."""
    if "Input:" not in text:
        return "refined"
    kind = seed % 5
    return {0: "Input: number 3\nOutput: no",  # a demonstration
            1: "I can't.", 2: "Input: number 77\nOutput: base"}.get(kind, f"Input: number {seed % 1000 + 100}\nOutput: base")


def rehearsed(folder: Path, script=ssr_script, seed: int = 0, **options) -> tuple[dict[str, list[Row]], Workshop]:
    shop = scripted.workshop(folder, script, seed)
    options = {"n": 8, "demonstrations": 6, "samples": 1, "clusters": 3, **options}
    return method("ssr", **options).rows({TASK: TASK_ROWS, SELF: EARLIER}, shop), shop


def test_every_ordered_pair_of_demonstrations_is_shown(tmp_path: Path) -> None:
    rows, shop = rehearsed(tmp_path, demonstrations=3, samples=2)
    shown = Counter(tuple(content for role, content in turns(text) if role == "assistant") for text in shop.writer.asked
                    if "Input:" in text)
    demos = Demonstrations.draw(EARLIER, 3, SELF, seed=0)
    examples = [f"Input: {x}\nOutput: {y}" for x, y in zip(demos.inputs, demos.outputs, strict=True)]
    assert shown == dict.fromkeys(permutations(examples, 2), 2)
    assert shop.writer.samplers[0] == {"temperature": 0.9, "top_p": 0.6, "max_new_tokens": 256}
    assert all("Is the number even?" in text for text in shop.writer.asked)


def test_chosen_inputs_are_answered_anew_and_precede_the_task(tmp_path: Path) -> None:
    rows, shop = rehearsed(tmp_path)
    new = rows[TASK][: -len(TASK_ROWS)]
    assert rows[TASK][-len(TASK_ROWS) :] == TASK_ROWS and rows[SELF] == EARLIER
    assert len(new) in range(6, 11) and {row.response for row in new} == {"refined"} and {row.source for row in new} == {"ssr"}
    prompts = [row.prompt[-1]["content"] for row in new]
    assert len(set(prompts)) == len(prompts) and all(p.startswith(RULE) for p in prompts) and {len(row.prompt) for row in new} == {1}
    assert not set(prompts) & {row.prompt[-1]["content"] for row in EARLIER}
    assert {row.meta["sampler"]["top_p"] for row in new} == {1e-9}
    said = json.loads((tmp_path / "ssr.json").read_text())
    assert said["examples"] == 30 and said["examples"] > said["parsed"] > said["distinct"] >= said["rehearsed"] == len(new)


def test_generated_tokens_are_counted_once_and_what_is_on_file_stays(tmp_path: Path) -> None:
    rows, shop = rehearsed(tmp_path)
    files = [tmp_path / "ssr-examples.jsonl", tmp_path / "ssr-answers.jsonl"]
    assert shop.costs == Costs(generated_tokens=sum(len(r.meta["logprobs"]) for f in files for r in read_rows(f)))
    files[1].unlink()
    files[0].write_text("".join(files[0].read_text().splitlines(keepends=True)[:18]))  # stopped in the fifth batch of four
    again, second = rehearsed(tmp_path)
    assert again == rows and second.costs == shop.costs
    assert sum("Input:" in text for text in second.writer.asked) == 14
    assert rehearsed(tmp_path)[1].writer.asked == []
    assert rehearsed(tmp_path / "other", seed=1)[0] != rows


def test_the_refining_sampler_is_greedy() -> None:
    model, chat = tiny_chat.chatty(), tiny_chat.chat()
    prompts = [chat.prompt_ids(({"role": "user", "content": text},)) for text in ("Why?", "Go on", "And then?")]
    kwargs = {"stop_id": chat.end_of_turn, "pad_id": chat.pad_id}
    assert [s.ids for s in sample(model, prompts, [1, 2, 3], greedy(10), **kwargs)] == [
        s.ids for s in sample(model, prompts, [7, 8, 9], greedy(10), greedy=True, **kwargs)]


@pytest.mark.parametrize("text, expected", [
    ("Input: a\nOutput: b", [("a", "b")]),
    (" a\nOutput: b\n\nInput: c\nd\nOutput: e", [("a", "b"), ("c\nd", "e")]),  # which goes on where the prompt has "Input:"
    ("Input: a\nOutput: b\nOutput: c", []),
    ("Input: a\nOutput:", []),
    ("Input:\nOutput: b", []),
    ("nothing", []),
])
def test_examples_are_read_from_what_the_model_wrote(text: str, expected: list) -> None:
    assert parse_examples(text) == expected


def test_each_cluster_gives_its_share_of_the_rows_nearest_to_its_centre() -> None:
    """Against TF-IDF and distances written out, on texts whose clusters are plain."""
    fruit = ["apple pear", "apple pear plum", "apple pear fig", "apple fig pear plum lime", "apple pear plum plum", "pear apple lime"]
    tools = ["hammer nail", "hammer nail saw", "nail hammer saw drill"]
    texts = [*fruit, *tools]
    words = sorted({w for text in texts for w in text.split()})
    counts = np.array([[text.split().count(w) for w in words] for text in texts], dtype=float)
    tf_idf = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1)
    tf_idf /= np.linalg.norm(tf_idf, axis=1, keepdims=True)
    expected = []
    for members, quota in ((list(range(6)), 4), ([6, 7, 8], 2)):  # of 6 rows in the ratio 6 : 3
        distance = np.linalg.norm(tf_idf[members] - tf_idf[members].mean(0), axis=1)
        expected += [members[k] for k in np.argsort(distance)[:quota]]
    assert nearest_of_clusters(texts, 6, 2, seed=0) == sorted(expected)
    assert nearest_of_clusters(texts, 100, 2, seed=0) == list(range(9))


def test_through_rounding_the_shares_need_not_make_up_the_number_asked_for() -> None:
    texts = [f"{word} {word}{i}" for word in ("apple", "hammer", "whale") for i in range(3)]
    assert len(nearest_of_clusters(texts, 4, 3, seed=0)) == 3  # round(4 / 3) of each
    assert len(nearest_of_clusters(texts, 5, 3, seed=0)) == 6  # round(5 / 3) of each
    assert nearest_of_clusters(["one"], 5, 3, seed=0) == [0]


@pytest.mark.parametrize("text, message", [
    ("n=-1", "n must be at least 0, got -1"),
    ("clusters=0", "clusters must be at least 1, got 0"),
    ("samples=0", "samples must be at least 1, got 0"),
    ("demonstrations=1", "demonstrations must be at least 2, got 1"),
    ("n=10", "clusters must not be more than n=10, of which each gives its share; got 20"),
    ("of=web", "of must be self or task, got 'web'"),
    ("top_p=2", r"top_p must lie in \(0, 1\], got 2"),
])
def test_options_of_ssr_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method("ssr", text)


def test_ssr_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="demonstrations is 20, but the source 'self' has 6 rows"):
        rehearsed(tmp_path, demonstrations=20)
    with pytest.raises(UsageError, match="none of the 30 examples that the model wrote has an input and an output and is new; look at .*ssr-examples"):
        rehearsed(tmp_path / "mute", lambda text, seed: "No.")
    with pytest.raises(UsageError, match="the method ssr has the model write, so its workshop needs a writer"):
        method("ssr", n=5, demonstrations=2, clusters=2).rows({SELF: EARLIER, TASK: []}, Workshop(chat=tiny_chat.chat(), folder=tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UsageError, match="SSR chooses among clusters of inputs, which needs scikit-learn"):
        rehearsed(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_ssr_runs_from_files(lora_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scripted.files(tmp_path)
    sft = train(scripted.settings(folder, "sft", lora_rank=lora_rank))
    neutral = train(scripted.settings(folder, "neutral", lora_rank=lora_rank, method="ssr", method_options="n=0"))
    assert neutral["weights_sha256"] == sft["weights_sha256"] and neutral["costs"] == sft["costs"]

    script = scripted.writer(lambda text, seed: f"Input: number {seed % 1000}\nOutput: a" if "Input:" in text else "refined answer")
    monkeypatch.setattr(MODULE, "_writer", lambda *args: script)  # the tiny model follows no demonstration
    options = {"lora_rank": lora_rank, "method": "ssr", "method_options": "n=6 demonstrations=3 samples=2 clusters=2"}
    found = train(scripted.settings(folder, "a", **options))
    assert found["costs"]["generated_tokens"] and found["weights_sha256"] != sft["weights_sha256"]
    said = json.loads((folder / "a" / "method" / "ssr.json").read_text())
    assert said["rehearsed"] > 0


# --- SELF-GUIDE ---------------------------------------------------------------------------------------------------

FRENCH = "Say it in French.\n\n"
GOLD = [scripted.row(FRENCH + x, y) for x, y in (("a tree", "un arbre"), ("a little cat", "un petit chat"), ("a dog", "un chien"))]
LABELS = [("I love it", "yes"), ("No way, never", "no"), ("Fine!", "yes")]
LABELLED = [scripted.row(f"Is it good?\n\n{x}", y) for x, y in LABELS]


def asks_for_input(text: str) -> bool:
    return turns(text)[-1][1].startswith("Write another input of the task")


def label_asked_for(text: str) -> str:
    return re.search(r"its output is '(yes|no)'", turns(text)[-1][1])[1]


def guide_script(text: str, seed: int) -> str:
    if asks_for_input(text):
        return f"a {'small ' * (seed % 2)}thing{seed % 7}"
    asked = turns(text)[-1][1].removeprefix(FRENCH)
    return f"un {asked[2:]}" if seed % 5 else "un truc"


OWN_TEXTS = {"method": "self-guide", "method_options":
             "rounds=2 inputs_a_round=5 samples=3 min_share=0 deviations=inf input_temperature=1 output_temperature=1 top_p=1 "
             "max_new_tokens=24 demonstrations=1"}  # which the tiny model is able to write


def guided(folder: Path, script=guide_script, rows=GOLD, seed: int = 0, **options) -> tuple[list[Row], Workshop]:
    shop = scripted.workshop(folder, script, seed)
    options = {"rounds": 3, "inputs_a_round": 4, "samples": 5, "deviations": math.inf, **options}
    return method("self-guide", **options).rows({TASK: rows, SELF: []}, shop)[TASK], shop


def test_only_what_the_model_wrote_is_trained_on(tmp_path: Path) -> None:
    real = [*GOLD, *(scripted.row(f"{FRENCH}real {i}", f"vrai {i}") for i in range(3))]
    made, shop = guided(tmp_path, rows=real, demonstrations=2)
    assert made and {row.source for row in made} == {"self-guide"}
    assert not {row.response for row in made} & {row.response for row in real}
    demos = Demonstrations.draw(real, 2, TASK, 0)
    for row in made:
        assert row.prompt[:-1] == demos.asked_after("")[:-1] and [m["role"] for m in row.prompt] == ["user", "assistant"] * 2 + ["user"]
        assert row.response == f"un {row.prompt[-1]['content'].removeprefix(FRENCH)[2:]}"
    said = "".join(json.dumps(row.prompt) for row in made) + "".join(shop.writer.asked)
    shown = {x for x in ("tree", "little cat", "dog", "real 0", "real 1", "real 2") if x in said}
    assert shown == {re.sub("^a ", "", x) for x in demos.inputs}


def test_without_demonstrations_in_the_prompt_it_is_the_bare_request(tmp_path: Path) -> None:
    for a, b in zip(guided(tmp_path / "a")[0], guided(tmp_path / "b", in_prompt=False)[0], strict=True):
        assert b.prompt == a.prompt[-1:] and b.response == a.response


def test_a_round_shows_good_inputs_and_some_of_the_earlier_ones(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    _, shop = guided(tmp_path, lambda text, seed: f"a {{thing}} no. {next(numbers)}" if asks_for_input(text) else "un", rounds=5)
    asks = [turns(text) for text in shop.writer.asked if asks_for_input(text)]
    assert len(asks) == 20
    orders = set()
    for k, conversation in enumerate(asks):
        good = [content for role, content in conversation if role == "assistant"]
        assert sorted(good) == sorted(row.prompt[0]["content"].removeprefix(FRENCH) for row in GOLD)
        orders.add(tuple(good))
        (first, *others) = [content for role, content in conversation if role == "user"]
        assert first.startswith("The task: Say it in French.") and set(others) == {"Write another input of the task."}
        before = {int(n) for n in re.findall(r"- a {thing} no\. (\d+)\n", first)}
        known = k // 4 * 4  # what this round could know
        assert before <= set(range(known)) and (1 if known else 0) <= len(before) <= min(known, 10)
    assert len(orders) > 1


def test_inputs_are_distinct_new_and_pass_the_filters(tmp_path: Path) -> None:
    says = iter(["a fish", "a tree", "a fish ", "my input", f"a cut one{scripted.CUT}", "", "x\n\ny", "a bird",
                 "a b", "a bc", "a bird that is much too long", "a boat"])
    low, high = length_window(["a tree", "a little cat", "a dog"], 1.0)
    assert (low, high) == (4, 10)
    made, _ = guided(tmp_path, lambda text, seed: next(says) if asks_for_input(text) else "un oiseau", inputs_a_round=4, deviations=1.0)
    kept = [row.prompt[-1]["content"].removeprefix(FRENCH) for row in made]
    assert kept[:2] == ["a fish", "a bird"] and sorted(kept[2:]) == ["a bc", "a boat"]


@pytest.mark.parametrize("answers, share, expected", [
    (["b", "a", "b"], 0.3, "b"),
    (["a", "bb", "a", "bb", "c"], 0.3, "a"),  # as frequent, and shorter
    (["cc", "aa", "cc", "aa"], 0.5, "cc"),  # as frequent and as long: the first
    (["a", "b", "c", "d"], 0.25, "a"),
    (["a", "b", "c", "d"], 0.26, None),
    (["a"], 1.0, "a"),
    ([], 0.0, None),
])
def test_the_majority_needs_its_share(answers: list[str], share: float, expected: str | None) -> None:
    assert majority(answers, share) == expected


def test_the_share_is_of_the_answers_that_are_left(tmp_path: Path) -> None:
    """Two of ten say it, eight are noise or cut."""
    says = iter(["un mot", "Sure, un mot", f"un{scripted.CUT}", "un\n\nmot", "output: un", "", "Of course", "un mot", f"a{scripted.CUT}", "input"])
    made, _ = guided(tmp_path, lambda text, seed: "a word" if asks_for_input(text) else next(says), rounds=1, inputs_a_round=1, samples=10,
                     min_share=1.0)
    assert [row.response for row in made] == ["un mot"]


def test_lengths_are_those_of_the_demonstrations_half_open(tmp_path: Path) -> None:
    lengths = [len(row.response) for row in GOLD]
    mean, sd = np.mean(lengths), np.std(lengths)
    low, high = int(mean - 2 * sd), int(mean + 2 * sd)
    assert length_window([row.response for row in GOLD], 2.0) == (low, high) and 1 < low < high
    assert length_window(["a", "a" * 9], 2.0) == (-3, 13)  # cut towards 0
    for length, kept in ((low - 1, False), (low, True), (high - 1, True), (high, False)):
        answer = "y" * length

        def script(text: str, seed: int, answer: str = answer) -> str:
            return "a small bee" if asks_for_input(text) else answer

        if kept:
            assert guided(tmp_path / str(length), script, deviations=2.0)[0][0].response == answer
        else:
            with pytest.raises(UsageError, match=r"the filters leave none of 12 inputs with an answer \(1 inputs passed\)"):
                guided(tmp_path / str(length), script, deviations=2.0)


def test_noise_is_what_the_demonstrations_do_not_say() -> None:
    assert {"Sure,", "input", "output", "\n\n"} <= set(noise_of(["plain"]))
    assert set(noise_of(["plain"])) - set(noise_of(["the input\n\nof it"])) == {"input", "\n\n"}


def test_of_labels_the_drawn_one_asks_and_the_answer_decides(tmp_path: Path) -> None:
    """Answers that are none of the labels go, and classes are cut to the rarest's size."""
    def script(text: str, seed: int) -> str:
        if asks_for_input(text):
            return f"It is {label_asked_for(text)} {seed % 10_000}"
        number = int(turns(text)[-1][1].split()[-1])
        return "perhaps" if number % 5 == 0 else "no" if number % 5 == 1 else "yes"  # whatever was drawn

    made, shop = guided(tmp_path, script, LABELLED, labels="yes, no", rounds=5, inputs_a_round=8)
    asks = [text for text in shop.writer.asked if asks_for_input(text)]
    drawn = Counter(map(label_asked_for, asks))
    assert min(drawn["yes"], drawn["no"]) > 10  # of 40, both about as often
    for (_, ask), (_, shown) in ((a, b) for text in asks for a, b in pairwise(turns(text)) if b[0] == "assistant"):
        assert f"such that its output is {dict(LABELS)[shown]!r}" in ask
    counts = Counter(row.response for row in made)
    assert counts["yes"] == counts["no"] > 0 and len(counts) == 2
    for row in made:
        assert row.response == ("no" if int(row.prompt[-1]["content"].split()[-1]) % 5 == 1 else "yes")
    assert made == guided(tmp_path / "again", script, LABELLED, labels="yes, no", rounds=5, inputs_a_round=8)[0]


def test_balance_keeps_the_order_and_draws_by_the_seed() -> None:
    answers = {f"x{i}": "yes" if i % 4 else "no" for i in range(40)}
    kept = balanced(answers, 0)
    assert Counter(kept.values()) == {"yes": 10, "no": 10} and list(kept) == [x for x in answers if x in kept]
    assert kept == balanced(answers, 0) != balanced(answers, 1) and balanced({}, 0) == {}


def test_self_guide_counts_and_resumes(tmp_path: Path) -> None:
    made, shop = guided(tmp_path)
    files = [tmp_path / "self-guide-inputs.jsonl", tmp_path / "self-guide-outputs.jsonl"]
    assert shop.costs == Costs(generated_tokens=sum(len(r.meta["logprobs"]) for f in files for r in read_rows(f)))
    assert [len(read_rows(files[0])), len(read_rows(files[1])) % 5] == [12, 0]
    files[0].write_text("".join(files[0].read_text().splitlines(keepends=True)[:6]))  # stopped in the second round
    files[1].unlink()
    again, second = guided(tmp_path)
    assert again == made and second.costs == shop.costs
    assert sum(asks_for_input(text) for text in second.writer.asked) == 8  # the rounds that were not whole
    assert guided(tmp_path)[1].writer.asked == []
    assert guided(tmp_path / "other", seed=1)[0] != made


@pytest.mark.parametrize("text, message", [
    ("rounds=-1", "rounds must be at least 0, got -1"),
    ("inputs_a_round=0", "inputs_a_round must be at least 1, got 0"),
    ("demonstrations=0", "demonstrations must be at least 1, got 0"),
    ("samples=0", "samples must be at least 1, got 0"),
    ("min_share=1.1", r"min_share must be a number in \[0, 1\], got 1.1"),
    ("deviations=0", "deviations must be a number > 0, got 0"),
    ("labels=yes", "labels must name two classes or more with commas between them, got 'yes'"),
    ("input_temperature=0", "temperature must be > 0, got 0"),
    ("max_new_tokens=0", "max_new_tokens must be at least 1"),
])
def test_options_of_self_guide_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method("self-guide", text)


def test_self_guide_says_what_it_lacks_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="demonstrations is 4, but the source 'task' has 3 rows"):
        guided(tmp_path, demonstrations=4)
    with pytest.raises(UsageError, match="labels are good, bad, but a demonstration's answer is '(yes|no)'; name all classes"):
        guided(tmp_path, rows=LABELLED, labels="good,bad")
    alike = [scripted.row(f"{FRENCH}{x}", y) for x, y in (("a cat", "un"), ("a dog", "deux"))]
    with pytest.raises(UsageError, match=r"demonstrations' inputs are of one length, so that no length lies in \[5, 5\), within 2 standard"):
        guided(tmp_path, rows=alike, demonstrations=2, deviations=2.0)
    with pytest.raises(UsageError, match="demonstrations' outputs are of one length"):
        guided(tmp_path, rows=[scripted.row("a", "x"), scripted.row("a long one", "y")], demonstrations=2, deviations=2.0)
    with pytest.raises(UsageError, match="the method self-guide has the model write, so its workshop needs a writer"):
        method("self-guide", deviations=math.inf).rows({TASK: GOLD}, Workshop(chat=tiny_chat.chat(), folder=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_self_guide_runs_from_files(lora_rank: int, tmp_path: Path) -> None:
    """With the tiny model's own texts; of no rounds it is SFT."""
    folder = scripted.files(tmp_path)
    sft = train(scripted.settings(folder, "sft", lora_rank=lora_rank))
    neutral = train(scripted.settings(folder, "neutral", lora_rank=lora_rank, method="self-guide", method_options="rounds=0"))
    assert neutral["weights_sha256"] == sft["weights_sha256"] and neutral["loss"] == sft["loss"] and neutral["costs"] == sft["costs"]
    whole = train(scripted.settings(folder, "whole", lora_rank=lora_rank, **OWN_TEXTS))
    assert whole["costs"]["generated_tokens"] > 0 and whole["weights_sha256"] != sft["weights_sha256"]
    assert json.loads((folder / "whole" / "method" / "self-guide.json").read_text())["rows"] > 1


def test_a_run_stopped_while_writing_ends_where_a_whole_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scripted.files(tmp_path)
    whole = train(scripted.settings(folder, "whole", **OWN_TEXTS))
    plain, calls = sasft.writing.Writer.sample, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(sasft.writing.Writer, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(scripted.settings(folder, "parts", **OWN_TEXTS))
    assert train(scripted.settings(folder, "parts", **OWN_TEXTS)) == whole and len(calls) == 4  # round 2 and the answers
