"""Which language a text is written in: by its script, and among languages that share one by their commonest words.

A rule of thumb for flagging a file in the wrong language and for IFEval's instructions about language, no language identifier.
It is our own, and may differ from the detector that IFEval's authors used where a text mixes languages.
"""

import re
import unicodedata
from collections import Counter

_OWN_SCRIPT = {"KANNADA": "kn", "HANGUL": "ko", "GURMUKHI": "pa", "GUJARATI": "gu", "TELUGU": "te", "TAMIL": "ta", "THAI": "th",
               "BENGALI": "bn", "GREEK": "el", "HEBREW": "he", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh"}
_COMMON = {
    "LATIN": {
        "en": "the of and to in is that it for was with as be on this are by have from not you at or your we can will what how",
        "de": "der die das und ist in zu den von mit ein eine nicht für auf sich es im dem auch als ich sie wir sind was wie",
        "fr": "le la les de des et est un une en du que pour dans qui pas sur au par ce il elle nous vous avec sont je ne mais",
        "es": "el la los las de y es un una en del que para con no por se su al lo como más este está son qué muy yo",
        "pt": "o a os as de e é um uma em do da dos das que para com não por se no na ao como mais são você isso muito",
        "it": "il la i gli le di e è un una in del della che per con non si da al sono come più questo nel alla anche ma",
        "vi": "và là của có không được cho trong một các với người này những để đã khi từ bạn tôi chúng ở về như",
        "fi": "ja on ei se että oli hän mutta ovat myös kun niin jos kuin olla sen tämä voi joka mitä minä ole sinä",
        "sw": "na ya wa kwa ni la za katika kuwa hii cha huo hiyo yake wake pia watu sana kama lakini au hivyo ili mimi",
        "nl": "de het een en van is dat in op te zijn met voor niet die aan er ook als bij ik je wij maar naar kan dit",
    },
    "CYRILLIC": {
        "ru": "и в не что на я с он как это по но они мы вы из у за от так же для было только её или быть был",
        "bg": "и на да се в за не от са че с по е като който ще това си но съм или може към беше много както при",
    },
    "DEVANAGARI": {
        "hi": "है के में की और से को का नहीं हैं पर यह भी एक कि था हो ने तो इस वह कर लिए थे जो मैं आप",
        "mr": "आहे आणि आहेत नाही मध्ये हे ते या होते आम्ही तुम्ही त्या करून असे की मी तर पण साठी हा ही झाले आपण",
        "ne": "छ र मा छन् पनि यो हो लागि गर्न भएको हुन्छ थियो तथा तपाईं म हामी गर्नुहोस् छैन त्यो गर्ने उनी भने धेरै",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا التي هذه عن مع لا كان الذي ما هو هي كما أو بين ذلك قد كل بعد لم",
        "fa": "و در به از که این را است با برای آن یک می شود بر تا هم شما خود ما هر کرد اند باشد من",
        "ur": "کے کی میں ہے اور سے کا کو نے پر ہیں یہ کہ بھی ایک نہیں اس تھا ہو کر جو آپ ہم لئے لیے",
    },
}
_COMMON_WORDS = {script: {code: frozenset(words.split()) for code, words in table.items()} for script, table in _COMMON.items()}

LANGUAGES = frozenset([*_OWN_SCRIPT.values(), *(language for table in _COMMON.values() for language in table)])
"""The codes (ISO 639-1) that :func:`language_of` knows."""


def language_of(text: str) -> str | None:
    """The code of the language (ISO 639-1), or None where it can't be told (short texts, code, sums, unknown scripts).

    The script that most letters are of settles it, if one language alone writes it; Chinese characters with kana among them are
    Japanese. Else it is the language of which the text has most of some 28 common words: at least two, at least a tenth of its
    words, and more than of any other. Languages without a list come out as a relative or as None.

    >>> [language_of(text) for text in ("Das ist ein Brief, der nicht für dich ist.", "นี่คือจดหมาย", "これは本です", "2 + 2 = 4")]
    ['de', 'th', 'ja', None]
    """
    scripts = Counter(unicodedata.name(c, "").split(" ")[0].split("-")[0] for c in text if c.isalpha())
    known = [(n, script) for script, n in scripts.items() if script in _OWN_SCRIPT or script in _COMMON_WORDS]
    if not known:
        return None
    script = max(known)[1]
    if script == "CJK" and scripts["HIRAGANA"] + scripts["KATAKANA"]:
        return "ja"
    if script in _OWN_SCRIPT:
        return _OWN_SCRIPT[script]
    # Vowel signs of Devanagari are marks, which \w leaves out: words are what stands between blanks and punctuation.
    words = [w for w in re.split(r"[\s\d.,;:!?।()\[\]\"'*«»“”،؟¿¡=+_/<>{}-]+", text.lower()) if w]
    hits = sorted(((sum(w in common for w in words), code) for code, common in _COMMON_WORDS[script].items()), reverse=True)
    (most, code), (second, _) = hits[:2]
    return code if most >= max(2, len(words) / 10) and most > second else None
