"""Divergence of a model's predictions from its base's on fixed rows, as a probe of :func:`drift.record`."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from drift.adapters import adapters_disabled, has_adapters
from drift.divergence import METRICS, Logits, Projected, RowDivergences, TokenDivergences, token_divergences
from drift.forward import Batch, Forward, check_batch, counted, device_of, headless, logits_at, logits_of, on_device
from drift.modes import measuring
from drift.names import parameters
from drift.numerics import at_least_fp32, check_finite
from drift.reference import Reference
from drift.table import Row, written_whole

NO_ADAPTERS: Literal["without adapters"] = "without adapters"
Base = nn.Module | Reference | Path | str | None


class DivergenceProbe:
    """KL to the base (both ways), entropy, NLL and perplexity on fixed held-out rows, as a probe of :func:`drift.record`.

    ``batches``: dictionaries of tensors as Hugging Face uses them (``input_ids``, ``attention_mask``, ``labels`` [B, T]; labels
    not shifted, -100 where a token is not counted). ``base``: where the base's predictions come from,

    - None: the recorder's θ₀, put into the model once, by :meth:`prepare`;
    - ``"without adapters"``: the model with its adapters switched off, once as well;
    - a second model, run once, on its own device;
    - another :class:`~drift.reference.Reference`, a checkpoint folder or a file of weights: put into the model once, by :meth:`prepare`;
    - a file of log-probabilities that :func:`store_base` wrote for these very batches; read as they are needed.

    Of a model whose logits are its head times its last states, as a trial on the first batch shows, only those states are kept
    (N·d numbers for N positions of width d), and logits exist for 128 positions at a time, in float32 also where the model runs in
    bfloat16; of any other, its logits (4·N·V bytes).
    ``forward(model, batch)`` returns logits [B, T, V]; the default calls a Hugging Face model.

    Raises ``ValueError`` for batches that do not go together (:func:`drift.forward.check_batch`) and a file of other batches, ``FileNotFoundError`` for a
    path that is not there; at measuring ``FloatingPointError``, naming the parameters, for weights that are not finite.

    >>> model, ids = nn.Embedding(2, 2), torch.tensor([[0, 1, 1]])
    >>> probe = DivergenceProbe("held-out", [{"input_ids": ids, "labels": ids}], forward=lambda m, b: m(b["input_ids"]))
    >>> _ = nn.init.zeros_(model.weight)
    >>> probe.prepare(model, Reference.snapshot(model))
    >>> {row.metric: round(row.value, 4) for row in probe.rows(model, step=0)}["ppl/base"]  # two words, as likely
    2.0
    """

    def __init__(self, name: str, batches: Sequence[Batch], *, base: Base = None, forward: Forward = logits_of,
                 every: Callable[[int], bool] | int | None = None) -> None:
        if not batches:
            raise ValueError(f"probe {name!r}: batches is empty; give at least one batch with labels")
        self.name, self.batches, self.forward, self.every = name, list(batches), forward, every
        for i, batch in enumerate(self.batches):
            try:
                check_batch(batch)
            except ValueError as error:
                raise ValueError(f"probe {name!r}, batch {i}: {error}") from None
        if isinstance(base, Path | str) and base != NO_ADAPTERS:
            base = _opened(Path(base), self.batches, name)
        elif not (base is None or base == NO_ADAPTERS or isinstance(base, nn.Module | Reference)):
            raise TypeError(f"probe {name!r}: base must be None, {NO_ADAPTERS!r}, a model, a Reference or a path, got {type(base).__name__}")
        self.base = base
        self._kept: list[Logits] | None = None
        self._prepared_for: Reference | None = None
        self._plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def prepare(self, model: nn.Module, reference: Reference | None = None) -> None:
        """Compute the base's predictions; once for a reference, however often it is called. ``reference`` is needed for ``base=None`` only."""
        if isinstance(self.base, Path):
            self._kept = _stored(self.base, len(self.batches))
            return
        reference = self.base if isinstance(self.base, Reference) else reference
        if self._kept is not None and self._prepared_for is reference:
            return
        source, context, head = model, nullcontext(), None
        device_of(model)
        if isinstance(self.base, nn.Module):
            source = self.base
        elif self.base == NO_ADAPTERS:
            if not has_adapters(model):
                raise ValueError(f"probe {self.name!r}: base is 'without adapters', but the model has none")
            context = adapters_disabled(model)
        elif reference is None:
            raise ValueError(f"probe {self.name!r}: reference is missing; without base= the base is θ₀")
        else:
            context, head = reference.swapped_into(model), reference
        self._kept = self._predictions(source, context, head)
        self._prepared_for = reference

    def _predictions(self, model: nn.Module, context: AbstractContextManager, reference: Reference | None) -> list[Logits]:
        kept = []
        with measuring(model), torch.no_grad(), context:
            for batch in self.batches:
                logits = self._counted(model, batch)[0]
                if isinstance(logits, Tensor):
                    kept.append(at_least_fp32(logits).cpu())
                else:
                    kept.append(Projected(logits.hidden.cpu(), _unchanging(model, logits.weight, reference),
                                          None if logits.bias is None else logits.bias.detach().cpu().clone()))
        return kept

    def per_row(self, model: nn.Module) -> RowDivergences:
        """Measure the model now; one entry a row, in the order of the batches."""
        if self._kept is None:
            raise RuntimeError(f"probe {self.name!r} is not prepared; call prepare(model, reference) first")
        columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(RowDivergences)}
        with measuring(model), torch.no_grad():
            for batch, base in zip(self.batches, self._kept, strict=True):
                logits, targets, rows = self._counted(model, batch)
                if isinstance(base, Projected):
                    base = base.to(targets.device)
                tokens = token_divergences(base, logits, targets)
                self._check_finite(model, tokens)
                n = len(batch["labels"])
                columns["tokens"].append(torch.bincount(rows.cpu(), minlength=n))
                for metric in METRICS:
                    values = getattr(tokens, metric).double().cpu()
                    columns[metric].append(torch.zeros(n, dtype=torch.float64).index_add_(0, rows.cpu(), values))
        return RowDivergences(**{name: torch.cat(parts) for name, parts in columns.items()})

    def _check_finite(self, model: nn.Module, tokens: TokenDivergences) -> None:
        bad = [side for side, nll in (("base", tokens.nll_base), ("model", tokens.nll_model)) if bool(nll.isnan().any())]
        if bad:
            check_finite("the weight", {n: bool(p.isfinite().all()) for n, p in parameters(model).items()})
            raise FloatingPointError(f"probe {self.name!r}: log-probabilities of the {' and the '.join(bad)} are not numbers")

    def rows(self, model: nn.Module, step: int) -> list[Row]:
        """Table rows: each metric's mean per token with its clustered standard error, and the perplexities :math:`e^{mean NLL}`."""
        measured = self.per_row(model)
        n = int(measured.tokens.sum())
        rows = [Row(step=step, metric=key, source=self.name, value=value, stderr=error, n_tokens=n)
                for metric, key in METRICS.items() for value, error in [measured.mean(metric)]]
        for side in ("base", "model"):
            nll, error = measured.mean(f"nll_{side}")
            rows.append(Row(step=step, metric=f"ppl/{side}", source=self.name, value=math.exp(min(nll, 700.0)),
                            stderr=math.exp(min(nll, 700.0)) * error, n_tokens=n))
        return rows

    def _counted(self, model: nn.Module, batch: Batch) -> tuple[Logits, Tensor, Tensor]:
        """Logits [N, V] that predict the counted tokens, those tokens [N], and their rows [N]."""
        moved = on_device(batch, device_of(model))
        row, column, targets = counted(moved["labels"])
        if self.forward is not logits_of:
            return logits_at(model, moved, self.forward, row, column), targets, row
        columns, place = column.unique(return_inverse=True)
        head = self._plain_head(model, moved)
        if head is None:
            return logits_of(model, moved, columns)[row, place], targets, row
        with headless(head):
            hidden = logits_of(model, moved, columns)[row, place]
        return Projected(hidden, head.weight, head.bias), targets, row

    def _plain_head(self, model: nn.Module, batch: Batch) -> nn.Linear | None:
        """The model's head, if its logits are exactly what that makes of the states before it (no cap, no scale); tried once a model."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if type(head) is not nn.Linear or hasattr(head.weight, "full_tensor"):  # adapted, quantised or sharded
            return None
        if model not in self._plain:
            one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
            last = torch.tensor([one["labels"].shape[1] - 1], device=head.weight.device)
            plain = logits_of(model, one, last)
            with headless(head):
                hidden = logits_of(model, one, last)
            self._plain[model] = hidden.shape[-1] == head.in_features and torch.allclose(head(hidden), plain, rtol=1e-4, atol=1e-5)
        return head if self._plain[model] else None


def _unchanging(model: nn.Module, weight: Tensor, reference: Reference | None) -> Tensor:
    """A head's weight as it is at the base, without a copy where the base's is at hand already."""
    name = next(n for n, p in parameters(model).items() if p is weight)
    if reference is not None and name in reference:
        return reference.get(name).to(weight.dtype)
    return weight.detach().cpu().clone() if weight.requires_grad else weight.detach()


# --- log-probabilities on disk ------------------------------------------------------------------------------------


def store_base(path: Path | str, model: nn.Module, batches: Sequence[Batch], *, forward: Forward = logits_of) -> None:
    """Write the model's log-probabilities [N, V] (float32) at the counted positions of ``batches``, for ``DivergenceProbe(base=path)``.

    4·N·V bytes in one safetensors file, which is written beside its place and renamed into it. Raises ``ValueError`` for batches as
    :class:`DivergenceProbe` does.

    >>> import tempfile
    >>> model, ids, forward = nn.Embedding(3, 3), torch.tensor([[0, 1, 2]]), lambda m, b: m(b["input_ids"])
    >>> batches = [{"input_ids": ids, "labels": ids}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store_base(Path(folder) / "base.safetensors", model, batches, forward=forward)
    ...     probe = DivergenceProbe("held-out", batches, base=Path(folder) / "base.safetensors", forward=forward)
    ...     probe.prepare(model)
    ...     round(probe.per_row(model).mean("kl_base_model")[0], 6)
    0.0
    """
    path, tensors = Path(path), {}
    if not batches:
        raise ValueError("batches is empty; give those of the probe")
    path.parent.mkdir(parents=True, exist_ok=True)
    with measuring(model), torch.no_grad():
        for i, batch in enumerate(batches):
            moved = on_device(batch, device_of(model))
            tensors[str(i)] = torch.log_softmax(at_least_fp32(_logits(model, moved, forward)), -1).float().cpu()
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"batches": _digest(batches)})


def _logits(model: nn.Module, batch: Batch, forward: Forward) -> Tensor:
    row, column, _ = counted(batch["labels"])
    return logits_at(model, batch, forward, row, column)


def _digest(batches: Sequence[Batch]) -> str:
    """What the stored positions depend on: token ids, masks and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in ("input_ids", "attention_mask", "labels"):
            if key in batch:
                digest.update(f"{key}{tuple(batch[key].shape)}".encode())
                digest.update(batch[key].cpu().long().numpy().tobytes())
    return digest.hexdigest()


def _opened(path: Path, batches: Sequence[Batch], name: str) -> Path | Reference:
    """The path itself, if it holds log-probabilities of these batches; the weights that it holds, if it holds some."""
    if not path.exists():
        raise FileNotFoundError(f"probe {name!r}: base {str(path)!r} is neither {NO_ADAPTERS!r} nor a path that is there; write log-probabilities "
                                "with drift.store_base, or give a model, a checkpoint folder or a Reference")
    if path.is_dir():
        return Reference.open(path)
    with safe_open(path, framework="pt") as opened:
        found = (opened.metadata() or {}).get("batches")
    if found is None:
        return Reference.open(path)
    if found != _digest(batches):
        raise ValueError(f"probe {name!r}: base {path} was stored for other batches (token ids, masks or labels differ)")
    return path


def _stored(path: Path, n: int) -> list[Tensor]:
    opened = safe_open(path, framework="pt")
    return [opened.get_tensor(str(i)) for i in range(n)]
