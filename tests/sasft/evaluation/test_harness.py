"""lm-evaluation-harness: what it is asked and what is made of its answers, with a stand-in of its interface and with itself."""

import functools
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from sasft.errors import UsageError
from sasft.evaluation import MeasureSettings, evaluate, forgetting, read_records
from sasft.evaluation.harness import harness_records
from tests.sasft import tiny_chat


class FakeLmEval:
    """As much of lm_eval as is called: it logs what it was asked, and gives ``samples``."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.wrapped: dict = {}
        self.samples = {"a_task": [sample(i, float(i % 2)) for i in range(4)]}
        self.error: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeLmEval":
        package = ModuleType("lm_eval")
        package.__version__, package.simple_evaluate = "0.4.13", self.simple_evaluate
        monkeypatch.setitem(sys.modules, "lm_eval", package)
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=self.hflm))
        monkeypatch.setitem(sys.modules, "lm_eval.tasks",
                            SimpleNamespace(TaskManager=lambda include_path: ("manager", include_path)))
        return self

    def hflm(self, **kwargs):
        kwargs["pretrained"].eval()
        kwargs["tokenizer"].pad_token = kwargs["tokenizer"].eos_token  # it configures what it is given
        self.wrapped = kwargs
        return "wrapped"

    def simple_evaluate(self, **kwargs):
        self.calls.append(kwargs)
        if self.error:
            raise self.error
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        taken = {task: logged[: kwargs["limit"] * 2 if kwargs["limit"] else None] for task, logged in self.samples.items()}
        return {"samples": taken, "versions": {"a_task": 3.0}, "n-shot": {"a_task": 2}, "results": {"a_task": {"acc,none": 0.5}}}


def sample(doc: int, acc, metric: str = "acc", filter_: str = "none") -> dict:
    return {"doc_id": doc, "doc": {}, "target": "", "filter": filter_, "metrics": [metric], "prompt_hash": f"h{doc}", metric: acc}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLmEval:
    return FakeLmEval().install(monkeypatch)


def ran(out: Path, spec: str = "lm_eval:a_task", **settings) -> dict:
    return evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), [spec], out, MeasureSettings(**settings), progress=False)


def test_what_lm_eval_is_asked(fake: FakeLmEval, tmp_path: Path) -> None:
    summary = ran(tmp_path, "lm_eval:a_task@2", limit=3, seed=5, batch_size=7, task_folder="tasks", precision="bf16",
                  max_new_tokens=9, temperature=0.5)
    [call] = fake.calls
    assert call == {"model": "wrapped", "tasks": ["a_task"], "num_fewshot": 2, "limit": 3, "log_samples": True,
                    "task_manager": ("manager", "tasks"),
                    "apply_chat_template": True, "fewshot_as_multiturn": True, "random_seed": 5, "numpy_random_seed": 5,
                    "torch_random_seed": 5,
                    "fewshot_random_seed": 5, "gen_kwargs": {"max_gen_toks": 9, "do_sample": True, "temperature": 0.5}}
    assert fake.wrapped["batch_size"] == 7 and fake.wrapped["mixed_precision_dtype"] == "bfloat16"
    suite = summary["suites"]["lm_eval:a_task@2"]
    assert suite["source"] == {"lm_eval": "0.4.13", "task_versions": {"a_task": 3.0}, "shots": {"a_task": 2}, "limit": 3,
                               "results": {"a_task": {"acc,none": 0.5}}}


def test_without_settings_of_ours_tasks_keep_their_own(fake: FakeLmEval, tmp_path: Path) -> None:
    summary = ran(tmp_path)
    assert [fake.calls[0][name] for name in ("num_fewshot", "limit", "gen_kwargs")] == [None] * 3
    assert fake.wrapped["mixed_precision_dtype"] is None
    found = summary["suites"]["lm_eval:a_task"]
    low, high = binomtest(2, 4).proportion_ci(method="wilson")
    assert found["scores"]["acc,none"] == pytest.approx({"score": 0.5, "stderr": (1 / 3 / 4) ** 0.5, "n": 4, "low": low, "high": high})
    assert found["groups"].keys() == {"a_task"} and found["macro"]["score"] == 0.5


def test_reasoning_templates_are_rendered_as_our_own_suites_have_them(fake: FakeLmEval, tmp_path: Path) -> None:
    ran(tmp_path / "plain")
    assert fake.wrapped["chat_template_args"] == {}
    block = "<think>\\n\\n</think>\\n\\n"
    template = tiny_chat.CHATML.replace("{{ m.content }}",
                                        f"{{{{ '{block}' if m.role == 'assistant' else '' }}}}{{{{ m.content }}}}")
    asked = f"{{% if enable_thinking is false %}}{{{{ '{block}' }}}}{{% endif %}}"
    template = template.replace("assistant\n{% endif %}", f"assistant\n{asked}{{% endif %}}")
    evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(template), ["lm_eval:a_task"], tmp_path / "thinks", progress=False)
    assert fake.wrapped["chat_template_args"] == {"enable_thinking": False}


def test_dated_templates_tell_the_day_of_our_own_suites(fake: FakeLmEval, tmp_path: Path) -> None:
    tokenizer = tiny_chat.tokenizer(tiny_chat.CHATML.replace("Be kind.", "{{ strftime_now('%d %b %Y') }}"))
    evaluate(tiny_chat.chatty(), tokenizer, ["lm_eval:a_task"], tmp_path, progress=False)
    asked = [{"role": "user", "content": "Hi"}]
    assert "26 Jul 2024" in fake.wrapped["tokenizer"].apply_chat_template(asked, tokenize=False)
    assert "26 Jul 2024" not in tokenizer.apply_chat_template(asked, tokenize=False)  # which keeps its own template


def test_lm_eval_leaves_no_trace(fake: FakeLmEval, tmp_path: Path) -> None:
    model, tokenizer = tiny_chat.chatty().train(), tiny_chat.tokenizer()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    evaluate(model, tokenizer, ["lm_eval:a_task"], tmp_path, progress=False)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
    assert all(module.training for module in model.modules()) and tokenizer.pad_token == "<|endoftext|>"


def test_a_finished_task_is_not_run_again(fake: FakeLmEval, tmp_path: Path) -> None:
    first = ran(tmp_path)
    assert json.loads(json.dumps(ran(tmp_path))) == json.loads(json.dumps(first)) and len(fake.calls) == 1
    with pytest.raises(UsageError, match="with limit None, now 2"):
        ran(tmp_path, limit=2)


def test_a_task_that_was_cut_while_it_was_written_is_run_again(fake: FakeLmEval, tmp_path: Path) -> None:
    first = ran(tmp_path)
    items, lines = tmp_path / "items.jsonl", (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    for kept in range(4):
        items.write_text("".join(lines[:kept]))
        if kept == 2:
            (tmp_path / "summary.json").unlink()  # stopped before there was one
        assert json.loads(json.dumps(ran(tmp_path)))["suites"] == json.loads(json.dumps(first["suites"]))
        assert items.read_text().splitlines(keepends=True) == lines
    (tmp_path / "summary.json").unlink()
    with pytest.raises(UsageError, match="on other items, such as a_task/2"):
        ran(tmp_path, limit=1)


def test_records_of_several_filters_metrics_and_tasks() -> None:
    records = harness_records({
        "gsm8k": [sample(0, 0.0, "exact_match", "strict-match"), sample(0, np.float32(1), "exact_match", "flexible-extract")],
        "ifeval": [{**sample(0, np.bool_(True), "prompt_level_strict_acc"),
                    "metrics": ["prompt_level_strict_acc", "inst_level_strict_acc"],
                    "inst_level_strict_acc": [True, False, True]}],
        "text": [sample(0, (-3.5, 7), "word_perplexity")]})
    assert [(r["id"], r["group"], r["prompt_sha256"], r["scores"]) for r in records] == [
        ("gsm8k/0", "gsm8k", "h0", {"exact_match,strict-match": (0.0, 1.0), "exact_match,flexible-extract": (1.0, 1.0)}),
        ("ifeval/0", "ifeval", "h0", {"prompt_level_strict_acc,none": (1.0, 1.0), "inst_level_strict_acc,none": (2.0, 3.0)})]


def test_a_groups_tasks_of_different_metrics_are_all_summarised(fake: FakeLmEval, tmp_path: Path) -> None:
    fake.samples = {"one": [sample(i, 1.0) for i in range(3)], "two": [sample(i, 0.5, "f1") for i in range(2)]}
    found = ran(tmp_path)["suites"]["lm_eval:a_task"]
    assert {name: score["n"] for name, score in found["scores"].items()} == {"acc,none": 3, "f1,none": 2}


def test_forgetting_between_two_runs_of_lm_eval(fake: FakeLmEval, tmp_path: Path) -> None:
    ran(tmp_path / "before")
    fake.samples = {"a_task": [sample(i, acc) for i, acc in enumerate((1.0, 1.0, 0.0, 0.0))]}
    ran(tmp_path / "after")
    found = forgetting(tmp_path / "before", tmp_path / "after", "lm_eval:a_task", choices=2)
    assert (found.lost, found.gained, found.lost_adjusted) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize("error", [KeyError("no such task"), ValueError("unknown"), ConnectionError("no route")])
def test_tasks_that_lm_eval_cannot_run(fake: FakeLmEval, tmp_path: Path, error: Exception) -> None:
    fake.error = error
    with pytest.raises(UsageError, match=f"lm-eval can't run 'a_task' .{type(error).__name__}: .*lm-eval ls tasks"):
        ran(tmp_path)


def test_tasks_without_a_number_an_item(fake: FakeLmEval, tmp_path: Path) -> None:
    fake.samples = {"a_task": [sample(0, "a string")]}
    with pytest.raises(UsageError, match="gave no item of 'a_task' a score"):
        ran(tmp_path)


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'sasft\[eval\]'"):
        ran(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the real one, where it is installed ---------------------------------------------------------------------------

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 7}
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
metadata: {version: 2}
"""
ROWS = [{"question": f"Which is {i}?", "choices": ["one", "the second of them", "c"], "gold": i % 3, "answer": "a"}
        for i in range(6)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on a local file; lm-eval's own tasks, which take a minute to list, are left out."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", functools.partial(lm_eval_tasks.TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, yaml in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(yaml.replace("FILE", str(tmp_path / "rows.jsonl")))
    return folder


def test_the_real_lm_eval_scores_choices_as_we_do(tasks: Path, tmp_path: Path) -> None:
    """By the accuracies that its sums of log-likelihoods give. It counts the blanks at the end of the prompt, here the template's
    line break, to the continuation, which changes no accuracy but that by length."""
    model, tokenizer = tiny_chat.chatty(), tiny_chat.tokenizer()
    summary = evaluate(model, tokenizer, ["lm_eval:tiny_choice"], tmp_path / "out",
                       MeasureSettings(task_folder=str(tasks), limit=5), progress=False)
    found = summary["suites"]["lm_eval:tiny_choice"]
    assert found["source"]["task_versions"] == {"tiny_choice": 7} and found["n"] == 5
    results = found["source"]["results"]["tiny_choice"]
    for metric in ("acc", "acc_norm"):
        assert found["scores"][f"{metric},none"]["score"] == pytest.approx(results[f"{metric},none"])
        assert found["scores"][f"{metric},none"]["stderr"] == pytest.approx(results[f"{metric}_stderr,none"])
    for record, row in zip(read_records(tmp_path / "out", "lm_eval:tiny_choice"), ROWS, strict=False):
        text = tokenizer.apply_chat_template([{"role": "user", "content": f"Question: {row['question']}\nAnswer:"}],
                                             tokenize=False,
                                             add_generation_prompt=True)
        sums = []
        for choice in row["choices"]:
            ids, start = tokenizer(text + choice).input_ids, len(tokenizer(text.rstrip()).input_ids)
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], -1)
            sums.append(log_p.gather(1, torch.tensor(ids[start:]).unsqueeze(1)).sum().item())
        by_length = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        assert record["scores"]["acc,none"][0] == float(sums.index(max(sums)) == row["gold"])
        assert record["scores"]["acc_norm,none"][0] == float(by_length.index(max(by_length)) == row["gold"])


def test_the_real_lm_eval_writes_answers(tasks: Path, tmp_path: Path) -> None:
    summary = ran(tmp_path / "out", "lm_eval:tiny_written@0", task_folder=str(tasks), max_new_tokens=3)
    found = summary["suites"]["lm_eval:tiny_written@0"]
    results = found["source"]["results"]["tiny_written"]
    assert found["n"] == 6 and found["scores"]["exact_match,none"]["score"] == results["exact_match,none"]


def test_the_real_lm_eval_has_no_such_task(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lm-eval can't run 'no_such_task'"):
        ran(tmp_path / "out", "lm_eval:no_such_task", task_folder=str(tasks))
