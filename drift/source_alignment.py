r"""Inner products of sources' gradients in one step, and what they say of expected gradients, over one step or several."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drift.alignment import Gram, cosine, jackknife, mean_inner
from drift.names import layer_index
from drift.source_collector import SGD
from drift.table import Row


@dataclass(frozen=True)
class SourceAlignment:
    r"""Inner products of the gradients of every source's folds in one optimiser step.

    ``grams[metric][name]`` [S·F, S·F] float64: :math:`\langle g_{s,f}, g_{s',f'}\rangle` for parameter ``name``, source-major. Metrics: ``sgd``,
    the plain inner product; ``adam``, :math:`\sum_p g_p g'_p/(\sqrt{\hat v_p}+\epsilon)` with the optimiser's second moments as they were
    before the step; ``lora``, the product of the steps in the adapted weight that the factors' gradients induce,
    :math:`s(\partial B\,A + B\,\partial A)` summed over its adapters, under that weight's name (not with DoRA).

    ``units`` [S, F]: independent rows in each fold, those without a label in the loss left out where labels were seen. ``coverage``: share of the numbers with a gradient that the
    products cover; ``missing``: why not, for the other parameters. Gradients are those of the loss that was differentiated: with a
    mean over the batch's tokens every source carries its share of the mixture.
    """

    sources: tuple[str, ...]
    folds: int
    grams: Mapping[str, Mapping[str, Gram]]
    units: NDArray[np.int64]
    coverage: float
    missing: Mapping[str, str] = field(default_factory=dict)

    def gram(self, *, metric: str = SGD, layer: int | None = None, module: str | None = None) -> Gram:
        """The products of one parameter (``module``), of one block (``layer``), or of all (neither)."""
        if metric not in self.grams:
            raise ValueError(f"metric must be one of {list(self.grams)}, got {metric!r}")
        chosen = self._chosen(metric, layer, module)
        if not chosen:
            raise ValueError(f"no parameter matches layer={layer}, module={module!r}; there are {list(self.grams[metric])[:5]}, ...")
        return sum(chosen)

    def has(self, *, metric: str = SGD, layer: int | None = None, module: str | None = None) -> bool:
        """Whether there are products of that parameter or block in that metric."""
        return bool(self._chosen(metric, layer, module))

    def _chosen(self, metric: str, layer: int | None, module: str | None) -> list[Gram]:
        return [k for name, k in self.grams.get(metric, {}).items()
                if (module is None or name == module) and (layer is None or layer_index(name) == layer)]

    def inner(self, **where) -> Gram:
        r"""Products [S, S] of the sources' gradients in this step, :math:`\langle g_s, g_{s'}\rangle`, noise included. ``where`` as in :meth:`gram`."""
        s, f = len(self.sources), self.folds
        return self.gram(**where).reshape(s, f, s, f).sum((1, 3))

    def raw_cos(self, a: str, b: str, **where) -> float:
        """Cosine between the two sources' gradients in this step, noise included: it shrinks as batches get smaller."""
        i, j, k = _place(self.sources, a), _place(self.sources, b), self.inner(**where)
        return float(k[i, j] / math.sqrt(k[i, i] * k[j, j])) if k[i, i] > 0 and k[j, j] > 0 else math.nan

    def cos(self, a: str, b: str, **where) -> float:
        """Cosine between the sources' *expected* gradients, from products of different folds (:func:`drift.alignment.cosine`)."""
        return pooled([self], [a, b], cosine, **where)[0]


def _place(sources: Sequence[str], name: str) -> int:
    if name not in sources:
        raise ValueError(f"there is no source {name!r}; the names are {list(sources)}")
    return list(sources).index(name)


def pooled(steps: Sequence[SourceAlignment], sources: Sequence[str], statistic: Callable[..., float], **where) -> tuple[float, float]:
    """A statistic of one or two sources' expected gradients over several steps, and its standard error.

    Products of folds, each per independent row, are averaged over the steps in which both folds have rows; ``statistic`` (
    :func:`~drift.alignment.mean_inner`, :func:`~drift.alignment.cosine`, ...) is taken of the average. The error is a jackknife: over the steps if
    there are three or more, else over the folds if there are three or more, else nan. It assumes that what is
    estimated holds still over these steps.
    """
    per_row = np.stack([_per_row(step, where) for step in steps])
    f = steps[0].folds
    members = [list(range(k * f, (k + 1) * f)) for k in (_place(steps[0].sources, s) for s in sources)]

    def estimate(chosen: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
        counted = np.isfinite(per_row[chosen])
        mean = np.where(counted, per_row[chosen], 0.0).sum(0) / np.where(counted.any(0), counted.sum(0), np.nan)
        used = [[r for r in group if np.isfinite(mean[r, r])] for group in groups]
        return statistic(mean, used[0], used[-1]) if all(used) else math.nan

    every = list(range(len(steps)))
    value = estimate(every, members)
    if len(steps) >= 3:
        return value, jackknife(lambda chosen: estimate(chosen[0], members), [every])
    return value, jackknife(lambda groups: estimate(every, groups), members)


def _per_row(step: SourceAlignment, where: Mapping[str, Any]) -> Gram:
    n = step.units.reshape(-1).astype(float)
    n[n == 0] = np.nan
    return step.gram(**where) / np.outer(n, n)


def scopes(names: Mapping[str, Gram]) -> list[dict[str, Any]]:
    """The whole model, every block and every parameter, as ``where`` takes them."""
    layers = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    return [{}, *({"layer": layer} for layer in layers), *({"module": name} for name in names)]


def table_rows(recent: Sequence[SourceAlignment], metric: str, where: dict[str, Any], step: int) -> list[Row]:
    """The rows of a recording about one scope in one metric: of the last step, and pooled over the ``recent`` ones."""
    now = recent[-1]
    prefix = "align" if metric == SGD else f"align_{metric}"
    module = where.get("module", "")
    layer = where.get("layer") if not module else layer_index(module)
    where = {**where, "metric": metric}
    # Adam has no second moments before its first step, and layers may be thawed on the way.
    recent = [earlier for earlier in recent if earlier.has(**where)]
    inner = now.inner(**where)
    rows = []

    def add(name: str, source: str, value: float, error: float | None = None) -> None:
        rows.append(Row(step=step, metric=f"{prefix}/{name}", layer=layer, module=module, source=source, value=float(value), stderr=error))

    for i, a in enumerate(now.sources):
        add("raw_norm2", a, inner[i, i])
        add("norm2", a, *pooled([now], [a], mean_inner, **where))
        for j in range(i + 1, len(now.sources)):
            pair = [a, now.sources[j]]
            shown = "|".join(pair)
            add("raw_inner", shown, inner[i, j])
            add("raw_cos", shown, now.raw_cos(*pair, **where))
            for key, statistic in (("inner", mean_inner), ("cos", cosine)):
                add(key, shown, *pooled([now], pair, statistic, **where))
                if len(recent) >= 3 and not module:
                    add(f"pooled_{key}", shown, *pooled(recent, pair, statistic, **where))
    return rows
