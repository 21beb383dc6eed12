"""Recording while a model trains: one context manager for any loop."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import pyarrow as pa
from torch import nn

from drift.names import parameters
from drift.reference import Reference
from drift.schedules import Schedule, schedule
from drift.table import Row, Table, write_meta
from drift.weights import ParameterDrift, parameter_drift


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
           reference: Reference | None = None, run: str = "run", config: Mapping[str, Any] | None = None,
           start_step: int = 0) -> "Recorder":
    r"""Record drift from the base, and whatever ``probes`` measure, while ``model`` trains.

    ``out``: folder for ``drift/part-*.parquet`` and ``drift/meta.json`` (None: memory only). ``every``: record each so many
    steps, or when ``every(step)`` is true; step 0 and the last step are always recorded. ``reference``: θ₀; by default the
    weights at the moment of entering. ``config``: anything worth keeping in meta.json. ``start_step``: the step that a
    resumed run goes on from; later recordings in ``out`` are dropped, earlier ones kept. θ₀ must then be given.

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
    return Recorder(model, out, every=every, probes=probes, reference=reference, run=run, config=config, start_step=start_step)


class Recorder:
    """What :func:`record` returns; call :meth:`step` after every optimiser step."""

    def __init__(self, model: nn.Module, out: Path | str | None, *, every: int | Schedule, probes: Sequence[Probe],
                 reference: Reference | None, run: str, config: Mapping[str, Any] | None, start_step: int) -> None:
        if start_step > 0 and reference is None:
            raise ValueError(f"reference is missing: at start_step={start_step} the model has left θ₀, so it can't be taken "
                             "from it; give Reference.snapshot(model) made before training, or "
                             "Reference.from_safetensors(base model)")
        names = [p.name for p in probes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes must have different names, got {names}")
        self.model, self.probes, self.reference, self.config = model, list(probes), reference, dict(config or {})
        self.every = schedule(every)
        self.last = start_step
        self.overhead = 0.0  # seconds spent recording, preparation of the probes included
        self.recordings = 0
        self._watchers = [p for p in self.probes if isinstance(p, Watcher)]
        self._table = Table(out, run)
        self._recorded: set[int] = set()

    def __enter__(self) -> Self:
        began = time.perf_counter()
        if self.reference is None:
            self.reference = Reference.snapshot(self.model)
        self.reference.check(self.model)
        for probe in self.probes:
            probe.prepare(self.model, self.reference)
        self.overhead += time.perf_counter() - began
        if self.last == 0:
            self._table.clear()
            self._record(0, everything=True)
        else:
            self._table.resume(self.last)
            self._recorded = {row.step for row in self._table.rows}
        for watcher in self._watchers:
            watcher.attach(self.every, self.last)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for watcher in self._watchers:
            watcher.detach()
        if kind is None and self.last not in self._recorded:
            self._record(self.last, everything=True)
        self._write_meta()

    def step(self, step: int | None = None) -> dict[str, float]:
        """Tell that an optimiser step has been taken; on schedule, record and return what is worth logging.

        ``step``: its number; by default one more than the last. Returns e.g. ``{"drift/l2": ..., "kl/base_model/held-out":
        ...}`` (whole-model figures), or ``{}`` where nothing was due.
        """
        self.last = self.last + 1 if step is None else step
        for watcher in self._watchers:
            watcher.step()
        return self._record(self.last) if self.every(self.last) else {}

    def table(self) -> pa.Table:
        """Everything recorded so far, as an Arrow table (columns as in :class:`drift.table.Row`)."""
        return self._table.arrow()

    def _record(self, step: int, *, everything: bool = False) -> dict[str, float]:
        began = time.perf_counter()
        rows = drift_rows(parameter_drift(self.model, self.reference), step)
        for probe in self.probes:
            if everything or probe.every is None or schedule(probe.every)(step):
                rows += probe.rows(self.model, step)
        self._table.add(step, rows)
        self._recorded.add(step)
        self.recordings += 1
        self.overhead += time.perf_counter() - began
        return _whole_model(rows)

    def latest(self) -> dict[str, float]:
        """The whole-model figures of the last recording, as :meth:`step` returns them."""
        last = max(self._recorded)
        return _whole_model([r for r in self._table.rows if r.step == last])

    def _write_meta(self) -> None:
        if self._table.out is None:
            return
        trainable = {n: p.numel() for n, p in parameters(self.model).items() if p.requires_grad}
        coverage = {p.name: p.coverage for p in self.probes if hasattr(p, "coverage")}
        write_meta(self._table.out, {
            "run": self._table.run, "last_step": self.last, "recordings": self.recordings,
            "overhead_seconds": round(self.overhead, 3), "trainable_parameters": sum(trainable.values()),
            "coverage": coverage, "config": self.config})


def drift_rows(drifts: Sequence[ParameterDrift], step: int) -> list[Row]:
    """Drift per parameter, per block and of the whole model, as table rows (``drift/l2`` and ``drift/rel``).

    Blocks and the whole combine their parameters as one long vector: squares add up.
    """
    rows = []
    groups: dict[int | None | str, list[ParameterDrift]] = {"model": list(drifts)}
    for d in drifts:
        rows += [Row(step=step, metric="drift/l2", layer=d.layer, module=d.name, value=d.l2),
                 Row(step=step, metric="drift/rel", layer=d.layer, module=d.name, value=d.rel)]
        if d.layer is not None:
            groups.setdefault(d.layer, []).append(d)
    for group, members in groups.items():
        l2 = sum(d.l2**2 for d in members) ** 0.5
        base = sum(d.base_l2**2 for d in members) ** 0.5
        layer = None if group == "model" else group
        rows += [Row(step=step, metric="drift/l2", layer=layer, value=l2),
                 Row(step=step, metric="drift/rel", layer=layer, value=l2 / base if base else float("nan"))]
    return rows


def _whole_model(rows: Sequence[Row]) -> dict[str, float]:
    return {f"{r.metric}/{r.source}" if r.source else r.metric: r.value for r in rows if r.layer is None and not r.module}

