"""Batched ancestral sampling whose every row depends on its own seed alone.

Each new token is drawn by inverting the cumulative distribution at one uniform number, and the uniforms of
a row come from a counter-based generator keyed by the row's seed. Which other rows share the batch, and on
which device it runs, therefore does not enter the draw (beyond the rounding of the logits themselves).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sasft.errors import UsageError

# Most of a truncated distribution lies in few tokens: a partial sort of this many is tried before a full one.
_NUCLEUS_FIRST = 1024
# Finished rows are taken out of the batch once they are this share of it.
_COMPACT_AT = 0.25


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
    greedy: bool = False,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """Sample one response for every prompt, all in one batch.

    Prompts are left-padded; finished rows leave the batch. Runs under whatever autocast is active: to keep the
    sampler equal to the model that is trained, sample under the precision of the training. ``greedy`` takes the
    most probable token instead of drawing. ``on_tokens(n)`` is told after each step how many tokens it gave.
    """
    if len(prompts) != len(seeds):
        raise UsageError(f"seeds must have one entry a prompt: got {len(seeds)} for {len(prompts)} prompts")
    if any(len(p) == 0 for p in prompts):
        raise UsageError("prompts must not be empty: a model continues at least one token")
    if not prompts:
        return []
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    uniforms = torch.from_numpy(np.stack([row_uniforms(s, sampler.max_new_tokens) for s in seeds]))

    was_training = model.training
    model.eval()
    try:
        return _decode(model, ids.to(device), mask.to(device), uniforms, sampler, stop_id, greedy, on_tokens)
    finally:
        model.train(was_training)


def _decode(model, ids, mask, uniforms, sampler, stop_id, greedy, on_tokens) -> list[Sample]:
    out_ids: list[list[int]] = [[] for _ in range(len(ids))]
    out_logprobs: list[list[float]] = [[] for _ in range(len(ids))]
    finished = [False] * len(ids)
    rows = torch.arange(len(ids))  # which prompt each batch row answers
    active = torch.ones(len(ids), dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    position = mask.cumsum(-1).sub(1).clamp(min=0)
    tokens = ids
    for step in range(sampler.max_new_tokens):
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]
        chosen = logits.argmax(-1) if greedy else draw(logits, uniforms[rows, step], sampler)
        logprob = torch.log_softmax(logits.float(), -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        for i, (row, token, lp) in enumerate(zip(rows.tolist(), chosen.tolist(), logprob.tolist(), strict=True)):
            if active[i]:
                out_logprobs[row].append(lp)
                if token == stop_id:
                    finished[row], active[i] = True, False
                else:
                    out_ids[row].append(token)
        on_tokens(int(active.sum()))
        if not active.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        tokens, position = chosen.unsqueeze(-1), position[:, -1:] + 1
        if (~active).float().mean() >= _COMPACT_AT:
            keep = active.nonzero().squeeze(-1)
            on_device = keep.to(tokens.device)
            cache.batch_select_indices(on_device)
            tokens, position, mask = tokens[on_device], position[on_device], mask[on_device]
            rows, active = rows[keep], active[keep]
    return [Sample(tuple(i), tuple(lp), f) for i, lp, f in zip(out_ids, out_logprobs, finished, strict=True)]
