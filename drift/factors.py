r"""Per-row gradients as products of layer inputs and output gradients, and their Gram matrices.

A parameter's gradient on a row is a sum over the row's tokens of an outer product :math:`e_t a_t^\top`. The pieces are
caught by forward hooks; torch.autograd then gives the output gradients alone, so no weight gradient is computed.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drift.names import canonical_name, tied

_BLOCK = 2048  # tokens of one side of a token-by-token product
_FORMED = 2**24  # numbers of per-row gradients in memory at once


@dataclass(frozen=True)
class Outer:
    """One use of a weight: per token a left vector (or the index of a one-hot), a right vector, and the token's row."""

    left: Tensor  # [N, m], or [N] int64 for one-hots
    right: Tensor  # [N, n]
    rows: Tensor  # [N] int64

    @property
    def one_hot(self) -> bool:
        return self.left.dim() == 1

    def part(self, tokens: slice | Tensor) -> "Outer":
        return Outer(self.left[tokens], self.right[tokens], self.rows[tokens])


@dataclass(frozen=True)
class Vectors:
    """One use of a vector parameter: its gradient on every row, [R, n]."""

    values: Tensor


def outer_gram(uses: list[Outer], n_rows: int, *, form: bool | None = None) -> Tensor:
    r"""Gram matrix [R, R] (float64) of per-row gradients :math:`\sum_{c}\sum_{t\in i}\ell_{c,t}r_{c,t}^\top` over all uses c of a weight.

    ``form``: form the per-row gradients (True) or use token-by-token products (False); None takes the cheaper.
    """
    if form is None:
        form = len(uses) == 1 and not uses[0].one_hot and _forming_is_cheaper(uses[0], n_rows)
    return _formed(uses[0], n_rows) if form else _token_products(uses, n_rows)


def _forming_is_cheaper(use: Outer, n_rows: int) -> bool:
    tokens, (m, n) = len(use.rows), (use.left.shape[1], use.right.shape[1])
    return (tokens + n_rows**2) * m * n < tokens**2 * (m + n)


def _token_products(uses: list[Outer], n_rows: int) -> Tensor:
    gram = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=uses[0].right.device)
    blocks = [use.part(slice(i, i + _BLOCK)) for use in uses for i in range(0, len(use.rows), _BLOCK)]
    for x, first in enumerate(blocks):
        for second in blocks[x:]:
            products = (first.right @ second.right.T) * _left_products(first, second)
            part = torch.zeros(n_rows, len(second.rows), dtype=products.dtype, device=products.device)
            part.index_add_(0, first.rows, products)
            joined = torch.zeros_like(gram).index_add_(1, second.rows, part.double())
            gram += joined if first is second else joined + joined.T
    return gram


def _left_products(first: Outer, second: Outer) -> Tensor:
    if first.one_hot and second.one_hot:
        return (first.left.unsqueeze(1) == second.left.unsqueeze(0)).to(first.right.dtype)
    if second.one_hot:
        return first.left[:, second.left]
    if first.one_hot:
        return second.left[:, first.left].T
    return first.left @ second.left.T


def _formed(use: Outer, n_rows: int) -> Tensor:
    m, n = use.left.shape[1], use.right.shape[1]
    gram = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=use.right.device)
    members = [(use.rows == row).nonzero().squeeze(1) for row in range(n_rows)]
    rights = [use.right[tokens] for tokens in members]
    step = max(1, _FORMED // (n_rows * n))
    for i in range(0, m, step):
        gradients = torch.stack([use.left[tokens, i : i + step].T @ right for tokens, right in zip(members, rights, strict=True)])
        flat = gradients.reshape(n_rows, -1)
        gram += (flat @ flat.T).double()
    return gram


class Capture:
    """Catches what the layers of a model see during one forward pass, and turns it into Gram matrices.

    ``rows`` [B, T]: the row of every token. Hooks are removed on leaving the block, also after an exception.
    """

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.n_rows = int(rows.max()) + 1
        self._calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []  # module path, module, input, output
        self._handles: list[Any] = []
        self._alias = tied(model)

    def __enter__(self) -> Self:
        for path, module in self.model.named_modules():
            if _kind(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                self._calls.append((path, module, inputs[0].detach(), output))
        return hook

    def grams(self, loss: Tensor) -> dict[str, NDArray[np.float64]]:
        """Gram matrices by canonical parameter name; a parameter that took no part in the loss has zeros."""
        outputs = [output for *_, output in self._calls]
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
        uses: dict[str, list[Outer | Vectors]] = {}
        for (path, module, x, output), e in zip(self._calls, gradients, strict=True):
            e = torch.zeros_like(output) if e is None else e
            rows = self._token_rows(path, e)
            dtype = torch.float64 if e.dtype == torch.float64 else torch.float32
            for name, use in _uses(module, x, e.to(dtype), rows, self.n_rows):
                canonical = canonical_name(f"{path}.{name}" if path else name)
                uses.setdefault(self._alias.get(canonical, canonical), []).append(use)
        self._calls.clear()
        return {name: self._gram(name, found) for name, found in uses.items()}

    def _gram(self, name: str, uses: list[Outer | Vectors]) -> NDArray[np.float64]:
        if isinstance(uses[0], Vectors):
            total = sum(use.values for use in uses).double()
            return (total @ total.T).cpu().numpy()
        return outer_gram(uses, self.n_rows).cpu().numpy()

    def _token_rows(self, path: str, e: Tensor) -> Tensor:
        lead = e.shape[:-1]
        b, t = self.rows.shape
        if lead == (b, t) or lead == (b * t,):
            return self.rows.reshape(-1)
        one_row_each = bool((self.rows == self.rows[:, :1]).all())
        if lead[0] == b and one_row_each:  # some of the positions only, or a further dimension
            return self.rows[:, 0].repeat_interleave(lead.numel() // b)
        raise ValueError(f"layer {path} has an output of shape {tuple(e.shape)} for a batch of [{b}, {t}] tokens, so it is not "
                         "known which row each of its vectors belongs to")


def _kind(module: nn.Module) -> str | None:
    """How a module uses its parameters, None if that is not known here."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding" if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse else None
    if isinstance(module, nn.LayerNorm):
        return "layer_norm" if len(module.normalized_shape) == 1 else None
    name = type(module).__name__
    if name == "Conv1D" and module.weight.dim() == 2:  # transformers' linear layer with a transposed weight
        return "linear"
    weight = module._parameters.get("weight")
    if name.endswith("RMSNorm") and weight is not None and weight.dim() == 1 and len(module._parameters) == 1:
        return "rms_norm"
    return None


def _uses(module: nn.Module, x: Tensor, e: Tensor, rows: Tensor, n_rows: int):
    """(parameter name, use) for every trainable parameter of one call; ``e`` is the gradient of the module's output."""
    kind, flat = _kind(module), e.reshape(-1, e.shape[-1])
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        if kind == "linear":
            # Tokens without gradient (padding, uncounted positions at the head) add nothing and cost as much as others.
            yield "weight", Outer(flat, x.reshape(-1, x.shape[-1]).to(e.dtype), rows).part(flat.any(dim=1))
        elif kind == "embedding":
            ids = x.reshape(-1)
            counted = flat.any(dim=1) if module.padding_idx is None else flat.any(dim=1) & (ids != module.padding_idx)
            yield "weight", Outer(ids, flat, rows).part(counted)
        else:
            yield "weight", _per_row(flat * _normalised(module, kind, x).reshape(flat.shape).to(e.dtype), rows, n_rows)
    if bias is not None and bias.requires_grad:
        yield "bias", _per_row(flat, rows, n_rows)


def _per_row(values: Tensor, rows: Tensor, n_rows: int) -> Vectors:
    return Vectors(values.new_zeros(n_rows, values.shape[1]).index_add_(0, rows, values))


def _normalised(module: nn.Module, kind: str, x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "layer_norm":
        return nn.functional.layer_norm(wide, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
