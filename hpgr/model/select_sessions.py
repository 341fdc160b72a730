"""Anchors of very long histories: sessions first, by their mean vectors, then events inside them. In tiles of queries.

The fast form of `select_anchors` with sessions: a query is compared with S sessions and with the events of a few, not
with N events, and no [Q, N] tensor is made.

Shapes: B rows, Q queries, N history events, S sessions, D item vector width, K anchors, C sessions that a query looks
into, T queries of a tile, L events that the one of them with most looks at.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr.model.pgsa import LOWEST, Sessions, last_session, session_means, session_places, sortable, sortable_at
from hpgr.model.rank import FAR, TILE_GPU, TILE_WHOLE, largest, places

TILE = TILE_WHOLE
"""Most relevances of sessions alive at once on a CPU..."""
GATHERED = 1 << 18
"""... and numbers in the gathered vectors of events. Measured on two cores."""


def anchors_in_sessions(query: Tensor, key: Tensor, visible: Tensor, top_k: int, sessions: Sessions) -> Tensor:
    """Anchors, [B, Q, <= K] positions in any order, below 0 where there are fewer; arguments as of `select_anchors`."""
    rows, n, queries = *key.shape[:2], query.shape[1]
    place = session_places(sessions.number)
    last = last_session(place, visible)
    mean, size = session_means(key, place, int(place.max()) + 1)
    first, length = _stretches(_near(query, mean, last, sessions.past), size, visible)
    start = torch.arange(rows, device=key.device)[:, None, None] * n  # of a row in the flattened history
    anchors = _best_of_stretches(
        query.flatten(0, 1), key.flatten(0, 1), (first + start).flatten(0, 1), length.flatten(0, 1), min(top_k, n)
    ).view(rows, queries, -1)
    return torch.where(anchors < 0, anchors, anchors - start)


def _near(query: Tensor, mean: Tensor, last: Tensor, count: int) -> Tensor:
    """Sessions a query looks into: the nearest before its last, -FAR where there are fewer, then that: [B, Q, C]."""
    rows, most = mean.shape[:2]
    size = max(1, (TILE if mean.device.type == "cpu" else TILE_GPU) // max(1, rows * most))
    chosen = last.new_full((*last.shape, min(count, most) + 1), -FAR)
    chosen[..., -1] = last
    for at in range(0, last.shape[1], size):
        tile = slice(at, at + size)
        upto = max(1, int(last[:, tile].max()))
        relevance = (query[:, tile].double() @ mean[:, :upto].transpose(1, 2)).float()
        best = places(largest(sortable(relevance, last[:, tile]), min(count, upto)))
        chosen[:, tile, : best.shape[-1]] = best
    return chosen


def _stretches(chosen: Tensor, size: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """First event of each session that a query looks into, and how many it sees of it: [B, Q, C] each."""
    start, session = size.cumsum(-1) - size, chosen.clamp(min=0).flatten(1)
    first = start.gather(1, session).view_as(chosen)
    length = torch.minimum(size.gather(1, session).view_as(chosen), visible[..., None] - first)
    return first, length.clamp_(min=0) * (chosen >= 0)


def _best_of_stretches(query: Tensor, key: Tensor, first: Tensor, length: Tensor, top_k: int) -> Tensor:
    """The best `top_k` events for each query: [Q, K] places, -FAR where there are fewer.

    Args:
        query, key: vectors [Q, D] and [N, D].
        first, length: stretches of events that each query looks at, [Q, C].
        top_k: at most N.
    """
    total = length.sum(-1)
    # Queries that look at like numbers of events share a tile, so that one long session widens few of them.
    order = total.argsort(descending=True, stable=True)
    # float64, rounded once: a repeated item must tie exactly wherever it stands (see `select_anchors`).
    query, key = query.double()[order, None], key.double()
    length, total, offset = length[order], total[order], (first - (length.cumsum(-1) - length))[order]
    found = torch.full((len(order), top_k), -FAR, device=key.device)
    for tile, longest in _like_lengths(total, (GATHERED if key.device.type == "cpu" else TILE_GPU) // key.shape[1]):
        event, real = _events(offset[tile], length[tile], total[tile, None], longest)
        vectors = key.index_select(0, event.flatten()).view(*event.shape, -1)
        relevance = torch.bmm(query[tile], vectors.transpose(1, 2))[:, 0].float()  # twice as fast as turned round
        best = largest(sortable_at(relevance, event).masked_fill_(~real, LOWEST), min(top_k, longest))
        found[tile, : best.shape[-1]] = places(best)
    return torch.empty_like(found).index_copy_(0, order, found)


def _like_lengths(total: Tensor, most: int) -> Iterator[tuple[slice, int]]:
    """Slices of descending totals [Q], each with its largest, that look at `most` events or at one query's."""
    done = 0
    while done < len(total):
        longest = max(1, int(total[done]))
        size = max(1, most // longest)
        yield slice(done, done + size), longest
        done += size


def _events(offset: Tensor, length: Tensor, total: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Places of the events of stretches, one stretch after the other, and which are real: [T, L] each.

    The i-th of a query's events is at i + `offset` of its stretch [T, C]; `total` [T, 1] adds up its `length` [T, C].
    """
    slot = torch.arange(longest, device=offset.device)
    filled = torch.cat([length, longest - total], -1).flatten()
    offset_of = F.pad(offset, (0, 1)).flatten().repeat_interleave(filled, output_size=len(offset) * longest)
    return offset_of.view(-1, longest) + slot, slot < total
