"""A whole evaluation: what it writes, that it goes on wherever it was stopped, and what it refuses."""

import hashlib
import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sasft.errors import UsageError
from sasft.evaluation import Answered, EvaluateSettings, Item, MeasureSettings, evaluate, forgetting, read_records, run
from sasft.evaluation.run import choose
from sasft.evaluation.suites import user
from tests.sasft import tiny_chat
from tests.sasft.evaluation import small_sets

SUITES = ["task:sums", "instructions", "gsm8k", "mmlu", "piqa", "rows:rows.jsonl", "answers:rows.jsonl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, rows, and a whole evaluation."""
    made = tmp_path_factory.mktemp("evaluation")
    small_sets.write(made / "data")
    small_sets.jsonl(made / "rows.jsonl",
                     [{"prompt": f"Say {word}.", "response": f"{word}!"} for word in ("yes", "no", "perhaps")])
    ran(made, "whole")
    return made


def ran(folder: Path, out: str, suites: list[str] | None = None, seed: int = 0, **settings) -> dict:
    model, tokenizer = tiny_chat.chatty(seed), tiny_chat.tokenizer()
    model.config.max_position_embeddings = 2048
    named = [name.replace("rows.jsonl", str(folder / "rows.jsonl")) for name in suites or SUITES]
    return evaluate(model, tokenizer, named, folder / out,
                    MeasureSettings(**{"data": str(folder / "data"), "limit": 4, "max_new_tokens": 4, "batch_size": 3,
                                       **settings}), progress=False)


def records(folder: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (folder / out / "items.jsonl").read_text().splitlines()]


def test_what_an_evaluation_writes(folder: Path) -> None:
    summary = json.loads((folder / "whole/summary.json").read_text())
    assert [name.partition(":")[0] for name in summary["suites"]] == [name.partition(":")[0] for name in SUITES]
    assert summary["identity"] == json.loads((folder / "whole/config.json").read_text())
    versions = summary["identity"]["versions"]
    assert (versions["sasft"], versions["torch"]) == (version("sasft"), torch.__version__)
    for name, suite in summary["suites"].items():
        assert all(score["stderr"] is not None for score in suite["scores"].values()), name
        assert suite["source"] and len(suite["prompts_sha256"]) == 64
    assert len(records(folder, "whole")) == sum(suite["n"] for suite in summary["suites"].values())
    assert summary["suites"]["mmlu"]["scores"]["acc"]["clusters"] == 2 and summary["suites"]["mmlu"]["n"] == 3
    assert list(summary["suites"]["gsm8k"]["scores"]) == ["flexible", "strict"]


def test_the_hash_of_a_prompt_is_of_the_tokens_that_the_model_is_shown(folder: Path) -> None:
    text = ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQuestion: Cool the soup.\nAnswer:<|im_end|>\n"
            "<|im_start|>assistant\n")
    ids = tiny_chat.tokenizer()(text).input_ids
    told = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    assert {r["id"]: r["prompt_sha256"] for r in read_records(folder / "whole", "piqa")}["0"] == told


def test_a_stopped_evaluation_goes_on_to_the_same_results(folder: Path) -> None:
    whole = json.loads((folder / "whole/summary.json").read_text())
    lines = (folder / "whole/items.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 5, 13, len(lines)):
        shutil.rmtree(folder / "cut", ignore_errors=True)
        (folder / "cut").mkdir()
        shutil.copy(folder / "whole/config.json", folder / "cut")
        torn = lines[kept][:40] if kept < len(lines) else b""
        (folder / "cut/items.jsonl").write_bytes(b"".join(lines[:kept]) + torn)
        assert json.loads(json.dumps(ran(folder, "cut"))) == whole, kept
        assert sorted((folder / "cut/items.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sasft.evaluation.subject.Subject.answers", lambda *_: pytest.fail("generated again"))
    monkeypatch.setattr("sasft.evaluation.subject.Subject.loglikelihoods", lambda *_, **__: pytest.fail("scored again"))
    ran(folder, "whole")


def test_a_run_that_goes_on_forms_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding hangs on what is run together: an item that was left does not move to another batch."""
    items = [Item(id=str(i), prompt=user(f"{i}?"), gold="a") for i in range(7)]
    together, measure = [], Answered.measure
    monkeypatch.setattr(Answered, "measure", lambda suite, subject, some: (together.append([i.id for i in some]),
                                                                          measure(suite, subject, some))[1])
    arguments = (tiny_chat.chatty(), tiny_chat.tokenizer(), [own(items)], tmp_path, MeasureSettings(batch_size=3))
    evaluate(*arguments, progress=False)
    assert together == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_text("".join(lines[:2]))
    together.clear()
    evaluate(*arguments, progress=False)
    assert together == [["2"], ["3", "4", "5"], ["6"]]


def test_another_run_is_refused(folder: Path) -> None:
    for other, told in (({"seed": 1}, "weights_sha256"), ({"max_new_tokens": 5}, "max_new_tokens is 4, now 5"),
                        ({"temperature": 0.5}, "temperature"),
                        ({"precision": "bf16"}, "precision is 'fp32', now 'bf16'")):
        with pytest.raises(UsageError, match=f"holds another run .*{told}"):
            ran(folder, "whole", ["task:sums"], **other)


def test_other_prompts_or_reference_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    data = small_sets.write(tmp_path / "data")
    ran(folder, "asked", ["gsm8k"])
    small_sets.jsonl(data / "gsm8k/test.jsonl", [{**r, "answer": "#### 1"} for r in small_sets.GSM8K["test"]])
    with pytest.raises(UsageError, match="holds results of gsm8k from another source, whose reference answers may be others"):
        ran(folder, "asked", ["gsm8k"], data=str(data))
    small_sets.jsonl(data / "gsm8k/test.jsonl", [{**r, "question": r["question"] + "?"} for r in small_sets.GSM8K["test"]])
    with pytest.raises(UsageError, match="holds results of gsm8k on other prompts"):
        ran(folder, "asked", ["gsm8k"], data=str(data))


def test_suites_join_those_that_are_there(folder: Path) -> None:
    first = ran(folder, "joined", ["piqa"])
    both = ran(folder, "joined", ["task:sums"])
    assert list(both["suites"]) == ["piqa", "task:sums"]
    assert both["suites"]["piqa"] == json.loads(json.dumps(first["suites"]["piqa"]))


def test_limits_are_nested_and_the_same_in_every_run(folder: Path) -> None:
    items = [Item(id=str(i)) for i in range(50)]
    few, more = choose(items, 5), choose(items[::-1], 20)
    assert [i.id for i in more[:5]] == [i.id for i in few] and choose(items, 0) == items
    ran(folder, "limited", ["task:sums"], limit=2)
    grown = ran(folder, "limited", ["task:sums"], limit=4)
    assert grown["suites"]["task:sums"] == json.loads((folder / "whole/summary.json").read_text())["suites"]["task:sums"]
    back = ran(folder, "limited", ["task:sums"], limit=2)
    assert back["suites"]["task:sums"]["n"] == 2


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    one = ran(folder, "singly", batch_size=1)
    whole = json.loads((folder / "whole/summary.json").read_text())
    for name, suite in one["suites"].items():
        for metric, score in suite["scores"].items():
            assert score["score"] == pytest.approx(whole["suites"][name]["scores"][metric]["score"], abs=1e-5), (name, metric)
        assert suite["prompts_sha256"] == whole["suites"][name]["prompts_sha256"]


def test_sampled_answers_come_again(folder: Path) -> None:
    first, again = (ran(folder, f"sampled{i}", ["instructions"], temperature=1.0, max_new_tokens=12, batch_size=i + 1)
                    for i in range(2))
    assert [r["answer"] for r in read_records(folder / "sampled0", "instructions")] and first["suites"] == again["suites"]
    answers = [{r["id"]: r["answer"] for r in read_records(folder / f"sampled{i}", "instructions")} for i in range(2)]
    assert answers[0] == answers[1]


def test_another_model_forgets_and_gains(folder: Path) -> None:
    ran(folder, "tuned", seed=1)
    rows = f"rows:{folder / 'rows.jsonl'}"
    same, other = (forgetting(folder / "whole", folder / name, rows) for name in ("whole", "tuned"))
    assert (same.change, same.low, same.high) == (0, 0, 0) and other.change != 0 and other.low < other.change < other.high
    flips = forgetting(folder / "whole", folder / "tuned", "mmlu")
    assert flips.choices == 4 and flips.change == pytest.approx(flips.gained - flips.lost)


def test_divergences_from_a_base(folder: Path, tmp_path: Path) -> None:
    found = evaluate(tiny_chat.chatty(1), tiny_chat.tokenizer(), [f"rows:{folder / 'rows.jsonl'}"], tmp_path,
                     base=tiny_chat.chatty(0), progress=False)
    [suite] = found["suites"].values()
    assert suite["scores"]["kl/base_model"]["score"] > 0 and len(found["identity"]["base"]) == 64
    assert list(suite["scores"]) == ["nll/model", "kl/base_model", "kl/model_base", "entropy/base", "entropy/model", "nll/base"]


@pytest.mark.parametrize(("base", "told"), [
    ("without adapters", "base is 'without adapters', but the model has none"),
    (LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2)), "base predicts 300 tokens, the model 259")])
def test_a_base_that_cannot_be_compared_with_is_refused_before_any_work(folder: Path, tmp_path: Path, base, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), [f"rows:{folder / 'rows.jsonl'}"], tmp_path / "out", base=base,
                 progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_diverged_is_refused(tmp_path: Path) -> None:
    """Its answers would be scored as wrong ones, like any other's."""
    model = tiny_chat.chatty()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = math.nan
    with pytest.raises(UsageError, match="1 of the model's weights are not finite, such as lm_head.weight, .* has diverged"):
        evaluate(model, tiny_chat.tokenizer(), ["task:sums"], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model, base = tiny_chat.save_chatty(tmp_path / "model"), tiny_chat.save_chatty(tmp_path / "base")
    tiny_chat.tokenizer(specials=tiny_chat.SPECIALS[::-1]).save_pretrained(base)  # as many, in another order
    with pytest.raises(UsageError, match="has another tokenizer than .*, and a KL between predictions of different tokens"):
        run(EvaluateSettings(model=str(model), base=str(base), suites="text", out=str(tmp_path / "out")))


def test_a_base_may_have_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str, revision: str | None = None):
        loaded.append((name, revision))
        return tiny_chat.chatty(), tiny_chat.tokenizer()

    monkeypatch.setattr(sys.modules["sasft.evaluation.run"], "load_model", load)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say", "response": "well"}\n')
    given = {"suites": f"rows:{tmp_path}/rows.jsonl", "out": str(tmp_path / "out")}
    found = run(EvaluateSettings(model="org/tuned", base="org/name", base_revision="v1", **given))
    assert loaded == [("org/tuned", None), ("org/name", "v1")]
    assert "kl/base_model" in found["suites"][given["suites"]]["scores"]
    for base in (None, "without adapters"):
        with pytest.raises(UsageError, match="base_revision is 'v1', but base names no model"):
            EvaluateSettings(base=base, base_revision="v1", **given)


def test_questions_in_training_rows_are_told(folder: Path) -> None:
    small_sets.jsonl(folder / "seen.jsonl", [{"prompt": small_sets.GSM8K["test"][0]["question"], "response": "7"}])
    pq.write_table(pa.table({"q": ["Who?"], "a": [small_sets.GSM8K["test"][1]["question"]]}), folder / "seen.parquet")
    found = ran(folder, "seen", ["gsm8k"], training=f"{folder}/seen.jsonl, {folder}/seen.parquet:prompt=q,response=a")["suites"]
    assert found["gsm8k"]["contaminated"]["ids"] == ["0", "1"]
    small_sets.jsonl(folder / "train.jsonl", [{"prompt": small_sets.GSM8K["test"][0]["question"], "response": "7"}])
    found = ran(folder, "seen", ["gsm8k", "mmlu", "rows:rows.jsonl"], training=str(folder / "train.jsonl"))["suites"]
    assert found["gsm8k"]["contaminated"]["ids"] == ["0"] and found["mmlu"]["contaminated"]["n"] == 0
    assert "contaminated" not in found[f"rows:{folder / 'rows.jsonl'}"]  # has no questions to look for


@pytest.mark.parametrize(("suites", "told"), [
    ([], "suites is empty"), (["no such suite"], "there is no suite 'no such suite'; there are gsm8k, mmlu"),
    (["piqa", "piqa"], "named twice: piqa"), (["text:x@2"], "no worked examples"),
    (["rows"], "needs a JSONL file of rows: rows:file.jsonl"),
    (["text:/nowhere.txt"], "can't be read as UTF-8 text"), (["lm_eval"], "needs a task of lm-eval: lm_eval:hellaswag"),
    (["gsm8k:x"], "has no parts"), (["instructions@2"], "no worked examples to show; leave @2 out")])
def test_suites_that_cannot_be_run(folder: Path, suites: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), suites, folder / "refused",
                 MeasureSettings(data=str(folder / "data")), progress=False)
    assert not (folder / "refused").exists()


def own(items: list[Item]) -> Answered:
    return Answered(name="own", items=items, metrics=("right",), max_new_tokens=3,
                    check=lambda item, answer: {"right": float(item.gold in answer)})


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    items = [Item(id=str(i), prompt=user(f"{i}?"), gold="a") for i in range(3)]
    found = evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), [own(items)], tmp_path, progress=False)
    answers = read_records(tmp_path, "own")
    assert found["suites"]["own"]["scores"]["right"]["score"] == pytest.approx(sum("a" in r["answer"] for r in answers) / 3)
    for wrong, told in (([], "has no items"), ([items[0], items[0]], "ids of items must be distinct; '0' is not")):
        with pytest.raises(UsageError, match=told):
            evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), [own(wrong)], tmp_path, progress=False)


def test_a_prompt_that_the_model_cannot_take_is_told_before_any_work(tmp_path: Path) -> None:
    items = [Item(id="short", prompt=user("?"), gold="a"), Item(id="long", prompt=user("word " * 200), gold="a")]
    with pytest.raises(UsageError,
                       match="suite 'own': the prompt of item long has 10.. tokens, the model takes 512; show fewer worked"):
        evaluate(tiny_chat.chatty(), tiny_chat.tokenizer(), ["task:sums", own(items)], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    room = 512 - len(tiny_chat.chat().prompt_ids(user("?")))
    told = f"prompt of item 0 has {512 - room} tokens and its answer up to {room + 2}, the model takes 512; lower max_new_tokens"
    for cap in (room + 2, room + 1):  # the last token of an answer is never fed
        settings = MeasureSettings(max_new_tokens=cap)
        arguments = (tiny_chat.chatty(), tiny_chat.tokenizer(), [own([replace(items[0], id="0")])], tmp_path / "fits", settings)
        if cap == room + 1:
            evaluate(*arguments, progress=False)
        else:
            with pytest.raises(UsageError, match=told):
                evaluate(*arguments, progress=False)


@pytest.mark.parametrize(("settings", "told"), [
    ({"limit": -1}, "limit must be at least 0"), ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"temperature": -0.1}, "temperature"), ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"max_new_tokens": -3}, "max_new_tokens"), ({"precision": "fp8"}, "precision must be .*'fp8'")])
def test_settings_that_make_no_sense(settings: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        MeasureSettings(**settings)


def test_from_a_models_folder(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_chat.save_chatty(folder / "model")
    found = run(EvaluateSettings(model=str(folder / "model"), suites="piqa, mmlu:astronomy", out=str(folder / "run"),
                                 data=str(folder / "data")))
    assert list(found["suites"]) == ["piqa", "mmlu:astronomy"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"weights {found['identity']['weights_sha256'][:12]}") and "acc_norm" in printed
    with pytest.raises(UsageError, match="out is missing"):
        EvaluateSettings()
