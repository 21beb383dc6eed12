r"""All responses of the lab's language, and the prefixes that they pass through.

A response is up to :data:`LENGTH` tokens: it ends with :data:`END`, or the cap cuts it. A *node* is a prefix without its end: the N nodes are
numbered by length, then in the order of their tokens. The R responses are the N that end at a node, then those that the cap
cuts. What a language model says is a table :math:`\log p(v\mid n)` [N, V]; what a set of rows teaches is a *flow* [N, V], the expected
number of times that token v is written at node n.
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor

END = 0
TOPICS = (1, 2, 3)
DIGITS = (4, 5, 6)  # keys in prompts, facts in responses
STYLES = (7, 8, 9)  # openers and closers
VOCABULARY = 10
LENGTH = 4
GOING_ON = VOCABULARY - 1  # tokens that do not end a response

PROMPTS = torch.tensor(list(product(TOPICS, DIGITS)))
"""[X, 2]: a topic and a key."""

DEPTHS = tuple(GOING_ON**k for k in range(LENGTH))
NODES = [node for k in range(LENGTH) for node in product(range(1, VOCABULARY), repeat=k)]
"""The prefixes, as tuples of tokens."""
N_NODES = len(NODES)
DEPTH = torch.tensor([len(node) for node in NODES])
NODE_OF = {node: i for i, node in enumerate(NODES)}

RESPONSES = [(*node, END) for node in NODES] + [(*node, v) for node in NODES if len(node) == LENGTH - 1 for v in range(1, VOCABULARY)]
"""Every response, as a tuple of tokens."""
N_RESPONSES = len(RESPONSES)
RESPONSE_OF = {response: i for i, response in enumerate(RESPONSES)}
LENGTHS = torch.tensor([len(r) for r in RESPONSES])


def _paths() -> tuple[Tensor, Tensor]:
    """(response, node · V + token) of every token of every response."""
    pairs = [(i, NODE_OF[r[:t]] * VOCABULARY + r[t]) for i, r in enumerate(RESPONSES) for t in range(len(r))]
    of_response, places = np.array(pairs).T
    return torch.from_numpy(of_response), torch.from_numpy(places)


_OF_RESPONSE, _PLACES = _paths()


def response_probabilities(log_p: Tensor) -> Tensor:
    r"""Probability of each response, [..., R], under next-token log-probabilities ``log_p`` [..., N, V].

    >>> uniform = torch.full((N_NODES, VOCABULARY), 0.1, dtype=torch.float64).log()
    >>> p = response_probabilities(uniform)
    >>> round(p.sum().item(), 12), round(p[RESPONSE_OF[(7, 4, 0)]].item(), 12)
    (1.0, 0.001)
    """
    flat = log_p.flatten(-2)
    total = flat.new_zeros(*flat.shape[:-1], N_RESPONSES)
    return total.index_add(-1, _OF_RESPONSE, flat[..., _PLACES]).exp()


def flow(rows: Tensor) -> Tensor:
    """Expected number of each token at each node, [..., N, V], in rows whose responses have the weights ``rows`` [..., R].

    >>> found = flow(torch.eye(N_RESPONSES)[RESPONSE_OF[(7, 4, 0)]])
    >>> found.sum().item(), found[NODE_OF[(7,)], 4].item()
    (3.0, 1.0)
    """
    total = rows.new_zeros(*rows.shape[:-1], N_NODES * VOCABULARY)
    return total.index_add(-1, _PLACES, rows[..., _OF_RESPONSE]).unflatten(-1, (N_NODES, VOCABULARY))


def content(response: tuple[int, ...]) -> int | None:
    """What a response says whatever its style: its first digit, None without one.

    >>> content((8, 5, 7, 0)), content((7, 0))
    (5, None)
    """
    return next((token for token in response if token in DIGITS), None)


def well_formed(response: tuple[int, ...]) -> bool:
    """Whether a response is [opener] digit [closer] end.

    >>> well_formed((8, 5, 0)), well_formed((5, 0)), well_formed((5, 5, 0)), well_formed((8, 5, 7, 7))
    (True, True, False, False)
    """
    body = response[1:] if response[0] in STYLES else response
    return body[-1] == END and body[0] in DIGITS and len(body) <= 3 and all(token in STYLES for token in body[1:-1])


CONTENT = torch.tensor([content(r) or -1 for r in RESPONSES])
WELL_FORMED = torch.tensor([well_formed(r) for r in RESPONSES])
FINISHED = torch.tensor([r[-1] == END for r in RESPONSES])
FIRST_DIGIT = torch.tensor([[v in DIGITS and content(node) is None for v in range(VOCABULARY)] for node in NODES])
"""[N, V]: where a response says what it says."""
