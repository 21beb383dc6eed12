"""Templates and masks, on byte-level tokenizers whose every token can be read."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import LlamaConfig, LlamaForCausalLM

from sasft.chat import IGNORE, Chat, Encoded, collate
from sasft.errors import UsageError
from tests.sasft.tiny_chat import CHATML, tokenizer

USER = [{"role": "user", "content": "Hi"}]
PROMPT = ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
          "<|im_start|>assistant\n")

# Templates in the manner of well-known families: (special tokens, end of turn, template).
FAMILIES = {
    "chatml": (("<pad>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", CHATML),
    "headers, content trimmed": (
        ("<pad>", "<|begin|>", "<|start|>", "<|end|>", "<|eot|>"), "<|eot|>",
        "<|begin|>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"),
    "other role names": (
        ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>",
        "<bos>{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"),
    "blanks around the answer": (
        ("<unk>", "<s>", "</s>"), "</s>",
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"),
}


def refused(message: str):
    return pytest.raises(UsageError, match=message)


def family(name: str) -> Chat:
    specials, end, template = FAMILIES[name]
    return Chat(tokenizer(template, specials=specials, eos=end, pad=None))


def labelled(chat: Chat, row: Encoded) -> str:
    return chat.tokenizer.decode([label for label in row.labels if label != IGNORE])


def test_a_row_reads_as_the_template_writes_it_and_learns_response_and_end_of_turn():
    chat = Chat(tokenizer())
    row = chat.encode(USER, "Hello.")
    assert chat.tokenizer.decode(row.input_ids) == PROMPT + "Hello.<|im_end|>"
    assert labelled(chat, row) == "Hello.<|im_end|>"
    assert row.labels[: row.start] == (IGNORE,) * len(chat.prompt_ids(USER))
    assert list(row.input_ids[: row.start]) == chat.prompt_ids(USER)
    assert row.finished and row.input_ids[-1] == chat.end_of_turn
    assert chat.tokenizer.decode(row.response_ids) == "Hello."


def test_a_cut_response_has_no_end_of_turn():
    chat = Chat(tokenizer())
    row = chat.encode(USER, "Hel", finished=False)
    assert labelled(chat, row) == "Hel"
    assert not row.finished and chat.tokenizer.decode(row.response_ids) == "Hel"


def test_an_empty_sampled_answer_learns_to_end_the_turn():
    chat = Chat(tokenizer())
    assert labelled(chat, chat.encode(USER, [])) == "<|im_end|>"


def test_sampled_ids_are_kept_where_text_would_be_cut_otherwise():
    chat = Chat(tokenizer(merges=[("a", "b")]))
    a, b = chat.tokenizer.convert_tokens_to_ids(["a", "b"])
    sampled, text = chat.encode(USER, [a, b]), chat.encode(USER, "ab")
    assert sampled.response_ids == (a, b)
    assert len(text.response_ids) == 1
    assert labelled(chat, sampled) == labelled(chat, text) == "ab<|im_end|>"


def test_the_prompt_stays_as_in_sampling_where_the_response_would_melt_into_it():
    chat = Chat(tokenizer(merges=[("Ċ", "Ċ")]))  # Ċ is the byte of a line feed
    prompt = chat.prompt_ids(USER)
    together = chat.tokenizer(PROMPT + "\nok", add_special_tokens=False).input_ids
    assert together[: len(prompt)] != prompt
    row = chat.encode(USER, "\nok")
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert labelled(chat, row) == "\nok<|im_end|>"


def test_the_end_of_turn_is_the_template_s_not_the_tokenizer_s():
    chat = Chat(tokenizer(eos="<|endoftext|>"))
    assert chat.tokenizer.eos_token_id == 0
    assert chat.end_of_turn == 2


def test_user_prefix_holds_the_default_system_prompt_or_the_one_given():
    chat = Chat(tokenizer())
    decode = chat.tokenizer.decode
    assert decode(chat.user_prefix_ids()) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert decode(chat.user_prefix_ids("Rhyme.")) == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_template_families(name):
    chat = family(name)
    end = FAMILIES[name][1]
    assert chat.tokenizer.decode([chat.end_of_turn]) == end
    whole = chat.tokenizer.apply_chat_template(
        [*USER, {"role": "assistant", "content": "Hello."}], tokenize=False)
    row = chat.encode(USER, "Hello.")
    assert whole.rstrip("\n") == chat.tokenizer.decode(row.input_ids)
    assert list(row.input_ids[: row.start]) == chat.prompt_ids(USER)
    blank = " " if name == "blanks around the answer" else ""
    assert labelled(chat, row) == f"{blank}Hello.{blank}{end}"
    assert labelled(chat, chat.encode(USER, "Hel", finished=False)) == f"{blank}Hel"
    assert chat.pad_id == 0


def test_blanks_around_a_text_are_trimmed_as_the_template_has_it():
    for name, expected in (("chatml", " a \n"), ("headers, content trimmed", "a")):
        chat = family(name)
        row = chat.encode(USER, " a \n")
        assert chat.tokenizer.decode(row.response_ids) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_comes_back(name):
    chat, rng = family(name), random.Random(0)
    pieces = ["\n", "  ", "\t", "a", "Z", ".", "é", "e\u0301", "漢字", "🙂", "<", "|", "\\", '"',
              "```", "[INST]"]
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        if not text.strip():
            continue
        row = chat.encode(USER, text, finished=rng.random() < 0.5)
        assert chat.tokenizer.decode(row.response_ids).strip() == text.strip()
        assert list(row.input_ids[: row.start]) == chat.prompt_ids(USER)


def test_pad_is_never_a_token_that_ends_a_turn():
    assert Chat(tokenizer(pad="<|im_start|>")).pad_id == 1
    assert Chat(tokenizer(pad="<|im_end|>")).pad_id == 0
    assert Chat(tokenizer(pad="<|im_end|>", eos="<|endoftext|>")).pad_id == 1
    assert Chat(tokenizer(pad=None)).pad_id == 0
    only_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    with refused(r"can pad only with tokens that end a turn; add one"):
        Chat(tokenizer(only_end, specials=["<|im_end|>"], pad=None))


def test_prompts_are_the_same_on_every_day() -> None:
    dated = """{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
{%- endif %}{% endif %}""" + CHATML.replace("Be kind.", "It is {{ date_string }}, {{ strftime_now( '%A' ) }}.")
    chat = Chat(tokenizer(dated))
    opening = "<|im_start|>system\nIt is 26 Jul 2024, Friday.<|im_end|>\n<|im_start|>user\n"
    assert chat.tokenizer.decode(chat.user_prefix_ids()) == opening
    row = chat.encode([{"role": "user", "content": "Hi"}], "Yo")
    assert chat.tokenizer.decode(row.input_ids) == f"{opening}Hi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"


def test_show_colours_what_is_in_the_loss():
    chat = Chat(tokenizer())
    assert chat.show(chat.encode(USER, "Yes")) == (
        f"\x1b[2m{PROMPT}\x1b[0m\x1b[1;32mYes<|im_end|>\x1b[0m")
    assert "\x1b[1;35mYes" in chat.show(chat.encode(USER, "Yes"), hue=35)
    assert chat.show(chat.encode(USER, "Yes"), colour=False) == f"{PROMPT}⟦Yes<|im_end|>⟧"


THINKS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
MOVES = CHATML.replace("Be kind.", "{{ messages | length }} turns.")
UNTHINKS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>') | last }}")


@pytest.mark.parametrize(("template", "response", "message"), [
    (THINKS, "Hi.", r"of 'tiny' is not prefix-stable: .*assistant\\n', but .*<think>.*think block"),
    (MOVES, "Hi.", r"is not prefix-stable: "),
    (UNTHINKS, "<think>2</think>Four", r"turns the response '<think>2</think>Four' into 'Four'"),
    (CHATML, "a<|im_end|>b", r"holds the end-of-turn token '<\|im_end\|>'; take it out"),
    (CHATML, [5, 2], r"holds the end-of-turn token"),
    (CHATML, [5, 10**6], r"response id 1000000 is none of the 259 tokens of 'tiny'"),
])
def test_what_cannot_be_encoded(template, response, message):
    with refused(message):
        Chat(tokenizer(template)).encode(USER, response)


def test_a_template_that_is_unstable_in_long_conversations_only():
    chat = Chat(tokenizer(CHATML.replace("Be kind.", "{{ messages | length > 3 }}")))
    assert labelled(chat, chat.encode(USER, "Hi.")) == "Hi.<|im_end|>"
    with refused(r"is not prefix-stable"):
        chat.encode([*USER, {"role": "assistant", "content": "Yo"}, *USER], "Hi.")


def test_sampled_ids_need_no_stable_template():
    chat = Chat(tokenizer(THINKS))
    assert chat.encode(USER, [65, 66]).response_ids == (65, 66)


def test_a_tokenizer_that_loses_text_is_found_out():
    chat = Chat(tokenizer(normalizer=normalizers.Replace("y", "ies")))
    with refused(r"does not give the response back: 'fly' became 'flies'"):
        chat.encode(USER, "fly")


def test_a_template_s_refusal_is_passed_on():
    chat = Chat(tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        + CHATML))
    with refused(r"of the roles \(system, user\): no system, please"):
        chat.prompt_ids([{"role": "system", "content": "x"}, *USER])


@pytest.mark.parametrize(("template", "message"), [
    (None, r"tokenizer of 'tiny' has no chat template.*chat_template\.jinja"),
    ("{{ messages[0].content }}", r"leaves out what the assistant says; it renders 'A TURN"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
     r"ends the assistant's turn with '\\n', which does not begin with a special token"),
    ("{% for m in messages %}{{ m.content }} bye<|im_end|>{% endfor %}",
     r"turn with ' bye<\|im_end\|>', which does not begin"),
])
def test_templates_that_cannot_be_used(template, message):
    with refused(message):
        Chat(tokenizer(template))


@pytest.mark.parametrize(("ids", "labels", "message"), [
    ((5, 6), (IGNORE, IGNORE), "the mask hides every token"),
    ((), (), "the mask hides every token"),
    ((5, 6), (IGNORE,), "got 1 labels for 2 tokens"),
    ((5, 6), (6, IGNORE), "a label must be its own token"),
    ((5, 6, 2), (IGNORE, 6, IGNORE), "hides the last token of a finished row, its end of turn"),
])
def test_rows_that_make_no_sense(ids, labels, message):
    with refused(message):
        Encoded(ids, labels)


def test_cut_keeps_what_fits():
    row = Encoded((5, 6, 7, 2), (IGNORE, 6, 7, 2))
    assert row.cut(4) is row
    assert row.cut(3) == Encoded((5, 6, 7), (IGNORE, 6, 7), finished=False)
    with refused("hides every token"):
        row.cut(1)


def test_with_response_of_an_unfinished_row():
    row = Encoded((5, 6, 7), (IGNORE, 6, 7), finished=False).with_response((9,))
    assert row == Encoded((5, 9), (IGNORE, 9), finished=False)


def test_a_batch_scores_each_row_as_it_scores_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1)).double().eval()
    chat = Chat(tokenizer())
    rows = [chat.encode(USER, "Hello there."),
            chat.encode([{"role": "user", "content": "A longer question?"}], "No", finished=False),
            Encoded.text([9, 8, 7, 6])]
    batch = collate(rows, chat.pad_id)
    start, width = batch.pop("response_start"), batch["labels"].shape[1]
    assert start == max(r.start for r in rows)
    assert (batch["labels"][:, start] != IGNORE).all()
    assert (batch["labels"][:, :start] == IGNORE).all()
    labels = batch.pop("labels")[:, start:]
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=width - start + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1)
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            expected = [alone[t - 1, row.labels[t]] for t in range(row.start, len(row.labels))]
            columns = (labels[i] != IGNORE).nonzero().squeeze(-1)
            found = logprobs[i, columns, labels[i, columns]]
            torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


def test_collate_pads_and_counts_positions():
    rows = [Encoded((5, 6, 7), (IGNORE, IGNORE, 7)), Encoded((8, 9), (IGNORE, 9))]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7], [IGNORE, IGNORE, 9]]
    assert {t.dtype for t in batch.values() if isinstance(t, torch.Tensor)} == {torch.int64}
    with refused("at least one row"):
        collate([], pad_id=0)


def test_errors_do_not_print_whole_conversations():
    with pytest.raises(UsageError) as caught:
        Chat(tokenizer(MOVES)).encode([{"role": "user", "content": "long " * 500}], "Hi.")
    assert len(re.sub(r"\s+", " ", str(caught.value))) < 700


# --- several turns --------------------------------------------------------------------------------------------

TALK = [*USER, {"role": "assistant", "content": "Yo."}, {"role": "user", "content": "And?"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_turns_of_the_assistant_are_learnt_each_with_its_end(name):
    chat, end = family(name), FAMILIES[name][1]
    last, every = chat.encode(TALK, "So."), chat.encode(TALK, "So.", turns="all")
    assert every.input_ids == last.input_ids
    blank = " " if name == "blanks around the answer" else ""
    assert labelled(chat, every) == f"{blank}Yo.{blank}{end}{blank}So.{blank}{end}" and labelled(chat, last).count(end) == 1
    assert every.start == chat.encode(USER, "Yo.").start and not chat.encode(TALK, "So", finished=False, turns="all").finished
    with refused("only a row with a single turn in the loss"):
        every.with_response([5])


def test_turns_that_are_rendered_otherwise_in_the_past_cannot_be_learnt():
    forgets = CHATML.replace("{{ m.content }}", "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}…{% endif %}")
    with refused("renders the assistant's turn 'Yo.' otherwise once the conversation goes on.*set turns to last"):
        Chat(tokenizer(forgets)).encode(TALK, "So.", turns="all")
    with refused("turns must be last or all, got 'first'"):
        Chat(tokenizer()).encode(TALK, "So.", turns="first")


# --- templates of real models, as TRL ships them --------------------------------------------------------------

TURNS = ("<|im_start|>", "<|im_end|>")
THINK = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# (template, special tokens, eos, pad, how the prompt ends, what ends the answer)
REAL = [
    ("qwen2_5", TURNS, "<|im_end|>", "<|im_end|>",  # a default system prompt, and eos = pad
     "You are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ("qwen3", TURNS, "<|im_end|>", None, THINK, "<|im_end|>"),  # adds an empty think block to answers only
    ("qwen3_5_nothink", TURNS, "<|im_end|>", None, THINK, "<|im_end|>"),
    ("qwen3_6", TURNS, "<|im_end|>", None, THINK, "<|im_end|>"),  # opens a think block for sampling, closes it in answers
    ("nemotron_3_nano", TURNS, "<|im_end|>", None, "<|im_start|>assistant\n<think></think>", "<|im_end|>"),
    ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<eos>", "<eos>",
     "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("gemma3", ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<eos>", "Hi<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    ("phi3", ("<|user|>", "<|assistant|>", "<|end|>"), "<eos>", "<eos>", "<|user|>\nHi<|end|>\n<|assistant|>\n", "<|end|>"),
    ("cohere", ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"), "<eos>", None,
     "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
]


def real(name: str, specials=TURNS, eos="<|im_end|>", pad=None) -> Chat:
    trl = importlib.util.find_spec("trl")
    file = Path(trl.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja" if trl else Path("none")
    if not file.exists():
        pytest.skip(f"TRL's template {name} is not installed")
    made = tokenizer(file.read_text(encoding="utf-8"), specials=("<unk>", "<bos>", "<eos>", *specials), eos=eos, pad=pad)
    made.bos_token = "<bos>"
    return Chat(made)


@pytest.mark.parametrize(("name", "specials", "eos", "pad", "opening", "end"), REAL, ids=[r[0] for r in REAL])
def test_real_templates(name, specials, eos, pad, opening, end):
    chat = real(name, specials, eos, pad)
    row = chat.encode(USER, "Hello.")
    assert list(row.input_ids[: row.start]) == chat.prompt_ids(USER)  # training conditions on what sampling conditions on
    assert chat.tokenizer.decode(row.input_ids[: row.start]).endswith(opening)
    assert labelled(chat, row) == "Hello." + end
    batch = collate([row, chat.encode(USER, "A longer answer.")], chat.pad_id)
    assert (batch["labels"] == chat.end_of_turn).sum() == 2 and chat.pad_id not in (chat.end_of_turn, chat.tokenizer.eos_token_id)


def test_real_templates_that_would_train_on_other_prompts_than_they_sample_from_are_refused():
    chat = real("deepseek_r1_distill", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>")
    with refused(r"is not prefix-stable: the prompt for sampling ends in .*<think>\\n"):
        chat.encode(USER, "Hello.")
    with refused("ends the assistant's turn with '', which does not begin with a special token"):
        real("glm4moe", ("<|user|>", "<|assistant|>"), "<eos>")


def test_earlier_turns_of_a_reasoning_template_have_no_think_block():
    with refused("renders the assistant's turn 'Yo.' otherwise once the conversation goes on"):
        real("qwen3").encode(TALK, "So.", turns="all")
    chat = real("qwen2_5")
    assert labelled(chat, chat.encode(TALK, "So.", turns="all")) == "Yo.<|im_end|>So.<|im_end|>"
