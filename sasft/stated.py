r"""The number that a free text states as its result, or the reason to say that it states none.

A model answers "42 + 57 is 99, and 99 + 115 = 214." Which of the six numbers is its answer? The text is
read as a sequence of numbers, operators, equality cues ("=", "is", "gives", "the answer:" ...) and other
words. Runs of numbers and operators are expressions; expressions joined by cues are chains. Then:

1. A chain whose left side is a bare number or no expression at all ("The answer is 214") *claims* its right
   side. So does a chain that contains the question's own expression, in any order of its terms.
2. Any other chain with an expression is a *step* (99 above). If nothing is claimed, the last step counts.
3. If there is no chain, a number that stands alone counts: neither operand of an expression, nor one of the
   question's terms, nor hedged ("not 214", "about 214", "214?").

Different claims contradict each other, and the text then states nothing. Restated operands are no answer.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal

_MINUS = str.maketrans("−–—‒", "----")
_THOUSANDS = "[,\u00a0\u2009\u202f]"
_WORD_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "×": "*", "÷": "/", "·": "*"}
_TOKEN = re.compile(
    rf"""
    (?P<number> (?<![\w.,]) (?:\d{{1,3}}(?:{_THOUSANDS}\d{{3}})+ | \d+) (?:\.\d+)? (?![\d%]|[^\W_]) )
  | (?P<cue> => | =+ | → | \b(?:is|are|was|be|equals?|gives?|makes?|totals?|yields?|equal\ to|\w+s?\ to)\b
      | \b(?:answer|result|total|sum|difference)\b\s*: | \\boxed )
  | (?P<operator> [-+*/×÷·] | \b(?:plus|minus|times)\b )
  | (?P<or> \bor\b )
  | (?P<hedge> \b(?:not|than|about|around|approximately|roughly|nearly|almost|between|least|most)\b
      | \w+n't\b | [≈~<>≠] )
  | (?P<other> \w+ | [^\w\s] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
