"""Cross-validated logistic regression that tells two sets of texts apart, for many labellings at once."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FOLDS = 5


def deal_folds(n: int, m: int, paired: bool, rng: np.random.Generator) -> NDArray[np.int64]:
    """Fold of each of n + m texts, [n + m]: both sets dealt out evenly; with ``paired``, texts i of both to one fold."""
    k = min(FOLDS, n, m)
    first = rng.permutation(n) % k
    return np.concatenate([first, first if paired else rng.permutation(m) % k])


def out_of_fold_scores(z: Array, labels: Array, fold: NDArray[np.int64]) -> Array:
    """Logits [N, P] of the rows of ``z`` [N, F], for each column of ``labels`` [N, P] (0 or 1), fitted on the other folds.

    The logit of the labels' shares among the other folds is taken off: it differs between folds, but not between texts.
    """
    scores = np.empty_like(labels)
    design = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    for k in range(fold.max() + 1):
        test = fold == k
        scores[test] = design[test] @ _logistic(design[~test], labels[~test]) - _logit_share(labels[~test])
    return scores.round(9)  # equal texts have equal scores


def _logit_share(labels: Array) -> Array:
    share = labels.mean(axis=0)
    return np.log(share / (1 - share))


def wins(low: Array, high: Array) -> Array:
    """1 where ``high`` [m] is above ``low`` [n], ½ where they are equal; [n, m]. Its mean is the area under the ROC curve."""
    return (np.sign(high - low[:, None]) + 1) / 2


def _logistic(design: Array, labels: Array) -> Array:
    r"""Coefficients [F, P] of logistic regressions on ``design`` [n, F], one for each column of ``labels`` [n, P].

    They minimise :math:`\sum_i[\log(1+e^{w^\top x_i})-y_iw^\top x_i]+\frac12\sum_{f>1}w_f^2`; the first column is the intercept.
    The Hessian is at most :math:`\frac14X^\top X+I` (Böhning & Lindsay 1988), the same for all label columns, so that one
    inverse serves all; accelerated, with restarts (O'Donoghue & Candès 2015).
    """
    ridge = np.ones((design.shape[1], 1))
    ridge[0] = 0
    inverse = np.linalg.inv(design.T @ design / 4 + np.diag(ridge[:, 0]))
    found = np.zeros((design.shape[1], labels.shape[1]))
    going = np.arange(labels.shape[1])  # columns still on their way
    w = np.zeros_like(found)
    w[0] = _logit_share(labels)  # the answer if no feature says anything
    ahead = w
    t = 1.0
    for _ in range(5000):
        residual = (1 + np.tanh(design @ ahead / 2)) / 2 - labels[:, going]
        new = ahead - inverse @ (design.T @ residual + ridge * ahead)
        step = new - w
        if ((ahead - new) * step).sum() > 0:  # the momentum points uphill
            t = 1.0
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        w, ahead = new, new + (before - 1) / t * step
        found[:, going] = w
        moving = np.abs(step).max(axis=0) > 1e-5
        if not moving.any():
            break
        going, w, ahead = going[moving], w[:, moving], ahead[:, moving]
    return found
