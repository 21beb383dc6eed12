"""The quality report: each measure counts what it says, and limits stop what is above them."""

import random
import time
from pathlib import Path

import pytest

from sasft.data import Row
from sasft.data_quality import QualityLimits, Spread, inspect_rows, special_tokens
from sasft.errors import UsageError
from sasft.languages import language_of
from sasft.sampling import Sampler
from sasft.selfdialogue import Writer, write_dialogues
from sasft.text_checks import is_degenerate, near_duplicates, off_template, repetition
from tests.sasft import tiny_chat

NOUNS = "apple bridge candle desert engine forest garden harbor island jacket kettle lantern meadow needle orchard".split()


def row(number: int, prompt: str | None = None, response: str | None = None, **kwargs) -> Row:
    a, b = NOUNS[number % 15], NOUNS[(number // 15 + 7 * number + 1) % 15]
    asked = prompt or f"What do you know about the {a} and the {b}, number {number}?"
    return Row(f"r{number}", "self", ({"role": "user", "content": asked},),
               f"There is a {a} that you can see from the {b} where {a} {number} is." if response is None else response, **kwargs)


def good(n: int = 60) -> list[Row]:
    return [row(i) for i in range(n)]


def spoilt(measure: str, n: int = 20) -> list[Row]:
    """``n`` rows that are bad in one way only."""
    numbers = range(100, 100 + n)
    return {
        "unfinished": [row(i, finished=False) for i in numbers],
        "empty": [row(i, response=" \n", response_ids=None) for i in numbers],
        "degenerate": [row(i, response=f"{NOUNS[i % 15]} {i}: " + f"the {i} is what it is and " * 12) for i in numbers],
        "off_template": [row(i, response=f"Sure, that is the {i}.\nUser: and what of the {i + 1}?") for i in numbers],
        "foreign": [row(i, prompt=f"Was ist die {NOUNS[i % 15]} und wie kann ich sie mit dem Auto Nummer {i} für dich finden?",
                        response=f"Ich kann dir das nicht sagen, es ist aber die {i} von {i + 1}.") for i in numbers],
    }[measure]


@pytest.mark.parametrize("measure", ["unfinished", "empty", "degenerate", "off_template", "foreign"])
def test_each_fault_shows_in_its_own_measure_and_no_other(measure: str) -> None:
    report = inspect_rows([*good(), *spoilt(measure)])
    names = ("unfinished", "empty", "duplicates", "duplicate_prompts", "degenerate", "off_template", "foreign")
    assert {name for name in names if report.measures[name]} == {measure}
    assert report.measures[measure] == 20 / 80
    assert report.flagged[measure] == tuple(f"r{i}" for i in range(100, 120))


def test_duplicates_of_rows_and_of_prompts_are_told_apart() -> None:
    rows = good(10)
    same_prompt = Row("p", "self", rows[0].prompt, "An answer that is not like any of the others here.")
    shouted = Row("s", "self", ({"role": "user", "content": rows[1].prompt[0]["content"].upper() + "  "},),
                  rows[1].response.upper())
    almost = Row("a", "self", rows[2].prompt, rows[2].response + " Yes.")
    report = inspect_rows([*rows, same_prompt, shouted, almost])
    assert report.flagged["duplicates"] == ("s",)
    assert report.flagged["duplicate_prompts"] == ("p", "s", "a")
    assert report.flagged["near_duplicates"] == ("s", "a")


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_comparing_all_pairs(threshold: float) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(NOUNS[:4], k=rng.randrange(0, 12))) for _ in range(60)]
    texts += [" ".join(w if rng.random() < 0.95 else "other" for w in text.split()) for text in texts for _ in range(3)]

    def shingles(text: str) -> set:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    expected: list[int | None] = []
    for i, text in enumerate(texts):
        a = shingles(text)
        expected.append(next((j for j in range(i) if expected[j] is None
                              and len(a & shingles(texts[j])) / len(a | shingles(texts[j])) >= threshold), None))
    assert near_duplicates(texts, threshold) == expected
    assert None in expected and sum(e is not None for e in expected) > 20


def test_near_duplicates_of_many_texts_take_no_time() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choice(NOUNS) + str(rng.randrange(50)) for _ in range(60)) for _ in range(3000)]
    start = time.process_time()
    assert near_duplicates(texts) == [None] * 3000
    assert time.process_time() - start < 5  # all pairs: four and a half million comparisons of sets


@pytest.mark.parametrize("text, loop", [
    ("ha" * 200, True), ("I am sorry. " * 10, True), ("no " * 7, False), ("", False),
    (" ".join(f"{i} times {i} is {i * i}." for i in range(40)), False),
    ("\n".join(f"{i}. The {noun} is one of the things that I like." for i, noun in enumerate(NOUNS)), False),
])
def test_loops_are_told_from_lists(text: str, loop: bool) -> None:
    assert is_degenerate(text) == loop


def test_repetition_is_the_share_of_phrases_seen_before() -> None:
    words = random.Random(1).choices("ab", k=30)
    phrases = [tuple(words[i : i + 4]) for i in range(27)]
    assert repetition(" ".join(words)) == pytest.approx(sum(p in phrases[:i] for i, p in enumerate(phrases)) / 27)


@pytest.mark.parametrize("text, mark", [
    ("Hello<|im_end|>there", "<|im_end|>"), ("### Instruction:\nAdd.", "### Instruction"), ("[INST] Hi", "[INST]"),
    ("So.</s>", "</s>"),
    ("a < b and c > d", None), ("The user: he left.", None), ("Assistant: yes", "Assistant:"), ("x <pad_7> y", None),
])
def test_marks_of_templates(text: str, mark: str | None) -> None:
    assert off_template(text) == mark


def test_a_tokenizer_s_own_special_tokens_are_marks() -> None:
    tokenizer = tiny_chat.tokenizer(specials=(*tiny_chat.SPECIALS, "<pad_7>"))
    chat = type("C", (), {"tokenizer": tokenizer})()
    assert set(special_tokens(chat)) == {*tiny_chat.SPECIALS, "<pad_7>"}
    rows = [*good(9), row(100, response="There is a <pad_7> in the answer that you gave.")]
    assert inspect_rows(rows).measures["off_template"] == 0
    assert inspect_rows(rows, chat).measures["off_template"] == pytest.approx(0.1)


@pytest.mark.parametrize("text, language", [
    ("What can I do for you?", "en"), ("Je ne sais pas, mais vous pouvez le faire avec nous.", "fr"),
    ("Ik kan dit niet zien, maar het is er.", "nl"), ("No es lo que yo quería para los niños.", "es"),
    ("Non è la casa che mi piace di più.", "it"), ("Você não sabe o que isso é para mim.", "pt"),
    ("Я не знаю, что это.", "ru"), ("これは何ですか。", "ja"), ("这是什么？", "zh"), ("이것은 무엇입니까?", "ko"),
    ("def f(x): return x + 1", None), ("42", None),
])
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_limits_name_the_measure_its_value_and_the_limit() -> None:
    report = inspect_rows([*good(), *spoilt("off_template"), *spoilt("degenerate")])
    with pytest.raises(UsageError) as error:
        report.check(QualityLimits(off_template=0.1, degenerate=0.3))
    assert "off_template is 0.2, above the limit 0.1 (20 rows, such as r100, r101, r102)" in str(error.value)
    assert "degenerate" not in str(error.value).split("Look at")[0]
    report.check(QualityLimits(off_template=0.2))
    report.check(QualityLimits(off_template=None))
    inspect_rows(good()).check()
    with pytest.raises(UsageError, match="limit empty must be at least 0, or None, got -1"):
        QualityLimits(empty=-1)


def test_every_limit_stops_something() -> None:
    for name in ("unfinished", "empty", "degenerate", "off_template", "foreign"):
        with pytest.raises(UsageError, match=f"{name} is 1, above the limit"):
            inspect_rows(spoilt(name)).check()
    with pytest.raises(UsageError, match="duplicates is 0.95.*duplicate_prompts is 0.95.*near_duplicates is 0.95"):
        inspect_rows([row(1)] * 20).check()
    with pytest.raises(UsageError, match="nats_per_token is 9, above the limit 6"):
        inspect_rows([row(i, meta={"logprobs": [-8.0, -10.0]}) for i in range(5)]).check()


def test_the_report_on_rows_that_a_model_wrote(tmp_path: Path) -> None:
    chat = tiny_chat.chat()
    writer = Writer(model=tiny_chat.chatty(), chat=chat, precision="fp32", batch_size=8, backend="refilled",
                    provenance={"model": "chatty"}, sampler=Sampler(temperature=1, top_p=1, max_new_tokens=12))
    rows = write_dialogues(writer, 30, tmp_path / "self.jsonl", max_user_tokens=30, progress=False)
    report, logprobs = inspect_rows(rows, chat), [lp for r in rows for lp in r.meta["logprobs"]]
    assert report.measures["unfinished"] == sum(not r.finished for r in rows) / 30
    assert report.measures["duplicate_prompts"] == pytest.approx(1 - len({r.prompt[-1]["content"] for r in rows}) / 30)
    assert report.measures["nats_per_token"] == pytest.approx(-sum(logprobs) / len(logprobs))
    assert report.tokens.mean == pytest.approx(sum(len(r.response_ids) for r in rows) / 30) and report.unit == "tokens"
    assert sum(report.languages.values()) == pytest.approx(1)
    assert "unfinished" in str(report) and report.as_dict()["measures"] == report.measures


def test_topics_of_rows() -> None:
    rows = [*good(8), row(100, prompt="What is 3 + 4?", response="3 + 4 = 7"), row(101, prompt="Is the diabetes a disease?")]
    topics = inspect_rows(rows).topics
    assert (topics["mathematics"], topics["medicine"], topics["none"]) == (0.1, 0.1, 0.8)


def test_spread() -> None:
    assert Spread.of(list(range(101))) == Spread(mean=50, p5=5, p50=50, p95=95)
    assert Spread.of([3.0]) == Spread(mean=3.0, p5=3.0, p50=3.0, p95=3.0)


def test_no_rows_have_no_quality() -> None:
    with pytest.raises(UsageError, match="at least one row to report on"):
        inspect_rows([])
