"""Candidates by stage 1: a hidden event after the history, ranked over the whole catalogue in chunks.

Legend: R users of a batch, V items of the catalogue, D width, n items wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr.config import Stream
from hpgr.data.batches import Assembler, query_batch
from hpgr.data.windows import query_windows
from hpgr.model.base import ItemModel
from hpgr.model.inputs import Inputs, pad
from hpgr.model.pgsa import LOWEST, ordered_bits
from hpgr.schema import MASK, Array, Ints

USERS = 64
CHUNK = 1 << 14
"""Items scored at once: memory is USERS * CHUNK, whatever the catalogue."""
NONE = -1
"""Index where fewer items than wanted are left."""


@dataclass(frozen=True)
class Retriever:
    """The next-item model over moments of timelines."""

    model: ItemModel
    stream: Stream
    device: torch.device
    chunk: int = CHUNK

    def top(self, assembler: Assembler, row: Ints, seen: Ints, moment: int, n: int, drop_seen: bool) -> Array:
        """The n best items of each timeline [Q] from its first `seen` [Q] events: [Q, n] indices, best first.

        `drop_seen` leaves out items of the whole past. Equal logits go to the lower index, as in evaluation. After
        no history at all the hidden event alone speaks, at `moment`.
        """
        out = np.full((len(row), n), NONE, np.int64)
        for chosen, x, state in self._states(assembler, row, seen, moment):
            out[chosen] = best_items(self.model, state, x if drop_seen else None, n, self.chunk).cpu().numpy()
        return out

    def user_vectors(self, assembler: Assembler, row: Ints, seen: Ints, moment: int) -> Array:
        """[Q, D + 1] vectors whose dot product with `item_vectors` is the retrieval logit."""
        out = np.ones((len(row), self.model.events.item.embedding_dim + 1), np.float32)
        for chosen, _, state in self._states(assembler, row, seen, moment):
            out[chosen, :-1] = state.float().cpu().numpy()
        return out

    def _states(
        self, assembler: Assembler, row: Ints, seen: Ints, moment: int
    ) -> Iterator[tuple[Ints, Inputs, Tensor]]:
        windows = query_windows(assembler.timelines, self.stream, row, seen)
        order = np.argsort(windows.stop - windows.start, kind="stable")
        for first in range(0, len(order), USERS):
            chosen = order[first : first + USERS]
            part = windows.take(chosen)
            x = pad(query_batch(assembler, part, np.full(len(part), MASK), moment), self.device)
            with torch.no_grad():
                yield chosen, x, query_states(self.model, x)


def query_states(model: ItemModel, x: Inputs) -> Tensor:
    """What the hidden event at the end of each history says about its item: [R, D]."""
    rows = torch.arange(len(x.h_item), device=x.h_item.device)
    return model.encode(x)[rows, x.h_real.sum(1) - 1]


def best_items(model: ItemModel, state: Tensor, past: Inputs | None, n: int, chunk: int = CHUNK) -> Tensor:
    """Indices of the n items of largest logit for each state [R, D], best first: [R, n]; NONE where there are no more.

    The catalogue goes by in chunks, and the best so far with it. `past` gives items to leave out (its candidates).
    """
    table, bias = model.events.item.weight[model.first_item :], model.item_bias[model.first_item :]
    size = len(table)
    best = torch.full((len(state), n), LOWEST, dtype=torch.int64, device=state.device)
    for first in range(0, size, chunk):
        logits = (state @ table[first : first + chunk].T + bias[first : first + chunk]).float()
        # Places count down, so that of equal logits the lower index is the larger number.
        place = size - 1 - torch.arange(first, min(first + chunk, size), device=state.device)
        key = (ordered_bits(logits) << 32) | place
        if past is not None:
            key = _without(key, past, model.first_item + first)
        best = torch.cat([best, key], 1).topk(n, 1).values
    items = size - 1 - (best & 0xFFFFFFFF) + model.first_item
    return torch.where(best == LOWEST, NONE, items)


def _without(key: Tensor, past: Inputs, first: int) -> Tensor:
    """Keys of a chunk that begins with item `first`, past items (the candidates of `past`) at the lowest."""
    width = key.shape[1]
    place = torch.where(past.c_real, past.c_item - first, width)
    place = torch.where((place >= 0) & (place < width), place, width)
    return F.pad(key, (0, 1)).scatter(1, place, LOWEST)[:, :-1]


def item_vectors(model: ItemModel) -> Array:
    """[V, D + 1] vectors of the catalogue in index order: the item table and, last, the item's bias."""
    table, bias = model.events.item.weight[model.first_item :], model.item_bias[model.first_item :]
    return torch.cat([table, bias[:, None]], 1).detach().float().cpu().numpy()
