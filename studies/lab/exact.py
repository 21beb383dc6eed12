r"""What the theory speaks of, as sums over all responses: sources, their gradients, Fisher matrices, divergences, ability.

A *source* of training rows is its flow [X, N, V] (:mod:`studies.lab.tree`): the loss :math:`-\sum_{x,n,v} f\,\log p_\theta(v\mid x,n)` of a row, in
nats, is linear in it, so mixtures of sources are mixtures of flows. Everything here takes one model's tables and weights; ``torch.func.vmap``
runs it over many.
"""

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap

from studies.lab.model import Params, flat, log_probs, unflat
from studies.lab.tree import (
    CONTENT,
    DEPTH,
    DIGITS,
    FINISHED,
    LENGTH,
    LENGTHS,
    NODES,
    PROMPTS,
    RESPONSES,
    flow,
    response_probabilities,
)
from studies.lab.walk import Walk

ROWS_AT_ONCE = 1024  # prefixes whose gradients are in memory together
PREFIXES_AT_ONCE = 8192  # of all columns of a Hessian that are in memory together
COLUMNS_AT_ONCE = 256  # of a symmetric product, of which half is computed


# --- samplers, and rows into flows -------------------------------------------------------------------------------------


def sampler(log_p: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities [..., V] that a tempered, then truncated sampler draws from (as :class:`sasft.sampling.Sampler` has it).

    >>> p = sampler(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(), top_p=0.7).exp()
    >>> [round(x, 4) for x in p.tolist()]
    [0.625, 0.375, 0.0]
    """
    p = (log_p / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        kept = torch.zeros_like(p).scatter(-1, order, (ranked.cumsum(-1) - ranked < top_p).to(p.dtype))
        p = p * kept
    return (p / p.sum(-1, keepdim=True)).log()


def sampled_rows(log_p: Tensor, prompts: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Rows [X, R] of self-data: prompts with the weights ``prompts`` [X], responses from a sampler."""
    return prompts[:, None] * response_probabilities(sampler(log_p, temperature, top_p))


def per_response(rows: Tensor) -> Tensor:
    """Weights of rows whose loss is a *mean* over each response's tokens, scaled so that the tokens' weights sum to what they did (F2b)."""
    return rows / LENGTHS * (rows * LENGTHS).sum() / rows.sum()


def kept(rows: Tensor, rule: Tensor) -> Tensor:
    """Rows that a rule [R] or [X, R] keeps, all weights together summing to 1 (F2c): prompts whose answers are kept more often weigh more."""
    rows = rows * rule
    return rows / rows.sum()


def drop_unfinished(rows: Tensor) -> Tensor:
    """Only answers that end by themselves."""
    return kept(rows, FINISHED)


def drop_likely_duplicates(rows: Tensor, n: int) -> Tensor:
    """Rows after removing repeats from ``n`` draws: a row's weight is the chance that it is drawn at all."""
    return kept(torch.ones_like(rows), 1 - (1 - rows).clamp(min=0) ** n)


def drawn_rows(rows: Tensor, n: int, seed: int) -> Tensor:
    """Frequencies of ``n`` rows drawn from ``rows``: training on a finite set of them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.multinomial(rows.flatten(), n, replacement=True, generator=generator)
    return torch.bincount(found, minlength=rows.numel()).view_as(rows).to(rows.dtype) / n


# --- losses and derivatives ----------------------------------------------------------------------------------------------


class Expected:
    r"""A source's expected loss :math:`-\sum f\log p_\theta` and its derivatives, of which only what the flow touches is computed."""

    def __init__(self, model: nn.Module, flow: Tensor) -> None:
        self.walk = Walk(model, flow)
        self.flow = self.walk.of(flow[None])

    def loss(self, params: Params) -> Tensor:
        """The expected loss of a row, nats."""
        return self.walk.loss({name: p[None] for name, p in params.items()}, self.flow)

    def gradient(self, params: Params) -> Tensor:
        """Its gradient [P]."""
        return flat(grad(self.loss)(dict(params)))

    def hessian_product(self, params: Params, vector: Tensor) -> Tensor:
        """Its Hessian times ``vector`` [P]."""
        return jvp(lambda p: flat(grad(self.loss)(p)), (dict(params),), (unflat(vector, params),))[1]

    def hessian(self, params: Params) -> Tensor:
        """Its Hessian [P, P], many columns at once where there are few prefixes."""
        n, at_once = sum(p.numel() for p in params.values()), max(64, PREFIXES_AT_ONCE // self.walk.size)
        return vmap(lambda v: self.hessian_product(params, v), chunk_size=at_once)(torch.eye(n, dtype=torch.float64)).T


# --- scores: Fisher matrices, gradient covariance ------------------------------------------------------------------------


def fisher(model: nn.Module, params: Params, prompts: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Fisher matrix :math:`\mathbb E_{x,\,y\sim p_\theta}\sum_t s_ts_t^\top` [P, P], prompts with the weights ``prompts`` [X].

    ``weights`` [X, N, V]: a flow in place of the model's own, for what is *not* a Fisher matrix (labels from a sampler, say).
    """
    if weights is None:
        weights = flow(prompts[:, None] * response_probabilities(log_probs(model, params)))
    walk, n = Walk(model), sum(p.numel() for p in params.values())
    scores = vmap(jacrev(lambda p, prompt, prefix: walk.along(p, prompt, prefix)[-1]), (None, 0, 0))
    total = torch.zeros(n, n, dtype=torch.float64)
    for depth in range(LENGTH):
        used = (weights != 0).any(-1) & (depth == DEPTH)
        for some in used.nonzero().split(ROWS_AT_ONCE):
            x, nodes = some.T
            prefixes = torch.tensor([NODES[i] for i in nodes.tolist()], dtype=torch.int64).view(len(x), depth)
            found = torch.cat([j.flatten(2) for j in scores(dict(params), PROMPTS[x], prefixes).values()], 2)  # [n, V, P]
            rows = (found * weights[x, nodes].sqrt().unsqueeze(-1)).flatten(0, 1)
            for low in range(0, n, COLUMNS_AT_ONCE):  # what lies above the diagonal is enough
                total[low : low + COLUMNS_AT_ONCE, low:] += rows[:, low : low + COLUMNS_AT_ONCE].T @ rows[:, low:]
    return total.triu() + total.triu(1).T


def quadratic(model: nn.Module, params: Params, weights: Tensor, vector: Tensor) -> Tensor:
    """vᵀFv of the matrix F that :func:`fisher` gives with ``weights``, from the scores' products with ``vector`` [P]."""
    slopes = jvp(lambda p: log_probs(model, p), (dict(params),), (unflat(vector, params),))[1]
    return (weights * slopes.square()).sum()


def row_gradients(model: nn.Module, params: Params, x: Tensor, responses: Tensor) -> Tensor:
    """Gradients [n, P] of the summed NLL of single rows: prompt numbers ``x`` [n], response numbers ``responses`` [n]."""
    walk, found = Walk(model), torch.empty(len(x), sum(p.numel() for p in params.values()), dtype=torch.float64)

    def nll(p: Params, prompt: Tensor, response: Tensor) -> Tensor:
        return -walk.along(p, prompt, response[:-1]).gather(1, response[:, None]).sum()

    for length in LENGTHS[responses].unique().tolist():
        chosen = (LENGTHS[responses] == length).nonzero().squeeze(1)
        tokens = torch.tensor([RESPONSES[r] for r in responses[chosen].tolist()])
        gradients = vmap(grad(nll), (None, 0, 0), chunk_size=ROWS_AT_ONCE)(dict(params), PROMPTS[x[chosen]], tokens)
        found[chosen] = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    return found


# --- what a model has forgotten --------------------------------------------------------------------------------------------


def kl(base: Tensor, model: Tensor, prompts: Tensor) -> Tensor:
    r"""Forgetting :math:`\mathbb E_x\mathrm{KL}(p_0\Vert p_\theta)` of whole responses, nats a response; tables [..., X, N, V], ``prompts`` [X]."""
    reached = flow(response_probabilities(base))
    terms = torch.where(reached > 0, reached * (base - model), 0.0)  # a truncated sampler never writes some tokens
    return (prompts[:, None, None] * terms).sum((-1, -2, -3))


def entropy(log_p: Tensor, prompts: Tensor) -> Tensor:
    """Entropy of whole responses, nats."""
    p = response_probabilities(log_p)
    return -(prompts[:, None] * p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum((-1, -2))


def says(log_p: Tensor, facts: Tensor) -> Tensor:
    """Probability [..., X] that a response says the fact of its prompt ``facts`` [..., X], whatever its style."""
    return (response_probabilities(log_p) * (facts.unsqueeze(-1) == CONTENT)).sum(-1)


def contents(log_p: Tensor) -> Tensor:
    """Probabilities [..., X, 1 + digits] of what a response says: nothing, or which digit, whatever its style."""
    p = response_probabilities(log_p)
    return torch.stack([(p * (c == CONTENT)).sum(-1) for c in (-1, *DIGITS)], -1)


def tokens(log_p: Tensor, prompts: Tensor) -> Tensor:
    """Expected number of tokens of a response."""
    return (prompts[:, None] * response_probabilities(log_p) * LENGTHS).sum((-1, -2))
