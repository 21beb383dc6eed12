"""Each kind of instruction on answers that obey it and answers that do not, by the definitions of arXiv 2311.07911, table 1."""

import os
from pathlib import Path

import pytest

from sasft.errors import UsageError
from sasft.evaluation.instructions import KINDS, check_instruction, follows, follows_loosely
from sasft.evaluation.sources import FOLDER_VARIABLE, read_jsonl
from sasft.languages import LANGUAGES

AT_LEAST, LESS = "at least", "less than"
FIVE_WORDS = "One two-three, four\nfive."
# kind, options, answers that obey, answers that do not
CASES: list[tuple[str, dict, list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["River", "stone"]}, ["A stone in the river.", "RIVERSIDE STONES"],
     ["A stone.", "A river", "riv er stone"]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": AT_LEAST}, ["Tea and tea.", "teatea", "tea steam tea"],
     ["One tea.", "te a tea"]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": LESS}, ["One tea.", "Coffee."], ["Tea and tea."]),
    ("keywords:forbidden_words", {"forbidden_words": ["tree", "cold"]}, ["Streets, colder trees.", "Nothing."],
     ["A Tree.", "so cold", "tree-lined"]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST}, ["Eve, he", "eee"],
     ["Ever so", "no"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": LESS}, ["Ever so", "no"], ["Eve, he"]),
    ("language:response_language", {"language": "de"}, ["Das ist der Brief, den ich dir mit Freude geschrieben habe."],
     ["This is the letter that I have written to you.", "12 + 3"]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": AT_LEAST},
     ["One. Two! Three?", "It rained. \"Why?\" she asked. Nobody knew. We left.", "1. Tea\n2. Milk\n3. Jam"],
     ["One. Two!", "Dr. Li paid $3.50 for No. 7."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS},
     ["Dr. Li came at 3.30 p.m. with a cat.", "no full stop", "A line\nthat goes on and on."], ["One. Two.", "Why? Because."]),
    ("length_constraints:number_words", {"num_words": 5, "relation": AT_LEAST}, [FIVE_WORDS, "a b c d e f"],
     ["One two-three, four."]),
    ("length_constraints:number_words", {"num_words": 5, "relation": LESS}, ["One two-three, four."], [FIVE_WORDS]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["One\n***\nTwo", "***\nOne\n***\nTwo\n***", "One *** Two"],
     ["One\n\nTwo", "One\n***\nTwo\n***\nThree", "One\n***\n\n***\nTwo", "One"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
     ["First this.\n\nThen that.", "A\n\n\"then, so", "A\n\nTHEN?"],
     ["First\n\nthenceforth", "Then\n\nA", "A\n\nThen\n\nB", "A\nThen", "A\n\n\n\nThen"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["Dear [name], at [address]", "[][]", "[a][b][c]"],
     ["Dear [name]", "[one\ntwo] [three]", "(name) (address)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. Call me", "p. s. call"],
     ["Bye. PS call", "P.P.S"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S Call me", "p. p. s"], ["P.S. call", "PPS"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* one\n* two", "- one\n  - two", "Intro:\n* one\n- two\nEnd"],
     ["* one", "- a\n- b\n- c", "**bold**\n* one", "1. one\n2. two"]),
    ("detectable_format:constrained_response", {},
     ["My answer is yes.", "Well: My answer is maybe. So there.", "My answer is no."],
     ["My answer is yes", "my answer is no.", "My answer is perhaps.", "Yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*one* and *two*", "**one** and *two*", "*a*\n*b*\n*c*"],
     ["*one*", "**one**", "*one\ntwo* *x*", "* * and *one*", "****"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\nA\nSECTION 2\nB", "SECTION 1 SECTION 2 SECTION 3"],
     ["SECTION 1\nA", "SECTION A\nSECTION B", "Section 1\nSection 2"]),
    ("detectable_format:json_format", {}, ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]\n```", " 3 "],
     ["{'a': 1}", '{"a": 1', 'Here: {"a": 1}', "```json\n```"]),
    ("detectable_format:title", {}, ["<<Joy>>\nText", "Text <<a title>> more"], ["<Joy>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["One\n******\nTwo", "******One******Two******", "Yes******No"],
     ["One", "One\n******\nOne", "One\n******\nTwo\n******\nThree", "One************Two", "One\n***\nTwo"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Tell me a joke."}, ["Tell me a joke.\nKnock.", "  TELL ME A JOKE. Ha"],
     ["Sure. Tell me a joke.", "Tell me a"]),
    ("startend:end_checker", {"end_phrase": "That is all."}, ["So. That is all.", '"So. THAT IS ALL."', "That is all.\n"],
     ["That is all. Bye", "That is all", "That is all.**"]),
    ("startend:quotation", {}, ['"All of it."', '  "a" and "b"\n'], ["All of it.", '"All', '"', "“curly”", "'single'"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": AT_LEAST},
     ["STOP it NOW", "I SAID", "A B", "DON'T"],
     ["STOP it now", "Stop It Now", "DONt", "a TOP-SECRET plan", "the U.S. army"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS},
     ["STOP it now", "a TOP-SECRET plan", "none"], ["STOP it NOW"]),
    ("change_case:english_capital", {}, ["GO ON, 7 TIMES!", "THE CAT IS ON THE MAT."],
     ["Go ON", "12", "DAS IST DER HUND UND DIE KATZE IST NICHT DA."]),
    ("change_case:english_lowercase", {}, ["go on, 7 times!", "a tree loses its leaves", "bees make a sweet liquid", "no."],
     ["Go on", "12", "das ist der hund und die katze ist nicht da."]),
    ("punctuation:no_comma", {}, ["No; never.", "1.000"], ["No, never.", "1,000"]),
]


def test_every_kind_has_cases_on_both_sides() -> None:
    assert {kind for kind, *_ in CASES} == KINDS.keys() and len(KINDS) == 25
    assert all(right and wrong for *_, right, wrong in CASES)


@pytest.mark.parametrize(("kind", "options", "right", "wrong"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_kind_against_its_definition(kind: str, options: dict, right: list[str], wrong: list[str]) -> None:
    check_instruction(kind, options)
    assert [answer for answer in right if not follows(kind, options, answer)] == []
    assert [answer for answer in wrong if follows(kind, options, answer)] == []


def test_an_empty_answer_obeys_nothing() -> None:
    assert not any(follows(kind, options, " \n") or follows_loosely(kind, options, "") for kind, options, *_ in CASES)


@pytest.mark.parametrize(("answer", "loose"), [
    ("all lower", True),
    ("Sure!\nall lower", True),  # without the first line
    ("all lower\nHope That Helps", True),  # without the last
    ("Sure!\nall lower\nBye.", True),  # without both
    ("Sure!\nand Here\nall lower", False)])
def test_loosely_leaves_out_first_and_last_lines(answer: str, loose: bool) -> None:
    assert follows_loosely("change_case:english_lowercase", {}, answer) is loose


def test_loosely_leaves_out_asterisks_on_top_of_lines() -> None:
    ends = {"end_phrase": "That is all."}
    assert not follows("startend:end_checker", ends, "So. **That is all.**")
    assert follows_loosely("startend:end_checker", ends, "So. **That is all.**")
    assert follows_loosely("startend:end_checker", ends, "So. *That* is all.\nCheers")
    # Loosely never takes back what strictly holds, though an asterisk is what is asked for.
    assert follows_loosely("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*one*")


@pytest.mark.parametrize(("kind", "options", "told"), [
    ("no:such_kind", {}, "no:such_kind"),
    ("punctuation:no_comma", {"n": 1}, "unexpected keyword argument 'n'"),
    ("length_constraints:number_words", {"num_words": 5}, "missing a required"),
    ("length_constraints:number_words", {"num_words": 5, "relation": "at most"}, "'at least' or 'less than', got 'at most'"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 1, "let_relation": "more"}, "let_relation"),
    ("language:response_language", {"language": "tlh"}, "'tlh'")])
def test_instructions_that_cannot_be_checked_are_refused(kind: str, options: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_instruction(kind, options)


# One sentence about a letter on a table, in each language.
SAMPLES = {
    "ar": "كتبت هذه الرسالة من البيت الذي في المدينة، وهي على الطاولة مع الكتاب",
    "bg": "Написах това писмо за теб и то е на масата, но не съм сигурен, че ще го видиш",
    "bn": "আমি তোমার জন্য এই চিঠিটি লিখেছি এবং এটি টেবিলের উপর আছে",
    "de": "Ich habe diesen Brief für dich geschrieben, und er liegt auf dem Tisch in der Küche",
    "en": "I have written this letter for you, and it is on the table in the kitchen",
    "es": "He escrito esta carta para ti y está en la mesa de la cocina, pero no es muy larga",
    "fa": "من این نامه را برای شما نوشتم و آن را بر روی میز که در خانه است گذاشتم",
    "fi": "Kirjoitin sinulle kirjeen ja se on pöydällä, mutta se ei ole pitkä, kun en ehtinyt",
    "fr": "J'ai écrit cette lettre pour vous et elle est sur la table de la cuisine, mais elle n'est pas longue",
    "gu": "મેં તમારા માટે આ પત્ર લખ્યો છે અને તે ટેબલ પર છે",
    "hi": "मैंने यह पत्र आपके लिए लिखा है और यह रसोई की मेज पर है",
    "it": "Ho scritto questa lettera per te e la lettera è sul tavolo della cucina, ma non è molto lunga",
    "kn": "ನಾನು ಈ ಪತ್ರವನ್ನು ನಿಮಗಾಗಿ ಬರೆದಿದ್ದೇನೆ",
    "ko": "나는 이 편지를 너에게 썼고 그것은 식탁 위에 있다",
    "mr": "मी हे पत्र तुमच्यासाठी लिहिले आहे आणि ते टेबलावर आहे, पण ते मोठे नाही",
    "ne": "मैले यो चिठी तपाईंको लागि लेखेको हुँ र यो टेबलमा छ, तर लामो छैन",
    "pa": "ਮੈਂ ਇਹ ਚਿੱਠੀ ਤੁਹਾਡੇ ਲਈ ਲਿਖੀ ਹੈ",
    "pt": "Escrevi esta carta para você e ela está na mesa da cozinha, mas não é muito longa",
    "ru": "Я написал это письмо для тебя, и оно на столе в кухне, но не такое длинное",
    "sw": "Nimeandika barua hii kwa ajili yako na iko juu ya meza ya jikoni, lakini si ndefu sana",
    "ta": "நான் இந்தக் கடிதத்தை உனக்காக எழுதினேன்",
    "te": "నేను ఈ ఉత్తరం మీ కోసం రాశాను",
    "th": "ฉันเขียนจดหมายฉบับนี้ถึงคุณและวางไว้บนโต๊ะ",
    "ur": "میں نے یہ خط آپ کے لیے لکھا ہے اور یہ میز پر ہے",
    "vi": "Tôi đã viết lá thư này cho bạn và nó ở trên bàn trong bếp, nhưng không dài",
}


@pytest.mark.parametrize("language", SAMPLES)
def test_a_response_in_each_language_that_ifeval_asks_for(language: str) -> None:
    obeyed = [code for code in LANGUAGES if follows("language:response_language", {"language": code}, SAMPLES[language])]
    assert obeyed == [language]


@pytest.mark.skipif(not os.environ.get(FOLDER_VARIABLE), reason=f"{FOLDER_VARIABLE} names no folder of public sets")
def test_every_instruction_of_ifeval_can_be_checked() -> None:
    rows = read_jsonl(Path(os.environ[FOLDER_VARIABLE]) / "ifeval/input_data.jsonl")
    asked = [(kind, options) for row in rows for kind, options in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    for kind, options in asked:
        check_instruction(kind, options)
    assert len(rows) == 541 and len(asked) == 834 and {kind for kind, _ in asked} == KINDS.keys()
