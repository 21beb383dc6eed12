"""Comparing the fast paths with slow ones, on the model that is to be measured."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor, nn

from drift import lowrank
from drift.adapters import adapters
from drift.alignment import gradient_gram
from drift.deltas import oriented
from drift.divergence import METRICS, token_divergences
from drift.divergence_probe import DivergenceProbe
from drift.forward import Batch, Forward, counted, logits_of, on_device, summed_nll
from drift.modes import measuring
from drift.names import trainable
from drift.numerics import moments
from drift.sources import SourceGradients

_SAMPLE = 12  # parameters and adapters that are compared where every one would take long
_ROWS = 4


@dataclass(frozen=True)
class Check:
    """One comparison: the largest relative error found, the error that is let pass, and what was left out."""

    what: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, repr=False)
class CheckReport:
    """All comparisons; shown, in a notebook too, as a table of them."""

    checks: tuple[Check, ...]

    @property
    def agrees(self) -> bool:
        """Whether all do."""
        return all(c.agrees for c in self.checks)

    def __str__(self) -> str:
        width = max(len(c.what) for c in self.checks)
        lines = [f"{'agrees ' if c.agrees else 'DIFFERS'}  {c.what:<{width}}  error {c.error:8.1e}  (up to {c.tolerance:.0e})"
                 f"{'  ' + c.note if c.note else ''}" for c in self.checks]
        return "\n".join(lines)

    __repr__ = __str__


def check(model: nn.Module, batch: Batch, *, forward: Forward = logits_of) -> CheckReport:
    """Compare what drift measures fast with the slow way, on this model and up to four rows of this batch; ``print`` the answer.

    Gradients of rows and of sources against one ordinary backward pass each, the training gradient with and without
    :class:`~drift.sources.SourceGradients`, divergences against a plain softmax in float64, drift sums and LoRA norms of some weights against
    float64 on formed matrices, and that nothing stays behind in the model. Takes about ten ordinary passes. Parameters that are not covered are
    named in the note, not counted as errors.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    >>> ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    >>> check(model, {"input_ids": ids, "labels": ids}, forward=lambda m, b: m(b["input_ids"])).agrees
    True
    """
    trained = trainable(model)
    batch = on_device(batch, next(iter(trained.values())).device)
    batch = {k: v[:_ROWS] if isinstance(v, Tensor) else v for k, v in batch.items()}
    if len(batch["labels"]) < 2:
        raise ValueError(f"batch must have at least 2 rows, got {len(batch['labels'])}")
    lowest = min((p.dtype for p in trained.values()), key=lambda dtype: torch.finfo(dtype).bits)
    tolerance = 5e-2 if torch.finfo(lowest).bits == 16 else 1e-3
    before = _state(model)
    checks = [*_gradients(model, batch, forward, trained, tolerance), _divergences(model, batch, forward, tolerance),
              _sums(trained), *_factors(model)]
    changed = [name for name, value in _state(model).items() if value != before.get(name)]
    checks.append(Check("the model is as it was", float(len(changed)), 0.0, ", ".join(changed[:3])))
    return CheckReport(tuple(checks))


def _state(model: nn.Module) -> dict[str, object]:
    """What no measurement may change."""
    return {"weights": sum(p._version for p in model.parameters()), "modes": [m.training for m in model.modules()],
            "gradients": [None if p.grad is None else p.grad._version for p in model.parameters()],
            "forward methods": ["forward" in m.__dict__ for m in model.modules()],
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "random state": torch.get_rng_state().tolist()}


def _gradients(model: nn.Module, batch: Batch, forward: Forward, trained: dict[str, nn.Parameter], tolerance: float) -> Iterator[Check]:
    rows = [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()} for i in range(len(batch["labels"]))]

    def gradients(part: Batch) -> list[Tensor]:
        found = torch.autograd.grad(summed_nll(model, part, forward), list(trained.values()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), found, strict=True)]

    with measuring(model), torch.enable_grad():
        separate = [gradients(row) for row in rows]
        whole = gradients(batch)
    gram = gradient_gram(model, batch, forward=forward)
    truth = {name: torch.stack([of_row[k].flatten() for of_row in separate]).double() for k, name in enumerate(trained)}
    expected = {name: x @ x.T for name, x in truth.items()}
    scale = max(float(k.abs().max()) for k in expected.values())
    errors = [float((torch.from_numpy(gram.per_parameter[name]) - k.cpu()).abs().max()) / scale
              for name, k in expected.items() if name in gram.per_parameter]
    yield Check("products of rows' gradients: one backward pass a row", max(errors, default=0.0), tolerance, _covered(gram.coverage, gram.missing))

    tags = [i % 2 for i in range(len(rows))]
    kept = {n: p.grad for n, p in trained.items()}
    for p in trained.values():
        p.grad = None
    try:
        with SourceGradients(model, ["even", "odd"], folds=1) as sources, measuring(model), torch.enable_grad():
            sources.tag(tags)
            summed_nll(model, batch, forward).backward()
            split = sources.step()
        taken = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    finally:
        for n, p in trained.items():
            p.grad = kept[n]
    errors = []
    for name, k in split.grams["sgd"].items():
        halves = torch.stack([truth[name][t::2].sum(0) for t in (0, 1)])
        errors.append(float((torch.from_numpy(k) - (halves @ halves.T).cpu()).abs().max()) / scale)
    yield Check("products of sources' gradients: one backward pass a source", max(errors, default=0.0), tolerance, _covered(split.coverage, split.missing))
    size = max(float(g.abs().max()) for g in whole) or 1.0
    yield Check("training gradient with and without SourceGradients",
                max(float((taken[n] - g).abs().max()) for n, g in zip(trained, whole, strict=True)) / size, tolerance)


def _covered(share: float, missing: Collection[str]) -> str:
    """Rounded down, so that 100 % is all."""
    return f"covers {floor(1000 * share) / 10:.1f}%" + (f"; not {', '.join(list(missing)[:3])}" if missing else "")


def _divergences(model: nn.Module, batch: Batch, forward: Forward, tolerance: float) -> Check:
    """The probe's states-and-head path against plain logits, the base being the model's own logits made flatter."""
    probe = DivergenceProbe("check", [batch], forward=forward)
    with measuring(model), torch.no_grad():
        row, column, targets = counted(batch["labels"])
        plain = forward(model, batch)[row, column].double()
        base = 0.9 * plain
        found = token_divergences(base, probe._counted(model, batch)[0], targets)
    log_p, log_q = base.log_softmax(-1), plain.log_softmax(-1)
    truth = {"kl_base_model": (log_p.exp() * (log_p - log_q)).sum(-1), "kl_model_base": (log_q.exp() * (log_q - log_p)).sum(-1),
             "entropy_base": -(log_p.exp() * log_p).sum(-1), "entropy_model": -(log_q.exp() * log_q).sum(-1),
             "nll_base": -log_p.gather(1, targets[:, None])[:, 0], "nll_model": -log_q.gather(1, targets[:, None])[:, 0]}
    errors = [float((getattr(found, m).double() - truth[m]).abs().max() / truth[m].abs().max().clamp(min=1e-6)) for m in METRICS]
    return Check("KL, entropy and NLL: plain softmax in float64", max(errors), tolerance)


def _sums(trained: dict[str, nn.Parameter]) -> Check:
    chosen = _some(list(trained.items()))
    errors = []
    for _, p in chosen:
        before = 0.75 * p.detach()
        d = p.detach().double() - before.double()
        errors.append(abs(float(moments(p, before).squared_distance) / float(d.square().sum()) - 1) if bool(d.any()) else 0.0)
    return Check("squared drift: float64", max(errors), 1e-5, f"{len(chosen)} of {len(trained)} parameters")


def _factors(model: nn.Module) -> Iterator[Check]:
    found = list(adapters(model))
    chosen = _some(found)
    if chosen:
        errors = []
        for adapter in chosen:
            a, b = oriented(adapter)
            formed = (b @ a).norm()
            errors.append(float((lowrank.norm(a, b) - formed).abs() / formed) if formed > 0 else float(lowrank.norm(a, b)))
        yield Check("LoRA norms: formed products", max(errors), 1e-9, f"{len(chosen)} of {len(found)} adapters")


def _some(items: Sequence) -> Sequence:
    """At most twelve, spread evenly."""
    return items if len(items) <= _SAMPLE else [items[i * len(items) // _SAMPLE] for i in range(_SAMPLE)]
