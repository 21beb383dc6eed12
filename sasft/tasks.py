r"""Procedural tasks with a checker: any number of problems from a seed, each with one right answer.

They supply the *new content* of the 2 x 2 design. A problem's raw answer ("214") is content in the data's
own style, :meth:`Task.sentence` says it in a plain sentence, and :meth:`Task.check` finds the truth in a
model's own words, which is how answers in the model's own style are accepted.

``sums`` is built in; ``reasoning_gym:<dataset>`` takes any of reasoning-gym's generators that state a gold
answer (``pip install sasft[tasks]``).

Seeds: item ``i`` of a stream depends on the task's options and ``(seed, i)`` alone; repeats and excluded
keys are passed over in order. So ``problems(n, seed)`` is a prefix of ``problems(n + k, seed)``.
"""

import difflib
import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sasft.errors import UsageError
from sasft.stated import numbers, stated_number
