"""Log-likelihoods, choices, predicted texts and written answers against plain loops over single rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import AddedToken
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from drift.forward import logits_of, summed_nll
from sasft.chat import Chat, Encoded
from sasft.evaluation.subject import Subject
from sasft.evaluation.suites import Chosen, Item, Predicted, user
from tests.sasft import tiny_chat

PAIRS = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5], [6]), ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14]), ([5, 6], [7, 8]),
         ([5, 6], [7, 9]), ([20, 21, 22, 23], [24, 25, 26, 27, 28])]


def llama(seed: int = 0) -> nn.Module:
    return tiny_chat.chatty(seed).double()


def gpt2() -> nn.Module:
    """Learned positions: padding that shifts them changes every score."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                      initializer_range=0.3)).double().eval()


def one_by_one(model: nn.Module, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """A forward pass for every token of the continuation, without batch, padding or cache."""
    ids, total = list(prompt), 0.0
    with torch.no_grad():
        for token in continuation:
            total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token].item()
            ids.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_loglikelihoods_token_by_token(make, batch_size: int) -> None:
    model = make()
    found = Subject(model=model, chat=tiny_chat.chat(), batch_size=batch_size).loglikelihoods(PAIRS)
    assert found == pytest.approx([one_by_one(model, *pair) for pair in PAIRS], abs=1e-10)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(make, side: str) -> None:
    model = make()
    width = max(len(p) + len(c) for p, c in PAIRS) + 3
    ids, mask, labels = (torch.zeros(len(PAIRS), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for row, (prompt, continuation) in enumerate(PAIRS):
        n = len(prompt) + len(continuation)
        at = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = torch.tensor([*prompt, *continuation]), 1
        labels[row, at] = torch.tensor([-100] * len(prompt) + list(continuation))
    padded = -summed_nll(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, logits_of).item()
    found = Subject(model=model, chat=tiny_chat.chat()).loglikelihoods(PAIRS)
    assert sum(found) == pytest.approx(padded, abs=1e-9)


def test_choices_that_are_one_token_share_a_row() -> None:
    rows = []
    model = llama()
    model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    Subject(model=model, chat=tiny_chat.chat()).loglikelihoods([([5, 6], [n]) for n in range(7, 11)] + [([5], [9])])
    assert rows == [2]


@dataclass
class Told:
    """A subject that finds what it is told to find."""

    found: list[float]
    chat: Chat = field(default_factory=tiny_chat.chat)

    def loglikelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        assert len(pairs) == len(self.found)
        return self.found


def test_a_choice_by_its_sum_and_by_its_mean_a_character() -> None:
    item = Item(id="0", prompt=user("?"), gold=1, choices=("ab", "abcdef"))
    suite = Chosen(name="s", items=[item], metrics=("acc_norm", "acc", "nll"))
    # −3 over 2 characters, −4 over 6: the sum favours the first, the mean the second.
    [record] = suite.measure(Told([-3.0, -4.0]), [item])
    assert record["scores"] == {"acc_norm": (1.0, 1.0), "acc": (0.0, 1.0), "nll": (4.0, 1.0)}
    assert (record["choice"], record["right"], record["logprobs"], record["choices"]) == ("ab", "abcdef", [-3.0, -4.0], 2)


def test_of_equal_choices_the_first_is_taken() -> None:
    items = [Item(id=str(gold), prompt=user("?"), gold=gold, choices=("A", "B", "C")) for gold in range(3)]
    records = Chosen(name="s", items=items, metrics=("acc", "nll")).measure(Told([-2.0, -2.0, -3.0] * 3), items)
    assert [r["scores"]["acc"][0] for r in records] == [1, 0, 0] and [r["scores"]["nll"][0] for r in records] == [2, 2, 3]


def test_choices_are_scored_where_the_assistants_turn_begins() -> None:
    model, chat = llama(), tiny_chat.chat()
    item = Item(id="0", prompt=user("Which?"), gold=2, choices=("A", "BB", "CD"))
    [record] = Chosen(name="s", items=[item], metrics=("acc", "nll", "acc_norm")).measure(Subject(model=model, chat=chat), [item])
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    prompt = chat.tokenizer(text).input_ids
    expected = [one_by_one(model, prompt, chat.tokenizer(choice).input_ids) for choice in item.choices]
    assert record["logprobs"] == pytest.approx(expected, abs=1e-10)
    assert record["scores"]["nll"][0] == pytest.approx(-expected[2])
    assert record["choice"] == item.choices[expected.index(max(expected))]


def predicted() -> Predicted:
    rows = [Encoded.text([5, 6, 7, 8]), Encoded.answered([9, 10, 11], [12, 2]), Encoded.text([30, 31])]
    return Predicted(name="p", metrics=("nll/model",), items=[Item(id=str(i), gold=row) for i, row in enumerate(rows)])


def test_predicted_tokens_and_divergences_from_a_base() -> None:
    model, base, chat, suite = llama(0), llama(1), tiny_chat.chat(), predicted()
    alone = suite.measure(Subject(model=model, chat=chat), suite.items)
    beside = suite.measure(Subject(model=model, chat=chat, base=base), suite.items)
    for item, one, two in zip(suite.items, alone, beside, strict=True):
        ids, at = torch.tensor([item.gold.input_ids]), [i - 1 for i, label in enumerate(item.gold.labels) if label != -100]
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids).logits[0, at], -1) for m in (base, model))
        tokens = ids[0, [i + 1 for i in at]].unsqueeze(1)
        slow = {"nll/model": -q.gather(1, tokens).sum(), "nll/base": -p.gather(1, tokens).sum(),
                "kl/base_model": (p.exp() * (p - q)).sum(), "kl/model_base": (q.exp() * (q - p)).sum(),
                "entropy/base": -(p.exp() * p).sum(), "entropy/model": -(q.exp() * q).sum()}
        assert one["scores"] == {"nll/model": (pytest.approx(slow["nll/model"].item(), abs=1e-9), len(at))}
        assert two["scores"].keys() == slow.keys() and one["tokens"] == two["tokens"] == len(at)
        for key, (total, weight) in two["scores"].items():
            assert (total, weight) == (pytest.approx(slow[key].item(), abs=1e-6), len(at)), key


def test_a_model_does_not_diverge_from_itself() -> None:
    suite = predicted()
    for record in suite.measure(Subject(model=llama(0), chat=tiny_chat.chat(), base=llama(0)), suite.items):
        assert record["scores"]["kl/base_model"][0] == pytest.approx(0, abs=1e-9)


def test_measuring_leaves_training_mode_and_gradients_alone() -> None:
    model, suite = llama().train(), predicted()
    suite.measure(Subject(model=model, chat=tiny_chat.chat()), suite.items)
    assert model.training and all(p.grad is None for p in model.parameters())


def greedily(model: nn.Module, prompt: Sequence[int], stop: int, most: int) -> tuple[list[int], bool]:
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == stop:
            return ids[len(prompt) : -1], True
    return ids[len(prompt) :], False


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_answers_token_by_token(batch_size: int) -> None:
    model, chat = tiny_chat.chatty(3, end=1.5).double(), tiny_chat.chat()
    prompts = [chat.prompt_ids(user(text)) for text in ("a", "bcd", "what?", "a long question with many words")]
    subject = Subject(model=model, chat=chat)
    found = [answer for i in range(0, len(prompts), batch_size)
             for answer in subject.answers(prompts[i : i + batch_size], [("s", str(j)) for j in range(i, i + batch_size)], 12)]
    for prompt, answer in zip(prompts, found, strict=True):
        ids, finished = greedily(model, prompt, chat.end_of_turn, 12)
        expected = chat.tokenizer.decode(ids).strip(), finished, len(ids) + finished
        assert (answer.text, answer.finished, answer.tokens) == expected


def test_an_answers_draws_hang_on_its_name_alone() -> None:
    chat = tiny_chat.chat()
    subject = Subject(model=tiny_chat.chatty(), chat=chat, temperature=1.0, seed=3)
    prompts = [chat.prompt_ids(user("hello"))] * 3
    names = [("s", "0"), ("s", "1"), ("t", "0")]
    together = subject.answers(prompts, names, 20)
    assert subject.answers(prompts[:1], names[1:2], 20) == together[1:2]
    assert len({answer.text for answer in together}) == 3


def test_an_answer_is_cut_at_special_tokens_only() -> None:
    tokenizer = tiny_chat.tokenizer()
    tokenizer.add_tokens([AddedToken("    ", special=False)])
    subject = Subject(model=tiny_chat.chatty(), chat=Chat(tokenizer))
    code = tokenizer("if x:\n    y = 1").input_ids
    assert tokenizer.convert_tokens_to_ids("    ") in code
    whole = subject._answer(code, True)
    assert (whole.text, whole.off_template) == ("if x:\n    y = 1", False)
    cut = subject._answer([*code, *tokenizer("<|im_start|>user\nMore").input_ids], False)
    assert (cut.text, cut.off_template, cut.finished) == ("if x:\n    y = 1", True, False)
