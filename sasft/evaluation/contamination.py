"""Looking for the questions of an evaluation in the rows that a model was trained on."""

import re
from collections.abc import Iterable, Mapping, Sequence

from sasft.data import Row

NGRAM = 13
"""Words and marks in a row that two texts must share, as in arXiv 2005.14165, appendix C; shorter questions must occur whole."""

_SHORTEST = 4


def contaminated(asked: Mapping[str, str], rows: Iterable[Row]) -> list[str]:
    """The ids in ``asked`` ({id: question}) of which a run of 13 words occurs in a row's prompt or response.

    Questions of fewer than 4 words are not looked for. An upper bound where questions share stock phrases of that length.

    >>> row = Row("1", "task", ({"role": "user", "content": "Please: what is 42 + 57? Quick!"},), "99")
    >>> contaminated({"a": "What is 42 + 57?", "b": "What is 42 - 57?"}, [row])
    ['a']
    """
    words = {name: _words(question) for name, question in asked.items()}
    lengths = {min(NGRAM, len(w)) for w in words.values() if len(w) >= _SHORTEST}
    seen = {hash(gram) for row in rows for text in (*(m["content"] for m in row.prompt), row.response)
            for n in lengths for gram in _grams(_words(text), n)}
    return [name for name, w in words.items()
            if len(w) >= _SHORTEST and any(hash(gram) in seen for gram in _grams(w, min(NGRAM, len(w))))]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _grams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
