"""KL divergence to the base, on self rows, on task rows, and on rows that the base writes while the model trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from drift.forward import on_device
from sasft.chat import Encoded, collate
from sasft.errors import UsageError
from sasft.methods.answers import answer_rows, end_of_turn
from sasft.methods.base import Batch, Costs, Method, Objective, score
from sasft.methods.checks import check_counts, check_weights, need_rows, source_names
from sasft.methods.frozen_base import FrozenBase
from sasft.methods.tokens import TokenObjective, forward_kl
from sasft.mixing import SELF, TASK
from sasft.sampling import row_seed
from sasft.settings import option


class _Kl(TokenObjective):
    def __init__(self, costs: Costs, on: Sequence[str], base: FrozenBase, of_nll: float, of_kl: float) -> None:
        super().__init__(costs, on, base)
        self.of_nll, self.of_kl = of_nll, of_kl

    def tokens(self, batch: Batch, rows: Tensor, logits: Tensor, labels: Tensor, nll: Tensor, base: Tensor | None) -> Tensor:
        return self.of_nll * nll + self.of_kl * forward_kl(base, logits)


@dataclass(frozen=True, kw_only=True)
class KlSelf(Method):
    r"""KL to the base in place of cross-entropy on self rows.

    .. math:: (1-w)\,CE_t+w\,KL(p_{\theta_0}(\cdot|t)\Vert p_\theta(\cdot|t))

    The KL is forward (base to model) and runs over the whole vocabulary at the prefixes of the rows. On rows that θ₀ has sampled
    at T = 1 from its whole distribution both terms have one expected gradient (docs/theory.md, F1 and F3), and the KL's has less
    variance: at θ₀ it is 0 on every row. How strong the anchor is, the mix says. Source: ``kl_pre`` of arXiv 2605.26097, with
    stored rows; the convex combination is our choice. Cost: a forward pass of the base on self rows.
    """

    name: ClassVar[str] = "kl-self"
    paper: ClassVar[str] = "arXiv 2605.26097 (kl_pre)"

    weight: float = option(1.0, "share of the KL in the loss of self rows, in [0, 1]; 0 is SA-SFT")
    on: str = option(SELF, "sources with the KL, with commas between them")

    def __post_init__(self) -> None:
        check_weights(0, 1, weight=self.weight)
        source_names(self.on)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        if self.weight == 0:
            return None
        need_rows(self.name, rows, self.on)
        return _Kl(costs, source_names(self.on), FrozenBase(model), 1 - self.weight, self.weight)


@dataclass(frozen=True, kw_only=True)
class KlTask(Method):
    r"""KL to the base on task rows, added: :math:`CE_t+w\,KL(p_{\theta_0}(\cdot|t)\Vert p_\theta(\cdot|t))`.

    Forward, over the whole vocabulary, at the prefixes of the task's own answers. Source: ``kl_dwn`` of arXiv 2605.26097, whose
    mean over T positions counts T − 1; here both terms are summed over the same tokens. Cost: a forward pass of the base on them.
    """

    name: ClassVar[str] = "kl-task"
    paper: ClassVar[str] = "arXiv 2605.26097 (kl_dwn)"

    weight: float = option(1.0, "weight of the KL beside the cross-entropy; 0 is SFT")
    on: str = option(TASK, "sources with the KL, with commas between them")

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        source_names(self.on)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        if self.weight == 0:
            return None
        need_rows(self.name, rows, self.on)
        return _Kl(costs, source_names(self.on), FrozenBase(model), 1.0, self.weight)


@dataclass(frozen=True, kw_only=True)
class OnlineReplay(Method):
    r"""Replay that the base writes while the model trains: :math:`L=L_{SFT}+c\,R`, R a mean over the replayed tokens of a step.

    ``kl``: :math:`R=\frac1N\sum_tKL(p_{\theta_0}(\cdot|t)\Vert p_\theta(\cdot|t))` (``kl_pre``); ``ntp``:
    :math:`R=\frac1N\sum_tCE_t` (``ntp_pre``).
    Every step answers some prompts of the sources ``prompts`` anew, sampled from the frozen θ₀ at T = 1 without truncation, where
    the two have one expected gradient. Source: arXiv 2605.26097 (c = 1), which continues a BOS token; answering prompts through
    the chat template is our choice. A step's rows follow from the seed and the step alone; those of ``buffer`` steps are written
    together. Cost: ``rows_per_step`` answers a step, a forward (``kl``) and a forward and backward pass on them.
    """

    name: ClassVar[str] = "online-replay"
    paper: ClassVar[str] = "arXiv 2605.26097"

    weight: float = option(1.0, "c, the weight of the mean over replayed tokens beside that over the step's; 0 is SFT")
    loss: Literal["kl", "ntp"] = option("kl", "kl: divergence to the base; ntp: cross-entropy of what the base wrote")
    prompts: str = option(SELF, "sources whose prompts are answered, with commas between them")
    rows_per_step: int = option(8, "answers a step")
    max_new_tokens: int = option(128, "length cap of an answer; cut answers are kept, without an end-of-turn token")
    buffer: int = option(16, "steps whose answers are sampled together")
    seed: int = option(0, "seed of prompts and answers")

    def __post_init__(self) -> None:
        check_weights(weight=self.weight)
        if self.loss not in ("kl", "ntp"):
            raise UsageError(f"loss must be kl or ntp, got {self.loss!r}")
        check_counts(rows_per_step=self.rows_per_step, max_new_tokens=self.max_new_tokens, buffer=self.buffer)

    def reads(self) -> Sequence[str]:
        return source_names(self.prompts) if self.weight else ()

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        if self.weight == 0:
            return None
        return _Replay(self, FrozenBase(model), need_rows(self.name, rows, self.prompts), pad_id, costs)


class _Replay(Objective):
    in_step = True

    def __init__(self, method: OnlineReplay, base: FrozenBase, prompts: Sequence[Encoded], pad_id: int, costs: Costs) -> None:
        super().__init__(costs)
        self.method, self.base, self.pad_id = method, base, pad_id
        self.prompts, self.stop_id = prompts, end_of_turn(prompts)
        self._written: tuple[int, list[Encoded]] = (-1, [])

    def replayed(self, step: int) -> list[Encoded]:
        """The rows of optimiser step ``step`` (from 1)."""
        method, (group, place) = self.method, divmod(step - 1, self.method.buffer)
        if self._written[0] != group:
            n = method.rows_per_step * method.buffer
            asked = [self.prompts[i] for i in np.random.default_rng([method.seed, group]).integers(len(self.prompts), size=n)]
            with self.base.in_place() as model:
                rows = answer_rows(model, asked, [row_seed(method.seed, "replay", group, k) for k in range(n)], costs=self.costs,
                                   max_new_tokens=method.max_new_tokens, stop_id=self.stop_id, pad_id=self.pad_id)
            self._written = group, rows
        return self._written[1][place * method.rows_per_step : (place + 1) * method.rows_per_step]

    def penalty(self, model: nn.Module, step: int) -> Tensor:
        batch = on_device(collate(self.replayed(step), self.pad_id), next(model.parameters()).device)
        self.costs.backward_tokens += int(batch["attention_mask"].sum())
        scored = score(model, batch)
        if self.method.loss == "ntp":
            return self.method.weight * nn.functional.cross_entropy(scored.logits.float(), scored.labels)
        return self.method.weight * forward_kl(self.base.score(batch, self.costs).logits, scored.logits).mean()
