"""Learning from the undesirable: hidden states held still under a small step in the wrong direction."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sasft.chat import IGNORE, Encoded
from sasft.errors import UsageError
from sasft.methods.base import Batch, Costs, Method, Objective, score
from sasft.methods.checks import check_counts, check_weights
from sasft.settings import option


@dataclass(frozen=True, kw_only=True)
class Lfu(Method):
    r"""LfU: the states of every block are held where they are under an ascent step of an auxiliary part φ.

    .. math:: L=\ell_{SFT}(\theta)+\lambda\,\ell_{cons},\qquad
       \varphi=\alpha\,\nabla_\varphi\ell_{SFT}/\lVert\nabla_\varphi\ell_{SFT}\rVert_2,\qquad
       \ell_{cons}=\mathbb E\Big[\frac1{TK}\sum_{t,l}\lVert\mathrm{sg}(h_{l,t})-h'_{l,t}\rVert^2\Big]

    with states :math:`h` at the outputs of the K blocks, :math:`h'` the same with φ in place. ``steering``: φ is a vector added
    at every block's output; ``lora``: a low-rank update of every linear layer in the blocks, whose A stays as drawn (at B = 0
    only B has a gradient). Source: arXiv 2511.13052 (α = 0.1, λ = 5, LoRA). Its code is not at hand; our choices: every row has
    a φ of its own, of norm α over all layers together, so that it doesn't matter which rows share a batch; φ starts at 0 in
    each step and is a constant to the outer gradient; T are the positions that predict counted tokens; squares are summed over
    a state's dimensions, so λ must be chosen anew for every model; A is drawn once, from the seed. Dropout should be off: it
    moves h' as well.
    Cost: a second forward and backward pass, and the ascent's backward pass, counted as two passes.
    """

    name: ClassVar[str] = "lfu"
    paper: ClassVar[str] = "arXiv 2511.13052"

    weight: float = option(5.0, "lambda, the weight of the consistency; 0 is SFT")
    alpha: float = option(0.1, "norm of the ascent step; 0 is SFT")
    variant: Literal["lora", "steering"] = option("lora", "what is moved: low-rank updates of layers, or a vector a block")
    rank: int = option(8, "rank of the low-rank updates")
    seed: int = option(0, "seed of their A")

    def __post_init__(self) -> None:
        check_weights(weight=self.weight, alpha=self.alpha)
        if self.variant not in ("lora", "steering"):
            raise UsageError(f"variant must be lora or steering, got {self.variant!r}")
        check_counts(rank=self.rank)

    def objective(self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int, costs: Costs) -> Objective | None:
        return None if 0 in (self.weight, self.alpha) else _Lfu(self, model, costs)


class _Lfu(Objective):
    inside = True

    def __init__(self, method: Lfu, model: nn.Module, costs: Costs) -> None:
        super().__init__(costs)
        self.method, self.blocks = method, _blocks(model)
        self.places: list[tuple[nn.Module, Tensor | None]] = [(block, None) for block in self.blocks]
        if method.variant == "lora":
            generator = torch.Generator().manual_seed(method.seed)
            self.places = [(layer, _drawn(layer, method.rank, generator)) for layer in _linear_layers(self.blocks)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        phi: list[Tensor] = []
        with self._perturbed(phi), self._states() as plain:
            scored = score(model, batch)
        nll = scored.nll()
        # Rows do not see each other, so the gradient of the sum holds each row's own.
        ascent = torch.autograd.grad(nll.sum(), phi, retain_graph=True)
        norms = torch.stack([g.float().flatten(1).square().sum(1) for g in ascent]).sum(0).sqrt().clamp(min=1e-30)
        moved = [self.method.alpha * g / norms.to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for g in ascent]
        with self._perturbed(moved), self._states() as shifted:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
                  use_cache=False, logits_to_keep=1)
        self.costs.backward_tokens += 2 * int(batch["attention_mask"].sum())
        predicting = batch["labels"][:, 1:] != IGNORE
        squares = [(h.detach()[:, :-1][predicting] - s[:, :-1][predicting]).float().square().sum(-1)
                   for h, s in zip(plain, shifted, strict=True)]
        return scored.total(nll) + self.method.weight * scored.total(torch.stack(squares).mean(0))

    @contextmanager
    def _perturbed(self, phi: list[Tensor]) -> Iterator[None]:
        """φ in place; an empty list is filled with zeros that take a gradient, in the order in which modules run."""
        fresh = not phi
        left = iter(list(phi))

        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            first = output if isinstance(output, Tensor) else output[0]
            a = down[module]
            if fresh:
                shape = (len(first), 1 if a is None else len(a), first.shape[-1])
                phi.append(first.new_zeros(shape).requires_grad_())
            own = phi[-1] if fresh else next(left)
            if a is not None:
                own = (args[0] @ a.to(args[0].device, args[0].dtype).T).to(own.dtype) @ own
            moved = first + own.to(first.dtype)
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        down = dict(self.places)
        with ExitStack() as hooks:
            for module, _ in self.places:
                hooks.callback(module.register_forward_hook(hook).remove)
            yield

    @contextmanager
    def _states(self) -> Iterator[list[Tensor]]:
        """What the blocks put out, in their order."""
        states: list[Tensor] = []
        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_hook(
                    lambda module, args, output: states.append(output if isinstance(output, Tensor) else output[0])).remove)
            yield states


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's transformer blocks."""
    n = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return list(module)
    raise UsageError(f"lfu finds no list of {n} blocks in a {type(model).__name__}, so it can't hold their states")


def _linear_layers(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks' linear layers, those with an adapter as a whole."""
    found: list[nn.Module] = []
    for block in blocks:
        inside: set[nn.Module] = set()
        for module in block.modules():
            if module not in inside and isinstance(getattr(module, "base_layer", module), nn.Linear):
                found.append(module)
                inside |= set(module.modules())
    if not found:
        raise UsageError("lfu finds no linear layer in the blocks; take variant=steering")
    return found


def _drawn(layer: nn.Module, rank: int, generator: torch.Generator) -> Tensor:
    """A [r, n], uniform as LoRA draws it: of variance 1 / (3n)."""
    weight = getattr(layer, "base_layer", layer).weight
    bound = weight.shape[1] ** -0.5
    return ((2 * torch.rand(rank, weight.shape[1], generator=generator) - 1) * bound).to(weight.device)
