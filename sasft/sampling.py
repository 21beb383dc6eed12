"""Batched ancestral sampling whose every row depends on its own seed alone.

Each new token is drawn by inverting the cumulative distribution at one uniform number, and the uniforms of
a row come from a counter-based generator keyed by the row's seed. Which other rows share the batch, and on
which device it runs, therefore does not enter the draw (beyond the rounding of the logits themselves).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sasft.errors import UsageError
from sasft.paged import Refilled

# Most of a truncated distribution lies in few tokens: a partial sort of this many is tried before a full one.
_NUCLEUS_FIRST = 1024


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


def positions(model: object) -> float:
    """How many tokens a model takes, as its configuration says; infinity if it says nothing, or is not transformers'."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf


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
    cdf = probs.cumsum(-1, dtype=torch.float64)
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

    Without ``slots`` all rows make one batch: prompts are left-padded, finished rows leave the batch. With ``slots`` rows share the
    memory for keys and values that a padded batch of ``slots`` rows would need, the longest prompt and ``max_new_tokens`` each:
    a row holds only what it has said so far, so more than ``slots`` run together, no row waits for the longest one to end, and
    what all prompts begin with is computed once (:mod:`sasft.paged`). Needs a model that attends to all or to the last so many
    tokens; one with a recurrent state is refused.

    Raises :class:`UsageError` if prompt and answer may be longer than the model takes: beyond its positions some models fail, and
    the others write what they would not.

    Runs under whatever autocast is active: to keep the sampler equal to the model that is trained, sample under the precision
    of the training. ``greedy`` takes the most probable token instead of drawing. ``on_tokens(n)`` is told after each step how
    many tokens it gave, ``on_done({index: sample})`` which rows have ended; it is told of every row once.
    """
    if len(prompts) != len(seeds):
        raise UsageError(f"seeds must have one entry a prompt: got {len(seeds)} for {len(prompts)} prompts")
    if any(len(p) == 0 for p in prompts):
        raise UsageError("prompts must not be empty: a model continues at least one token")
    longest = max(map(len, prompts), default=0)
    if longest + sampler.max_new_tokens - 1 > positions(model):  # the last token is never fed
        raise UsageError(f"a prompt of {longest} tokens and an answer of up to {sampler.max_new_tokens} are more than the "
                         f"{positions(model)} tokens that the model takes; lower max_new_tokens, or shorten the prompts")
    if slots is not None:
        _check_slots(model, slots)
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        answers = _Answers(prompts, seeds, sampler, stop_id, greedy, on_tokens, on_done)
        if slots is None:
            _padded(model, answers, pad_id)
        else:
            Refilled(model, answers, slots, sampler.max_new_tokens).run()
        return answers.all()
    finally:
        model.train(was_training)


def _check_slots(model: PreTrainedModel, slots: int) -> None:
    if slots < 1:
        raise UsageError(f"slots (rows sampled together) must be at least 1, got {slots}")
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if other := sorted(kind.__name__ for kind in layers - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise UsageError(f"slots cannot be refilled in a {type(model).__name__}: its cache has {', '.join(other)}, and only keys "
                         "and values of single tokens can be put beside others; sample padded batches (slots=None)")


class _Answers:
    """What every row has said so far; draws what it says next."""

    def __init__(self, prompts, seeds, sampler, stop_id, greedy, on_tokens, on_done) -> None:
        self.prompts, self.sampler, self.stop_id, self.greedy = prompts, sampler, stop_id, greedy
        self.on_tokens, self.on_done = on_tokens, on_done
        self.uniforms = torch.from_numpy(np.stack([row_uniforms(s, sampler.max_new_tokens) for s in seeds]))
        self.said: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.samples: dict[int, Sample] = {}

    def next(self, rows: Sequence[int], logits: Tensor) -> tuple[Tensor, list[bool]]:
        """Token [B] that each of the rows says next, and whether the row goes on after it."""
        u = self.uniforms[rows, [len(self.logprobs[i]) for i in rows]]
        chosen = logits.argmax(-1) if self.greedy else draw(logits, u, self.sampler)
        logprob = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).float() - logits.float().logsumexp(-1)
        done: dict[int, Sample] = {}
        for i, token, lp in zip(rows, chosen.tolist(), logprob.tolist(), strict=True):
            self.logprobs[i].append(lp)
            finished = token == self.stop_id
            if not finished:
                self.said[i].append(token)
            if finished or len(self.said[i]) == self.sampler.max_new_tokens:
                done[i] = Sample(tuple(self.said[i]), tuple(self.logprobs[i]), finished)
        self.on_tokens(len(rows) - sum(row.finished for row in done.values()))
        if done:
            self.on_done(done)
            self.samples |= done
        return chosen, [i not in done for i in rows]

    def all(self) -> list[Sample]:
        return [self.samples[i] for i in range(len(self.prompts))]


def _padded(model: PreTrainedModel, answers: _Answers, pad_id: int) -> None:
    """All rows in one batch, in transformers' own cache, until the last has ended."""
    device = next(model.parameters()).device
    width = max(map(len, answers.prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in answers.prompts]).to(device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in answers.prompts]).to(device)
    position = mask.cumsum(-1).sub(1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    rows = list(range(len(answers.prompts)))
    while rows:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                       logits_to_keep=1).logits[:, -1]
        chosen, going = answers.next(rows, logits)
        rows = list(compress(rows, going))
        keep = torch.tensor(going).nonzero().squeeze(-1).to(device)
        if not all(going):
            cache.batch_select_indices(keep)
        ids, position = chosen[keep].unsqueeze(1), position[keep, -1:] + 1
        mask = torch.cat([mask[keep], mask.new_ones(len(keep), 1)], 1)
