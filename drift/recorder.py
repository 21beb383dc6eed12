"""Recording while a model trains: one context manager for any loop."""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from math import isnan, nan, sqrt
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import pyarrow as pa
from torch import nn

from drift.names import parameters, trainable
from drift.reference import Reference
from drift.schedules import Schedule, schedule
from drift.table import Row, Table, write_meta
from drift.weights import METRICS, ParameterDrift, Side, check_metrics, parameter_drift

UPDATE = "update"


class Probe(Protocol):
    """What :func:`record` measures beside parameter drift.

    ``prepare`` is called once, before the first recording; ``rows`` at every recording, and returns table rows without
    their ``run``. A probe's own ``every`` (None: the recorder's) lets a dear one be read more rarely.

    A probe that watches the training steps themselves is a :class:`Watcher` too.
    """

    name: str
    every: Schedule | int | None

    def prepare(self, model: nn.Module, reference: Reference) -> None: ...

    def rows(self, model: nn.Module, step: int) -> list[Row]: ...


@runtime_checkable
class Watcher(Protocol):
    """A probe that is told of the training: ``attach(due, step)`` before the step after ``step`` (``due`` says which will be
    recorded), ``step()`` after every optimiser step, before ``rows``; ``detach()`` at the end, also after an exception."""

    def attach(self, due: Schedule, step: int) -> None: ...

    def step(self) -> Any: ...

    def detach(self) -> None: ...


def record(model: nn.Module, out: Path | str | None = None, *, every: int | Schedule = 1, probes: Sequence[Probe] = (),
           reference: Side | None = None, metrics: Collection[str] = ("l2", "rel"), run: str = "run",
           config: Mapping[str, Any] | None = None, start_step: int = 0, overwrite: bool = False) -> "Recorder":
    r"""Record drift from the base, and whatever ``probes`` measure, while ``model`` trains.

    ``out``: folder for ``drift/part-*.parquet`` and ``drift/meta.json``, readable by :func:`drift.load` while the run goes on (None: memory
    only). ``every``: record each so many steps, or when ``every(step)`` is true (:mod:`drift.schedules`); step 0 and the last step are
    always recorded. ``reference``: θ₀, any base that :func:`drift.parameter_drift` takes; by default the weights at the moment of entering. ``metrics``: of
    :data:`drift.weights.METRICS`, and ``update``, the distance from the last recording (which keeps one more copy of what is trained).
    ``config``: anything worth keeping in meta.json. ``start_step``: the step that a resumed run goes on from; later recordings in ``out`` are
    dropped, earlier ones kept. θ₀ must then be given. ``overwrite``: replace a former run's recordings in ``out``.

    Raises ``TypeError`` if ``model`` or ``probes`` are none, ``ValueError`` for frozen models, unknown metrics, names of probes that are equal, a
    ``reference`` that does not match (at entering), or probes that record the same of one source (when they do), ``FileExistsError`` if ``out``
    holds another run's recordings, ``OSError`` if it can't be written.

    Under torch.distributed every process must record; the first writes. Sharded parameters (FSDP2) are gathered one at a time.
    Cost of a recording: one read of θ and θ₀, plus the probes; :attr:`Recorder.overhead` says what it came to in seconds.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> with record(model) as rec:
    ...     for _ in range(3):
    ...         model(torch.ones(1, 2)).sum().backward()
    ...         optimizer.step(); optimizer.zero_grad()
    ...         logged = rec.step()
    >>> round(logged["drift/l2"], 4)  # three steps of 0.5 in both weights: 1.5 √2
    2.1213
    """
    return Recorder(model, out, every=every, probes=probes, reference=reference, metrics=metrics, run=run, config=config,
                    start_step=start_step, overwrite=overwrite)


class Recorder:
    """What :func:`record` returns; call :meth:`step` after every optimiser step."""

    def __init__(self, model: nn.Module, out: Path | str | None, *, every: int | Schedule, probes: Sequence[Probe],
                 reference: Side | None, metrics: Collection[str], run: str, config: Mapping[str, Any] | None,
                 start_step: int, overwrite: bool) -> None:
        if reference is model:
            raise ValueError("reference is the model that is trained, which can't drift from itself; leave it out, or give Reference.snapshot(model)")
        if start_step < 0:
            raise ValueError(f"start_step must be 0 or the step that the run goes on from, got {start_step}")
        if start_step > 0 and reference is None:
            raise ValueError(f"reference is missing: at start_step={start_step} the model has left θ₀, so it can't be taken "
                             "from it; give Reference.snapshot(model) made before training, or "
                             "Reference.open(the base model's folder)")
        trainable(model)  # refuses frozen models, and what is no model
        check_metrics(metrics, [*METRICS, UPDATE])
        if not isinstance(probes, Sequence) or isinstance(probes, str):
            raise TypeError(f"probes must be a list of probes, got {type(probes).__name__}")
        if wrong := next((p for p in probes if not all(hasattr(p, has) for has in ("name", "every", "prepare", "rows"))), None):
            raise TypeError(f"probes holds {wrong!r}, which is no probe: it must have name, every, prepare(model, reference) and rows(model, step)")
        names = [p.name for p in probes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes must have different names, got {names}")
        self.model, self.probes, self.config = model, list(probes), dict(config or {})
        self.reference = None if reference is None else Reference.of(reference)
        self.metrics, self.overwrite = tuple(dict.fromkeys(["l2", *metrics])), overwrite
        self.every = schedule(every)
        self.last = start_step
        self.overhead = 0.0  # seconds spent recording, preparation of the probes included
        self.recordings = 0
        self._watchers = [p for p in self.probes if isinstance(p, Watcher)]
        self._table = Table(out, run)
        self._entered = False
        self._recorded: set[int] = set()
        self._whose: dict[tuple[str, int | None, str, str], str] = {}  # the probe of every series
        self._theta0: dict[str, str] = {}  # what the reference is
        self._before: Reference | None = None  # the weights at the last recording, for "update"

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("this Recorder has recorded a run; call drift.record for another")
        self._entered = True
        began = time.perf_counter()
        if self.reference is None:
            self.reference = Reference.snapshot(self.model)
        self.reference.check(self.model)
        self._theta0 = {"source": self.reference.source, "sha256": self.reference.digest(parameters(self.model))}
        if self.last == 0:
            self._table.begin(overwrite=self.overwrite)
        else:
            before = self._table.resume(self.last, {"config": self.config, "trainable_parameters": self._trainable(), "reference": self._theta0})
            self.overhead, self.recordings = before.get("overhead_seconds", 0.0), before.get("recordings", 0)
        for probe in self.probes:
            probe.prepare(self.model, self.reference)
        self.overhead += time.perf_counter() - began
        if self.last == 0:
            self._record(0, everything=True)
        else:
            self._recorded = {self.last}
            if UPDATE in self.metrics:
                self._before = Reference.snapshot(self.model)
        try:
            for watcher in self._watchers:
                watcher.attach(self.every, self.last)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach()
        if kind is None and self.last not in self._recorded:
            self._record(self.last, everything=True)
        with nullcontext() if kind is None else suppress(OSError):  # the error that ended the training is the one to see
            self._write_meta()

    def _detach(self) -> None:
        for watcher in self._watchers:
            watcher.detach()

    def step(self, step: int | None = None) -> dict[str, float]:
        """Tell that an optimiser step has been taken; on schedule, record and return what is worth logging.

        ``step``: its number, above the last; by default one more. Returns e.g. ``{"drift/l2": ..., "kl/base_model/held-out":
        ...}`` (whole-model figures), or ``{}`` where nothing was due.
        """
        self._check_entered()
        if step is not None and step <= self.last:
            raise ValueError(f"step must be above the last, {self.last}, got {step}")
        if self._watchers and step not in (None, self.last + 1):
            raise ValueError(f"probe {self._watchers[0].name!r} watches every training step, so step must be {self.last + 1} after {self.last}, got {step}")
        self.last = self.last + 1 if step is None else step
        for watcher in self._watchers:
            watcher.step()
        return self._record(self.last) if self.every(self.last) else {}

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("the recorder is not running: use it in a with block, `with drift.record(model) as rec:`")

    def table(self) -> pa.Table:
        """Everything recorded so far, as an Arrow table (columns as in :class:`drift.table.Row`)."""
        return self._table.arrow()

    def _record(self, step: int, *, everything: bool = False) -> dict[str, float]:
        began = time.perf_counter()
        drifts = parameter_drift(self.model, self.reference, metrics=[m for m in self.metrics if m != UPDATE])
        rows = drift_rows(drifts, step, self.metrics)
        if UPDATE in self.metrics:
            if self._before is not None:
                rows += drift_rows(parameter_drift(self.model, self._before, metrics=()), step, ("l2",), name=UPDATE)
            self._before = Reference.snapshot(self.model)
        for probe in self.probes:
            if everything or probe.every is None or schedule(probe.every)(step):
                rows += self._own(probe, probe.rows(self.model, step))
        self._table.add(step, rows)
        self._recorded.add(step)
        self.recordings += 1
        self.overhead += time.perf_counter() - began
        self._write_meta()
        return _whole_model(rows)

    def _own(self, probe: Probe, rows: list[Row]) -> list[Row]:
        """The rows of a probe, none of which another probe records, too: the table could not tell them apart."""
        for r in rows:
            first = self._whose.setdefault((r.metric, r.layer, r.module, r.source), probe.name)
            if first != probe.name:
                raise ValueError(f"probes {first!r} and {probe.name!r} both record {r.metric} of source {r.source!r}; give their sources "
                                 "different names")
        return rows

    def latest(self) -> dict[str, float]:
        """The whole-model figures of the last recording, as :meth:`step` returns them."""
        self._check_entered()
        last = max(self._recorded)
        return _whole_model([r for r in self._table.rows if r.step == last])

    def _trainable(self) -> int:
        return sum(p.numel() for p in parameters(self.model).values() if p.requires_grad)

    def _write_meta(self) -> None:
        if self._table.out is None:
            return
        coverage = {p.name: p.coverage for p in self.probes if hasattr(p, "coverage")}
        write_meta(self._table.out, {
            "run": self._table.run, "last_step": self.last, "recordings": self.recordings,
            "overhead_seconds": round(self.overhead, 3), "trainable_parameters": self._trainable(),
            "reference": self._theta0, "metrics": list(self.metrics), "coverage": coverage, "config": self.config})


def drift_rows(drifts: Sequence[ParameterDrift], step: int, metrics: Collection[str] = ("l2", "rel"), name: str | None = None) -> list[Row]:
    """Drift per parameter, per kind of module in a block's, per block and of the whole model, as table rows ``drift/<metric>``.

    Kinds (``module`` = ``*.q_proj.weight``), blocks and the whole combine their parameters as one long vector: squares add up, the largest element is
    the largest of all. Singular values and directions belong to single matrices and are not combined. ``name``: another
    name for the metric ``l2``.
    """
    rows: list[Row] = []

    def add(metric: str, value: float, layer: int | None, module: str) -> None:
        rows.append(Row(step=step, metric=f"drift/{name if name and metric == 'l2' else metric}", layer=layer, module=module, value=value))

    groups: dict[tuple[int | None, str], list[ParameterDrift]] = {(None, ""): list(drifts)}
    for d in drifts:
        for metric in metrics:
            if metric != UPDATE and not isnan(getattr(d, metric)) or metric == "rel":
                add(metric, getattr(d, metric), d.layer, d.name)
        if d.layer is not None:
            groups.setdefault((d.layer, ""), []).append(d)
            groups.setdefault((None, kind(d.name)), []).append(d)
    for (layer, module), members in groups.items():
        for metric, value in _combined(members, metrics).items():
            add(metric, value, layer, module)
    return rows


def _combined(members: Sequence[ParameterDrift], metrics: Collection[str]) -> dict[str, float]:
    l2, base = (sqrt(sum(x**2 for x in values)) for values in ([d.l2 for d in members], [d.base_l2 for d in members]))
    found = {"l2": l2, "rel": l2 / base if base else nan}
    if "max" in metrics:
        found["max"] = max(d.max for d in members)
    if "cos" in metrics:
        products = [(d.base_l2**2 + d.product, d.base_l2**2 + 2 * d.product + d.l2**2) for d in members]
        now = sqrt(sum(max(n, 0.0) for _, n in products))
        found["cos"] = sum(p for p, _ in products) / (base * now) if base and now else nan
    return {metric: value for metric, value in found.items() if metric in metrics}


def kind(name: str) -> str:
    """A parameter's name without its block, for sums over all blocks.

    >>> kind("model.layers.3.mlp.up_proj.weight")
    '*.mlp.up_proj.weight'
    """
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(["*", *parts[place + 1 :]])


def _whole_model(rows: Sequence[Row]) -> dict[str, float]:
    return {f"{r.metric}/{r.source}" if r.source else r.metric: r.value for r in rows if r.layer is None and not r.module}

