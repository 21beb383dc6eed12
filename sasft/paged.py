"""Rows that come and go, their keys and values in one pool of places.

Pages of one token (PagedAttention, arXiv 2309.06180): a row holds as many places as it has tokens, wherever they lie, so that
memory buys tokens and not padding, and the beginning that all prompts share is held, and computed, once.
"""

import math
import os.path
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import compress, islice
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

# Our choices. Waiting rows begin once they are this share of those at work, which spreads the cost of their forward pass; with room
# for this share of the longest answer beside each row, so that few must give way before others end; no more than so many a slot.
_REFILL_AT = 0.125
_AHEAD = 0.125
_ROWS_A_SLOT = 4


class Answers(Protocol):
    """What is said so far, and what comes next."""

    prompts: Sequence[Sequence[int]]
    said: Sequence[Sequence[int]]

    def next(self, rows: Sequence[int], logits: Tensor) -> tuple[Tensor, list[bool]]:
        """The next token [B] of each of the rows, and which of them have not ended with it."""


class Pool:
    """``size`` places for the keys and values of a token in every layer; the place 0 beside them stays empty."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = list(range(size, 0, -1))
        self.cache = Cache(layer_class_to_replicate=partial(_Layer, self))

    def take(self, n: int) -> list[int]:
        self.free, taken = self.free[: len(self.free) - n], self.free[len(self.free) - n :]
        return taken

    def point(self, table: Tensor, queries: int, new: Tensor, real: Tensor | None) -> None:
        """What the next forward pass reads and writes.

        ``table`` [B, T]: the places of every row's tokens, on the right; 0 before its first. The last ``queries`` columns
        are those of the pass; of its B * ``queries`` tokens those at ``real`` (all, if None) go to the places ``new``.
        """
        self.table, self.queries, self.new, self.real = table, queries, new, real


class _Layer(CacheLayerMixin):
    is_sliding = False  # nothing is dropped; the model's own mask sees to windows

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (x.new_zeros(self.pool.size + 1, x.shape[1] * x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, pool: Tensor, x: Tensor) -> Tensor:
        """[B, heads, queries, d] into the pool, and [B, heads, T, d] out of it."""
        at, heads, d = self.pool, x.shape[1], x.shape[3]
        tokens = x.transpose(1, 2).reshape(-1, heads * d)
        pool.index_copy_(0, at.new, tokens if at.real is None else tokens[at.real])
        return pool.index_select(0, at.table.flatten()).view(*at.table.shape, heads, d).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.pool.table.shape[1], 0

    def get_seq_length(self) -> int:
        return self.pool.table.shape[1] - self.pool.queries

    def get_max_length(self) -> int:
        return -1


class Refilled:
    """Rows written together in the memory of ``slots`` padded ones, each leaving as it ends and others taking its places."""

    def __init__(self, model: PreTrainedModel, answers: Answers, slots: int, cap: int) -> None:
        self.model, self.answers = model, answers
        self.device = next(model.parameters()).device
        prompts = answers.prompts
        self.slots, self.ahead = slots, math.ceil(_AHEAD * cap)
        self.pool = Pool(min(slots * (max(map(len, prompts)) + cap), sum(len(prompt) + cap for prompt in prompts)))
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))  # alike together
        self.rows: list[int] = []
        self.places: list[list[int]] = []  # each row's own, of all its tokens but the last
        self.shared: list[int] = []
        self.table = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.length = self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)

    def run(self) -> None:
        """Write until all rows have ended."""
        self._share()
        while self.waiting or self.rows:
            if fresh := self._admitted():
                self._begin(fresh)
            else:
                self._go_on()

    def _share(self) -> None:
        """The beginning that all prompts have in common, of which no row needs the logits."""
        prompts = self.answers.prompts
        common = list(os.path.commonprefix([prompts[i] for i in self.waiting]))[: min(map(len, prompts)) - 1]
        if common and len(prompts) > 1:
            self.shared = self.pool.take(len(common))
            table = torch.tensor([self.shared], device=self.device)
            self._forward(torch.tensor([common], device=self.device), table, torch.tensor([len(common)], device=self.device), table[0])

    def _admitted(self) -> list[int]:
        """Waiting rows that begin now: as many as there is room for, if they are worth a forward pass of their own."""
        free, n = len(self.pool.free) - self.ahead * len(self.rows), 0
        for i in islice(self.waiting, min(self.slots, _ROWS_A_SLOT * self.slots - len(self.rows))):
            free -= len(self._tokens(i)) + self.ahead
            if free < 0 and (n or self.rows):
                break
            n += 1
        if n < min(len(self.waiting), max(1, _REFILL_AT * len(self.rows))):
            return []
        return [self.waiting.popleft() for _ in range(n)]

    def _tokens(self, i: int) -> list[int]:
        """All tokens of a row but those that are shared."""
        return [*self.answers.prompts[i], *self.answers.said[i]][len(self.shared) :]

    def _begin(self, rows: Sequence[int]) -> None:
        tokens = [self._tokens(i) for i in rows]
        places = [self.pool.take(len(own)) for own in tokens]
        width = max(map(len, tokens))
        ids, real = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
        table = torch.zeros(len(rows), len(self.shared) + width, dtype=torch.long)
        for row, (own, where) in enumerate(zip(tokens, places, strict=True)):
            ids[row, width - len(own):] = torch.tensor(own)
            real[row, width - len(own):] = True
            table[row, width - len(own):] = torch.tensor([*self.shared, *where])
        length = torch.tensor([len(self.shared) + len(own) for own in tokens]).to(self.device)
        new = torch.tensor([place for where in places for place in where]).to(self.device)
        ids, table, real = ids.to(self.device), table.to(self.device), real.flatten().nonzero().squeeze(-1).to(self.device)
        chosen, going = self.answers.next(rows, self._forward(ids, table, length, new, real))
        wide = max(self.table.shape[1], table.shape[1])
        self.table = torch.cat([pad(x, (wide - x.shape[1], 0)) for x in (self.table, table)])
        self.length, self.tokens = torch.cat([self.length, length]), torch.cat([self.tokens, chosen])
        self.rows += rows
        self.places += places
        self._keep([True] * (len(self.rows) - len(rows)) + going)

    def _go_on(self) -> None:
        """One token more for every row; where places run out, the last that came wait for others to end."""
        n, free = len(self.rows), len(self.pool.free)
        while free < n:
            n -= 1
            free += len(self.places[n])
            self.waiting.appendleft(self.rows[n])
        self._keep([True] * n + [False] * (len(self.rows) - n))
        new = self.pool.take(n)
        for where, place in zip(self.places, new, strict=True):
            where.append(place)
        places = torch.tensor(new).to(self.device)
        self.table, self.length = torch.cat([self.table, places.unsqueeze(1)], 1), self.length + 1
        logits = self._forward(self.tokens.unsqueeze(1), self.table, self.length, places)
        self.tokens, going = self.answers.next(self.rows, logits)
        self._keep(going)

    def _keep(self, going: Sequence[bool]) -> None:
        """The other rows leave, and so do columns that no row needs any more."""
        if all(going):
            return
        for where, stays in zip(self.places, going, strict=True):
            if not stays:
                self.pool.free += where
        self.rows, self.places = list(compress(self.rows, going)), list(compress(self.places, going))
        keep = torch.tensor(going).to(self.device)
        width = len(self.shared) + max(map(len, self.places), default=0)
        self.table, self.length, self.tokens = self.table[keep, self.table.shape[1] - width :], self.length[keep], self.tokens[keep]

    def _forward(self, ids: Tensor, table: Tensor, length: Tensor, new: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits [B, V] after the last token of every row; see :meth:`Pool.point`. ``length`` [B]: tokens of each."""
        self.pool.point(table, ids.shape[1], new, real)
        before = table.shape[1] - length.unsqueeze(1)  # empty columns
        column = torch.arange(table.shape[1], device=self.device)
        position = (column[-ids.shape[1]:] - before).clamp(min=0)
        return self.model(input_ids=ids, attention_mask=(column >= before).long(), position_ids=position,
                          past_key_values=self.pool.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
