"""Every suite from small files of the public sets' shape: prompts, gold, clusters, worked examples; faulty files; the hub."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sasft.errors import UsageError
from sasft.evaluation.benchmarks import BENCHMARKS, held_out
from sasft.evaluation.run import MeasureSettings, evaluate, make_suite
from sasft.evaluation.sources import FOLDER_VARIABLE
from sasft.evaluation.suites import Suite
from tests.sasft import tiny_chat
from tests.sasft.evaluation import small_sets

NAMES = ["gsm8k", "mmlu", "agieval:aqua-rat", "agieval:sat-math", "agieval:math", "piqa", "ifeval", "super_ni:task007",
         "super_ni:task008",
         "medquad", "meqsum", "medtext"]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Suite]:
    settings = MeasureSettings(data=str(small_sets.write(tmp_path / "data")))
    return lambda spec: make_suite(spec, tiny_chat.chat(), settings)


def said(suite: Suite, i: int) -> list[str]:
    """The contents of a prompt's turns, which are user and assistant by turns, the user last."""
    roles = [m["role"] for m in suite.items[i].prompt]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    return [m["content"] for m in suite.items[i].prompt]


def test_every_benchmark_is_read_from_a_folder(make) -> None:
    assert {name.partition(":")[0] for name in NAMES} == BENCHMARKS.keys()
    for name in NAMES:
        suite = make(name)
        assert suite.items and suite.source["file"].startswith(name.partition(":")[0]) and len(suite.source["sha256"]) == 64
        assert [m["role"] for m in suite.items[0].prompt] == ["user"]


def test_gsm8k(make) -> None:
    suite = make("gsm8k")
    assert said(suite, 0) == ["Ann has 3 apples and buys 4. How many has she?\n\nWork it out step by step. End with a line that "
                              "holds #### and the answer as a plain number."]
    assert suite.check(suite.items[0], "3 + 4 = 7\n#### 7") == {"strict": 1, "flexible": 1}
    assert suite.metrics == ("flexible", "strict")
    shown = make("gsm8k@2")
    assert said(shown, 1) == ["Question: Tom reads 5 pages a day. How many in 3 days?\nAnswer:", "5 * 3 = 15\n#### 15",
                              "Question: Ann has 3 apples and buys 4. How many  has she?\nAnswer:", "Seven.\n#### 7",
                              "Question: A box holds 12 eggs. How many do 2 boxes hold?\nAnswer:"]
    # The item's own question is among the training rows, and is not shown.
    assert said(shown, 0)[2] == "Question: Li has 9 pens and loses 2. How many are left?\nAnswer:"
    assert shown.source["shots"]["file"] == "gsm8k/train.jsonl"
    with pytest.raises(UsageError,
                       match="asks for 3 shots, but there are 2 examples to show beside the question 'Question: Ann has"):
        make("gsm8k@3")
    with pytest.raises(UsageError, match="has no parts"):
        make("gsm8k:train")


def test_mmlu(make) -> None:
    suite = make("mmlu")
    head = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    assert said(suite, 0) == [head + "What does the moon circle?\nA. Mars\nB. Earth\nC. Venus\nD. Sun\nAnswer:"]
    item = suite.items[0]
    assert (item.gold, item.choices, item.group, item.cluster) == (1, ("A", "B", "C", "D"), "astronomy", "")
    assert suite.items[1].cluster == suite.items[2].cluster != ""  # one source, two questions
    shown = make("mmlu:astronomy@5")
    assert [i.id for i in shown.items] == ["0"] and len(said(shown, 0)) == 11
    assert said(shown, 0)[:2] == [head + "Development question 0 on astronomy?\nA. a\nB. b\nC. c\nD. d\nAnswer:", "A"]
    assert said(shown, 0)[-1].startswith("What does the moon circle?") and said(shown, 0)[3] == "B"
    with pytest.raises(UsageError, match="needs one of its parts: mmlu:astronomy, mmlu:world_history"):
        make("mmlu:biology")
    with pytest.raises(UsageError, match="asks for 6 shots, but there are 5"):
        make("mmlu@6")


def test_agieval(make) -> None:
    suite = make("agieval:aqua-rat")
    assert said(suite, 0) == ["What is 1 + 1?\nA. 2\nB. 3\nC. 4\nD. 5\nE. 6\nAnswer:"]
    assert (suite.items[0].gold, suite.items[0].choices) == (0, tuple("ABCDE"))
    shown = make("agieval:aqua-rat@2")
    for i, others in enumerate([(2, 3), (1, 3), (1, 2), (1, 2)]):
        assert [text.split("?")[0] for text in said(shown, i)[::2]] == [f"What is {n} + {n}" for n in (*others, i + 1)]
        assert said(shown, i)[1] == "A"
    sat = make("agieval:sat-math")
    assert said(sat, 0) == ["A plan.\n\nIf x = 0, what is x?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"] and sat.items[0].gold == 1
    assert sat.items[0].cluster == sat.items[1].cluster != sat.items[2].cluster == ""
    mathematics = make("agieval:math")
    assert mathematics.check(mathematics.items[0], r"\boxed{\dfrac12}")["formula"] == 0
    assert mathematics.check(mathematics.items[0], r"\boxed{\dfrac{1}{2}}")["formula"] == 1
    for spec, told in (("agieval", "needs one of its parts"), ("agieval:lsat", "needs one of its parts"),
                       ("agieval:math@1", "no worked examples"),
                       ("agieval:sat-math@3", "asks for 3 shots, but there are 2")):
        with pytest.raises(UsageError, match=told):
            make(spec)


def test_piqa(make) -> None:
    suite = make("piqa")
    assert said(suite, 0) == ["Question: Cool the soup.\nAnswer:"] and suite.metrics == ("acc_norm", "acc", "nll")
    assert [(i.gold, i.choices[i.gold]) for i in suite.items] == [(0, "Blow on it."), (1, "Turn the lid.")]


def test_piqa_needs_a_label_for_every_row(tmp_path: Path, make) -> None:
    labels = tmp_path / "data/piqa/valid-labels.lst"
    for wrong in ("0\n", "0\n2\n", ""):
        labels.write_text(wrong)
        with pytest.raises(UsageError, match="one label, 0 or 1, for each of the 2 rows"):
            make("piqa")
    labels.unlink()
    with pytest.raises(UsageError, match="valid-labels.lst can't be read"):
        make("piqa")


def test_ifeval(make) -> None:
    suite = make("ifeval")
    assert [i.id for i in suite.items] == ["1000", "1001"] and said(suite, 1) == ["Name a colour in capitals."]
    assert suite.check(suite.items[0], "two words, no") == {"prompt_strict": 0, "instruction_strict": (1, 2), "prompt_loose": 0,
                                                            "instruction_loose": (1, 2)}
    assert suite.check(suite.items[0], "a, b\nthree words here") == {"prompt_strict": 0, "instruction_strict": (1, 2),
                                                                     "prompt_loose": 1,
                                                                     "instruction_loose": (2, 2)}


def test_ifeval_as_a_table_has_it_with_every_option_in_every_row(tmp_path: Path, make) -> None:
    rows = [{**row, "kwargs": [{"num_words": None, "relation": None, "keyword": None, **options} for options in row["kwargs"]]}
            for row in small_sets.IFEVAL]
    small_sets.jsonl(tmp_path / "data/ifeval/input_data.jsonl", rows)
    assert [i.gold for i in make("ifeval").items] == [list(zip(r["instruction_id_list"], r["kwargs"], strict=True))
                                                      for r in small_sets.IFEVAL]


def test_an_instruction_without_a_checker_is_named_with_its_item(tmp_path: Path, make) -> None:
    small_sets.jsonl(tmp_path / "data/ifeval/input_data.jsonl", [{**small_sets.IFEVAL[1], "instruction_id_list": ["new:kind"]}])
    with pytest.raises(UsageError, match="ifeval, item 1001: there is no checker for instructions of the kind 'new:kind'"):
        make("ifeval")


def test_super_natural_instructions_in_both_shapes(make) -> None:
    suite = make("super_ni:task007@1")
    # t-0 asks the item's own question.
    assert said(suite, 1)[0] == f"{small_sets.DEFINITION}\n\nContext: It rains.\nQuestion: Is it dry?"
    assert said(suite, 0)[:2] == [f"{small_sets.DEFINITION}\n\n{small_sets.SUPER_NI[1]['input']}", "Sad."]
    assert said(suite, 0)[-1] == f"{small_sets.DEFINITION}\n\n{small_sets.SUPER_NI[0]['input']}"
    assert suite.items[0].cluster == suite.items[1].cluster != suite.items[2].cluster != ""
    assert suite.check(suite.items[2], "the DOG") == {"rouge_l": 1, "exact_match": 1}
    published = make("super_ni:task008_next_number@1")
    assert said(published, 0) == ["Say the next number.\n\n1", "2", "Say the next number.\n\n5"]
    assert published.items[0].gold == ["6", "six"] and published.check(published.items[0], "Six.")["exact_match"] == 1
    for spec, told in (("super_ni",
                        "needs a task, such as super_ni:task024; in the folder of data there are task007_on_the_quay, task008"),
                       ("super_ni:task007@3", "asks for 3 shots")):
        with pytest.raises(UsageError, match=told):
            make(spec)


def test_medical_questions_keep_to_the_held_out_tenth(make) -> None:
    kept = [row["question"] for row in small_sets.MEDICAL if held_out(row["question"])]
    assert 0 < len(kept) < 15
    for name, gold in (("medquad", "answer"), ("meqsum", "summary"), ("medtext", "answer")):
        suite = make(name)
        assert [i.asked for i in suite.items] == kept
        assert [i.gold for i in suite.items] == [[row[gold]] for row in small_sets.MEDICAL if held_out(row["question"])]


def test_a_held_out_tenth_is_a_tenth() -> None:
    assert sum(held_out(f"question {i}") for i in range(10_000)) == pytest.approx(10_000 * 26 / 256, abs=100)


@pytest.mark.parametrize(("file", "rows", "spec", "told"), [
    ("gsm8k/test.jsonl", [{"question": "?", "result": 3}], "gsm8k",
     "row 1: columns answer are missing; found question, result, needed question"),
    ("gsm8k/test.jsonl", [], "gsm8k", "has no rows; rows with the fields question, answer are needed"),
    ("gsm8k/test.jsonl", [{"question": "?", "answer": 7}], "gsm8k", r"gsm8k/test.jsonl\), row 1: answer must be text, got 7"),
    ("ifeval/input_data.jsonl", [{**small_sets.IFEVAL[0], "prompt": None}], "ifeval", "row 1: prompt must be text, got None"),
    ("agieval/math.jsonl", [{**small_sets.AGIEVAL["math"][0], "answer": None}], "agieval:math", "answer must be text, got None"),
    ("super_ni/task007_on_the_quay.test.jsonl", [{"id": "a", "input": "Who?", "output": 3}], "super_ni:task007",
     "the output of the input 'Who.' must be a text or texts, got 3"),
    ("super_ni/task007_on_the_quay.train.jsonl", [{"id": "a", "text": "Who?"}], "super_ni:task007@1",
     "columns input, output are missing; found id, text"),
    ("mmlu/test.jsonl", [{**small_sets.MMLU["test"][0], "answer": "B"}], "mmlu",
     "answer must be the index of one of the 4 choices, got 'B'"),
    ("mmlu/test.jsonl", [{**small_sets.MMLU["test"][0], "answer": 4}], "mmlu", "got 4"),
    ("agieval/aqua-rat.jsonl", [{**small_sets.AGIEVAL["aqua-rat"][0], "label": "F"}], "agieval:aqua-rat",
     "one of its 5 options, got 'F'"),
    ("medtext/medtext.jsonl", [{"question": "?", "answer": "!"}], "medtext",
     "none of its 1 questions falls into the held-out tenth")])
def test_files_of_another_shape(tmp_path: Path, make, file: str, rows: list[dict], spec: str, told: str) -> None:
    small_sets.jsonl(tmp_path / "data" / file, rows)
    with pytest.raises(UsageError, match=told):
        make(spec)


@pytest.mark.parametrize(("text", "told"), [
    ('{"Definition": ', "task008_next_number.json is not the JSON of a task as it is published at https://github.com/allenai"),
    (json.dumps({**small_sets.PUBLISHED, "Instances": {"a": 1}}), "Instances of .* must be a list of objects, got"),
    (json.dumps({**small_sets.PUBLISHED, "Instances": [{"input": "5", "output": []}]}), "must be a text or texts, got"),
    (json.dumps({**small_sets.PUBLISHED, "Positive Examples": [{"input": "5"}]}), "Positive Examples of .*: columns output are missing"),
    (json.dumps({"Instances": []}), "columns Definition, Positive Examples are missing")])
def test_published_tasks_of_another_shape(tmp_path: Path, make, text: str, told: str) -> None:
    (tmp_path / "data/super_ni/task008_next_number.json").write_text(text)
    with pytest.raises(UsageError, match=told):
        make("super_ni:task008")


def test_one_reference_or_several(tmp_path: Path, make) -> None:
    small_sets.jsonl(tmp_path / "data/super_ni/task007_on_the_quay.test.jsonl", [
        {"id": "a", "input": "Who?", "output": ["The dog.", "A dog"]}, {"id": "b", "input": "Why?", "output": "Rain."}])
    suite = make("super_ni:task007")
    assert [item.gold for item in suite.items] == [["The dog.", "A dog"], ["Rain."]]
    assert suite.check(suite.items[0], "a dog") == {"rouge_l": 1.0, "exact_match": 1.0}
    one = {**small_sets.PUBLISHED, "Instances": [{"input": "5", "output": "six"}]}
    (tmp_path / "data/super_ni/task008_next_number.json").write_text(json.dumps(one))
    assert make("super_ni:task008").items[0].gold == ["six"]  # and not its letters


def test_a_line_that_is_not_json_is_named(tmp_path: Path, make) -> None:
    (tmp_path / "data/gsm8k/test.jsonl").write_text('{"question": "?", "answer": "1"}\n{"question": "\n')
    with pytest.raises(UsageError, match="test.jsonl, line 2: not valid JSON"):
        make("gsm8k")


# --- the hub ------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the datasets package and for the hub's client: tables by (name, configuration, split)."""

    def __init__(self, tables: dict[tuple, list[dict]]) -> None:
        self.tables, self.asked = tables, []

    def load_dataset(self, name: str, config: str | None, *, split: str, revision: str):
        self.asked.append((name, config, split, revision))
        if (name, config, split) not in self.tables:
            raise ConnectionError(f"no route to {name}\nand a long trace")
        return Table(self.tables[name, config, split])

    def dataset_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(sha=f"commit of {name}")


class Table(list):
    def filter(self, keep: Callable) -> "Table":
        return Table(row for row in self if keep(row))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub({})
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=made.load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: made))
    return made


def from_hub(spec: str, **settings) -> Suite:
    return make_suite(spec, tiny_chat.chat(), MeasureSettings(**settings))


def test_the_hubs_rows_give_the_same_suites_as_files(tmp_path: Path, make, hub: Hub) -> None:
    aqua = [{"query": f"Q: {r['question']} Answer Choices: {' '.join(r['options'])}\nA: Among A through E, the answer is",
             "choices": r["options"], "gold": [0]} for r in small_sets.AGIEVAL["aqua-rat"]]
    hub.tables |= {
        ("openai/gsm8k", "main", "test"): small_sets.GSM8K["test"], ("openai/gsm8k", "main", "train"): small_sets.GSM8K["train"],
        ("cais/mmlu", "all", "test"): small_sets.MMLU["test"], ("cais/mmlu", "all", "dev"): small_sets.MMLU["dev"],
        ("hails/agieval-aqua-rat", None, "test"): aqua,
        ("hails/agieval-math", None, "test"): [{"query": f"Q: {r['question']}\nA: The answer is", "answer": r["answer"]}
                                               for r in small_sets.AGIEVAL["math"]],
        ("google/IFEval", None, "train"): [{**r, "kwargs": [{"num_words": None, **k} for k in r["kwargs"]]}
                                           for r in small_sets.IFEVAL],
        ("baber/piqa", None, "validation"): [{**r, "label": label}
                                             for r, label in zip(small_sets.PIQA, small_sets.LABELS, strict=True)],
        ("Muennighoff/natural-instructions", None, "train+test"): [
            {"task_name": task, "id": r["id"], "definition": small_sets.DEFINITION, "inputs": r["input"], "targets": r["output"]}
            for task in ("task007_on_the_quay", "task0070_another") for r in small_sets.SUPER_NI],
        ("keivalya/MedQuad-MedicalQnADataset", None, "train"): [{"Question": r["question"], "Answer": r["answer"]}
                                                                for r in small_sets.MEDICAL],
        ("BI55/MedText", None, "train"): [{"Prompt": r["question"], "Completion": r["answer"]} for r in small_sets.MEDICAL]}
    for spec in ("gsm8k@2", "mmlu@1", "agieval:aqua-rat@1", "agieval:math", "ifeval", "piqa", "super_ni:task007", "medquad",
                 "medtext"):
        mine, theirs = make(spec), from_hub(spec)
        assert [(i.id, i.prompt, i.gold, i.choices, i.cluster) for i in theirs.items] == [
            (i.id, i.prompt, i.gold, i.choices, i.cluster) for i in mine.items], spec
        assert set(theirs.source) >= {"hub", "split", "revision"} and theirs.source["revision"]
    assert ("openai/gsm8k", "main", "test", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c") in hub.asked
    assert ("baber/piqa", None, "validation", "commit of baber/piqa") in hub.asked  # main, resolved to its commit
    assert make("gsm8k").source.keys() == {"file", "sha256"}  # a file comes before the hub


def test_several_references_of_one_instance_come_together(hub: Hub) -> None:
    rows = [{"task_name": "task008_next_number", "id": "b-1", "definition": "Say it.", "inputs": "5", "targets": target}
            for target in ("6", "six")]
    hub.tables["Muennighoff/natural-instructions", None, "train+test"] = rows
    [item] = from_hub("super_ni:task008").items
    assert item.gold == ["6", "six"]


def test_sets_that_are_missing_are_named_all_at_once(tmp_path: Path, hub: Hub) -> None:
    tiny_chat.save_chatty(tmp_path / "model")
    with pytest.raises(UsageError) as caught:
        evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), ["gsm8k", "instructions", "ifeval", "meqsum"], tmp_path / "out",
                 progress=False)
    first, second, third = str(caught.value).splitlines()
    assert first == (
        "GSM8K (test) is missing: there is no file gsm8k/test.jsonl in a folder of data (which the setting data names, or the "
        f"environment variable {FOLDER_VARIABLE}), and openai/gsm8k (configuration main, split test, revision "
        "cc7b047b6e5bb11b4f1af84efc572db110a51b3c) can't be read from the hub (ConnectionError: no route to openai/gsm8k). Get it "
        "from https://github.com/openai/grade-school-math (one JSON object a line; the fields needed are question, answer)")
    assert second.startswith("IFEval is missing: there is no file ifeval/input_data.jsonl")
    assert "google/IFEval (split train, revision" in second
    assert third.startswith("MeQSum is missing") and "not on the hub in a shape that is known here" in third
    assert not (tmp_path / "out").exists()


def test_the_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        from_hub("gsm8k")


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nowhere .from the setting data. is not there"):
        from_hub("gsm8k", data=str(tmp_path / "nowhere"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=f"gone .from {FOLDER_VARIABLE}. is not there"):
        from_hub("gsm8k")


# --- the real sets, where they are at hand ------------------------------------------------------------------------

DATA = os.environ.get(FOLDER_VARIABLE)


@pytest.mark.skipif(not DATA, reason=f"{FOLDER_VARIABLE} names no folder of public sets")
@pytest.mark.parametrize(("spec", "n"), [("gsm8k@5", 1319), ("mmlu@5", 14042), ("agieval:aqua-rat@3", 254),
                                         ("agieval:sat-math@3", 220),
                                         ("agieval:math", 1000), ("ifeval", 541), ("piqa", 1838), ("super_ni:task024@2", 500),
                                         ("super_ni:task346", 500)])
def test_the_real_sets(spec: str, n: int) -> None:
    suite = make_suite(spec, tiny_chat.chat(), MeasureSettings(data=DATA))
    assert len(suite.items) == n
    for item in suite.items:
        *shown, asked = [m["content"] for m in item.prompt][::2]
        assert asked not in shown
    if spec == "mmlu@5":
        assert len({i.group for i in suite.items}) == 57 and len({i.cluster for i in suite.items if i.cluster}) < 14042
