"""Rows chosen by what the model answers, by its gradients, and among its own answers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sasft.chat import IGNORE
from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods import Costs, method, parse_method
from sasft.methods.grads import density, squared_norms
from sasft.methods.judging import against_reference, grades, on_its_own
from sasft.mixing import SELF, TASK
from sasft.sampling import Sampler, row_seed
from sasft.writing import answer
from tests.sasft.methods import cases
from tests.sasft.methods.workshops import greedy_answer, log_likelihood, task_rows, workshop

QUESTIONS = ["What is it?", "Why?", "Say a word, please.", "How many are there?", "Go on", "And then?"]


def kept(method_, rows: list[Row], shop) -> list[str]:
    return [row.id for row in method_.rows({TASK: rows, SELF: []}, shop)[TASK]]


# --- SLearnLLM ------------------------------------------------------------------------------------------------------


def test_slearnllm_trains_on_what_the_model_does_not_answer(tmp_path: Path) -> None:
    """Gold answers of every other row are the model's own greedy ones, found by a loop written out."""
    shop = workshop(tmp_path)
    model, chat = shop.writer.model, shop.chat
    own = [chat.tokenizer.decode(greedy_answer(model, chat, chat.prompt_ids(({"role": "user", "content": q},)), 7)) for q in QUESTIONS]
    assert all(own)
    rows = task_rows([(q, own[i] if i % 2 else "a cat, no doubt") for i, q in enumerate(QUESTIONS)])
    chosen = method("slearnllm", max_new_tokens=7)
    found = chosen.rows({TASK: rows, SELF: [rows[0]]}, shop)
    assert found == {TASK: rows[::2], SELF: [rows[0]]}
    assert 6 <= shop.costs.generated_tokens <= 6 * 8 and shop.costs.forward_tokens == 0
    report = json.loads((tmp_path / "slearnllm.json").read_text())
    assert (report["rows"], report["kept"], report["agreement_with_exact"]) == (6, 3, 1.0)
    assert report["grades"] == {f"t{i}": float(i % 2) for i in range(6)}


@pytest.mark.parametrize("grader, wrong", [("exact", {"t1", "t2", "t3"}), ("contains", {"t2", "t3"}), ("number", {"t2", "t3"}), ("rouge", {"t2"})])
def test_graders(grader: str, wrong: set[str], tmp_path: Path) -> None:
    answers = {"2 + 2?": "4.", "3 + 3?": "That makes 3 + 3 = 6", "5 + 5?": "It is twelve, or 12", "7 + 7?": "7 + 7 = 15"}
    rows = task_rows([("2 + 2?", "4"), ("3 + 3?", "3 + 3 = 6"), ("5 + 5?", "5 + 5 = 10"), ("7 + 7?", "7 + 7 = 14")])
    assert set(kept(method("slearnllm", grader=grader), rows, workshop(tmp_path, answers.__getitem__))) == wrong


def test_an_answer_at_the_mark_is_right(tmp_path: Path) -> None:
    rows = task_rows([("x", "a b"), ("y", "a b")])  # ROUGE-L of "a c" is ½, that of "c a d" ⅖
    assert kept(method("slearnllm", grader="rouge"), rows, workshop(tmp_path, {"x": "a c", "y": "c a d"}.__getitem__)) == ["t1"]


def test_the_choice_does_not_depend_on_the_order_of_rows_nor_on_their_ids(tmp_path: Path) -> None:
    rows = task_rows([(q, "so") for q in QUESTIONS])
    says = {q: ("so" if len(q) % 2 else "no") for q in QUESTIONS}.__getitem__
    first = {rows[int(i[1:])].prompt[0]["content"] for i in kept(method("slearnllm"), rows, workshop(tmp_path / "a", says))}
    shuffled = [replace(rows[i], id="same") for i in (3, 1, 5, 0, 2, 4)]
    again = method("slearnllm").rows({TASK: shuffled}, workshop(tmp_path / "b", says))[TASK]
    assert first == {row.prompt[0]["content"] for row in again} and 0 < len(first) < 6


def test_a_model_that_answers_all_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="answers all 6 task rows rightly by grader=exact at pass_mark=0.5, so there is nothing to train on"):
        kept(method("slearnllm"), task_rows([(q, "so") for q in QUESTIONS]), workshop(tmp_path, lambda asked: "so"))


def test_rows_without_a_number_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grader=number compares last numbers, but the answer of row t1 has none"):
        kept(method("slearnllm", grader="number"), task_rows([("a", "1"), ("b", "one")]), workshop(tmp_path, str))


@pytest.mark.parametrize("think", [0, 5])
def test_the_model_grades_its_own_answers(think: int, tmp_path: Path) -> None:
    """Against the expected grade written out: greedy answer, greedy reasoning, five log-likelihoods."""
    shop = workshop(tmp_path)
    model, chat = shop.writer.model, shop.chat

    def ids_of(text: str) -> list[int]:
        return chat.prompt_ids(({"role": "user", "content": text},))

    rows = task_rows([(q, f"it is {'so' * i}") for i, q in enumerate(QUESTIONS)])
    wanted, forward = [], 0
    for row in rows:
        answer = chat.tokenizer.decode(greedy_answer(model, chat, ids_of(row.prompt[0]["content"]), 7))
        prompt = ids_of(against_reference(row.prompt[0]["content"], row.response, answer, think=think > 0))
        reasoning = greedy_answer(model, chat, prompt, think)
        assert len(reasoning) == think
        prompt += reasoning
        lead = "\n\n" if think else ""
        p = np.array([math.exp(log_likelihood(model, chat, prompt, f"{lead}Grade: {k}")) for k in range(1, 6)])
        wanted.append(((p * np.arange(1, 6)).sum() / p.sum() - 1) / 4)
        forward += len(prompt) + len(chat.tokenizer(f"{lead}Grade: ").input_ids)
    mark = float(np.median(wanted))
    ids = kept(method("slearnllm", grader="self", max_new_tokens=7, think_tokens=think, pass_mark=mark), rows, shop)
    assert ids == [row.id for row, grade in zip(rows, wanted, strict=True) if grade < mark] and len(ids) == 3
    report = json.loads((tmp_path / "slearnllm.json").read_text())
    assert list(report["grades"].values()) == pytest.approx(wanted, rel=1e-4)
    assert report["agreement_with_exact"] == 0.5  # no answer is right by the letter, half are by the grades
    assert shop.costs.forward_tokens == forward


def test_a_stopped_choice_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = task_rows([(q, f"it is {'so' * i}") for i, q in enumerate(QUESTIONS)])
    chosen = method("slearnllm", grader="self", max_new_tokens=7, think_tokens=4, pass_mark=0.49)
    whole = workshop(tmp_path / "whole")
    wanted = chosen._grades(whole, rows, ["so"] * 6)
    parts = workshop(tmp_path / "parts")
    from sasft.evaluation.subject import Subject

    scored, calls = Subject.loglikelihoods, []

    def stopped(self, pairs, **kwargs):
        calls.append(len(pairs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(self, pairs, **kwargs)

    monkeypatch.setattr("sasft.methods.judging._BATCHES_ON_FILE", 1)
    monkeypatch.setattr(Subject, "loglikelihoods", stopped)
    with pytest.raises(KeyboardInterrupt):
        chosen._grades(parts, rows, ["so"] * 6)
    file = tmp_path / "parts" / "slearnllm-grades.jsonl"
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as torn:
        torn.write('{"id": "half')
    again = workshop(tmp_path / "parts")
    assert chosen._grades(again, rows, ["so"] * 6) == pytest.approx(wanted, rel=1e-6)
    assert calls == [15, 15, 15] and again.costs == whole.costs


# --- improved SFT -------------------------------------------------------------------------------------------------


def self_rows(folder: Path, n: int = 5) -> list[Row]:
    writer = replace(workshop(folder).writer, sampler=Sampler(temperature=0.9, top_p=0.95, max_new_tokens=9))
    return answer(writer, {f"self-{i}": QUESTIONS[i] for i in range(n)}, folder / "self.jsonl", source="self", progress=False)


def test_improved_takes_the_answer_of_highest_grade(tmp_path: Path) -> None:
    own, shop = self_rows(tmp_path), workshop(tmp_path, seed=4)
    model, chat = shop.writer.model, shop.chat
    found = method("improved", samples=3).rows({TASK: [], SELF: own}, shop)[SELF]
    writer = replace(shop.writer, sampler=Sampler(**own[0].meta["sampler"]))
    taken, generated = [], 0
    for row, new in zip(own, found, strict=True):
        drawn = [writer.sample([chat.prompt_ids(row.prompt)], [row_seed(4, "improved", row.id, k)])[0] for k in (1, 2)]
        generated += sum(len(s.logprobs) for s in drawn)
        candidates = [row.response, *(chat.tokenizer.decode(s.ids) for s in drawn)]
        marks = []
        for text in candidates:
            prompt = chat.prompt_ids(({"role": "user", "content": on_its_own(row.prompt[-1]["content"], text)},))
            p = np.array([math.exp(log_likelihood(model, chat, prompt, f"Grade: {k}")) for k in range(1, 6)])
            marks.append((p * np.arange(1, 6)).sum() / p.sum())
        best = int(np.argmax(marks))
        taken.append(best)
        assert new.response == candidates[best] and new.id == row.id and new.prompt == row.prompt
        assert new.response_ids == (row.response_ids if best == 0 else drawn[best - 1].ids)
    assert len(set(taken)) > 1 and shop.costs.generated_tokens == generated
    assert json.loads((tmp_path / "improved.json").read_text())["taken"] == {row.id: k for row, k in zip(own, taken, strict=True)}


def test_one_sample_is_replay_and_equal_grades_leave_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = self_rows(tmp_path)
    assert method("improved", samples=1).rows({TASK: [], SELF: own}, workshop(tmp_path)) == {TASK: [], SELF: own}
    for shift in (0.0, 0.3):  # the same for all candidates of a row
        monkeypatch.setattr("sasft.methods.selection.grades",
                            lambda shop, name, asked, shift=shift: {k: shift * len(k.split("/")[0]) for k in asked})
        assert method("improved", samples=2).rows({TASK: [], SELF: own}, workshop(tmp_path / str(shift)))[SELF] == own


@pytest.mark.parametrize("change, message", [
    (lambda rows: [], "improved chooses among answers to the prompts of self rows, but there are none"),
    (lambda rows: [rows[0], replace(rows[1], meta={})], "self row self-1 names no sampler"),
    (lambda rows: [rows[0], replace(rows[1], meta={**rows[1].meta, "sampler": {"temperature": 1.0}})], "name different samplers"),
    (lambda rows: [rows[0], replace(rows[1], meta={**rows[1].meta, "weights_sha256": "other"})], "was written by another model"),
    (lambda rows: [rows[0], replace(rows[1], id=rows[0].id)], "two self rows have the id self-0;"),
])
def test_improved_refuses_rows_that_are_not_the_models_own(change, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        method("improved").rows({TASK: [], SELF: change(self_rows(tmp_path, 2))}, workshop(tmp_path))


def test_grading_needs_a_writer(tmp_path: Path) -> None:
    shop = replace(workshop(tmp_path), writer=None)
    with pytest.raises(UsageError, match="the method improved has the model grade answers, so its workshop needs a writer"):
        grades(shop, "improved", {"a": "b"})
    with pytest.raises(UsageError, match="the method slearnllm has the model write, so its workshop needs a writer"):
        method("slearnllm").rows({TASK: task_rows([("a", "b")])}, shop)


# --- GrADS --------------------------------------------------------------------------------------------------------


def by_autograd(model, row) -> tuple[float, float]:
    """Squared norms of the gradients of the row's mean cross-entropy, in each role of embedding and head."""
    embedding = model.get_input_embeddings().weight.detach().clone().requires_grad_()
    head = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
    states = model.model(inputs_embeds=embedding[ids], attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    at = (labels != IGNORE).nonzero().squeeze(-1)
    loss = torch.nn.functional.cross_entropy(states[at - 1] @ head.T, labels[at])
    return tuple(float(g.double().square().sum()) for g in torch.autograd.grad(loss, [embedding, head]))


@pytest.mark.parametrize("tied", [False, True])
def test_row_norms_are_those_of_autograd_in_each_role(tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, initializer_range=0.3,
                                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)).eval()
    data = cases.rows()[TASK]
    wanted = torch.tensor([by_autograd(model, row) for row in data], dtype=torch.float64)
    batch = cases.batch_of({TASK: data}, [(TASK, i) for i in range(8)])
    got = torch.stack(squared_norms(model, batch), 1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    model.requires_grad_(False)
    torch.testing.assert_close(torch.stack(squared_norms(model, batch), 1), got)
    assert not model.get_input_embeddings()._forward_hooks and not model.get_output_embeddings()._forward_hooks


def test_the_heads_norm_is_the_sum_over_pairs_of_tokens() -> None:
    model, row = cases.tiny(), cases.rows()[TASK][3]
    labels = torch.tensor(row.labels)
    at = (labels != IGNORE).nonzero().squeeze(-1)
    with torch.no_grad():
        out = model(torch.tensor([row.input_ids]), output_hidden_states=True)
        h = out.hidden_states[-1][0, at - 1].double()
        a = torch.softmax(out.logits[0, at - 1].double(), -1)
    a[range(len(at)), labels[at]] -= 1
    wanted = sum(a[t] @ a[u] * (h[t] @ h[u]) for t in range(len(at)) for u in range(len(at))) / len(at) ** 2
    got = squared_norms(model, cases.batch_of({TASK: [row]}, [(TASK, 0)]))[1]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_density_is_a_sum_of_gaussians_of_scotts_width() -> None:
    x = np.random.default_rng(0).normal(size=30) ** 3
    width = x.std(ddof=1) * 30 ** (-1 / 5)
    wanted = [np.exp(-0.5 * ((x - at) / width) ** 2).mean() / (width * math.sqrt(2 * math.pi)) for at in x]
    assert density(x) == pytest.approx(wanted, rel=1e-9)
    assert density(np.ones(4)).tolist() == [1.0] * 4


def _after_an_epoch(lora: bool, folder: Path, data, seed: int):
    """The model after one epoch of AdamW, row by row, and s of each row by autograd."""
    model = cases.tiny(folder, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    order = np.random.default_rng(seed).permutation(len(data))
    for i in range(0, len(order), 3):
        rows = [data[k] for k in order[i : i + 3]]
        losses = []
        for row in rows:
            labels = torch.tensor(row.labels)
            at = (labels != IGNORE).nonzero().squeeze(-1)
            losses.append(torch.nn.functional.cross_entropy(model(torch.tensor([row.input_ids])).logits[0, at - 1], labels[at], reduction="sum"))
        (sum(losses) / sum(row.loss_tokens for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), optimizer.zero_grad()
    plain = model.merge_and_unload() if lora else model
    return np.array([math.sqrt(sum(by_autograd(plain, row))) for row in data])


@pytest.mark.parametrize("lora", [False, True])
def test_grads_keeps_typical_or_large_rows_after_an_epoch(lora: bool, tmp_path: Path) -> None:
    data = cases.rows()
    s = _after_an_epoch(lora, tmp_path, data[TASK], seed=5)
    options = {"share": 0.5, "lr": 1e-2, "rows_per_step": 3, "seed": 5}
    for keep, order in (("large", np.argsort(-s)), ("dense", np.argsort(-density(np.log(s))))):
        model, costs = cases.tiny(tmp_path, lora), Costs()
        before = cases.weights(model)
        found = method("grads", keep=keep, **options).encoded(data, model, 0, costs)
        assert found[TASK] == [data[TASK][i] for i in sorted(order[:4])] and found[SELF] == data[SELF]
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert costs.backward_tokens == 2 * sum(len(r.input_ids) for r in data[TASK]) and costs.forward_tokens == 0


def test_density_is_that_of_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row among the small norms is lonely on the logarithm's scale alone, one among the large ones on the norm's alone."""
    norms = np.array([0.001, 1.0, 1.1, 1.2, 1.3, 9.0, 12.0, 16.0])
    monkeypatch.setattr("sasft.methods.grads._one_epoch", lambda *args: None)
    monkeypatch.setattr("sasft.methods.grads._row_norms", lambda *args: norms)
    data = cases.rows()
    found = method("grads", share=0.875).encoded(data, cases.tiny(), 0, Costs())[TASK]
    assert found == data[TASK][1:]
    assert density(norms).argmin() == 7


def test_norms_are_on_file_and_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, chosen = cases.rows(), method("grads", lr=1e-2)
    first = chosen.encoded(data, cases.tiny(), 0, costs := Costs(), tmp_path / "method")
    assert len(json.loads((tmp_path / "method" / "grads.json").read_text())["norms"]) == 8
    monkeypatch.setattr("sasft.methods.grads._one_epoch", None)
    assert chosen.encoded(data, cases.tiny(), 0, again := Costs(), tmp_path / "method") == first and again == costs


def test_random_rows_are_as_many_and_cost_nothing() -> None:
    data, costs = cases.rows(), Costs()
    found = method("grads", keep="random", share=0.4, seed=1).encoded(data, cases.tiny(), 0, costs)[TASK]
    assert len(found) == 3 and [data[TASK].index(row) for row in found] == sorted(data[TASK].index(row) for row in found)
    assert found != method("grads", keep="random", share=0.4, seed=2).encoded(data, cases.tiny(), 0, costs)[TASK]
    assert costs == Costs()
    assert len(method("grads", keep="random", share=0.01).encoded(data, cases.tiny(), 0, costs)[TASK]) == 1


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, message", [
    ("slearnllm", "grader=gpt", "grader must be one of exact, contains, number, rouge, self, got 'gpt'"),
    ("slearnllm", "pass_mark=0", "pass_mark must be a number > 0, got 0.0; at 0 every answer would be right"),
    ("slearnllm", "max_new_tokens=0", "max_new_tokens must be at least 1, got 0"),
    ("slearnllm", "think_tokens=-1", "think_tokens must be at least 0, got -1"),
    ("improved", "samples=0", "samples must be at least 1, got 0"),
    ("grads", "share=0", "share must be above 0"),
    ("grads", "share=1.5", r"share must be a number in \[0, 1\], got 1.5"),
    ("grads", "keep=small", "keep must be one of dense, large, random, got 'small'"),
    ("grads", "lr=0", "lr must be a number > 0, got 0.0"),
    ("grads", "rows_per_step=0", "rows_per_step must be at least 1, got 0"),
])
def test_what_cannot_be_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_method(name, text)
