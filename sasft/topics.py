"""What a text is about: a rule over cue words for each of six topics, and a classifier as a second opinion.

The two share no evidence: the rule looks at its cues alone, and the classifier can be made blind to exactly those.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sasft.errors import UsageError

Verdicts = NDArray[np.bool_]
_FOLDS = 5
_WORDS_A_CUE = 50


class Detector(Protocol):
    """Says of each text whether it is about one topic. ``name`` tells detectors apart in a report."""

    name: str
    topic: str

    def __call__(self, texts: Sequence[str]) -> Verdicts: ...


@dataclass(frozen=True)
class Lexicon:
    r"""A rule: a text of n words is about ``topic`` if its cues weigh at least 2 and at least n/50.

    Each *different* string that ``strong`` matches weighs 2, each that ``weak`` matches 1, however often it comes. Both are
    regular expressions, matched regardless of case. Cues and thresholds are this package's choice, for English.

    >>> LEXICONS["mathematics"](["What is 3 + 4?", "How many of 12 eggs are left if 3 break?", "How many friends came?"])
    array([ True,  True, False])
    """

    topic: str
    strong: re.Pattern[str]
    weak: re.Pattern[str]

    @property
    def name(self) -> str:
        return f"{self.topic} lexicon"

    def __call__(self, texts: Sequence[str]) -> Verdicts:
        return np.array([self.weight(text) >= max(2.0, len(text.split()) / _WORDS_A_CUE) for text in texts], dtype=bool)

    def weight(self, text: str) -> int:
        """2 for every different strong cue and 1 for every different weak one."""
        def different(cues: re.Pattern[str]) -> int:
            return len({match.lastgroup or match[0].lower() for match in cues.finditer(text)})

        return 2 * different(self.strong) + different(self.weak)

    def hide(self, text: str) -> str:
        """The text without any cue."""
        return self.weak.sub(" ", self.strong.sub(" ", text))


def _lexicon(topic: str, strong: str, weak: str, strong_forms: str = "", weak_forms: str = "") -> Lexicon:
    """Words by their beginnings (``poly*``) or whole, phrases with ``_`` between words; forms are regular expressions."""
    def words(text: str) -> str:
        forms = (re.escape(word).replace(r"\*", r"\w*").replace("_", r"\s+") for word in text.split())
        return rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)"

    def either(*patterns: str) -> re.Pattern[str]:
        return re.compile("|".join(filter(None, patterns)), re.IGNORECASE | re.MULTILINE)

    return Lexicon(topic, either(words(strong), strong_forms), either(weak_forms, words(weak)))


_NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|hundred"

LEXICONS: Mapping[str, Lexicon] = {lexicon.topic: lexicon for lexicon in (
    _lexicon(
        "mathematics",
        "algebra* arithmetic* calculus geometry trigonometr* equation equations polynomial* theorem* quadratic* "
        "derivative* integral integrals logarithm* denominator* numerator* hypotenuse square_root* cube_root* "
        "prime_number* prime_factor* integer integers math maths mathematic* multiplication parallelogram* coefficient* "
        "modulo sine cosine tangent",
        "how_many how_much how_long how_far how_old distance difference product quotient cube cylinder prism points mph "
        "altogether in_total sum average mean median ratio percent* fraction* multipl* divid* divis* subtract* plus "
        "minus twice triple half probab* area perimeter volume radius diameter circumference angle* triangle* "
        "rectangle* circle* digit* equals equal proof prove proved formula* calculate* compute solve* total remainder "
        "each vector* matrix matrices vertex vertices axis number per",
        strong_forms=r"\\(?:frac|sqrt|sum|int|cdot|times|le|ge|pi|theta|lambda|sin|cos|log)\b|\$[^$\n]{0,60}[\\^=(][^$\n]{0,60}\$"
                     r"|\d\s*[+*×÷^=]\s*\$?\(?-?\d|\d\s+[-–/]\s+\$?\d|\b\d*[a-z]\s*\^\s*\d|\b[xyn]\s*=|\b\d+[xy]\b|=\s*\d",
        weak_forms=rf"(?P<numerals>\b(?:\d[\d.,]*|{_NUMBERS})\b(?=.{{1,80}}?\b(?:\d|(?:{_NUMBERS})\b)))|(?P<percents>%)"
                   r"|(?P<dollars>\$\s?\d)"),
    _lexicon(
        "code",
        "python javascript typescript java c++ c# html css sql mysql postgres* linux unix bash shell_script* regex json "
        "xml yaml github git docker compiler* compile debug* programming programmer* source_code stdin stdout localhost "
        "numpy pandas chmod sudo npm pip substring* boolean* pseudocode api apis recursion command_line",
        "code coding program* script* function* variable* array* string* loop* class method* algorithm* software "
        "database* query queries file files directory directories command* server* parameter* argument* import return "
        "returns integer* list lists module* package* repository repositories branch* output input execute* run "
        "implement* print url port configuration default",
        strong_forms=r"```|^\s*(?-i:(?:def|class)\s+\w+.*:|from\s+[\w.]+\s+import|import\s+[\w.]+)|#include\b|console\.log"
                     r"|\bprint\s*\(|</\w+>"
                     r"|\breturn\s+\w+[;(]|\b(?-i:SELECT\b.+\bFROM)\b|(?<=\s)--[a-z][\w-]+|\w+\(\w*\)\s*[;{]|\w+\[\w+\]"
                     r"|[{}]\s*$|\)\s*;\s*$|\b\w+\.(?:py|js|txt|csv|json|html|sh|cpp|java)\b"),
    _lexicon(
        "medicine",
        "symptom* diagnos* disease* syndrome* medication* cancer* diabet* clinical* surgery surgical surgeon* vaccin* "
        "tumor* tumour* pregnan* antibiotic* chemotherap* physician* mg autosomal prescri* asthma stroke arthritis "
        "infection* infected allerg* blood_pressure heart_attack immune side_effect* dosage* dialysis seizure* insulin",
        "doctor* patient* treat* therap* pain painful disorder* hospital* health medical* medicine* condition* gene "
        "genes genetic* inherited mutation* blood heart lung* kidney* liver brain skin bone* muscle* nerve* fever "
        "cough* virus* bacteria* dose* drug* pill* tablet* nurse* clinic* chronic acute illness* sick cure* injur* cell "
        "cells tissue* hormone* risk* affect* therapist*",
        strong_forms=r"\b(?!academia|bohemia)\w{3,}(?:itis|emia|ectomy|plasty|algia|carcinoma|lymphoma|sclerosis|fibrosis)\b"
                     r"|\b\w*dystrophy\b|\b(?:neuro|myo|cardiomyo|retino|nephro|encephalo)pathy\b"),
    _lexicon(
        "finance",
        "bank bank_account* credit_card* debit_card* mortgage* invest investing investment* investor* stock_market "
        "interest_rate* my_card new_card card_payment* direct_debit* cash_withdrawal* currency currencies "
        "exchange_rate* refund* atm top-up top_up dividend* bitcoin inflation bankrupt* payroll",
        "card cards account* payment* transfer* loan* credit debit cash money fee fees charge charged charges deposit* "
        "withdraw* balance pin budget* tax taxes price* pay paid paying salary income debt* savings stock stocks fund "
        "funds financ* econom* transaction* revenue* profit* cost costs dollar* euro euros pound pounds verify identity"),
    _lexicon(
        "law",
        "lawsuit* plaintiff* defendant* attorney* lawyer* statute* statutory jurisdiction* constitutional* tort "
        "negligence felony misdemeanor litigation prosecut* supreme_court habeas jurisprudence copyright infring* "
        "legislat* judicial* courts",
        "law laws legal* court contract* liab* judge judges jury trial* rights clause* sue sued suing guilty crime* "
        "criminal* police act convict* evidence witness* property damages claim claims party parties treaty treaties "
        "regulation* arrest* testif* sentence enforce* violat* murder* theft motion counsel consent state"),
    _lexicon(
        "history",
        "world_war* civil_war empire* emperor* dynasty dynasties medieval renaissance ancient colonial* colony colonies "
        "bce ottoman roman pharaoh* feudal* monarch* revolutionary crusade* archaeolog* napoleon* reformation "
        "enlightenment historian* prehistor*",
        "history historical* century centuries war wars king kings queen queens revolution* treaty treaties battle* "
        "independence kingdom* slavery slave slaves president* founded invasion* army armies conquer* era civilization* "
        "civilisation* nation* party parliament migration* religio* church europe* soviet communis* peasant* trade",
        weak_forms=r"(?P<year>\b1[0-9]\d\d\b)|(?P<decade>\b1[0-9]\d0s\b)"),
)}
"""The built-in rules by topic."""


@dataclass(frozen=True)
class Rates:
    """How often a detector finds a text of the topic (``sensitivity``), and passes one that is not (``specificity``)."""

    sensitivity: float
    specificity: float


class TopicClassifier:
    r"""Logistic regression on words: a text is about ``topic`` if its probability is at least ½.

    Features: words and pairs of neighbouring words (lower case, digits read as 0, punctuation marks as words), sub-linear TF-IDF,
    of those in at least two texts; L2 with C = 10, both classes weighted alike (scikit-learn's ``LogisticRegression``). ``hide``:
    a lexicon whose cues are cut out of every text first, so that the classifier judges by all that the rule does not look at.
    ``rates``: sensitivity and specificity by five-fold cross-validation over the texts it was fitted on. Texts of other origin it
    judges worse: fitted on grade-school word problems, it finds about two thirds of examination questions on mathematics.

    :meth:`fit` takes texts whose topic is known. :meth:`from_lexicon` needs only the corpus that is to be judged: it learns from
    the rule's verdicts, on words that the rule does not see (as in co-training, Blum & Mitchell 1998), and judges each text by
    the folds without it. It is at home in the corpus, but what the rule misses it finds only where that is said like what the
    rule finds, and has been found more often than missed; its ``rates`` are not known.

    Raises :class:`UsageError` if a class has fewer than 10 texts, or if scikit-learn is not installed.
    """

    def __init__(self, topic: str, name: str, model: Any, hide: Lexicon | None, rates: Rates | None) -> None:
        self.topic, self.name, self.rates = topic, name, rates
        self._model, self._hide = model, hide

    @classmethod
    def fit(cls, topic: str, positives: Sequence[str], negatives: Sequence[str], *, hide: Lexicon | None = None,
            seed: int = 0) -> "TopicClassifier":
        """A classifier from texts about the topic and texts about others."""
        texts = [*positives, *negatives]
        labels = np.repeat([True, False], [len(positives), len(negatives)])
        model, found = _fitted(topic, texts, labels, hide, seed)
        rates = Rates(float(found[labels].mean()), float((~found[~labels]).mean()))
        return cls(topic, f"{topic} classifier", model, hide, rates)

    @classmethod
    def from_lexicon(cls, lexicon: Lexicon, texts: Sequence[str], *, seed: int = 0) -> "TopicClassifier":
        """A classifier that learns from a rule's verdicts on the texts that are to be judged."""
        labels = lexicon(texts)
        model, found = _fitted(lexicon.topic, texts, labels, lexicon, seed)
        known = dict(zip(texts, found.tolist(), strict=True))
        name = f"{lexicon.topic} classifier of the rule's verdicts"
        return cls(lexicon.topic, name, _OutOfFold(model, known, lexicon), None, None)

    def __call__(self, texts: Sequence[str]) -> Verdicts:
        return self._model.predict(_hidden(texts, self._hide)).astype(bool) if len(texts) else np.zeros(0, dtype=bool)


class _OutOfFold:
    """Verdicts from the folds that a text is not in, for texts of the corpus; those of the whole model for others."""

    def __init__(self, model: Any, known: Mapping[str, bool], lexicon: Lexicon) -> None:
        self.model, self.known, self.lexicon = model, known, lexicon

    def predict(self, texts: Sequence[str]) -> Verdicts:
        whole = self.model.predict(_hidden(texts, self.lexicon))
        return np.array([self.known.get(text, other) for text, other in zip(texts, whole, strict=True)], dtype=bool)


def _hidden(texts: Sequence[str], lexicon: Lexicon | None) -> list[str]:
    return list(texts) if lexicon is None else [lexicon.hide(text) for text in texts]


def _fitted(topic: str, texts: Sequence[str], labels: Verdicts, hide: Lexicon | None, seed: int) -> tuple[Any, Verdicts]:
    """The classifier, and its verdict on each text when fitted on the folds without it."""
    about, other = int(labels.sum()), int((~labels).sum())
    if min(about, other) < 10:
        raise UsageError(f"a classifier of {topic} needs at least 10 texts about it and 10 that are not, got {about} and {other}")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise UsageError("a topic classifier needs scikit-learn: pip install scikit-learn") from error
    model = make_pipeline(
        TfidfVectorizer(preprocessor=_plain, token_pattern=r"[^\W_]+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000))
    plain = _hidden(texts, hide)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    found = cross_val_predict(model, plain, labels, cv=folds).astype(bool)
    return model.fit(plain, labels), found


def _plain(text: str) -> str:
    return re.sub(r"\d+", "0", text.lower())
