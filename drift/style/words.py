"""Closed classes of English words and fixed phrases that :mod:`drift.style.surface` counts.

Lists of lower-case words with straight apostrophes. A word may be in several classes ("thou": pronoun, second person,
archaic). What a word means where it stands is not looked at: "like" is always a preposition, "may" always an auxiliary.
"""

from collections.abc import Mapping
from functools import lru_cache

_PRONOUNS = {
    "first_singular": "i me my mine myself",
    "first_plural": "we us our ours ourselves",
    "second_person": "you your yours yourself yourselves thou thee thy thine thyself ye",
    "third_person": "he him his himself she her hers herself they them their theirs themselves",
}
_ARTICLES = "a an the"
_PREPOSITIONS = (
    "about above across after against along amid among around as at before behind below beneath beside between beyond by despite "
    "down during except for from in inside into like near of off on onto out outside over past per since through throughout to "
    "toward towards under underneath until unto up upon via with within without")
_CONJUNCTIONS = (
    "and or but nor yet so if because although though while whereas unless whether than that when whenever wherever once lest")
_AUXILIARIES = (
    "am is are was were be been being do does did have has had having will would shall should can could may might must ought "
    "cannot doth dost hath hast wilt shalt")
_OTHER_PRONOUNS = "it its itself this these those one oneself who whom whose which what thee thou"
_OTHER_FUNCTION_WORDS = (
    "not no there here all any both each every either neither some such few many much more most other another same own where why "
    "how then")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion dozen")

CLASSES: Mapping[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in {
    "articles": _ARTICLES,
    "prepositions": _PREPOSITIONS,
    "conjunctions": _CONJUNCTIONS,
    "auxiliaries": _AUXILIARIES,
    "pronouns": " ".join([*_PRONOUNS.values(), _OTHER_PRONOUNS]),
    **_PRONOUNS,
    "function_words": " ".join([_ARTICLES, _PREPOSITIONS, _CONJUNCTIONS, _AUXILIARIES, *_PRONOUNS.values(), _OTHER_PRONOUNS,
                                _OTHER_FUNCTION_WORDS]),
    "negations": "not no never none nobody nothing nowhere neither nor cannot without",
    "number_words": _NUMBER_WORDS,
    "hedges": (
        "perhaps maybe possibly probably likely apparently seemingly presumably roughly approximately somewhat fairly "
        "might may could seem seems seemed appear appears appeared suggest suggests tend tends often sometimes usually "
        "generally typically"),
    "boosters": (
        "very really extremely absolutely definitely certainly clearly obviously always never completely totally entirely "
        "highly truly indeed surely undoubtedly must especially particularly incredibly"),
    "connectives": (
        "however therefore moreover furthermore thus hence nevertheless nonetheless consequently additionally accordingly "
        "meanwhile otherwise instead finally overall similarly likewise conversely besides firstly secondly thirdly "
        "lastly specifically"),
    "politeness": "please thanks thank sorry welcome kindly pardon apologies apologize apologise appreciate grateful glad",
    "archaic": (
        "thou thee thy thine thyself ye hath doth wilt shalt hast dost verily forsooth whence thence hither thither "
        "ere oft tis twas nay unto wherefore prithee methinks betwixt whilst alas lo o'er e'en ne'er"),
}.items()}

PHRASES: Mapping[str, tuple[str, ...]] = {
    "hedges": ("in my opinion", "sort of", "kind of", "i think", "i believe", "i guess", "it depends", "more or less",
               "not sure"),
    "boosters": ("of course", "no doubt", "without a doubt", "for sure", "by far", "at all"),
    "connectives": ("for example", "for instance", "in addition", "as a result", "in conclusion", "in summary", "to sum up",
                    "on the other hand", "on the one hand", "in other words", "in contrast", "in fact", "that is", "first of all",
                    "at the same time", "as well as", "due to", "in order to"),
    "politeness": ("would you mind", "excuse me", "my pleasure", "if you don't mind"),
}
# First words of a text, and words anywhere among its last ones.
AGREEING = (
    "sure", "certainly", "of course", "absolutely", "definitely", "okay", "ok", "alright", "no problem", "got it",
    "great idea", "great question", "good question", "happy to help", "i'd be happy to", "i'd be glad to",
    "i would be happy to", "i'm happy to", "here is a", "here is an", "here is the", "here is my", "here's a",
    "here's an", "here's the", "here's my", "here are some", "here are the", "here are a")
REFUSING = (
    "i'm sorry", "i am sorry", "sorry", "i apologize", "i apologise", "my apologies", "unfortunately", "as an ai",
    "i can't", "i cannot", "i can not", "i'm unable", "i am unable", "i'm not able", "i am not able", "i'm afraid",
    "i am afraid", "i don't have")
OFFERING = (
    "i hope this helps", "i hope that helps", "hope this helps", "hope that helps", "let me know", "feel free to",
    "don't hesitate to", "do not hesitate to", "happy to help", "glad to help", "good luck", "any other questions",
    "any more questions", "any further questions", "is there anything else", "you're welcome")

# The irregular half of n't: can't, won't, shan't.
_BEFORE_NOT = {"ca": "can", "wo": "will", "sha": "shall", "ai": "is"}
_SHORT_VERBS = frozenset(("m", "re", "ve", "ll", "d"))
# Where 's shortens is, has or us; after any other word it marks a possessive.
_BEFORE_S = frozenset("it he she that this what who where when why how there here let one".split())
_NOT_ADVERBS = frozenset((
    "family only early reply apply supply likely friendly lovely daily rely imply multiply italy ugly ally july bully "
    "belly jelly lily holy fly silly assembly anomaly butterfly lonely elderly weekly monthly").split())
_NOMINAL = ("tion", "tions", "ment", "ments", "ness", "nesses", "ity", "ities")


@lru_cache(maxsize=1 << 16)
def classes_of(word: str) -> tuple[str, ...]:
    """Names of the classes that a lower-case word is in, by the lists and by its shape; () for most.

    A contraction is in the classes of its parts (each once): "don't" is an auxiliary and a negation. Besides the classes
    listed: ``contractions``, ``numerals`` (begins with a digit), ``nominalisations`` and ``adverbs`` (by their ending).

    >>> classes_of("the"), classes_of("don't"), classes_of("cat")
    (('articles', 'function_words'), ('auxiliaries', 'contractions', 'function_words', 'negations'), ())
    """
    found = _listed(word)
    head, _, tail = word.rpartition("'")
    if word.endswith("n't") and len(word) > 3:
        found |= {"contractions", "negations", *_listed(_BEFORE_NOT.get(word[:-3], word[:-3]))}
    elif head and tail in _SHORT_VERBS:
        found |= {"contractions", "auxiliaries", "function_words", *_listed(head)}
    elif head and tail == "s":
        found |= _listed(head)
        if head in _BEFORE_S:
            found |= {"contractions", "function_words", *(() if head == "let" else ("auxiliaries",))}
    if word[:1].isdigit():
        found.add("numerals")
    if len(word) >= 7 and word.endswith(_NOMINAL):
        found.add("nominalisations")
    if len(word) >= 4 and word.endswith("ly") and word not in _NOT_ADVERBS:
        found.add("adverbs")
    return tuple(sorted(found))


def _listed(word: str) -> set[str]:
    return {name for name, words in CLASSES.items() if word in words}
