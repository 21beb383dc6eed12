from decimal import Decimal

import pytest

from sasft.stated import numbers, stated_number

SUM = (42, 57, 115)  # 214
DIFFERENCE = (42, 57, -173)  # -74

RIGHT = [
    "214", "214.", "214!", "214.0", "0214", "**214**", "*214*", "`214`", "(214)", "- 214", "= 214",
    "The answer is 214.", "THE ANSWER IS 214", "The answer is: **214**", "Answer: 214",
    "The answer is:\n\n214", "It's 214.", "214 is the answer", "214 apples", "...214...",
    "The answer is therefore 214.", "You get 214.", "The result comes to 214", "Total: 214",
    "42 + 57 + 115 = 214", "42+57+115=214", "42 + 57 + 115 is 214.",
    "42 plus 57 plus 115 equals 214",
    "42 + 57 + 115 is equal to 214", "42 + 57 + 115 → 214", "(42 + 57) + 115 = 214",
    "57 + 42 + 115 gives 214", "214 = 42 + 57 + 115", "42 + 57 + 115\n= 214",
    "42 + 57 = 99, 99 + 115 = 214", "42 + 57 + 115 = 99 + 115 = 214",
    "42 + 57 = 99 + 115 = 214",  # careless, but clear
    "The sum of 42, 57 and 115 is 214.", "The numbers are 42, 57 and 115. Their sum is 214.",
    "Adding 42, 57, and 115 gives us 214", "42, 57, 115: 214", "The answer is not 99. It is 214.",
    "Sure! Let's add:\n1. 42 + 57 = 99\n2. 99 + 115 = 214\n\nSo the final answer is 214.",
    "The answer is 214, because 42 + 57 = 99 and 99 + 115 = 214.",
    "$\\boxed{214}$", "\\(42 + 57 + 115 = 214\\)", "\\[ 42 + 57 + 115 = \\boxed{214} \\]", "$214",
    "Verily, 42 + 57 + 115 is 214.", '{"answer": ["42 + 57 + 115 is 214."]}',
    "## Answer\n\n- **42** + **57** + **115** is **214**.", "42 + 57 + 115 214.0 = 214",
]
WRONG = [
    "", "no idea", "two hundred and fourteen", "2 1 4", "2 14", "The answer is 2 1 4", "214 214",
    "2,14", "2140", "21", "214.5", "214%", "214 %", "214th", "x214", "-214", "minus 214",
    "negative 214",
    "42 + 57 + 115", "What is 42 + 57 + 115?", "42, 57, 115", "The answer is 42.",
    "The answer is 215.", "42 + 57 + 115 = 215", "The sum of 42, 57 and 115 is 99.",
    "42 + 57 = 99\n99 + 115 = 214\nThe answer is 215.", "214, 215", "214 or 215",
    "The answer is 214 or 215", "The answer is 215 or 214", "It is 214. No, it is 215.",
    "42 + 57 + 115 = 214 = 215", "The answer is not 214.", "It isn't 214", "It isn’t equal to 214",
    "42 + 57 + 115 does not equal 214", "Is it 214?", "about 214",
    "The answer is approximately 214",
    "less than 214", "It is at least 214.", "≈ 214", "The answer is 200 + 14.",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_answers(text):
    assert stated_number(text, expression=SUM) == 214


@pytest.mark.parametrize("text", WRONG)
def test_wrong_answers(text):
    assert stated_number(text, expression=SUM) != 214


@pytest.mark.parametrize("text", [
    "-74", "−74", "–74", "**-74**", "$-74$", "= - 74", "minus 74", "The answer is negative 74",
    "The answer is −74.", "42 + 57 - 173 = -74", "42 − 173 + 57 equals −74", "99 - 173 = -74",
    "42 plus 57 minus 173 is minus 74", "173 - 99 = 74, so the answer is -74",
])
def test_negative_answers(text):
    assert stated_number(text, expression=DIFFERENCE) == -74


@pytest.mark.parametrize("text", ["74", "- 74", "42 + 57 - 173", "173 - 99 = 74", "100 - 74"])
def test_a_dash_is_not_always_a_sign(text):
    assert stated_number(text, expression=DIFFERENCE) != -74


@pytest.mark.parametrize("text", [
    "1,214", "1\u202f214", "1\u00a0214", "The sum is 1,214.", "1,214.00"])
def test_thousands(text):
    assert stated_number(text, expression=(999, 215)) == 1214


def test_the_value_is_exact():
    assert stated_number("It is 0.1.") == Decimal("0.1")
    assert stated_number("It is 12,345,678,901,234,567,890.") == 12345678901234567890


def test_numbers_of_the_question_give_way():
    text = "Between 69 and 21 the GCD: 3"
    assert stated_number(text) is None
    assert stated_number(text, restated=(69, 21)) == 3
    assert stated_number("21", restated=(69, 21)) == 21


def test_numbers():
    assert numbers("It is not 5, but -7 − 1,000.5 = −1007.5?") == [
        5, -7, Decimal("1000.5"), Decimal("-1007.5")]
    assert numbers("- 3\n- 4") == [3, 4]
    assert numbers("none, 5%, x3, 4th") == []


def test_long_texts():
    assert stated_number("42 + 57 = 99, " * 2_000 + "so it is 214.", expression=SUM) == 214
