r"""Every estimator of :mod:`drift` against the value that it estimates, on rows drawn from a world where that value is a sum.

The instruments run as they do on real models: on batches of sampled rows, with their own standard errors. A *repeat* draws new rows. Where an
instrument treats rows apart (Gram matrices, sketches, divergences), it is run once on every row that any repeat has drawn, and a repeat takes its
rows' part of the result, which is what it would give on the repeat's batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

import drift
from drift import alignment, fisher
from drift.decompose import decompose
from drift.divergence import RowDivergences
from drift.forward import logits_of, summed_nll
from studies.lab import exact
from studies.lab.courses import Rows
from studies.lab.drawing import draw
from studies.lab.exact import Expected
from studies.lab.experiment import ALL, OTHERS, Bases, rows_of_cell, tables
from studies.lab.place import Case, Found, Place, Pool, bare, seconds, within
from studies.lab.start import gradients_by_prompt
from studies.lab.tree import N_RESPONSES, flow, response_probabilities
from studies.lab.world import prompts_of
from studies.stats import over_seeds

# --- gradients ------------------------------------------------------------------------------------------------------------


def gradients(place: Place, repeats: int, n: int = 32) -> Iterator[Case]:
    """Expected gradients, their products, cosines and coherence, from Gram matrices of rows."""
    case = _of_rows(place, Pool(place, ("self", "external", "foreign"), repeats, n, 1), n)
    own, a, b = (place.expected(s).numpy() for s in ("self", "external", "foreign"))
    cos = float(a @ b / np.sqrt(a @ a * (b @ b)))
    yield case("‖E g‖², external data", "alignment.mean_inner", ["external"], a @ a, _norm2, lambda g, r: alignment.mean_inner_error(g, r, r))
    yield case("‖E g‖², self-data (exact: 0)", "alignment.mean_inner", ["self"], own @ own, _norm2, lambda g, r: alignment.mean_inner_error(g, r, r))
    yield case("‖E g‖², external data", "uncorrected: ‖mean g‖²", ["external"], a @ a, lambda g, r: float(g[np.ix_(r, r)].mean()))
    yield case("⟨E g, E g'⟩", "alignment.mean_inner", ["external", "foreign"], a @ b, alignment.mean_inner, alignment.mean_inner_error)
    yield case("cos(E g, E g')", "alignment.cosine", ["external", "foreign"], cos, alignment.cosine, alignment.cosine_error)
    yield case("cos(E g, E g')", "uncorrected: raw_cosine", ["external", "foreign"], cos, alignment.raw_cosine)
    yield _coherence(place, case)


def _norm2(gram: NDArray[np.float64], rows: Sequence[int]) -> float:
    return alignment.mean_inner(gram, rows, rows)


def _of_rows(place: Place, pool: Pool, n: int, *, timed: bool = True) -> Callable[..., Case]:
    """Makes cases of statistics (with their errors, if they have any) of the Gram matrix of ``n`` rows of each of one or two sources."""
    gram = alignment.gradient_gram(place.base, place.batch(pool.unique)).total()

    def case(quantity: str, estimator: str, sources: Sequence[str], truth: float, statistic: Callable[..., float],
             error: Callable[..., float] | None = None) -> Case:
        groups = [range(k * n, (k + 1) * n) for k in range(len(sources))]

        def estimate(k: int) -> Found:
            chosen = np.concatenate([pool.places[s][k] for s in sources])
            found = gram[np.ix_(chosen, chosen)]
            return bare(statistic(found, *groups)) if error is None else within(statistic(found, *groups), error(found, *groups), n)

        batch = place.batch(torch.cat([pool.drawn[s][0] for s in sources]))
        cost = place.cost(batch, lambda: statistic(alignment.gradient_gram(place.base, batch).total(), *groups)) if timed else {}
        return Case(quantity, estimator, n, float(truth), estimate, **cost)

    return case


def _coherence(place: Place, case: Callable[..., Case]) -> Case:
    mean = place.expected("external")
    truth = mean @ mean / _expected_power(place, "external")
    return case("coherence, external data", "alignment.coherence", ["external"], truth, alignment.coherence, alignment.coherence_error)


def many_rows(place: Place, repeats: int) -> Iterator[Case]:
    """Estimators whose intervals cover too seldom above, where rare rows have large gradients, on as many rows as it takes."""
    yield _coherence(place, _of_rows(place, Pool(place, ("external",), repeats, 1024, 8), 1024, timed=False))
    yield from decompositions(place, repeats, 768, timed=False)


def _expected_power(place: Place, source: str) -> float:
    """E‖g‖² of a source's rows, over all that have weight."""
    rows = place.sources[source].flatten()
    kept = (rows > 0).nonzero().squeeze(1)
    found = exact.row_gradients(place.bases.model, place.bases.one(place.seed), kept // N_RESPONSES, kept % N_RESPONSES)
    return float((rows[kept] * found.square().sum(1)).sum())


def source_split(place: Place, repeats: int, n: int = 16, steps: int = 8) -> Iterator[Case]:
    """The same from inside training's own backward passes, pooled over steps (the weights stand still)."""
    pool = Pool(place, ("external", "foreign"), repeats, n * steps, 2)
    tags = [0] * n + [1] * n
    a, b = (place.expected(s).numpy() for s in ("external", "foreign"))
    truths = {"sources.pooled, inner": float(a @ b), "sources.pooled, cosine": float(a @ b / np.sqrt(a @ a * (b @ b)))}
    sources = drift.SourceGradients(place.base, ["a", "b"], folds=2)

    def one(numbers: Tensor) -> drift.SourceAlignment:
        sources.tag(tags)
        summed_nll(place.base, place.batch(numbers), logits_of).backward()
        place.base.zero_grad()
        return sources.step()

    def repeat(k: int) -> list[drift.SourceAlignment]:
        parts = [pool.drawn[s][k].view(steps, n) for s in ("external", "foreign")]
        with sources:
            return [one(torch.cat([p[t] for p in parts])) for t in range(steps)]

    found = [{name: drift.sources.pooled(some, ["a", "b"], statistic)
              for name, statistic in zip(truths, (alignment.mean_inner, alignment.cosine), strict=True)} for some in map(repeat, range(repeats))]
    numbers = torch.cat([pool.drawn[s][0, :n] for s in ("external", "foreign")])
    with sources:
        cost = place.cost(place.batch(numbers), lambda: one(numbers))
    for (name, truth), quantity in zip(truths.items(), ("⟨E g, E g'⟩, from 8 training steps", "cos(E g, E g'), from 8 training steps"), strict=True):
        yield Case(quantity, name, n * steps, truth, lambda k, name=name: within(*found[k][name], steps), **cost)


# --- Fisher ---------------------------------------------------------------------------------------------------------------


def fishers(place: Place, repeats: int, n: int = 32) -> Iterator[Case]:
    """Fisher-weighted drift of one δ, ½ δᵀFδ, from forms of F on rows that the base has written about the kept topics."""
    matrix = exact.fisher(place.bases.model, place.bases.one(place.seed), prompts_of(OTHERS))
    pool = Pool(place, ("kept",), repeats, n, 3)
    drawn = pool.drawn["kept"]
    base = drift.Reference.snapshot(place.base)
    delta = place.by_name(place.drift)
    cells = _slices(delta)
    half_diagonal = {name: float((matrix.diagonal()[at] * place.drift[at] ** 2).sum() / 2) for name, at in cells.items()}
    half_block = {name: float(place.drift[at] @ matrix[at, at] @ place.drift[at] / 2) for name, at in cells.items()}
    matrices = [name for name, p in delta.items() if p.dim() == 2]
    linear = [name for name in matrices if "embed" not in name]

    def weighted(form: fisher.Fisher) -> Found:
        return bare(sum(d.value for d in fisher.weighted_drift(form, place.drifted, base)))

    def case(quantity: str, estimator: str, truth: float, estimate: Callable[[list, int], Found]) -> Case:
        batch = place.batch(drawn[0])
        return Case(quantity, estimator, n, truth, lambda k: estimate([place.batch(drawn[k])], k), **place.cost(batch, lambda: estimate([batch], 0)))

    vectors = drift.Sketch(64, 64).gradients(place.base, place.batch(pool.unique))
    squares = np.concatenate([place.by_name(place.drift)[name].reshape(-1).numpy() for name in vectors.columns]) ** 2

    def mean_squared(_: list, k: int) -> Found:
        return bare(float((vectors.values[pool.places["kept"][k]].mean(0) ** 2 * squares).sum() / 2))

    everything = float(place.drift @ matrix @ place.drift / 2)
    yield case("½ δᵀFδ", "fisher.quadratic", everything, lambda b, k: bare(fisher.quadratic(place.base, b, delta) / 2))
    diagonal = sum(half_diagonal.values())
    yield case("½ Σ Fᵢᵢδᵢ²", "fisher.diagonal, sequence", diagonal, lambda b, k: weighted(fisher.diagonal(place.base, b, seed=k)))
    yield case("½ Σ Fᵢᵢδᵢ²", "fisher.diagonal, token", diagonal, lambda b, k: weighted(fisher.diagonal(place.base, b, estimator="token", seed=k)))
    yield case("½ Σ Fᵢᵢδᵢ²", "uncorrected: batch mean squared", diagonal, mean_squared)
    yield case("½ Σ Fᵢᵢδᵢ² of matrices", "fisher.rank_one", sum(half_diagonal[m] for m in matrices),
               lambda b, k: weighted(fisher.rank_one(place.base, b, seed=k)))
    yield case("½ Σ δₗᵀFₗδₗ of linear layers", "fisher.kfac", sum(half_block[m] for m in linear),
               lambda b, k: weighted(fisher.kfac(place.base, b, seed=k)))


def _slices(like: Mapping[str, Tensor]) -> dict[str, slice]:
    found, start = {}, 0
    for name, p in like.items():
        found[name] = slice(start, start + p.numel())
        start += p.numel()
    return found


def push(place: Place, repeats: int, n: int = 8, batches: int = 6) -> Iterator[Case]:
    """How self-data answer a drift, against Fδ."""
    pool = Pool(place, ("self",), repeats, n * batches, 4)
    base = drift.Reference.snapshot(place.base)
    own = flow(place.sources["self"])
    force = Expected(place.bases.model, own).gradient(place.by_name(place.weights))
    truth = float(force @ place.drift / exact.quadratic(place.bases.model, place.bases.one(place.seed), own, place.drift))

    def estimate(k: int) -> fisher.RestoringForce:
        return fisher.restoring_force(place.drifted, base, [place.batch(x) for x in pool.drawn["self"][k].view(batches, n)])

    def found(k: int) -> Found:
        one = estimate(k)
        return within(one.slope_along_drift, one.slope_along_drift_stderr, batches)

    cost = place.cost(place.batch(pool.drawn["self"][0]), lambda: estimate(0))
    yield Case("⟨g, δ⟩ / δᵀFδ of self-data", "fisher.restoring_force", n * batches, truth, found, **cost)


# --- divergences ----------------------------------------------------------------------------------------------------------


def divergences(place: Place, repeats: int, n: int = 64) -> Iterator[Case]:
    """Divergences from the base on rows that the base has written about the kept topics, nats a token."""
    pool = Pool(place, ("kept",), repeats, n, 5)
    probe = drift.DivergenceProbe("kept", [place.batch(pool.unique)], base=place.base)
    probe.prepare(place.drifted)
    whole = probe.per_row(place.drifted)
    base, model = place.bases.log_p[place.seed], _log_p(place)
    own = response_probabilities(base)
    reach = (flow(prompts_of(OTHERS)[:, None] * own)).sum(-1)

    def expected(per_node: Tensor) -> float:
        return float((reach * per_node).sum() / reach.sum())

    def of(k: int) -> RowDivergences:
        at = torch.from_numpy(pool.places["kept"][k])
        return RowDivergences(**{f.name: getattr(whole, f.name)[at] for f in fields(whole)})

    one = drift.DivergenceProbe("kept", [place.batch(pool.drawn["kept"][0])], base=place.base)
    one.prepare(place.drifted)
    cost = place.cost(place.batch(pool.drawn["kept"][0]), lambda: one.per_row(place.drifted))
    kl = expected((base.exp() * (base - model)).sum(-1))
    for quantity, metric, truth in (
            ("KL(base ‖ model)", "kl_base_model", kl),
            ("KL(model ‖ base)", "kl_model_base", expected((model.exp() * (model - base)).sum(-1))),
            ("entropy of the model", "entropy_model", expected(-(model.exp() * model).sum(-1))),
            ("NLL of the base's rows", "nll_model", expected(-(base.exp() * model).sum(-1)))):
        yield Case(quantity, f"DivergenceProbe, {metric}", n, truth, lambda k, metric=metric: within(*of(k).mean(metric), n), **cost)

    def sampled(k: int) -> Found:
        rows = of(k)
        difference = RowDivergences(**{f.name: getattr(rows, f.name) for f in fields(rows) if f.name != "nll_model"}, nll_model=rows.nll_model - rows.nll_base)
        return within(*difference.mean("nll_model"), n)

    yield Case("KL(base ‖ model)", "sampled log-ratio (k1)", n, kl, sampled, **cost)


def _log_p(place: Place) -> Tensor:
    return tables(place.bases.model, place.weights[None], {n: p[:1] for n, p in place.bases.params.items()})[0]


# --- style and content ------------------------------------------------------------------------------------------------------


def decompositions(place: Place, repeats: int, n: int = 48, *, timed: bool = True) -> Iterator[Case]:
    """Parts of the gradient that style and content make up, from rows of the four cells at the same prompts."""
    kinds = [("own", "old"), ("foreign", "old"), ("own", "new"), ("foreign", "new")]
    rows = [rows_of_cell(place.bases, place.seed, *kind, ALL) for kind in kinds]
    expected = [gradients_by_prompt(place.bases, place.seed, r) for r in rows]
    prompts = rows[0].sum(1)
    generator = torch.Generator().manual_seed(6)
    x = torch.multinomial(prompts, repeats * n, replacement=True, generator=generator)
    numbers = torch.stack([_answers(r, x, generator) for r in rows])
    unique, places = numbers.unique(return_inverse=True)
    whole = drift.Sketch(64, 64).gradients(place.base, place.batch(unique)).values  # sides of up to 64 are left as they are: whole gradients
    vectors = whole @ np.linalg.qr(whole.T)[0]  # the same in a basis of their span: inner products are all that is asked for
    drawn = places.view(4, repeats, n).numpy()
    found = [decompose(*(vectors[of_cell[k]] for of_cell in drawn), resamples=200, seed=k) for k in range(repeats)]
    oo, fo, on, fn = expected
    weight = prompts[:, None]
    style, content = (weight * ((fo - oo) + (fn - on)) / 2).sum(0), (weight * ((on - oo) + (fn - fo)) / 2).sum(0)
    total = style + content
    spent = seconds(lambda: decompose(*(whole[of_cell[0]] for of_cell in drawn), resamples=200)) if timed else math.nan
    for quantity, name, truth, read in (
            ("‖E style effect‖²", "decompose, style.norm2", style @ style, lambda d: within(d.style.norm2, d.style.stderr, n)),
            ("‖E content effect‖²", "decompose, content.norm2", content @ content, lambda d: within(d.content.norm2, d.content.stderr, n)),
            ("cos(style, content)", "decompose, cos", style @ content / (style.norm() * content.norm()), lambda d: bare(d.cos)),
            ("style's share of the gradient", "decompose, style_share", style @ total / (total @ total),
             lambda d: (d.style_share.value, d.style_share.low, d.style_share.high))):
        yield Case(quantity, name, n, float(truth), lambda k, read=read: read(found[k]), seconds=spent)


def _answers(rows: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers x · R + r [n] of rows drawn from ``rows`` [X, R] given their prompts [n]."""
    found = torch.empty_like(prompts)
    for x in prompts.unique().tolist():
        at = (prompts == x).nonzero().squeeze(1)
        found[at] = x * N_RESPONSES + draw(rows[x], len(at), generator)
    return found


def sketches(place: Place, repeats: int) -> Iterator[Case]:
    """Inner products of random projections: a repeat is another projection of the same two gradients."""
    a, b = (place.by_name(place.expected(s)) for s in ("external", "foreign"))
    truth = float(sum((a[name] * b[name]).sum() for name in a))

    def estimate(k: int) -> Found:
        sketch = drift.Sketch(4, 4, seed=k)
        return bare(float(sum((sketch.project(name, a[name]) * sketch.project(name, b[name])).sum() for name in a)))

    yield Case("⟨E g, E g'⟩ of sketches", "Sketch(4, 4)", 1, truth, estimate, seconds=seconds(lambda: estimate(0)))


# --- intervals of the studies -------------------------------------------------------------------------------------------------


def seed_intervals(place: Place, repeats: int) -> Iterator[Case]:
    """The studies' own interval of a mean over few seeds, where seeds are normal and where they are skewed."""
    rng = np.random.default_rng(7)
    for n in (3, 10, 12, 100):
        for kind, values in (("normal", rng.normal(size=(repeats, n))), ("skewed", rng.exponential(size=(repeats, n)))):
            def estimate(k: int, values=values, n=n) -> Found:
                found = over_seeds(lambda s: values[k][s].mean(), n, draws=200, seed=k)
                return found.value, found.low, found.high

            yield Case(f"mean over {n} seeds, {kind}", "stats.over_seeds", n, 0.0 if kind == "normal" else 1.0, estimate,
                       seconds=seconds(lambda e=estimate: e(0)))


GROUPS: dict[str, Callable[[Place, int], Iterator[Case]]] = {
    "gradients": gradients, "source split": source_split, "fishers": fishers, "push": push, "divergences": divergences,
    "decompositions": decompositions, "many rows": many_rows, "sketches": sketches, "seed intervals": seed_intervals}
SLOW = ("source split", "fishers", "push", "many rows")  # a pass of the model or more for every repeat, or a large matrix


def calibrate(bases: Bases, group: str, repeats: int) -> Rows:
    """One row an estimator of a group: its bias with the error of that, its spread, and how often its 95 % interval covers the truth."""
    return [_row(case, repeats) for case in GROUPS[group](Place(bases), repeats)]


def _row(case: Case, repeats: int) -> dict[str, object]:
    values, lows, highs = np.array([case.find(k) for k in range(repeats)]).T
    usable = np.isfinite(values)
    spread = float(values[usable].std(ddof=1))
    row: dict[str, object] = {
        "quantity": case.quantity, "estimator": case.estimator, "rows": case.rows, "repeats": repeats, "undefined": int((~usable).sum()), "exact": case.exact,
        "mean": float(values[usable].mean()), "bias": float(values[usable].mean()) - case.exact, "bias_error": spread / math.sqrt(usable.sum()), "spread": spread}
    judged = np.isfinite(lows) & np.isfinite(highs)
    covered = judged & (lows <= case.exact) & (case.exact <= highs)
    interval = binomtest(int(covered.sum()), int(judged.sum())).proportion_ci(method="wilson") if judged.any() else None
    row |= {"coverage": float(covered.sum() / judged.sum()) if interval else None, "coverage_low": interval.low if interval else None,
            "coverage_high": interval.high if interval else None, "seconds": _known(case.seconds), "of_pass": _known(case.of_pass)}
    return row


def _known(x: float) -> float | None:
    return x if math.isfinite(x) else None
