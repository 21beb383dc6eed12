"""Parameter drift: how far the weights are from where they started, per parameter."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import acos, isfinite, nan, sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from drift.adapters import Adapter
from drift.deltas import Delta, DenseDelta, DoraDelta, FactoredDelta, ResidualDelta, StackedDelta, factors_of
from drift.names import layer_index, parameters
from drift.numerics import check_finite
from drift.reference import Reference
from drift.spectra import intruders, leading, principal_angles

METRICS: dict[str, str] = {
    "l2": "‖δ‖₂, the Euclidean (Frobenius) norm of δ = θ − θ₀",
    "rel": "‖δ‖₂ / ‖θ₀‖₂",
    "max": "max |δᵢ|",
    "cos": "cosine between θ and θ₀",
    "spectral": "largest singular value of a matrix's δ",
    "stable_rank": "‖δ‖₂² / (largest singular value)²: 1 for one direction, the rank for equal ones",
    "base_angle": "angle in radians between δ's leading left direction and the span of the base's ten leading ones",
    "intruders": "of the ten leading left directions of θ, how many are within 53° of none of θ₀'s (arXiv 2410.21228)",
}
_SPECTRAL = {"spectral", "stable_rank", "base_angle", "intruders"}
_K = 10


@dataclass(frozen=True, kw_only=True)
class ParameterDrift:
    r"""Drift of one parameter: the metrics of :data:`METRICS` that were asked for, nan where one does not apply.

    ``base_l2`` is :math:`\lVert\theta_0\rVert_2`, ``product`` :math:`\langle\delta,\theta_0\rangle`. Spectral metrics are of matrices only (vectors and stacks of experts: nan).
    """

    name: str
    numel: int
    l2: float
    base_l2: float = nan
    product: float = nan
    max: float = nan
    cos: float = nan
    spectral: float = nan
    stable_rank: float = nan
    base_angle: float = nan
    intruders: float = nan

    @property
    def rel(self) -> float:
        """``l2 / base_l2``; nan if the parameter was 0, or if its base values are not at hand."""
        return self.l2 / self.base_l2 if self.base_l2 else nan

    @property
    def angle(self) -> float:
        """Angle between θ and θ₀ in radians; small ones (below 1e-7) are lost in the cosine."""
        return acos(max(-1.0, min(1.0, self.cos)))

    @property
    def layer(self) -> int | None:
        """Block index, None outside the blocks."""
        return layer_index(self.name)


Side = nn.Module | Path | str | Reference


@torch.no_grad()
def parameter_drift(model: Side, base: Side, *, metrics: Collection[str] = ("l2", "rel")) -> list[ParameterDrift]:
    r"""Drift :math:`\delta_p=\theta_p-\theta_{0,p}` of every parameter *p* that can have moved, between any two states of a model.

    ``model``, ``base``: a live model, a :class:`~drift.reference.Reference`, a ``.safetensors`` file, a checkpoint folder (sharded or
    not) or a PEFT adapter folder. Of a live model the trainable parameters are measured, and frozen ones that are not what they were in the base; of files, all. ``metrics``: names in
    :data:`METRICS`; ``l2`` is always there.

    With LoRA it is the drift of the *effective* weight, under the base weight's name: :math:`s\,BA` of plain, rank-stabilised and
    several adapters, expert by expert where they are of stacked ones; less their product at the start where that is not 0 (PiSSA, OLoRA: ``base`` must be a snapshot or
    the adapter folder saved at the start); with DoRA's rescaling of the rows. All from the factors in float64, and a
    factored update's spectrum is exact. Where the frozen weights differ from the base's as well, sums run over a few rows of the
    formed weight at a time. Quantised base weights are not read: their ``rel`` and ``cos`` are nan, LoRA's own drift is exact.

    Exact up to float32 rounding of the inputs (:func:`drift.numerics.inner`). Cost: one read of θ and θ₀, one device
    synchronisation in all; ``max`` forms factored updates a few rows at a time, ``cos`` costs :math:`O(mnr)` for them; spectral metrics of
    dense weights cost :math:`O(mn\min(m,n))` each.

    Raises ``ValueError`` for unknown metrics, parameters that are missing or of another shape on one side, weights on the meta device and
    models with nothing trainable; ``FloatingPointError`` for weights that are not finite.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> before = Reference.snapshot(model)
    >>> model.weight.data += torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    >>> [d] = parameter_drift(model, before, metrics=["max", "spectral", "stable_rank"])
    >>> d.name, round(d.l2, 5), round(d.max, 5), round(d.spectral, 5), round(d.stable_rank, 5)
    ('weight', 3.0, 3.0, 3.0, 1.0)
    """
    check_metrics(metrics, METRICS)
    found = dict(deltas(model, base))
    if not found:
        raise ValueError("the model has no trainable parameter, so nothing can drift; set requires_grad on some")
    wanted = [name for name in ("rel", "cos", "max") if name in metrics]
    sums = torch.stack([torch.stack([v.to(torch.float64).cpu() if not v.is_cuda else v for v in _sums(d, wanted)]) for d in found.values()])
    drifts = [_drift(name, delta, row, metrics) for (name, delta), row in zip(found.items(), sums.cpu().tolist(), strict=True)]
    check_finite("the drift", {d.name: isfinite(d.l2) for d in drifts})
    return drifts


def check_metrics(metrics: Collection[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` naming what there is, unless ``metrics`` is a list of known names."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got the string {metrics!r}; there are {', '.join(known)}")
    unknown = sorted(set(metrics) - set(known))
    if unknown:
        raise ValueError(f"metrics holds {unknown}; there are {', '.join(known)}")


def _sums(delta: Delta, wanted: Collection[str]) -> tuple[Tensor, ...]:
    square = delta.squared()
    nothing = torch.full_like(square, nan)
    return (square, delta.base_squared() if "rel" in wanted or "cos" in wanted else nothing,
            delta.with_base() if "cos" in wanted else nothing, delta.max_abs() if "max" in wanted else nothing)


def _drift(name: str, delta: Delta, sums: list[float], metrics: Collection[str]) -> ParameterDrift:
    square, base_square, product, largest = sums
    now_square = base_square + 2 * product + square
    cos = (base_square + product) / sqrt(base_square * now_square) if base_square > 0 and now_square > 0 else nan
    found = ParameterDrift(name=name, numel=delta.numel, l2=sqrt(square), base_l2=sqrt(base_square), product=product, max=largest, cos=cos)
    wanted = _SPECTRAL & set(metrics)
    if not wanted or isinstance(delta, StackedDelta) or (isinstance(delta, DenseDelta) and delta.now.dim() != 2):
        return found
    return ParameterDrift(**{**found.__dict__, **_spectral(delta, wanted)})


def _spectral(delta: Delta, wanted: Collection[str]) -> dict[str, float]:
    left, values = delta.directions(1)
    top = float(values[0])
    found = {"spectral": top, "stable_rank": float(values.square().sum()) / top**2 if top > 0 else nan}
    if top > 0 and wanted & {"base_angle", "intruders"}:
        base = delta.base().double()
        if "base_angle" in wanted:
            found["base_angle"] = float(principal_angles(left, leading(base, min(_K, *base.shape))[0])[0])
        if "intruders" in wanted:
            found["intruders"] = float(intruders(base, base + delta.formed(), k=_K))
    return {name: value for name, value in found.items() if name in wanted}


# --- which form a change has ------------------------------------------------------------------------------------


def deltas(model: Side, base: Side) -> Iterator[tuple[str, Delta]]:
    """(name, change) of every parameter that :func:`parameter_drift` measures."""
    now, before = Reference.of(model), Reference.of(base)
    live = parameters(model) if isinstance(model, nn.Module) else None
    adapted = sorted({*now.adapters, *before.adapters})
    dense = [n for n in (sorted(now.names()) if live is None else live) if ".lora_" not in n and n not in adapted
             and (live is None or live[n].requires_grad or before.left_by(n, live[n]))]
    _check(now, before, live, dense, before.surplus(model) if isinstance(model, nn.Module) else None)
    for name in dense:
        yield name, DenseDelta(now.get(name), before.get(name))
    for name in adapted:
        yield name, _adapted(name, now, before)


def _check(now: Reference, before: Reference, live: dict[str, nn.Parameter] | None, measured: Collection[str], extra: list[str] | None) -> None:
    missing = sorted(n for n in measured if n not in before)
    if extra is None:
        extra = [] if now.partial else sorted(n for n in before.names() - now.names() if ".lora_" not in n)
    biased = next((n for n in sorted({*(live or ()), *now.names(), *before.names()}) if ".lora_B." in n and n.endswith("bias")), None)
    if biased is not None:
        raise NotImplementedError(f"{biased} is a bias of a LoRA factor (lora_bias=True), which moves the layer's own bias; it is not covered")
    if missing or extra:
        raise ValueError(f"{now.source} and {before.source} differ in their parameters: {len(missing)} only in the first "
                         f"({', '.join(missing[:5])}), {len(extra)} only in the second ({', '.join(extra[:5])})")
    wrong = [(n, now.shape(n), before.shape(n)) for n in sorted(measured) if now.shape(n) != before.shape(n)]
    if wrong:
        raise ValueError("shapes differ between model and base: " + "; ".join(f"{n} is {a}, base {b}" for n, a, b in wrong[:5]))
    if live is not None:
        meta = [n for n in sorted(measured) if live[n].is_meta]
        if meta:
            raise ValueError(f"{len(meta)} parameters are on the meta device and have no values ({', '.join(meta[:3])}); load the weights first")
        shared = [n for n in sorted(measured) if n in before and before.aliases(n, live[n])]
        if shared:
            raise ValueError(f"{shared[0]} was frozen when the snapshot was taken, so no copy of it was kept, and is trainable now; take the "
                             "snapshot after choosing what is trained")
    for side in (now, before):
        if side.moved_base and not (now.adapters and before.adapters):
            raise ValueError(f"{side.source} was initialised by {side.moved_base}, which moved part of the base weights into the adapter: its product "
                             "is not the drift. Give the adapter that was saved at the start as base")


def _adapted(name: str, now: Reference, before: Reference) -> Delta:
    after, start = now.adapters.get(name, []), before.adapters.get(name, [])
    if any(adapter.magnitude is not None for adapter in (*after, *start)):
        return _dora(name, now, before)
    weights = [side.get(name) if name in side else None for side in (now, before)]
    moved = weights[0] is not None and weights[1] is not None and not before.holds(name, weights[0])
    experts = sorted({adapter.expert for adapter in (*after, *start)} - {None})
    if not experts:
        return _factored(after, start, *weights, moved=moved)
    return StackedDelta(tuple(_factored(*([a for a in found if a.expert == e] for found in (after, start)),
                                        *(w if w is None else w[e] for w in weights), moved=moved) for e in experts))


def _factored(after: Sequence[Adapter], start: Sequence[Adapter], now: Tensor | None, before: Tensor | None, *,
              moved: bool) -> FactoredDelta | ResidualDelta:
    """The change of one matrix from its adapters now and at the start; ``moved``: its frozen part is not what it was."""
    (a, b), (a0, b0) = (factors_of(found) if found else (None, None) for found in (after, start))
    if a is None:  # adapters at the start only: they were taken away
        a, b = a0[:1] * 0, b0[:, :1] * 0
    if a0 is not None and not b0.any():
        a0 = b0 = None
    if moved:
        if a0 is not None:
            a, b = torch.cat([a, a0.to(a.device)]), torch.cat([b, -b0.to(b.device)], dim=1)
        return ResidualDelta(now, before, a, b)
    frozen = before if now is None else now
    return FactoredDelta(a, b, a0, b0, None if frozen is None else frozen.to(a.device))


def _dora(name: str, now: Reference, before: Reference) -> DoraDelta:
    after, start = now.adapters.get(name, []), before.adapters.get(name, [])
    frozen = next((side.get(name) for side in (now, before) if name in side), None)
    if not after:
        raise NotImplementedError(f"{name} had a DoRA adapter at the start, and has none now")
    if frozen is None:
        raise ValueError(f"{name} uses DoRA, which rescales the base weight, and the base weight is not at hand; give the base model")
    if "lora_embedding" in after[0].name_a:
        raise NotImplementedError(f"{name} is an embedding with DoRA, which is not covered")
    if len(after) != 1 or len(start) > 1 or (start and start[0].b.any()):
        raise NotImplementedError(f"{name} uses DoRA beside another adapter, or from a start that is not 0")
    adapter = after[0]
    # DoRA's rows are the layer's outputs, whatever way round the weight is stored.
    frozen = (frozen.T if adapter.transposed else frozen).to(adapter.a.device)
    return DoraDelta(adapter.a.detach(), adapter.scaling * adapter.b.detach(), adapter.magnitude.detach(),
                     start[0].magnitude if start else None, frozen, adapter.transposed)

