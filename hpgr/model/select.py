"""PGSA's choice of keys the fast way, in tiles of queries: kept keys in index form, or weights over all events.

Shapes: B rows, Q queries, N history events, D item vector width, K anchors, S slots for kept keys, T queries of a tile.

A tile sees the history up to its last visible event, so causal queries cost half, and no [Q, N] tensor outlives it
but the weights of `select_weights`, which is for short histories.
Of long histories the K best blocks of events are found first, by their best event, and the anchors inside them:
an event of the top K cannot be in another block, as K blocks would each hold an event that comes before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr.model.inputs import tiles
from hpgr.model.pgsa import (
    LOWEST,
    Sessions,
    gaussian_level,
    in_near_sessions,
    sortable,
    sortable_at,
    visible_mask,
)
from hpgr.model.rank import FAR, TILE_GPU, TILE_WHOLE, largest, places
from hpgr.model.select_sessions import anchors_in_sessions

TILE = 1 << 19
"""Most relevances alive at once on a CPU (4 MB in float64), `TILE_WHOLE` where a history is searched whole. Measured on
two cores."""
BLOCK = 16
"""Events of a block; histories of fewer than two blocks an anchor are searched whole."""
FUSED_EVENTS, FUSED_ANCHORS = 1 << 18, 496
"""Most events of a history, and anchors, that Triton's kernels rank: a program looks at 16,384 blocks of 16 events,
then at the events of 512."""


@dataclass(frozen=True)
class Kept:
    """Keys kept by each query, largest weight first, of equal ones the more recent first.

    `index` [B, Q, S] int64 positions in the history and `weight` [B, Q, S] float32; weight 0 marks an unused slot,
    whose index is 0.
    """

    index: Tensor
    weight: Tensor

    def count(self) -> Tensor:
        """Keys a query keeps: [B, Q]."""
        return (self.weight > 0).sum(-1)

    def anchors(self, top_k: int) -> tuple[Tensor, Tensor]:
        """Positions of the anchors, the most recent first, and which are real: [B, Q, <= K]. Not of capped keys.

        They are the slots of weight 1, the first ones: beside an anchor a Gaussian is less.
        """
        return self.index[..., :top_k], self.weight[..., :top_k] == 1


def most_slots(n: int, top_k: int, sigma: float, max_keys: int | None) -> int:
    """S: no query keeps more keys than this, K (2 ceil(3 sigma) + 1) without a cap."""
    return min(n, top_k * (2 * math.ceil(3 * sigma) + 1), max_keys or n)


def select_keys(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    top_k: int,
    sigma: float,
    max_keys: int | None = None,
    fused: bool = False,
    sessions: Sessions | None = None,
) -> Kept:
    """Kept keys and their weights: those of `gaussian_weights` around `select_anchors`, capped by `cap_weights`.

    Args:
        query: [B, Q, D] item vectors of the queries. No gradient flows through the choice.
        key: [B, N, D] item vectors of the history.
        visible: [B, Q] how many events of the history are strictly past.
        top_k: anchors a query.
        sigma: width of the Gaussians in events.
        max_keys: most keys a query, or None.
        fused: by Triton's kernels, unless anchors come from sessions or are more than they can rank.
        sessions: from which anchors come, or None.
    """
    n, queries = key.shape[1], query.shape[1]
    slots = most_slots(n, top_k, sigma, max_keys)
    if fused and sessions is None and min(top_k, n) <= FUSED_ANCHORS:
        from hpgr.model import fused_select  # needs triton

        visible = visible.clamp(max=n)  # kernels must not look beyond
        with torch.no_grad():
            anchors = fused_select.choose_anchors(query, key, visible, min(top_k, n))
            return Kept(*fused_select.spread_anchors(anchors, visible, n, sigma, slots))
    index = torch.zeros(len(key), queries, slots, dtype=torch.int64, device=key.device)
    weight = torch.zeros(index.shape, device=key.device)
    with torch.no_grad():
        for tile, anchors in _anchor_tiles(query, key, visible, top_k, sessions):
            index[:, tile], weight[:, tile] = _around(anchors, visible[:, tile], n, sigma, slots)
    return Kept(index, weight)


def select_weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    top_k: int,
    sigma: float,
    max_keys: int | None = None,
    sessions: Sessions | None = None,
) -> tuple[Tensor, Tensor]:
    """The same weights over the whole history, as the reference has them, [B, Q, N]; arguments as of `select_keys`.

    With them the anchors, [B, Q, <= K] positions in any order, below 0 where there are fewer.

    Of distances instead of weights, in a byte each: what lies beyond all Gaussians is at the distance `far`.
    """
    n = key.shape[1]
    if sessions is None and n <= min(top_k, max_keys or n):
        return _all_visible(visible, n)
    levels = [1.0, *(gaussian_level(d, sigma) for d in range(1, min(math.ceil(3 * sigma), n - 1) + 1))]
    far = len(levels)
    weight_at = torch.tensor([*levels, 0.0], device=key.device)
    weights = torch.zeros(len(key), query.shape[1], n, device=key.device)
    anchors = torch.full((len(key), query.shape[1], min(top_k, n)), -FAR, device=key.device)
    with torch.no_grad():
        for tile, relevance in _relevance_tiles(query, key, visible, top_k):
            upto = relevance.shape[-1]
            ranked = sortable(relevance, visible[:, tile])
            seen = visible_mask(visible[:, tile], upto)
            if sessions is not None:
                near = in_near_sessions(query[:, tile], key, visible[:, tile], sessions)
                ranked.masked_fill_(~near[..., :upto], LOWEST)
            best = ranked if upto <= top_k else largest(ranked, top_k)
            anchors[:, tile, : best.shape[-1]] = places(best)
            anchor = ranked != LOWEST if upto <= top_k else ranked >= best[..., :1].clamp(min=LOWEST + 1)
            distance = _no_nearer(_distances(anchor, far), ~seen, far)
            if max_keys is not None and max_keys < upto:
                order = (distance.int() * -n).add_(torch.arange(upto, dtype=torch.int32, device=key.device))
                distance = _no_nearer(distance, order < largest(order, max_keys)[..., :1], far)
            weights[:, tile, :upto] = weight_at.index_select(0, distance.flatten().int()).view(distance.shape)
    return weights, anchors


def _all_visible(visible: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What `select_weights` returns of a history no longer than K: all that a query sees is an anchor, whatever its
    relevance."""
    seen = visible_mask(visible, n)
    return seen.float(), torch.where(seen, torch.arange(n, device=visible.device), -FAR)


def _distances(anchor: Tensor, far: int) -> Tensor:
    """Distance of each event to the nearest anchor, at most `far`: [B, T, N] booleans -> small integers.

    Steps of 1, 2, 4, ... events add up to every distance.
    """
    distance = (~anchor).to(torch.uint8 if 2 * far < 256 else torch.int32) * far
    step = 1
    while step < min(far, anchor.shape[-1]):
        moved = distance + step
        torch.minimum(distance[..., step:], moved[..., :-step], out=distance[..., step:])
        torch.minimum(distance[..., :-step], moved[..., step:], out=distance[..., :-step])
        step *= 2
    return distance


def _no_nearer(distance: Tensor, where: Tensor, far: int) -> Tensor:
    """`distance` with `far` at some places; a fifth of `masked_fill`'s time on bytes."""
    return torch.maximum(distance, where.to(distance.dtype) * far)


def select_anchors_in_tiles(
    query: Tensor, key: Tensor, visible: Tensor, top_k: int, sessions: Sessions | None = None
) -> tuple[Tensor, Tensor]:
    """`select_anchors`, the fast way: the same anchors, the most recent first."""
    with torch.no_grad():
        found = [anchors for _, anchors in _anchor_tiles(query, key, visible, top_k, sessions)]
        width = min(top_k, key.shape[1])
        anchors = torch.cat([F.pad(a, (0, width - a.shape[-1]), value=-FAR) for a in found], 1)
    return recent_first(anchors)


def recent_first(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors [..., K], below 0 where there are fewer, in an order that says nothing of how they were found: positions,
    the most recent first, and which are real."""
    anchors = anchors.sort(-1, descending=True).values
    return anchors.clamp(min=0), anchors >= 0


def _anchor_tiles(
    query: Tensor, key: Tensor, visible: Tensor, top_k: int, sessions: Sessions | None
) -> Iterator[tuple[slice, Tensor]]:
    """Queries of a tile and their anchors [B, T, <= K], -FAR where there are fewer."""
    if sessions is not None:
        anchors = anchors_in_sessions(query, key, visible, top_k, sessions)
        yield from ((tile, anchors[:, tile]) for tile in tiles(len(key), query.shape[1], BLOCK * top_k))
        return
    for tile, relevance in _relevance_tiles(query, key, visible, top_k):
        yield tile, _best(relevance, visible[:, tile], top_k)


def _relevance_tiles(query: Tensor, key: Tensor, visible: Tensor, top_k: int) -> Iterator[tuple[slice, Tensor]]:
    """Queries of a tile and their relevances over the history up to the last event that one of them sees: [B, T, N]."""
    rows, n = len(key), key.shape[1]
    most = TILE_GPU if key.device.type != "cpu" else TILE_WHOLE if _searched_whole(n, top_k) else TILE
    size = max(1, most // max(1, rows * n))
    key64 = key.double().transpose(1, 2)
    seen = visible.amax(0)
    for first in range(0, query.shape[1], size):
        tile = slice(first, first + size)
        upto = min(n, -(-max(1, int(seen[tile].max())) // BLOCK) * BLOCK)
        # float64, rounded once: a repeated item must tie exactly wherever it stands (see `select_anchors`).
        yield tile, (query[:, tile].double() @ key64[..., :upto]).float()


def _searched_whole(n: int, top_k: int) -> bool:
    return n < 2 * BLOCK * top_k


def _best(relevance: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Positions of the top K of [B, T, N] relevances among the visible, -FAR where there are fewer: [B, T, <= K]."""
    n = relevance.shape[-1]
    if _searched_whole(n, top_k):
        ranked = sortable(relevance, visible)
        return places(largest(ranked, min(top_k, n)))
    return _best_in_blocks(relevance, visible, top_k)


def _best_in_blocks(relevance: Tensor, visible: Tensor, top_k: int) -> Tensor:
    n = relevance.shape[-1]
    least = int(visible.min()) // BLOCK * BLOCK  # what every query sees need not be masked
    hidden = torch.arange(least, n, device=relevance.device) >= visible[..., None]
    relevance[..., least:].masked_fill_(hidden, float("-inf"))
    blocks = F.pad(relevance, (0, -n % BLOCK), value=float("-inf")).view(*relevance.shape[:2], -1, BLOCK)
    some = -(-visible // BLOCK)
    chosen = largest(sortable(blocks.amax(-1), some), top_k)
    block = torch.where(chosen != LOWEST, chosen & 0xFFFFFFFF, 0)
    place = (block[..., None] * BLOCK + torch.arange(BLOCK, device=block.device)).flatten(-2)
    values = relevance.gather(-1, place.clamp(max=n - 1))
    allowed = (place < visible[..., None]) & (chosen != LOWEST).repeat_interleave(BLOCK, -1)
    ranked = sortable_at(values, place).masked_fill_(~allowed, LOWEST)
    return places(largest(ranked, top_k))


def _around(anchors: Tensor, visible: Tensor, n: int, sigma: float, slots: int) -> tuple[Tensor, Tensor]:
    """The first `slots` events by distance to their nearest anchor, of equal distance the more recent: [B, T, S] each.

    Weights fall with the distance, so this is the order of weights. An event in the middle of two anchors counts
    for the earlier one. Of descending anchors the events at one distance, first after then before each, descend too.
    """
    anchors = anchors.sort(-1, descending=True).values
    wanted = visible.clamp(max=slots)
    gap = anchors - F.pad(anchors[..., 1:], (0, 1), value=-FAR)
    above = F.pad(gap[..., :-1], (1, 0), value=FAR)
    places, real, weights = [anchors], [anchors >= 0], [1.0]
    found = real[0].sum(-1)
    for distance in range(1, min(math.ceil(3 * sigma), n - 1) + 1):
        level = gaussian_level(distance, sigma)
        if level == 0 or bool((found >= wanted).all()):
            break
        after, before = anchors + distance, anchors - distance
        owned = (above >= 2 * distance) & (after < visible[..., None]) & real[0]
        places.append(torch.stack([after, before], -1).flatten(-2))
        real.append(torch.stack([owned, (gap > 2 * distance) & (before >= 0)], -1).flatten(-2))
        weights.append(level)
        found = found + real[-1].sum(-1)
    sizes = torch.tensor([p.shape[-1] for p in places], device=anchors.device)
    level_of_place = torch.tensor(weights, device=anchors.device).repeat_interleave(sizes)
    return _compact(torch.cat(places, -1), level_of_place, torch.cat(real, -1), slots)


def _compact(place: Tensor, weight: Tensor, real: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The real ones of places [B, T, C] with weights [C], moved to the first slots in order: [B, T, S] each."""
    slot = (real.cumsum(-1) - 1).clamp_(max=slots).masked_fill_(~real, slots)
    index = place.new_zeros(*place.shape[:-1], slots + 1).scatter_(-1, slot, place)
    weights = weight.new_zeros(index.shape).scatter_(-1, slot, weight.expand_as(place))
    return index[..., :slots], weights[..., :slots]
