r"""Gradients of several sources of data taken apart inside the one backward pass that trains on their mixture.

The loss of a mixed batch is a sum over its tokens, so its gradient is :math:`g=\sum_s g_s` over the sources s. Each weight
gradient is computed source by source and added up (:mod:`drift.uses`), which costs no more products than computing it at
once; the inner products :math:`\langle g_s, g_{s'}\rangle` of the pieces are all that is kept. Every source is cut into ``folds`` of
independent rows, because a product of two *different* folds carries no sampling noise:
:math:`\mathbb E\langle g_{s,1}, g_{s,2}\rangle=\langle\mathbb E g_{s,1},\mathbb E g_{s,2}\rangle`, while :math:`\mathbb E\lVert g_s\rVert^2` has the variance on top.
"""

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drift.groups import Groups
from drift.intercept import Interceptor
from drift.names import trainable
from drift.schedules import Schedule, schedule
from drift.source_alignment import SourceAlignment, pooled, scopes, table_rows
from drift.source_collector import SourceCollector
from drift.table import Row
from drift.uses import Scratch

__all__ = ["SourceAlignment", "SourceGradients", "pooled", "release"]


class SourceGradients:
    r"""Alignment of the gradients of two or more sources of data, inside the ordinary backward pass on their mixture.

    ``sources``: their names. :meth:`tag` says before each forward pass whose every row or token is, :meth:`step` ends an optimiser
    step. It is also a probe of :func:`drift.record`, which then calls :meth:`step` itself.

    ``every``: measure each so many steps, or when ``every(step)`` is true; other steps run as if nothing were here. None: each step, or
    as often as the recorder records. ``folds``: parts
    that a source's rows are dealt into; 2 give estimates free of sampling noise with standard errors over steps, 3 or more also
    within a step. ``accumulate``: a step has several backward passes; every source's gradients are then kept until it
    ends (S·F numbers for each of the model's; LoRA factors are always kept). ``optimizer``: an Adam, for products in its metric.
    ``key``: name of the model's keyword argument that carries the tags (it is taken out before the model sees it), for loops
    that can't call :meth:`tag`. ``window``: recordings that the pooled rows of the table look back on.

    Exact for tokens of different sources that do not attend to each other: rows of a batch, or packed rows under a
    block-diagonal mask. A row none of whose labels is in the loss has no gradient; where the model is given ``labels``, it does not count among its
    source's rows (elsewhere tag it -1). Cost: the products of the gradients, S·F·(S·F + 1)/(6N) of a layer's work at N tokens, and memory
    for :data:`drift.uses.BLOCK` numbers and a layer's input. Under torch.distributed gradients are averaged over the processes before the products
    (S·F times the gradient's traffic, at the steps that measure).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> sources = SourceGradients(model, ["task", "self"], folds=1)
    >>> with sources:
    ...     sources.tag([0, 1])
    ...     model(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).sum().backward()
    ...     alignment = sources.step()
    >>> alignment.inner().tolist(), round(alignment.raw_cos("task", "self"), 4)
    ([[1.0, 1.0], [1.0, 2.0]], 0.7071)
    """

    name = "sources"

    def __init__(self, model: nn.Module, sources: Sequence[str], *, every: int | Schedule | None = None, folds: int = 2,
                 accumulate: bool = False, optimizer: torch.optim.Optimizer | None = None, key: str | None = None,
                 window: int = 20) -> None:
        self.sources = () if isinstance(sources, str) else tuple(sources)
        if len(set(self.sources)) < max(2, len(self.sources)):
            raise ValueError(f"sources must be a list of two or more different names, got {sources!r}")
        if folds < 1 or window < 1:
            raise ValueError(f"folds and window must be at least 1, got folds={folds}, window={window}")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is a wrapper
        if optimizer is not None and not all({"betas", "eps"} <= group.keys() for group in optimizer.param_groups):
            raise ValueError(f"optimizer must be an Adam (its groups have betas and eps), got {type(optimizer).__name__}; leave it out")
        trainable(model)  # refuses frozen models
        self.model, self.folds, self.accumulate, self.optimizer, self.key = model, folds, accumulate, optimizer, key
        self.every: int | Schedule | None = None  # of the recorder: rows are there whenever a step was measured
        self._due = schedule(every)
        self._follows = every is None
        self._last, self._at = 0, 0
        self._open = False
        self._collector: SourceCollector | None = None
        self._interceptor = Interceptor(model)
        self._aside: Groups | None = None
        self._scratch = Scratch()
        self._handles: list[Any] = []
        self._checked, self._in_part = False, frozenset()
        self.coverage: dict[str, Any] = {}
        self._recent: deque[SourceAlignment] = deque(maxlen=window)
        self._process_group = dist.new_group() if dist.is_initialized() and dist.get_world_size() > 1 else None

    # --- attaching -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if _attached(self.model):
            raise RuntimeError("a SourceGradients is attached to this model already (left behind by a crash?); drift.release(model) "
                               "takes it off")
        self._open = True
        self._handles += [self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
                          self.model.register_forward_hook(self._after_forward, always_call=True)]
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_pre_hook(lambda *_: self._finish()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open = False

    def _detach(self) -> None:
        self._interceptor.detach()
        if self._collector is not None:
            self._collector.release()
        self._collector = None

    # --- one step ------------------------------------------------------------------------------------------------

    def tag(self, sources: Tensor | Sequence[int] | Sequence[str], units: Tensor | None = None) -> None:
        """Say whose the rows or tokens of the coming forward pass are.

        ``sources``: [B] names or numbers of sources, or [B, T] numbers; -1: nobody's (their part of the gradient is left out of
        all products). ``units`` [B, T]: which independent row a token belongs to, where several are packed into one; by
        default runs of one source in a row of the batch are taken for one unit.
        """
        if not self._open:
            raise RuntimeError("SourceGradients is not attached: use it in a with block, or give it to drift.record as a probe")
        if not self._due(self._last + 1):
            return
        index, unit = self._parsed(sources, units)
        if self._collector is None:
            self._begin(untagged=bool((index < 0).any()))
        elif not self.accumulate:
            raise RuntimeError("tag was called twice in one step; call step() after each optimiser step, or give "
                               "SourceGradients(accumulate=True) if a step has several backward passes")
        self._interceptor.groups = Groups(self._collector.deal(index, unit), self._collector.n_groups)

    def step(self) -> SourceAlignment | None:
        """End an optimiser step; the alignment of its gradients, or None where the step was not measured."""
        self._finish()
        self._last += 1
        if self._collector is None:
            if self._open and self._due(self._last):
                raise RuntimeError(f"step {self._last} was to be measured, but nobody said whose its rows are: " + (
                    "tag was not called" if self.key is None else f"the model was not given {self.key!r} (a Trainer drops such a column unless "
                    "remove_unused_columns=False, and a collator may)"))
            return None
        found = self._collector.result
        self._detach()
        if found is None:
            raise RuntimeError(f"step {self._last} was to be measured, but nothing was seen of its gradient: tag comes before the forward pass, "
                               "backward before step")
        alignment = SourceAlignment(self.sources, self.folds, found.grams, found.units.reshape(len(self.sources), -1),
                                    found.coverage, found.missing)
        self._recent.append(alignment)
        self._at = self._last
        self.coverage = {"covered": alignment.coverage, "missing": dict(alignment.missing)}
        return alignment

    def _begin(self, *, untagged: bool) -> None:
        self._collector = SourceCollector(
            self.model, trainable(self.model), len(self.sources), self.folds,
            untagged=untagged, accumulate=self.accumulate, optimizer=self.optimizer, process_group=self._process_group, scratch=self._scratch,
            compare=not self._checked, in_part=self._in_part)
        self._interceptor.attach(self._collector)

    def _finish(self) -> None:
        if self._collector is not None and self._collector.result is None and self._collector.touched:
            self._collector.finish()
            self._checked, self._in_part = True, self._collector.in_part

    def _parsed(self, sources, units) -> tuple[Tensor, Tensor | None]:
        if not isinstance(sources, Tensor) and hasattr(sources, "__len__") and len(sources) and isinstance(sources[0], str):
            unknown = sorted(set(sources) - set(self.sources))
            if unknown:
                raise ValueError(f"sources holds {unknown}; the names are {list(self.sources)}")
            sources = [self.sources.index(s) for s in sources]
        try:
            index = torch.as_tensor(sources).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"sources must be names [B], or whole numbers [B] or [B, T], got {sources!r}") from None
        if index.dim() not in (1, 2) or index.is_floating_point() or index.is_complex():
            raise ValueError(f"sources must be whole numbers [B] or [B, T], got {index.dtype} {tuple(index.shape)}")
        index = index.long()
        if index.numel() == 0 or not (int(index.min()) >= -1 and int(index.max()) < len(self.sources)):
            raise ValueError(f"sources must lie in -1 ... {len(self.sources) - 1}, got "
                             f"{'nothing' if index.numel() == 0 else f'{int(index.min())} ... {int(index.max())}'}")
        if not bool((index >= 0).any()):
            raise ValueError("sources is -1 throughout, so there is no source's gradient to measure")
        units = None if units is None else torch.as_tensor(units)
        if units is not None and (index.dim() == 1 or units.shape != index.shape):
            raise ValueError(f"units must have the shape of sources [B, T], got {tuple(units.shape)} and {tuple(index.shape)}")
        return index, None if units is None else units.cpu().long()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if self.key is not None and self.key in kwargs:
            kwargs = dict(kwargs)
            self.tag(kwargs.pop(self.key))
        if not torch.is_grad_enabled():  # an evaluation in the midst of a step is not part of it
            self._aside, self._interceptor.groups = self._interceptor.groups, None
        if self._interceptor.groups is not None:
            self._learn_shape([*args, *kwargs.values()])
            self._collector.discount(kwargs.get("labels"))
        return args, kwargs

    def _after_forward(self, *_) -> None:
        if self._aside is not None:
            self._interceptor.groups, self._aside = self._aside, None

    def _learn_shape(self, inputs: Sequence[Any]) -> None:
        """Rows and tokens of the batch, from the model's first tensor: ids [B, T], embeddings [B, T, n], or plain vectors [B, n]."""
        first = next((x for x in inputs if isinstance(x, Tensor) and x.dim() >= 1), None)
        if first is None:
            return
        shape = tuple(first.shape[:-1] if first.is_floating_point() else first.shape)
        groups = self._interceptor.groups
        index = groups.index
        if shape[0] != len(index) or (index.dim() == 2 and len(shape) > 1 and shape[1] != index.shape[1]):
            raise ValueError(f"sources was {list(index.shape)} in tag, but the model is given a batch of shape {list(shape)}")
        if len(shape) > 1 and groups.tokens is None:
            self._interceptor.groups = Groups(index, groups.n, tokens=shape[:2])

    # --- as a probe of drift.record ------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, reference: Any) -> None:
        """Nothing has to be prepared."""
        if model is not self.model:
            raise ValueError(f"SourceGradients was made for another {type(self.model).__name__} than the model that is recorded")

    def attach(self, due: Schedule, step: int) -> None:
        """Start watching after ``step``; the recorder's schedule is taken where ``every`` was not given."""
        self._last = step
        if self._follows:
            self._due = due
        self.__enter__()

    def detach(self) -> None:
        """Stop watching."""
        self.__exit__(None, None, None)

    def rows(self, model: nn.Module, step: int) -> list[Row]:
        """Table rows of the step that has just ended, if it was measured (else none).

        For the whole model, each block and each parameter, and every metric (``align``, ``align_adam``, ``align_lora``):
        ``/raw_inner``, ``/raw_cos`` (this step's gradients), ``/inner``, ``/cos`` (expected gradients, this step), ``/norm2`` (squared norm of a
        source's expected gradient), and, pooled over the last recordings with a standard error, ``/pooled_cos``, ``/pooled_inner``.
        """
        if not self._recent or self._at != self._last:
            return []
        now = self._recent[-1]
        return [replaced for metric, per_name in now.grams.items() for where in scopes(per_name)
                for replaced in table_rows(list(self._recent), metric, where, step)]


def release(model: nn.Module) -> None:
    """Take off the model whatever :class:`SourceGradients` is attached to it, for instance after a Trainer has crashed.

    >>> release(nn.Linear(1, 1))
    """
    for sources in _attached(model):
        sources.detach()


def _attached(model: nn.Module) -> list[SourceGradients]:
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, SourceGradients)]
