"""Lexical diversity that does not fall merely because a text is long: MATTR and MTLD."""

from collections.abc import Sequence

MATTR_WINDOW = 25  # answers are often short; the usual 50 to 500 would leave one window
MTLD_THRESHOLD, MTLD_BOUND = 0.72, 200.0


def mattr(words: Sequence[str], window: int = MATTR_WINDOW) -> float:
    """Moving-average type-token ratio (Covington & McFall 2010): the share of distinct words, averaged over all windows.

    A text shorter than the window is one window of its own length; no words give 0. Time O(n) whatever the window: word i
    is new in the windows that begin after its last occurrence.

    >>> mattr("a b a a c".split(), window=3)  # windows with 2, 2 and 2 distinct words
    0.6666666666666666
    """
    n = len(words)
    if n <= window:
        return len(set(words)) / n if n else 0.0
    new, last_start = 0, n - window
    seen: dict[str, int] = {}
    for i, word in enumerate(words):
        new += max(0, min(i, last_start) - max(seen.get(word, -1), i - window))
        seen[word] = i
    return new / (window * (last_start + 1))


def mtld(words: Sequence[str]) -> float:
    """Measure of textual lexical diversity (McCarthy & Jarvis 2010), in words: the mean of a forward and a backward pass.

    A pass cuts the text each time the share of distinct words since the last cut is 0.72 or less; the rest counts as the
    part (1 − share)/(1 − 0.72) of a factor; MTLD is words divided by factors. Bounded at 200 in each direction, which is also
    the value where no word comes twice and the factors are 0: a short text is diverse as far as one can see. No words: 0.
    Under 100 words or so it is noisy.

    >>> mtld("a b a b a b".split())  # both ways one cut, after 3 words (share 2/3), and another 3 words later
    3.0
    """
    if not words:
        return 0.0
    return (_mtld_forward(words) + _mtld_forward(words[::-1])) / 2


def _mtld_forward(words: Sequence[str]) -> float:
    factors, tokens = 0.0, 0
    seen: set[str] = set()
    for word in words:
        tokens += 1
        seen.add(word)
        if len(seen) / tokens <= MTLD_THRESHOLD:
            factors, tokens = factors + 1, 0
            seen.clear()
    if tokens:
        factors += (1 - len(seen) / tokens) / (1 - MTLD_THRESHOLD)
    return min(MTLD_BOUND, len(words) / factors) if factors else MTLD_BOUND
