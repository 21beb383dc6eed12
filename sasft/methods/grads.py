"""Rows chosen by how strongly they pull at the embeddings and at the head."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drift.forward import on_device
from drift.modes import measuring
from drift.numerics import at_least_fp32
from sasft.chat import Encoded, collate
from sasft.errors import UsageError
from sasft.files import ensure_writable, write_json
from sasft.methods.base import Batch, Costs, Method, response_loss, score
from sasft.methods.checks import check_counts, check_weights, need_rows
from sasft.mixing import TASK
from sasft.processes import first_goes_first
from sasft.settings import option

KEEP = ("dense", "large", "random")


@dataclass(frozen=True, kw_only=True)
class Grads(Method):
    r"""GrADS: SFT on the task rows whose gradients, after an epoch of SFT on all of them, are typical (or large).

    .. math:: s_i=\sqrt{\lVert\nabla_E\ell_i\rVert_F^2+\lVert\nabla_W\ell_i\rVert_F^2},\qquad\ell_i=\frac1{T_i}\sum_tCE_t

    with E the embeddings and W the head, each in its own role where they are one tensor. Source: arXiv 2511.08620, which fits a
    kernel density to a signal made of these gradients and selects by magnitude and density; it does not say which norm, which
    bandwidth or which regions. Our choices: s at the end of the epoch; a Gaussian kernel of Scott's bandwidth on log s;
    ``keep=dense`` takes the rows of highest density, ``large`` those of largest s, and ``random`` as many at random, the control
    that the other two need. Training then starts from the base, for as many steps as any other method's. The epoch is AdamW at a
    constant ``lr``, ``rows_per_step`` rows a step, mean over a step's tokens, gradients clipped to norm 1. s falls with a row's
    length, so it is in part a choice by length. ``share=1`` is SFT.

    Cost: forward and backward passes on all task rows, twice (``random``: none). Memory: a second model with its optimiser, until
    the rows are chosen. ``grads.json`` has s of every row.
    """

    name: ClassVar[str] = "grads"
    paper: ClassVar[str] = "arXiv 2511.08620"

    share: float = option(0.5, "share of the task rows that is kept, in (0, 1]; 1 is SFT")
    keep: Literal["dense", "large", "random"] = option("dense", f"which rows are kept: {', '.join(KEEP)}")
    lr: float = option(2e-5, "learning rate of the epoch before the choice")
    rows_per_step: int = option(16, "rows a step of that epoch")
    seed: int = option(0, "seed of that epoch's order, and of the random rows")

    def __post_init__(self) -> None:
        check_weights(0, 1, share=self.share)
        if self.share == 0:
            raise UsageError("share must be above 0: at 0 no row is left to train on")
        if self.keep not in KEEP:
            raise UsageError(f"keep must be one of {', '.join(KEEP)}, got {self.keep!r}")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr must be a number > 0, got {self.lr}")
        check_counts(rows_per_step=self.rows_per_step)

    def encoded(self, rows: Mapping[str, Sequence[Encoded]], model: nn.Module, pad_id: int, costs: Costs,
                folder: Path | None = None) -> dict[str, list[Encoded]]:
        found = super().encoded(rows, model, pad_id, costs)
        need_rows(self.name, rows, TASK)
        task = found[TASK]
        n = max(1, round(self.share * len(task)))
        if n < len(task):
            if self.keep == "random":
                order = np.random.default_rng(self.seed).permutation(len(task))
            else:
                norms = self._norms(task, model, pad_id, costs, folder).clip(np.finfo(np.float64).tiny)  # 0: known by heart
                order = np.argsort(-(norms if self.keep == "large" else density(np.log(norms))), kind="stable")
            found[TASK] = [task[i] for i in sorted(order[:n].tolist())]
        return found

    def _norms(self, task: Sequence[Encoded], model: nn.Module, pad_id: int, costs: Costs,
               folder: Path | None) -> NDArray[np.float64]:
        """s of every row [N], from the folder if it is there."""
        costs.backward_tokens += 2 * sum(len(row.input_ids) for row in task)
        file = None if folder is None else folder / f"{self.name}.json"
        with first_goes_first():  # the others read what it has found: rounding may differ, what they train on must not
            if file is not None and file.exists():
                return np.array(json.loads(file.read_text(encoding="utf-8"))["norms"])
            trained = copy.deepcopy(model)
            _one_epoch(self, trained, task, pad_id)
            norms = _row_norms(trained, task, pad_id)
            if file is not None:
                ensure_writable(folder)
                write_json(file, {"norms": norms.tolist()})
            return norms


def density(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel density estimate of the values [N] at each of them: Gaussian kernels, Scott's bandwidth; 1 where all are equal.

    >>> int(density(np.array([0.0, 0.1, 5.0])).argmin())
    2
    """
    from scipy.stats import gaussian_kde  # takes a second to import

    return gaussian_kde(values, "scott")(values) if np.ptp(values) > 0 else np.ones_like(values)


def _one_epoch(method: Grads, model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> None:
    order = np.random.default_rng(method.seed).permutation(len(rows))
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=method.lr, weight_decay=0.0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(method.seed)  # of dropout, where adapters have it
        model.train()
        for i in range(0, len(rows), method.rows_per_step):
            step = [rows[k] for k in order[i : i + method.rows_per_step]]
            batch = on_device(collate(step, pad_id), device)
            (response_loss(model, batch) / sum(row.loss_tokens for row in step)).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _row_norms(model: nn.Module, rows: Sequence[Encoded], pad_id: int, together: int = 16) -> NDArray[np.float64]:
    """s of every row [N]; rows of similar length share a batch."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found = np.zeros(len(rows))
    for i in range(0, len(order), together):
        numbers = order[i : i + together]
        batch = on_device(collate([rows[k] for k in numbers], pad_id), device)
        found[numbers] = torch.stack(squared_norms(model, batch)).sum(0).sqrt().cpu().numpy()
    return found


def squared_norms(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    r""":math:`\lVert\nabla_E\ell_i\rVert_F^2` and :math:`\lVert\nabla_W\ell_i\rVert_F^2` of every row of a batch, [B] each.

    From one forward and backward pass that forms neither gradient: with :math:`a_t` and :math:`\delta_t` the gradients of ℓ at
    the head's output and at the embeddings' output, and h the states before the head,

    .. math:: \lVert\nabla_W\ell\rVert_F^2=\sum_{t,u}(a_t^\top a_u)(h_t^\top h_u),\qquad
       \lVert\nabla_E\ell\rVert_F^2=\sum_v\Big\lVert\sum_{t:x_t=v}\delta_t\Big\rVert^2.

    Weights need not be trainable, and may be tied: each role has a norm of its own. In the model's own precision, in eval mode;
    summed in float64.
    """
    seen: dict[str, Any] = {}

    def embedded(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen["embedded"] = output.detach().requires_grad_()
        return seen["embedded"]

    def predicted(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["states"], seen["logits"] = args[0].detach(), output

    hooks = [model.get_input_embeddings().register_forward_hook(embedded),
             model.get_output_embeddings().register_forward_hook(predicted)]
    ids = batch["input_ids"]
    try:
        with measuring(model), torch.enable_grad(), torch.autocast(ids.device.type, enabled=False):
            scored = score(model, batch)
            nll, tokens = scored.nll(), torch.bincount(scored.rows, minlength=len(ids))
            d, a = torch.autograd.grad((nll / tokens[scored.rows]).sum(), [seen["embedded"], seen["logits"]])
    finally:
        for hook in hooks:
            hook.remove()
    a, states, d = (at_least_fp32(x) for x in (a, seen["states"], d))
    of_head = ((a @ a.mT).double() * (states @ states.mT)).sum((1, 2))
    n = int(ids.max()) + 1
    keys, where = (ids + n * torch.arange(len(ids), device=ids.device).unsqueeze(1)).unique(return_inverse=True)
    summed = d.new_zeros(len(keys), d.shape[-1]).index_add(0, where.flatten(), d.flatten(0, 1))
    of_embeddings = summed.new_zeros(len(ids)).double().index_add(0, keys // n, summed.double().square().sum(1))
    return of_embeddings, of_head.clamp(min=0)
