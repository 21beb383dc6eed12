r"""The Fisher information of a model's predictions, and how much of it a drift runs into.

On rows x with counted positions t,

.. math:: F=\frac1R\sum_x\sum_t\mathbb E_{y\sim p_\theta(\cdot\mid x_{<t})}\big[s_{t,y}s_{t,y}^\top\big],\qquad s_{t,y}=\nabla_\theta\log p_\theta(y\mid x_{<t}),

per row, with labels of the *model*, never those of the data. On rows that the base itself has written, :math:`\tfrac12\delta^\top F\delta` is the KL
divergence per row from the base to :math:`\theta_0+\delta`, up to :math:`O(\lVert\delta\rVert^3)`, and :math:`F\delta` is the force with which those rows
push back (docs/theory.md, F3 and F4).

Estimators that draw labels (:func:`diagonal`, :func:`rank_one`, :func:`kfac`) take one backward pass over a batch for all of its rows; products
(:func:`product`, :func:`quadratic`) sum over the vocabulary instead and have no sampling error.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from drift.fisher_collectors import Factors, Margins, Squares
from drift.fisher_forms import Diagonal, Fisher, KroneckerFactored, RankOne
from drift.forward import Batch, Forward, counted_log_p, logits_of, on_device, summed_nll
from drift.groups import Groups
from drift.intercept import Interceptor, UseCollector
from drift.modes import measuring
from drift.names import layer_index, parameters, trainable
from drift.numerics import inner
from drift.reference import Reference
from drift.weights import Side, deltas

Vector = Mapping[str, Tensor]


# --- estimates with sampled labels --------------------------------------------------------------------------------


def diagonal(model: nn.Module, batches: Iterable[Batch], *, estimator: str = "sequence", samples: int = 1, seed: int = 0,
             forward: Forward = logits_of) -> Diagonal:
    r"""Diagonal of F from labels drawn from the model.

    ``estimator="sequence"``: :math:`\frac1R\sum_x(\sum_ts_{t,\tilde y_t})^2` with one label a position. Unbiased: given the prefixes the scores of
    different positions are independent with mean 0, so cross terms vanish in expectation. Rows' gradients are formed a few rows of a weight at a
    time. ``"token"``: :math:`\sum_t e_t^2\,(a_t^2)^\top` over the positions of each linear layer and embedding, one product a layer; it leaves out the
    products between positions that attention and later layers tie together, which is a bias (small on trained models; vectors stay as in
    "sequence"). Squaring the gradient of a *batch mean* instead, as is often seen, estimates neither.

    ``samples``: draws of labels, averaged; the relative error of one entry falls as :math:`\sqrt{2/(R\cdot samples)}` or slower. ``seed``: of the labels.
    ``batches`` as for :func:`drift.gradient_gram`. Cost: a forward and a backward pass each, memory of one more gradient.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    >>> batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    >>> found = diagonal(model, [batch], forward=lambda m, b: m(b["input_ids"]))
    >>> {name: tuple(f.shape) for name, f in found.values.items()}
    {'0.weight': (3, 2), '1.weight': (3, 2), '1.bias': (3,)}
    """
    if estimator not in ("sequence", "token"):
        raise ValueError(f"estimator must be 'sequence' or 'token', got {estimator!r}")
    collector = Squares(_shapes(model), token=estimator == "token")
    rows, missing = _collect(model, batches, collector, samples, seed, forward)
    return Diagonal({n: collector.sums[n] / (rows * samples) for n in _shapes(model) if n in collector.sums and n not in missing}, rows, missing)


def rank_one(model: nn.Module, batches: Iterable[Batch], *, samples: int = 1, seed: int = 0, forward: Forward = logits_of) -> RankOne:
    """:class:`RankOne` of every matrix from the "sequence" estimator of :func:`diagonal`, whose row and column sums it keeps: unbiased for those.

    The diagonal itself is never in memory. Vectors and stacks of experts are listed in ``missing``.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    >>> batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    >>> found = rank_one(model, [batch], forward=lambda m, b: m(b["input_ids"]))
    >>> sorted((name, len(u), len(v)) for name, (u, v) in found.factors.items()), found.missing
    ([('0.weight', 3, 2), ('1.weight', 3, 2)], ('1.bias',))
    """
    collector = Margins({n: shape for n, shape in _shapes(model).items() if len(shape) == 2})
    rows, missing = _collect(model, batches, collector, samples, seed, forward)
    factors = {}
    for name, (by_row, by_column) in collector.sums.items():
        total = by_row.sum().clamp(min=torch.finfo(torch.float64).tiny)
        factors[name] = by_row / (rows * samples), by_column / total
    return RankOne(factors, rows, _left_out(model, factors, missing))


def kfac(model: nn.Module, batches: Iterable[Batch], *, samples: int = 1, seed: int = 0, forward: Forward = logits_of,
         largest_side: int = 4096) -> KroneckerFactored:
    """:class:`KroneckerFactored` of linear layers used once a pass, both of whose sides are at most ``largest_side``.

    Others (heads of large vocabularies, embeddings, norms) are listed in ``missing``. Memory: m² + n² numbers a layer.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    >>> batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    >>> found = kfac(model, [batch], forward=lambda m, b: m(b["input_ids"]))
    >>> {name: (tuple(s.shape), tuple(a.shape)) for name, (s, a) in found.factors.items()}
    {'1.weight': ((3, 3), (2, 2))}
    """
    small = {n for n, shape in _shapes(model).items() if len(shape) == 2 and max(shape) <= largest_side}
    collector = Factors(small)
    rows, missing = _collect(model, batches, collector, samples, seed, forward)
    factors = {n: (s / (rows * samples), a / max(1, collector.positions[n])) for n, (s, a) in collector.sums.items()}
    return KroneckerFactored(factors, rows, _left_out(model, factors, missing))


def _left_out(model: nn.Module, found: Mapping[str, object], missing: Sequence[str]) -> tuple[str, ...]:
    return tuple(n for n, p in parameters(model).items() if p.requires_grad and (n not in found or n in missing))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in parameters(model).items()}


def _collect(model: nn.Module, batches: Iterable[Batch], collector: UseCollector, samples: int, seed: int,
             forward: Forward) -> tuple[int, tuple[str, ...]]:
    """Run the batches; returns the number of rows, and the parameters whose gradients were not seen whole."""
    trained = trainable(model)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    device = next(iter(trained.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    interceptor, n_rows, missing = Interceptor(model), 0, set()
    for batch in batches:
        batch = on_device(batch, device)
        labels = batch["labels"]
        groups = Groups(torch.arange(len(labels)).unsqueeze(1).expand(labels.shape), len(labels), tuple(labels.shape))
        for _ in range(samples):
            with measuring(model), torch.enable_grad(), interceptor.collecting(collector, groups):
                log_p, _ = counted_log_p(model, batch, forward)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                unseen = torch.autograd.grad(-log_p.gather(1, drawn).sum(), list(trained.values()), allow_unused=True)
                collector.close()
            missing |= {n for n, g in zip(trained, unseen, strict=True) if g is not None}
        n_rows += len(labels)
    if n_rows == 0:
        raise ValueError("batches is empty; give at least one batch with labels")
    return n_rows, tuple(n for n in trained if n in missing)


# --- products, exact over the vocabulary --------------------------------------------------------------------------


def product(model: nn.Module, batches: Iterable[Batch], vector: Vector, *, forward: Forward = logits_of) -> dict[str, Tensor]:
    r"""Fisher-vector product :math:`Fv` over the parameters that ``vector`` names, labels summed over the whole vocabulary.

    :math:`F=\frac1R\sum_{x,t}J_t^\top(\operatorname{diag}p_t-p_tp_t^\top)J_t` with the Jacobian J of the logits (the Gauss-Newton matrix of
    cross-entropy): one forward and three backward passes a batch. ``vector``: canonical name → tensor of the parameter's shape.
    No sampling error; exact to the precision of the model's type. Raises ``ValueError`` for names or shapes that the model has not.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    >>> batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    >>> along = {"1.bias": torch.ones(3)}  # the same added to all logits changes no prediction
    >>> bool(product(model, [batch], along, forward=lambda m, b: m(b["input_ids"]))["1.bias"].abs().max() < 1e-6)
    True
    """
    found: dict[str, Tensor] = {n: torch.zeros_like(v) for n, v in vector.items()}
    n_rows = 0
    for log_p, jv, pull, rows in _pushed(model, batches, vector, forward):
        p = log_p.detach().exp()
        for name, g in pull(p * jv - p * (p * jv).sum(-1, keepdim=True)).items():
            found[name] += g
        n_rows += rows
    return {n: x / n_rows for n, x in found.items()}


def quadratic(model: nn.Module, batches: Iterable[Batch], vector: Vector, *, forward: Forward = logits_of) -> float:
    r""":math:`v^\top Fv=\frac1R\sum_{x,t}\operatorname{Var}_{y\sim p_t}[(J_tv)_y]`, exact as :func:`product` and a pass cheaper.

    >>> model, ids = nn.Embedding(2, 2), torch.tensor([[0, 1]])
    >>> _ = nn.init.zeros_(model.weight)
    >>> along = {"weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}  # the logit of one of two words that are as likely
    >>> quadratic(model, [{"input_ids": ids, "labels": ids}], along, forward=lambda m, b: m(b["input_ids"]))  # variance of 0 and 2
    1.0
    """
    total, n_rows = 0.0, 0
    for log_p, jv, _, rows in _pushed(model, batches, vector, forward):
        p = log_p.detach().exp()
        mean = (p * jv).sum(-1, keepdim=True)
        total += float((p * (jv - mean) ** 2).double().sum())
        n_rows += rows
    return total / n_rows


def _pushed(model: nn.Module, batches: Iterable[Batch], vector: Vector, forward: Forward):
    """For every batch: log-probabilities [N, V], the logits' derivative along ``vector``, its transpose as a function, and the rows."""
    mine = parameters(model)
    unknown = [n for n in vector if n not in mine]
    if unknown or not vector:
        raise ValueError(f"vector names {unknown or 'nothing'}; the model's parameters are {list(mine)[:3]}, ...")
    wrong = [(n, tuple(v.shape), tuple(mine[n].shape)) for n, v in vector.items() if v.shape != mine[n].shape]
    if wrong:
        raise ValueError(f"vector and model differ in shape: {wrong[0][0]} is {wrong[0][1]}, the parameter {wrong[0][2]}")
    along = [mine[n] for n in vector]
    values = [v.to(p.device, p.dtype) for v, p in zip(vector.values(), along, strict=True)]
    frozen = [p for p in along if not p.requires_grad]
    any_batch = False
    for p in frozen:
        p.requires_grad_(True)
    try:
        for batch in batches:
            any_batch = True
            batch = on_device(batch, along[0].device)
            # Of the attention kernels only the plain one can be differentiated twice.
            with measuring(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                log_p, _ = counted_log_p(model, batch, forward)
                probe = torch.zeros_like(log_p, requires_grad=True)
                pulled = torch.autograd.grad(log_p, along, probe, create_graph=True, allow_unused=True)
                used = [(g, v) for g, v in zip(pulled, values, strict=True) if g is not None]
                (jv,) = torch.autograd.grad([g for g, _ in used], probe, [v for _, v in used], retain_graph=True)

                def pull(x: Tensor, log_p=log_p) -> dict[str, Tensor]:
                    back = torch.autograd.grad(log_p, along, x, retain_graph=True, allow_unused=True)
                    return {n: g for n, g in zip(vector, back, strict=True) if g is not None}

                yield log_p, jv, pull, len(batch["labels"])
    finally:
        for p in frozen:
            p.requires_grad_(False)
    if not any_batch:
        raise ValueError("batches is empty; give at least one batch with labels")


# --- what drift runs into -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedDrift:
    r"""``value`` = :math:`\tfrac12\delta^\top F\delta` of one parameter, in nats per row."""

    name: str
    value: float

    @property
    def layer(self) -> int | None:
        """Block index, None outside the blocks."""
        return layer_index(self.name)


@torch.no_grad()
def weighted_drift(fisher: Fisher, model: Side, base: Side) -> list[WeightedDrift]:
    r"""Fisher-weighted drift :math:`\tfrac12\delta_p^\top F_p\delta_p` of every parameter that ``fisher`` covers.

    ``fisher``: at the base, from rows of what is not to be forgotten. ``model``, ``base`` as for :func:`drift.parameter_drift`; LoRA from its
    factors. The sum over parameters leaves out products between parameters (F is taken as block-diagonal), and with :class:`Diagonal` those
    within one as well: an approximation to the KL, not a bound. :func:`quadratic` has them all. Raises ``ValueError`` if ``fisher`` is of another model.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> base = Reference.snapshot(model)
    >>> model.weight.data += torch.tensor([[1.0, 3.0]])
    >>> [found] = weighted_drift(Diagonal({"weight": torch.tensor([[4.0, 0.0]])}, rows=1), model, base)
    >>> found.name, round(found.value, 5)  # ½ (4 · 1² + 0 · 3²)
    ('weight', 2.0)
    """
    known = set(fisher.values if isinstance(fisher, Diagonal) else fisher.factors)
    found = {name: delta for name, delta in deltas(model, base) if name in known}
    if not found:
        hint = "; LoRA's drift is that of the weights that it adapts, so take fisher of the base model" if any(".lora_" in n for n in known) else ""
        raise ValueError(f"fisher covers none of the parameters that can drift; it has {sorted(known)[:3]}, ...{hint}")
    sizes = {n: fisher.values[n].numel() if isinstance(fisher, Diagonal) else math.prod(len(x) for x in fisher.factors[n]) for n in found}
    wrong = next((n for n, delta in found.items() if delta.numel != sizes[n]), None)
    if wrong is not None:
        raise ValueError(f"fisher is of another model: it has {sizes[wrong]} numbers for {wrong}, the drift has {found[wrong].numel}")
    values = torch.stack([fisher.quadratic(name, delta).cpu() for name, delta in found.items()]).tolist()
    return [WeightedDrift(name, value / 2) for name, value in zip(found, values, strict=True)]


@dataclass(frozen=True)
class RestoringForce:
    r"""How the gradient of the base's own rows answers a drift: :math:`f=g(\theta)-g(\theta_0)` against :math:`F\delta`, both per row.

    ``slope`` :math:`=\langle f,F\delta\rangle/\lVert F\delta\rVert^2` and ``slope_along_drift`` :math:`=\langle f,\delta\rangle/\delta^\top F\delta` are 1 as
    :math:`\delta\to0` (docs/theory.md, F4); the second has a standard error, a jackknife over batches (nan for fewer than three). ``cos`` is the cosine of
    f and Fδ; ``force``, ``predicted``, ``drift`` are the norms of f, Fδ and δ.
    """

    slope: float
    slope_along_drift: float
    slope_along_drift_stderr: float
    cos: float
    force: float
    predicted: float
    drift: float


def restoring_force(model: nn.Module, base: Side, batches: Sequence[Batch], *, forward: Forward = logits_of) -> RestoringForce:
    r"""The test of F4 on rows that the *base* has written: :math:`g(\theta)=F\delta+O(\lVert\delta\rVert^2)`.

    :math:`g` is the gradient of the rows' summed NLL. The difference to :math:`g(\theta_0)` on the same rows is taken: :math:`g(\theta_0)` has mean 0
    but the noise of the labels that were drawn, and most of that is shared. What is left of it blurs all three of slope, slope along the drift
    and cosine with few rows; F itself sums over labels. Cost a batch: two ordinary passes and one Fisher-vector product; memory: five
    vectors of the trainable parameters. ``base`` as for :func:`drift.parameter_drift`; it must hold all that is trained (LoRA: a snapshot).

    >>> model, ids = nn.Embedding(2, 2), torch.tensor([[0, 0], [0, 1]])  # rows of a base to which both words are as likely
    >>> _ = nn.init.zeros_(model.weight)
    >>> base = Reference.snapshot(model)
    >>> model.weight.data[0, 0] += 0.01
    >>> found = restoring_force(model, base, [{"input_ids": ids, "labels": ids}], forward=lambda m, b: m(b["input_ids"]))
    >>> round(found.slope, 3), round(found.slope_along_drift, 3), round(found.drift, 3)
    (1.0, 1.0, 0.01)
    """
    mine, base = trainable(model), Reference.of(base)
    delta = {n: p.detach() - base.get(n).to(p.device) for n, p in mine.items()}
    force, predicted = ({n: torch.zeros_like(p) for n, p in mine.items()} for _ in range(2))
    along, rows = [], 0
    for batch in batches:
        pushed = _summed_gradient(model, mine, batch, forward)
        with base.swapped_into(model):
            before = _summed_gradient(model, mine, batch, forward)
            curved = product(model, [batch], delta, forward=forward)
        n = len(batch["labels"])
        for name in mine:
            pushed[name] -= before[name]
            curved[name] *= n
            force[name] += pushed[name]
            predicted[name] += curved[name]
        along.append((_dot(pushed, delta), _dot(curved, delta)))
        rows += n
    if not along:
        raise ValueError("batches is empty; give at least one batch with labels")

    def ratio(kept: Sequence[tuple[float, float]]) -> float:
        below = sum(q for _, q in kept)
        return sum(f for f, _ in kept) / below if below > 0 else math.nan

    error = math.nan
    if len(along) >= 3:
        left_out = [ratio(along[:k] + along[k + 1 :]) for k in range(len(along))]
        mean = sum(left_out) / len(along)
        error = math.sqrt((len(along) - 1) / len(along) * sum((x - mean) ** 2 for x in left_out))
    crossed, squared, size = _dot(force, predicted), _dot(predicted, predicted), math.sqrt(_dot(force, force))
    return RestoringForce(crossed / squared if squared > 0 else math.nan, ratio(along), error,
                          crossed / (size * math.sqrt(squared)) if size > 0 and squared > 0 else math.nan,
                          size / rows, math.sqrt(squared) / rows, math.sqrt(_dot(delta, delta)))


def _dot(x: Vector, y: Vector) -> float:
    return float(sum(inner(x[n], y[n]).cpu() for n in x))


def _summed_gradient(model: nn.Module, mine: Mapping[str, nn.Parameter], batch: Batch, forward: Forward) -> dict[str, Tensor]:
    """Gradient of the summed NLL of the batch's own labels."""
    device = next(iter(mine.values())).device
    batch = on_device(batch, device)
    with measuring(model), torch.enable_grad():
        gradients = torch.autograd.grad(summed_nll(model, batch, forward), list(mine.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(mine.items(), gradients, strict=True)}
