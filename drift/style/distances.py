"""How far two sets of texts are from each other in style, and whether that is more than chance."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drift.style.classifier import deal_folds, out_of_fold_scores, wins
from drift.style.surface import style_matrix, words_of

Array = NDArray[np.float64]
Features = Callable[[Sequence[str]], Array]
DELTA_WORDS = 150  # the most frequent words that Delta looks at
_LEVEL = 95.0


@dataclass(frozen=True)
class Statistic:
    """A distance, its 95 % bootstrap ``interval`` (low, high), permutation ``p_value``, and its mean over the permutations.

    ``null`` is what ``value`` would be about if both sets came from one population: not 0 for every distance.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    null: float


@dataclass(frozen=True)
class FeatureDifference:
    """One feature's means in both sets, and ``d``, their difference (texts less reference) in standard deviations.

    The standard deviation is that over all texts of both sets; 0 for a feature that never varies.
    """

    name: str
    mean_reference: float
    mean_texts: float
    d: float


@dataclass(frozen=True)
class StyleComparison:
    """What :func:`compare_styles` found; ``features`` are sorted by ``|d|``, largest first."""

    mean_distance: Statistic
    delta: Statistic
    energy: Statistic
    auc: Statistic
    features: tuple[FeatureDifference, ...]


def compare_styles(reference: Sequence[str], texts: Sequence[str], *, features: Features = style_matrix, paired: bool = False,
                   resamples: int = 1000, permutations: int = 1000, refits: int = 200, seed: int = 0) -> StyleComparison:
    r"""Four distances in style between two sets of texts, with confidence intervals and permutation p-values.

    ``features(texts)`` gives [n, F] numbers, and may carry their ``names``. Each feature is divided by its standard deviation
    (ddof 1) over all texts of both sets, and left out if it never varies; below, :math:`x_i` and :math:`y_j` are the vectors
    of the F left, of n reference texts and m texts.

    ``mean_distance``
        :math:`\sqrt{\max(0,g)}` with :math:`g=\frac1F\bigl[\|\bar x-\bar y\|^2-\sum_f(s_{x,f}^2/n+s_{y,f}^2/m)\bigr]`, the
        squared difference of means less what sampling alone gives (:func:`style_distance`). The p-value is that of g.
    ``delta``
        Burrows' Delta (Burrows 2002; as an L1 distance: Argamon 2008),
        :math:`\frac1W\sum_w|\bar f_{x,w}-\bar f_{y,w}|/\sigma_w` over the 150 words most frequent in both sets together (each set
        counting the same). :math:`\bar f_{x,w}` is the mean over texts of the word's share of a text's words,
        :math:`\sigma_w` its standard deviation over all texts of both sets. Uses words, not ``features``. Never negative, so
        above 0 by chance: compare it with ``null``.
    ``energy``
        energy distance (Székely & Rizzo 2013), :math:`2E\|x-y\|-E\|x-x'\|-E\|y-y'\|` with norms divided by
        :math:`\sqrt F`, means over pairs of different texts (U-statistic: unbiased, no root taken, around 0 if nothing differs).
    ``auc``
        area under the ROC curve of a logistic regression (L2, C = 1) of texts against reference, from the pooled
        out-of-fold scores of five folds (fewer with fewer texts) with an even part of each set: 0.5 if they can't be told apart.

    With ``paired=True`` text i of both sets answers prompt i. Pairs then stay in one fold, are resampled and swapped as a
    whole, and :math:`x_i,y_i` are left out of the means over pairs as :math:`x_i,x_i` is, so that g and the energy distance
    stay unbiased although both answers depend on the prompt.

    *Intervals*: percentiles over ``resamples`` bootstrap draws of texts within each set; standard deviations and Delta's words
    are held. A draw that holds a text twice would bring the pair of it with itself into g and energy, which leave it out of
    the sample, and so be biased upwards; such pairs are left out of the draw, too. Delta's draws are noisier than its sample
    and so larger on average: they are moved down by that difference (not below 0), and the interval is one for the
    Delta of sets of this size. AUC's draws are of out-of-fold scores, without the chance that is in the training. Near 0 the
    intervals of g and energy are too wide.

    *p-values*: :math:`(1+\#\{T_\pi\ge T\})/(1+P)` over P = ``permutations`` random divisions of the texts; for AUC, P =
    ``refits`` divisions that keep the folds' shares, the classifiers fitted anew for each.

    Cost: :math:`O((n+m)^2(F+\text{resamples}+\text{permutations}))` time and a few [n+m, n+m] arrays; for 100 + 100 texts half
    a second, for 500 + 500 three, half of it the refits. Raises ``ValueError`` before any of that for fewer than 3 texts a
    side, for paired sets of different sizes, for counts below 1, and for features of a wrong shape or not finite.

    >>> plain = [f"The sum of {a} and {b} is {a + b}." for a in range(4) for b in range(4)]
    >>> found = compare_styles(plain, [t.upper() + "!!" for t in plain], paired=True, resamples=99, permutations=99, refits=19)
    >>> found.auc.value, found.energy.p_value, found.features[0].name
    (1.0, 0.01, 'exclamation_marks')
    """
    check_sizes("compare_styles", reference, texts, paired)
    for name, count in (("resamples", resamples), ("permutations", permutations), ("refits", refits)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    x, y, names = feature_pair(features, reference, texts)
    n, m = len(x), len(y)
    rng = np.random.default_rng(seed)
    draws = _Draws(n, m, paired, resamples, permutations, rng)
    z = _standardised(np.concatenate([x, y]))
    width = max(z.shape[1], 1)
    g = _quadratic(z @ z.T / width, draws)
    energy = _quadratic(-np.sqrt(_squared_distances(z) / width), draws)
    means = x.mean(axis=0), y.mean(axis=0)
    both = np.concatenate([x, y])
    d = np.divide(means[1] - means[0], both.std(axis=0, ddof=1), out=np.zeros(len(names)), where=_varies(both))
    table = [FeatureDifference(*row) for row in zip(names, *(column.tolist() for column in (*means, d)), strict=True)]
    return StyleComparison(
        mean_distance=_rooted(g), delta=_delta(reference, texts, draws), energy=energy,
        auc=_auc(z, draws, refits, rng), features=tuple(sorted(table, key=lambda row: -abs(row.d))))


def style_distance(reference: Sequence[str], texts: Sequence[str], *, features: Features = style_matrix,
                   paired: bool = False) -> tuple[float, float]:
    r"""Distance between two sets of texts in mean style, with its standard error.

    :math:`d=\sqrt{\max(0, \frac1F\sum_f z_f^2 - b)}` where :math:`z_f` is the difference of the means of feature f in units
    of its standard deviation over all texts of both sets (features that never vary are left out), and :math:`b` the value
    that :math:`\frac1F\sum z_f^2` is expected to have from sampling alone,
    :math:`\frac1F\sum_f(s_{f,1}^2/n_1+s_{f,2}^2/n_2)/s_f^2`. Without that correction few texts would look distant from
    themselves. 0: no difference beyond noise; 1: means one standard deviation apart in a typical feature. The standard error
    is a jackknife over the texts of both sets; near 0 it is not reliable.

    With ``paired=True`` text i of both sets answers prompt i: the noise is then that of the differences within pairs,
    :math:`\frac1F\sum_f s_{f,1-2}^2/(n s_f^2)`, and the jackknife is over pairs. On such texts the unpaired distance subtracts
    too much and misses small differences.

    Raises ``ValueError`` for fewer than 3 texts a side, for paired sets of different sizes, and for features of a wrong
    shape or not finite.

    >>> plain = ["The sum is four.", "It comes to nine.", "That makes seven.", "You get two."]
    >>> style_distance(plain, [t.upper() for t in plain], paired=True)[0] > style_distance(plain, plain)[0] == 0
    True
    """
    check_sizes("style_distance", reference, texts, paired)
    x, y, _ = feature_pair(features, reference, texts)
    return mean_distance(x, y, paired)


def mean_distance(x: Array, y: Array, paired: bool = False) -> tuple[float, float]:
    """:func:`style_distance` of features already computed, ``x`` [n, F] and ``y`` [m, F]."""
    if paired:
        left_out = [[_corrected_distance(np.delete(x, i, 0), np.delete(y, i, 0), True) for i in range(len(x))]]
    else:
        left_out = [[_corrected_distance(np.delete(x, i, 0), y) for i in range(len(x))],
                    [_corrected_distance(x, np.delete(y, i, 0)) for i in range(len(y))]]
    variance = sum((len(values) - 1) * np.var(values) for values in left_out)
    return _corrected_distance(x, y, paired), math.sqrt(variance)


def _corrected_distance(x: Array, y: Array, paired: bool = False) -> float:
    both = np.concatenate([x, y])
    varies = _varies(both)
    if not varies.any():
        return 0.0
    gap = (x.mean(0) - y.mean(0)) ** 2
    noise = (x - y).var(0, ddof=1) / len(x) if paired else x.var(0, ddof=1) / len(x) + y.var(0, ddof=1) / len(y)
    return math.sqrt(max(0.0, float(((gap - noise)[varies] / both.var(axis=0, ddof=1)[varies]).mean())))


def feature_pair(features: Features, reference: Sequence[str], texts: Sequence[str]) -> tuple[Array, Array, tuple[str, ...]]:
    """Features of both sets, checked, [n, F] and [m, F], and their names."""
    x, y = checked_features(features, reference), checked_features(features, texts)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features must give one number of columns, got {x.shape[1]} for reference and {y.shape[1]} for texts")
    return x, y, feature_names(features, x.shape[1])


def checked_features(features: Features, texts: Sequence[str]) -> Array:
    """``features(texts)`` as float64 [n, F]; ``ValueError`` if it is not that, or not finite."""
    found = np.asarray(features(texts), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(texts) or not found.shape[1]:
        raise ValueError(f"features must return [n, F] with a row for each of the {len(texts)} texts and F ≥ 1, "
                         f"got shape {found.shape}")
    if not np.isfinite(found).all():
        row, column = np.argwhere(~np.isfinite(found))[0].tolist()
        raise ValueError(f"features must be finite, got {found[row, column]} for text {row}, feature {column}")
    return found


def feature_names(features: Features, width: int) -> tuple[str, ...]:
    """``features.names``, or the column numbers if there are none."""
    names = tuple(getattr(features, "names", map(str, range(width))))
    if len(names) != width:
        raise ValueError(f"features.names must name each of the {width} columns, got {len(names)} names")
    return names


def check_sizes(function: str, reference: Sequence[str], texts: Sequence[str], paired: bool) -> None:
    """``ValueError`` for what :func:`compare_styles` says of the sets of texts."""
    for argument, given in (("reference", reference), ("texts", texts)):
        if isinstance(given, str):
            raise ValueError(f"{argument} must be a sequence of texts, got one string")
    if len(reference) < 3 or len(texts) < 3:
        raise ValueError(f"{function} needs at least 3 texts a side, got {len(reference)} reference texts and {len(texts)} texts")
    if paired and len(reference) != len(texts):
        raise ValueError("paired=True needs as many texts as reference texts (text i answers prompt i in both), "
                         f"got {len(reference)} reference texts and {len(texts)} texts")


def _standardised(features: Array) -> Array:
    """Columns centred and divided by their standard deviation; those that never vary left out."""
    features = features[:, _varies(features)]
    return (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)


def _varies(features: Array) -> NDArray[np.bool_]:
    # A constant column such as 0.1 can have a mean that is off by rounding, and so a tiny standard deviation.
    return np.ptp(features, axis=0) > 0


def _squared_distances(z: Array) -> Array:
    norms = (z**2).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms - 2 * z @ z.T, 0.0)
    np.fill_diagonal(squared, 0.0)
    return squared


class _Draws:
    """Weights of the N = n + m texts in both sets: as they are, in bootstrap draws, and in random divisions.

    ``sample``, ``bootstrap`` and ``permuted`` are pairs of arrays [draws, N]: how often each text is in the first set and
    in the second. ``units`` [N]: texts of one number are never compared with each other.
    """

    def __init__(self, n: int, m: int, paired: bool, resamples: int, permutations: int, rng: np.random.Generator) -> None:
        self.n, self.m, self.paired = n, m, paired
        self.units = np.concatenate([np.arange(n), np.arange(m) + (0 if paired else n)])
        first = np.repeat([1.0, 0.0], [n, m])
        self.sample = first[None], 1 - first[None]
        a, b = np.zeros((2, resamples, n + m))
        a[:, :n] = _resample(n, resamples, rng)
        b[:, n:] = a[:, :n] if paired else _resample(m, resamples, rng)
        self.bootstrap = a, b
        if paired:
            kept = rng.integers(0, 2, (permutations, n)).astype(float)
            permuted = np.concatenate([kept, 1 - kept], axis=1)
        else:
            permuted = rng.permuted(np.tile(first, (permutations, 1)), axis=1)
        self.permuted = permuted, 1 - permuted


def _resample(n: int, draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of n texts is in each draw, [draws, n]; draws of one text only have no pair, and are drawn again."""
    weights = rng.multinomial(n, np.full(n, 1 / n), draws)
    while (alone := weights.max(axis=1) == n).any():
        weights[alone] = rng.multinomial(n, np.full(n, 1 / n), int(alone.sum()))
    return weights


def _statistic(value: float, draws: Array, null: Array) -> Statistic:
    low, high = np.percentile(draws, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2]).tolist()
    # Sums in another order are not equal to the last digit.
    exceeding = np.count_nonzero(null >= value - 1e-9 * max(1.0, abs(value)))
    return Statistic(value, (low, high), float((1 + exceeding) / (1 + len(null))), float(null.mean()))


def _quadratic(kernel: Array, draws: _Draws) -> Statistic:
    """Mean of the kernel over pairs within each set, less twice that between them; pairs of one unit are left out."""
    apart = (draws.units[:, None] != draws.units).astype(float)
    kernel = kernel * apart

    def mean(a: Array, b: Array) -> Array:
        return ((a @ kernel) * b).sum(axis=1) / ((a @ apart) * b).sum(axis=1)

    value, bootstrap, null = (mean(a, a) + mean(b, b) - 2 * mean(a, b)
                              for a, b in (draws.sample, draws.bootstrap, draws.permuted))
    return _statistic(float(value[0]), bootstrap, null)


def _rooted(g: Statistic) -> Statistic:
    def root(value: float) -> float:
        return math.sqrt(max(0.0, value))

    return Statistic(root(g.value), (root(g.interval[0]), root(g.interval[1])), g.p_value, root(g.null))


def _delta(reference: Sequence[str], texts: Sequence[str], draws: _Draws) -> Statistic:
    counts = [Counter(words_of(text)) for text in (*reference, *texts)]
    total: Counter[str] = Counter()
    for text, weight in zip(counts, np.repeat([1 / draws.n, 1 / draws.m], [draws.n, draws.m]), strict=True):
        size = text.total()
        for word, count in text.items():
            total[word] += weight * count / size
    words = [word for word, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:DELTA_WORDS]]
    shares = np.array([[text[word] / max(text.total(), 1) for word in words] for text in counts])
    z = _standardised(shares.reshape(len(counts), len(words)))

    def distance(a: Array, b: Array) -> Array:
        gap = a @ z / a.sum(axis=1, keepdims=True) - b @ z / b.sum(axis=1, keepdims=True)
        return np.abs(gap).sum(axis=1) / max(z.shape[1], 1)

    value, bootstrap, null = (distance(*weights) for weights in (draws.sample, draws.bootstrap, draws.permuted))
    return _statistic(float(value[0]), np.maximum(bootstrap - (bootstrap.mean() - value[0]), 0.0), null)


def _auc(z: Array, draws: _Draws, refits: int, rng: np.random.Generator) -> Statistic:
    n, m = draws.n, draws.m
    fold = deal_folds(n, m, draws.paired, rng)
    labels = np.tile(draws.sample[1].T, (1, 1 + refits))  # 1 for texts, 0 for reference; column 0 is the truth
    if draws.paired:
        swapped = rng.integers(0, 2, (n, refits)).astype(bool)[draws.units]
        labels[:, 1:][swapped] = 1 - labels[:, 1:][swapped]
    else:
        for k in range(fold.max() + 1):
            labels[fold == k, 1:] = rng.permuted(labels[fold == k, 1:], axis=0)
    scores = out_of_fold_scores(z, labels, fold)
    areas = np.array([wins(s[y == 0], s[y == 1]).mean() for s, y in zip(scores.T, labels.T, strict=True)])
    won = wins(scores[:n, 0], scores[n:, 0])
    a, b = draws.bootstrap
    bootstrap = ((a[:, :n] @ won) * b[:, n:]).sum(axis=1) / (n * m)
    return _statistic(float(areas[0]), bootstrap, areas[1:])
