r"""What a fine-tuning method may change, stage by stage; every stage left as it is makes plain SFT.

A :class:`Method` is its options and nothing else, so that it can be written into a run's configuration. What it needs while it
trains lives in the :class:`Objective` that it makes for one run. The order of a run:

1. ``rows`` rewrites, adds or selects rows of text, before anything is encoded;
2. ``prepare`` freezes parameters or adds adapters;
3. ``encoded`` masks tokens or selects rows that are encoded, with the untrained model at hand;
4. ``objective`` gives the loss of a micro-batch, a penalty once a step, and what happens after each step and at the end.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sasft.chat import IGNORE, Chat, Encoded
from sasft.data import Row
from sasft.files import ensure_writable, write_json
from sasft.mixing import SELF, TASK
from sasft.writing import Writer

Batch = Mapping[str, Any]
"""A micro-batch of :func:`sasft.chat.collate`, or of :func:`sasft.packing.pack` (then ``rows`` [1, T] says to which row each token
belongs, and ``whole``, if it is there and true, that logits of all positions are to be computed, for instruments that must see
every token of a layer). With ``source`` (names) and ``index`` (numbers among their source), one entry a row, and ``weight`` ([B],
by what a row's loss is multiplied) where the plan has loss weights."""


@dataclass
class Costs:
    """What a method spends beyond SFT, in tokens.

    ``forward_tokens``: run through a model without a gradient (the base's predictions, scoring of rows); ``backward_tokens``: run
    through it forwards and backwards, besides SFT's own pass; ``generated_tokens``: sampled.

    ``self_data_tokens``: sampled before the run, for the self rows that it was given (:func:`sasft.selfdialogue.generated_tokens`):
    all rows of the file, or of a mix all that it holds, if the steps or the method read any; else 0.
    Rivals that write as they train spend ``generated_tokens`` in their place: at equal cost, the sums of the two are equal.
    """

    forward_tokens: int = 0
    backward_tokens: int = 0
    generated_tokens: int = 0
    self_data_tokens: int = 0

    def describe(self) -> dict[str, int]:
        """The counts as a plain dictionary."""
        return asdict(self)


@dataclass(kw_only=True)
class Workshop:
    """What methods that make rows need.

    ``writer``: the model to be trained as it writes, or None where nothing is to be generated; ``folder``: for files in the
    making, from which a stopped run goes on; ``seed``: of all draws; ``costs``: to be added to.
    """

    chat: Chat
    folder: Path
    writer: Writer | None = None
    seed: int = 0
    costs: Costs = field(default_factory=Costs)

    def report(self, method: str, said: str, **found: Any) -> None:
        """Say on standard error what a method has done, and write what there is to know of it to ``<folder>/<method>.json``."""
        ensure_writable(self.folder)
        write_json(self.folder / f"{method}.json", found)
        print(f"{method}: {said}", file=sys.stderr)


class Objective:
    r"""What one training minimises: :math:`\frac1D\sum_{\text{rows}}\ell+\mathrm{penalty}`, D being the run's constant.

    As it stands, it is plain SFT.

    How a step is cut into micro-batches changes nothing: ``loss`` is a sum over the micro-batch's counted tokens, and ``penalty``
    is asked for once an optimiser step. A resumed training makes its objective anew from the untrained model, so whatever an
    objective draws must follow from its seed and the step alone.

    ``one_pass``: with gradients the model runs once a micro-batch, as :class:`drift.SourceGradients` needs it. ``in_step``: all
    processes run it equally often, whatever rows they have, and touch its weights as shards, so that these may be sharded
    (FSDP2). ``inside``: it reaches into the model's layers while they run, row by row, so that rows can't be packed nor layers be run anew
    in the backward pass.
    """

    one_pass = False
    in_step = False
    inside = False

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = Costs() if costs is None else costs

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over the batch's counted tokens (times their rows' ``weight``), in nats; the trainer divides it."""
        return response_loss(model, batch)

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        """What is added to the divided loss of optimiser step ``step`` (from 1), as it is."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called when optimiser step ``step`` (from 1) is done."""

    def finish(self, model: nn.Module) -> None:
        """Called once, when training is over."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Plain SFT: cross-entropy of the counted tokens of the rows that the mix reads (without self rows: task-only)."""

    name: ClassVar[str] = "sft"
    paper: ClassVar[str] = ""
    writes: ClassVar[bool] = False  # whether ``rows`` needs the workshop's writer

    def files(self) -> Mapping[str, str]:
        """Further sources of rows to be read, by name, each as :class:`sasft.sources.Source` takes it."""
        return {}

    def shares(self, lam: float) -> dict[str, float]:
        """Share of each source in the rows read, ``lam`` being that of all but the task's."""
        return {TASK: 1 - lam, SELF: lam}

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        """The rows to train on, by source. Those that ``shares`` does not name are companions for later stages."""
        return {source: list(rows) for source, rows in sources.items()}

    def prepare(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """The model with what is to be trained on it."""
        return model

    def encoded(self, rows: Mapping[str, Sequence[Encoded]], model: nn.Module, pad_id: int, costs: Costs,
                folder: Path | None = None) -> dict[str, list[Encoded]]:
        """The encoded rows, as they enter the mix and the loss; ``model`` is untrained still.

        ``folder``: for what takes long, so that a stopped run finds it there; without one, nothing is kept.
        """
        return {source: list(found) for source, found in rows.items()}

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        """The state of one training; None stands for plain SFT. ``model`` is untrained still."""
        return None

    def reads(self) -> Sequence[str]:
        """Sources that it needs also where no step reads them."""
        return ()

    def learning_rate(self, lr: float) -> float:
        """The peak learning rate, from the one that was asked for."""
        return lr

    def describe(self) -> dict[str, Any]:
        """Name and options, for provenance."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Scored:
    """The N counted tokens of a batch: ``logits`` [N, V] that predict them, ``labels`` [N], ``rows`` [N] (row within the batch),
    and ``weights`` [N] where the plan has loss weights."""

    logits: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor | None

    def nll(self) -> Tensor:
        """The tokens' cross-entropies [N], in nats, in fp32."""
        return nn.functional.cross_entropy(self.logits.float(), self.labels, reduction="none")

    def total(self, losses: Tensor) -> Tensor:
        """The sum of the tokens' losses [N], times their weights."""
        return losses.sum() if self.weights is None else (losses * self.weights).sum()


def score(model: nn.Module, batch: Batch) -> Scored:
    """Run ``model`` on ``batch``; vocabulary logits are computed for the response columns only (of packed rows: for N tokens)."""
    if "rows" in batch:
        return _score_packed(model, batch)
    start = batch["response_start"]
    labels = batch["labels"][:, start:]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
        use_cache=False, logits_to_keep=labels.shape[1] + 1,
    ).logits[:, :-1]
    counted = labels != IGNORE
    rows = counted.nonzero()[:, 0]
    return Scored(logits[counted], labels[counted], rows, batch["weight"][rows] if "weight" in batch else None)


def _score_packed(model: nn.Module, batch: Batch) -> Scored:
    counted = (batch["labels"][0] != IGNORE).nonzero().squeeze(-1)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}  # no mask: see pack
    if batch.get("whole"):
        logits = model(**inputs).logits[0, counted - 1]
    else:
        logits = model(**inputs, logits_to_keep=counted - 1).logits[0]
    rows = batch["rows"][0, counted]
    return Scored(logits, batch["labels"][0, counted], rows, batch["weight"][rows] if "weight" in batch else None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, for a forward pass that not every process makes: DDP's own begins with all processes talking."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    r"""Cross-entropy summed over the labelled tokens of a batch, in nats, accumulated in fp32.

    :math:`\sum_i w_i \sum_{t \in M_i} -\log p_\theta(y_{i,t} \mid x_i, y_{i,<t})`. ``batch`` comes from
    :func:`sasft.chat.collate`; vocabulary logits are computed for the response columns only.
    """
    scored = score(model, batch)
    if scored.weights is None:
        return nn.functional.cross_entropy(scored.logits.float(), scored.labels, reduction="sum")
    return scored.total(scored.nll())


def of_sources(batch: Batch, names: Sequence[str]) -> Tensor:
    """Which rows of a batch come from the sources ``names``: [B], boolean, on the CPU.

    >>> of_sources({"source": ["task", "self", "task"]}, ["self"]).tolist()
    [False, True, False]
    """
    return torch.tensor([source in names for source in batch["source"]])
