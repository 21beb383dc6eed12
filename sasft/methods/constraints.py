"""Methods that change what is trained, how fast, or what is kept of it: adapters, frozen layers, small steps, interpolation."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import nn

from drift.adapters import adapters, has_adapters
from drift.names import canonical_name, layer_index, parameters, trainable
from sasft.chat import Encoded
from sasft.data import Row
from sasft.errors import UsageError
from sasft.methods.base import Costs, Method, Objective, Workshop
from sasft.methods.checks import check_weights
from sasft.mixing import SELF
from sasft.models import LoraSettings, with_adapters
from sasft.processes import cut_as, own_part
from sasft.sampling import EXACT, PAPER
from sasft.settings import option


@dataclass(frozen=True, kw_only=True)
class SaSft(Method):
    """SA-SFT: ordinary SFT on task rows and self-dialogues; the mix says in which ratio.

    Source: arXiv 2602.20162, whose self-dialogues are sampled at T = 0.7, top-p 0.9 (``paper``). At T = 1, top-p 1 (``exact``),
    with the loss summed over tokens and cut answers kept, self rows exert no force at the base (docs/theory.md, F1).
    """

    name: ClassVar[str] = "sa-sft"
    paper: ClassVar[str] = "arXiv 2602.20162"

    sampler: Literal["any", "exact", "paper"] = option("any", "sampler that self rows must come from, and say so")

    def __post_init__(self) -> None:
        if self.sampler not in ("any", "exact", "paper"):
            raise UsageError(f"sampler must be any, exact or paper, got {self.sampler!r}")

    def rows(self, sources: Mapping[str, Sequence[Row]], workshop: Workshop) -> dict[str, list[Row]]:
        if not sources.get(SELF):
            raise UsageError("sa-sft mixes in self rows, but there are none; write some, or take the method sft")
        if self.sampler != "any":
            wanted = EXACT if self.sampler == "exact" else PAPER
            for row in sources[SELF]:
                said = row.meta.get("sampler") or {}
                if (said.get("temperature"), said.get("top_p")) != (wanted.temperature, wanted.top_p):
                    raise UsageError(f"self row {row.id} was sampled with {said or 'a sampler that it does not name'}, and "
                                     f"sampler={self.sampler} needs temperature {wanted.temperature} and top_p {wanted.top_p}; "
                                     "write the rows anew, or set sampler=any")
        return super().rows(sources, workshop)


@dataclass(frozen=True, kw_only=True)
class LowLearningRate(Method):
    """SFT with small steps: the learning rate times ``factor``. The baseline that any method has to beat; factor 1 is SFT."""

    name: ClassVar[str] = "low-lr"

    factor: float = option(0.1, "by what the learning rate is multiplied, > 0")

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise UsageError(f"factor must be a number > 0, got {self.factor}")

    def learning_rate(self, lr: float) -> float:
        return lr * self.factor


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    r"""SFT of low-rank adapters, :math:`W=W_0+\frac\alpha rBA`, first :math:`B=0`. Source: arXiv 2106.09685.

    Every other method takes adapters as well: they train whatever is trainable. Learning rates want to be about ten times those
    of all weights.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv 2106.09685"

    r: int = option(16, "rank")
    alpha: float = option(16.0, "scale: updates are multiplied by alpha / r")
    dropout: float = option(0.0, "dropout of the adapters' inputs")
    target_modules: str = option("all-linear", "layers with an adapter, as PEFT takes them: all-linear, or a regular expression")

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> LoraSettings:
        """The adapters as :func:`sasft.models.load_model` takes them."""
        return LoraSettings(r=self.r, alpha=self.alpha, dropout=self.dropout, target_modules=self.target_modules)

    def prepare(self, model: nn.Module, seed: int = 0) -> nn.Module:
        if has_adapters(model):
            raise UsageError("the model has adapters already, and the method lora would add a second set; set lora_rank to 0, "
                             "or take another method")
        device = next(model.parameters()).device
        return with_adapters(model, self.settings(), seed).to(device).eval()


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """SFT with some layers fixed: they get no gradient, so that no optimiser moves them.

    Source: arXiv 2501.13453 (embeddings and the bottom layers). Layers are named by their numbers, never by parts of names (the
    released code takes ``layers.1`` for the layers 10 to 19 too); other parameters by exact name or pattern. Where embedding and
    head are tied, freezing one freezes the other. Adapters within a frozen layer are frozen with it.
    """

    name: ClassVar[str] = "freeze"
    paper: ClassVar[str] = "arXiv 2501.13453"

    layers: str = option("", "numbers of layers to be frozen, counted from 0: 0-5,7")
    parameters: str = option("", "names of parameters to be frozen, with commas between them; * for any characters: lm_head.*")
    embeddings: bool = option(False, "freeze the input embeddings")

    def __post_init__(self) -> None:
        if not (self.layers or self.parameters or self.embeddings):
            raise UsageError("nothing is to be frozen: give layers (as 0-5), parameters (names or patterns) or embeddings=true")
        numbers(self.layers)

    def prepare(self, model: nn.Module, seed: int = 0) -> nn.Module:
        found = parameters(model)
        having = {index for name in found if (index := layer_index(name)) is not None}
        wanted = numbers(self.layers)
        if absent := wanted - having:
            raise UsageError(f"layers names {min(absent)}, but the model's layers are {min(having, default=0)} to "
                             f"{max(having, default=0)}")
        frozen = {name for name in found if layer_index(name) in wanted}
        for pattern in filter(None, (part.strip() for part in self.parameters.split(","))):
            matched = {name for name in found if fnmatchcase(name, pattern)}
            if not matched:
                raise UsageError(f"the pattern {pattern!r} in parameters matches none of the model's {len(found)} parameters, "
                                 f"such as {', '.join(list(found)[:3])}; names are compared whole")
            frozen |= matched
        if self.embeddings:
            inside = {canonical_name(n) for n, module in model.named_modules() if module is model.get_input_embeddings()}
            frozen |= {name for name in found if name.rpartition(".")[0] in inside}
        before = trainable(model)
        if not before.keys() - frozen:
            raise UsageError("nothing would be left to train: every trainable parameter is to be frozen")
        if not before.keys() & frozen:
            raise UsageError("none of what is to be frozen would be trained anyway (adapters are, weights below them are not)")
        for name in frozen:
            found[name].requires_grad_(False)
        left = trainable(model)
        print(f"frozen: {len(before) - len(left)} of {len(before)} parameters, {sum(p.numel() for p in left.values())} of "
              f"{sum(p.numel() for p in before.values())} weights are trained", file=sys.stderr)
        return model


def numbers(text: str) -> set[int]:
    """``0-2,5`` as numbers; raises :class:`UsageError` for anything else.

    >>> sorted(numbers("0-2,5"))
    [0, 1, 2, 5]
    """
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"layers are given as numbers and ranges, as 0-5,7; got {part!r}")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


@dataclass(frozen=True, kw_only=True)
class WiseFt(Method):
    r"""WiSE-FT: after training, :math:`\theta_\alpha=(1-\alpha)\theta_0+\alpha\theta_1`. Source: arXiv 2109.01903 (α = 0.5).

    With LoRA the product is scaled, :math:`\alpha\,sBA` (interpolating A and B apart would give α²). Tied weights move once;
    buffers do not. α = 1 is SFT. Choose α on validation data only. Memory: a copy of the trained weights, on the CPU.
    """

    name: ClassVar[str] = "wise-ft"
    paper: ClassVar[str] = "arXiv 2109.01903"

    alpha: float = option(0.5, "share of the fine-tuned weights, in [0, 1]; 1 is SFT, 0 the base")

    def __post_init__(self) -> None:
        check_weights(0, 1, alpha=self.alpha)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        return None if self.alpha == 1 else _WiseFt(costs, model, self.alpha)


class _WiseFt(Objective):
    in_step = True

    def __init__(self, costs: Costs, model: nn.Module, alpha: float) -> None:
        super().__init__(costs)
        self.alpha = alpha
        found = list(adapters(model))
        if moved := [a.base for a in found if bool(a.a.any()) and bool(a.b.any())]:
            raise UsageError(f"wise-ft interpolates adapters that start at B = 0, but that of {moved[0]} has an update already; "
                             "merge it first")
        if dora := [a.base for a in found if a.magnitude is not None]:
            raise UsageError(f"wise-ft scales the update of an adapter, but {dora[0]} has none (DoRA); use plain LoRA")
        factors = {name for a in found for name in (a.name_a, a.name_b)}
        self.start = {name: p.detach().to("cpu", copy=True) for name, p in trainable(model).items() if name not in factors}

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        for adapter in adapters(model):
            adapter.b.mul_(self.alpha)
        for name, p in trainable(model).items():
            if name in self.start:
                start, mine = own_part(cut_as(self.start[name], p)), own_part(p)
                mine.copy_(torch.lerp(start, mine, self.alpha))
