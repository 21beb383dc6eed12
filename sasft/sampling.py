"""Batched ancestral sampling whose every row depends on its own seed alone.

Each new token is drawn by inverting the cumulative distribution at one uniform number, and the uniforms of
a row come from a counter-based generator keyed by the row's seed. Which other rows share the batch, and on
which device it runs, therefore does not enter the draw (beyond the rounding of the logits themselves).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sasft.errors import UsageError

# Most of a truncated distribution lies in few tokens: a partial sort of this many is tried before a full one.
_NUCLEUS_FIRST = 1024
# Finished rows are taken out of the batch once they are this share of it; waiting rows take their places once this share is free.
_COMPACT_AT = 0.25
_REFILL_AT = 0.125


@dataclass(frozen=True, kw_only=True)
class Sampler:
    r"""How responses are drawn from the model: temperature ``T`` and nucleus ``top_p``.

    Tokens are drawn from :math:`p(y_t) \propto p_\theta(y_t \mid \cdot)^{1/T}`, restricted to the smallest set of
    most probable tokens whose mass reaches ``top_p`` (the token that crosses the threshold included).

    Only ``T = 1, top_p = 1`` (:data:`EXACT`) samples the model's own distribution, for which self-data exert no
    first-order force (the score identity, docs/theory.md F1). :data:`PAPER` is the sampler of arXiv 2602.20162.
    ``max_new_tokens`` caps a response; a length cap is a stopping time, so it leaves the identity intact as long
    as cut responses are kept.

    >>> Sampler().temperature, Sampler().top_p
    (0.7, 0.9)
    >>> EXACT.exact, PAPER.exact
    (True, False)
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature must be > 0, got {self.temperature}; use a small value such as 0.01 "
                             "for nearly greedy sampling")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p}; 1 keeps the whole distribution")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def exact(self) -> bool:
        """Whether samples follow the model's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def describe(self) -> dict[str, float]:
        """The settings as a plain dictionary, for provenance."""
        return asdict(self)


EXACT = Sampler(temperature=1.0, top_p=1.0)
PAPER = Sampler(temperature=0.7, top_p=0.9)


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    ``ids``: response tokens without the end-of-turn token. ``logprobs``: natural-log probability of each token
    under the untruncated model at T = 1, the end-of-turn token's included if the response is ``finished``
    (so ``len(logprobs) == len(ids) + finished``). ``finished``: False if the length cap cut it.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


def row_uniforms(seed: int, n: int) -> np.ndarray:
    """``n`` uniforms in [0, 1) that depend on ``seed`` alone.

    >>> bool((row_uniforms(7, 3) == row_uniforms(7, 5)[:3]).all())
    True
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(n)


def row_seed(seed: int, *path: int | str) -> int:
    """A 64-bit seed for one row, from the run's seed and the row's place in it.

    >>> row_seed(0, "user", 1) != row_seed(0, "user", 2) != row_seed(1, "user", 1)
    True
    """
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "little") for w in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0])


def draw(logits: Tensor, u: Tensor, sampler: Sampler) -> Tensor:
    """Draw one token a row by inverse transform.

    ``logits`` [B, V]; ``u`` [B] float64 uniforms in [0, 1); returns token ids [B]. The cumulative sums run in
    float64: in float32 their rounding at V ~ 50,000 is as large as the rarer tokens' probabilities.

    >>> logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]]))
    >>> [draw(logits, torch.tensor([u], dtype=torch.float64), EXACT).item() for u in (0.05, 0.25, 0.95)]
    [0, 1, 2]
    >>> draw(logits, torch.tensor([0.99], dtype=torch.float64), Sampler(temperature=1, top_p=0.6)).item()
    2
    """
    probs = torch.softmax(logits.float() / sampler.temperature, dim=-1)
    tokens = None
    if sampler.top_p < 1:
        probs, tokens = _nucleus(probs, sampler.top_p)
    cdf = probs.double().cumsum(-1)
    threshold = (u.to(cdf.device) * cdf[:, -1]).unsqueeze(-1)
    # right=True skips tokens of zero probability when the threshold falls on their (empty) interval.
    choice = torch.searchsorted(cdf, threshold, right=True).clamp_(max=cdf.shape[-1] - 1)
    return choice.squeeze(-1) if tokens is None else tokens.gather(-1, choice).squeeze(-1)


def _nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities outside the nucleus set to 0, most probable first, with their token ids."""
    k = min(_NUCLEUS_FIRST, probs.shape[-1])
    top, ids = probs.topk(k, dim=-1)
    if bool((top.double().sum(-1) < top_p).any()):
        top, ids = probs.sort(dim=-1, descending=True)
    before = top.double().cumsum(-1) - top
    return top.masked_fill(before >= top_p, 0.0), ids


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampler: Sampler,
    *,
    stop_id: int,
    pad_id: int,
    slots: int | None = None,
    greedy: bool = False,
    on_tokens: Callable[[int], None] = lambda n: None,
    on_done: Callable[[Mapping[int, Sample]], None] = lambda done: None,
) -> list[Sample]:
    """Sample one response for every prompt.

    Without ``slots`` all rows make one batch: prompts are left-padded, finished rows leave the batch. With ``slots`` at most
    that many rows run together, the longest prompts first, and finished rows give their places to waiting ones, an eighth of
    the batch at a time: a place holds keys and values for no more than the longest prompt and response among its neighbours, so
    memory is that of one padded batch of ``slots`` rows, while no row waits for the longest one to end. Needs a model that
    attends to all or to the last so many tokens; one with a recurrent state is refused.

    Runs under whatever autocast is active: to keep the sampler equal to the model that is trained, sample under the precision
    of the training. ``greedy`` takes the most probable token instead of drawing. ``on_tokens(n)`` is told after each step how
    many tokens it gave, ``on_done({index: sample})`` which rows have ended; it is told of every row once.
    """
    if len(prompts) != len(seeds):
        raise UsageError(f"seeds must have one entry a prompt: got {len(seeds)} for {len(prompts)} prompts")
    if any(len(p) == 0 for p in prompts):
        raise UsageError("prompts must not be empty: a model continues at least one token")
    if slots is not None:
        _check_slots(model, slots)
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        return _Decoder(model, prompts, seeds, sampler, stop_id, pad_id, greedy).run(slots, on_tokens, on_done)
    finally:
        model.train(was_training)


def _check_slots(model: PreTrainedModel, slots: int) -> None:
    if slots < 1:
        raise UsageError(f"slots (rows sampled together) must be at least 1, got {slots}")
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if other := sorted(kind.__name__ for kind in layers - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise UsageError(f"slots cannot be refilled in a {type(model).__name__}: its cache has {', '.join(other)}, and only keys "
                         "and values of single tokens can be put beside others; sample padded batches (slots=None)")


@dataclass
class _Batch:
    """Rows in the middle of being written.

    ``index`` of each among all prompts, whether it is still ``active``, its ``steps`` so far. The cache holds all tokens but the
    last, ``mask`` says where. Rows end in the same column, so a shorter row begins later.
    """

    cache: DynamicCache  # keys and values [B, heads, T, d]
    mask: Tensor  # [B, T]
    tokens: Tensor  # [B, 1], the last ones
    position: Tensor  # [B, 1], of the last ones
    index: Tensor  # [B], on the CPU like the next two
    active: Tensor
    steps: Tensor

    def keep_active(self) -> None:
        keep = self.active.nonzero().squeeze(-1)
        on_device = keep.to(self.tokens.device)
        self.cache.batch_select_indices(on_device)
        self.tokens, self.position, self.mask = self.tokens[on_device], self.position[on_device], self.mask[on_device]
        self.index, self.active, self.steps = self.index[keep], self.active[keep], self.steps[keep]

    def join(self, other: "_Batch") -> None:
        """Take the rows of another batch in, and drop the columns on the left that no row needs any more."""
        width = max(_used(self.mask), _used(other.mask))
        self.trim(width), other.trim(width)
        self.mask = torch.cat([self.mask, other.mask])
        for mine, new in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = torch.cat([mine.keys, new.keys]), torch.cat([mine.values, new.values])
        for name in ("tokens", "position", "index", "active", "steps"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


    def trim(self, width: int) -> None:
        """Cut the columns on the left, or add empty ones, so that there are ``width``."""
        self.mask = _to_width(self.mask, width, dim=1)
        for layer in self.cache.layers:
            layer.keys, layer.values = _to_width(layer.keys, width, dim=2), _to_width(layer.values, width, dim=2)


def _used(mask: Tensor) -> int:
    """Columns from the first that some row uses to the last."""
    return mask.shape[1] - int(mask.any(0).int().argmax())


def _to_width(x: Tensor, width: int, dim: int) -> Tensor:
    """Cut or filled with zeros on the left of dimension ``dim``."""
    missing = width - x.shape[dim]
    if missing <= 0:
        return x.narrow(dim, -missing, width)
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim)


class _Decoder:
    def __init__(self, model, prompts, seeds, sampler, stop_id, pad_id, greedy) -> None:
        self.model, self.prompts, self.sampler = model, prompts, sampler
        self.stop_id, self.pad_id, self.greedy = stop_id, pad_id, greedy
        self.device = next(model.parameters()).device
        self.uniforms = torch.from_numpy(np.stack([row_uniforms(s, sampler.max_new_tokens) for s in seeds]))
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.samples: dict[int, Sample] = {}
        self.untold: dict[int, Sample] = {}

    def run(self, slots, on_tokens, on_done) -> list[Sample]:
        order = range(len(self.prompts))
        if slots is None:
            slots, config, widest = len(order), self.model.config, None
        else:
            # Without the configuration every layer keeps all its keys, in the columns of the mask.
            order, config = sorted(order, key=lambda i: -len(self.prompts[i])), None
            widest = max(map(len, self.prompts)) + self.sampler.max_new_tokens
        waiting = deque(order)
        batch = None
        while True:
            going = 0 if batch is None else int(batch.active.sum())
            if not going and not waiting:
                break
            full = batch is not None and batch.mask.shape[1] == widest  # the row that was the first in this batch has ended
            if waiting and (full or slots - going >= max(1, _REFILL_AT * slots)):
                fresh = self._begin([waiting.popleft() for _ in range(min(slots - going, len(waiting)))], config)
                on_tokens(self._step(fresh))
                if going:
                    batch.keep_active()
                    batch.join(fresh)
                else:
                    batch = fresh
                self._tell(on_done)
                continue
            if full or (~batch.active).float().mean() >= _COMPACT_AT:
                batch.keep_active()
            if full:
                batch.trim(_used(batch.mask))
            batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.mask), 1)], dim=1)
            on_tokens(self._step(batch))
        self._tell(on_done)
        return [self.samples[i] for i in range(len(self.prompts))]

    def _begin(self, indices: Sequence[int], config) -> _Batch:
        """A batch of new rows; its ``tokens`` and ``position`` are those of the whole prompts."""
        width = max(len(self.prompts[i]) for i in indices)
        ids = torch.full((len(indices), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, width - len(self.prompts[i]):] = torch.tensor(self.prompts[i])
            mask[row, width - len(self.prompts[i]):] = 1
        mask = mask.to(self.device)
        return _Batch(DynamicCache(config=config), mask, ids.to(self.device), mask.cumsum(-1).sub(1).clamp(min=0),
                      torch.tensor(indices), torch.ones(len(indices), dtype=torch.bool),
                      torch.zeros(len(indices), dtype=torch.long))

    def _step(self, batch: _Batch) -> int:
        """Run the model on the batch's tokens and draw the next one of every row; how many rows it gave one."""
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask, position_ids=batch.position,
                            past_key_values=batch.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        # Rows that have ended keep drawing until they leave the batch; nothing of it is kept.
        u = self.uniforms[batch.index, batch.steps.clamp(max=self.sampler.max_new_tokens - 1)]
        chosen = logits.argmax(-1) if self.greedy else draw(logits, u, self.sampler)
        logprob = torch.log_softmax(logits.float(), -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        batch.steps += 1
        given = 0
        for row, (i, token, lp) in enumerate(zip(batch.index.tolist(), chosen.tolist(), logprob.tolist(), strict=True)):
            if batch.active[row]:
                self.logprobs[i].append(lp)
                finished = token == self.stop_id
                if not finished:
                    self.ids[i].append(token)
                    given += 1
                if finished or len(self.ids[i]) == self.sampler.max_new_tokens:
                    batch.active[row] = False
                    self.untold[i] = Sample(tuple(self.ids[i]), tuple(self.logprobs[i]), finished)
        batch.tokens, batch.position = chosen.unsqueeze(-1), batch.position[:, -1:] + 1
        return given

    def _tell(self, on_done) -> None:
        if self.untold:
            on_done(self.untold)
            self.samples |= self.untold
            self.untold = {}
