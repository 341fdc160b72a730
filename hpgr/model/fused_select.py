"""PGSA's choice of keys as Triton kernels: what `select.select_keys` does, for GPUs.

Shapes: B rows, Q queries, N history events, D item vector width, K anchors, S slots, T queries of a tile, M survivors.

A product of all pairs in float64 is what takes longest there, so relevances are screened first: a tensor-core product
in half precision, kept in 16 bits for a tile of queries (`_screen`). Of a query the best M = K + MARGIN blocks of
events survive (`_best_blocks`), of their events the best M (`_best_events`), and of these the K anchors are chosen by
relevances as exact as the reference's (`_choose`). What differs from the reference [D]: screened relevances are off by
4e-5 as a rule, so an anchor is missed where over MARGIN blocks, or events, that deserve less come as near. Equal
vectors screen equal wherever they stand and whatever the batch, and the more recent goes first throughout.

Import needs triton; kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hpgr.errors import ConfigError
from hpgr.model.pgsa import gaussian_level
from hpgr.model.select import FUSED_ANCHORS, FUSED_EVENTS

MARGIN = 16
"""Blocks, and events, that survive the screening beyond the K that are wanted."""
EVENTS = 16
"""Events of a block."""
TILE_Q, TILE_N, TILE_D = 64, 128, 64
"""Queries, events and dimensions that a program takes at a time; measured on an H100."""
SCREENED = 1 << 27
"""Most screened relevances alive at once (256 MB)."""


@triton.jit
def _screen(query, key, visible, values, best, first, tile, queries, n, padded,
            D: tl.constexpr, EVENTS: tl.constexpr,
            TILE_Q: tl.constexpr, TILE_N: tl.constexpr, TILE_D: tl.constexpr):  # fmt: skip
    """Relevances in 16 bits, and the best of each block, of TILE_Q queries and TILE_N events."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    j = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    there = (t < tile) & (first + t < queries)
    query, key = query + (b * queries + first) * D, key + b * n * D
    seen = tl.load(visible + b * queries + first + t, mask=there, other=0).to(tl.int32)
    if tl.max(seen, 0) > tl.program_id(0) * TILE_N:
        product = tl.zeros([TILE_Q, TILE_N], tl.float32)
        for start in range(0, D, TILE_D):
            d = start + tl.arange(0, TILE_D)
            q = tl.load(query + t[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            k = tl.load(key + j[None, :] * D + d[:, None], mask=(j < n)[None, :] & (d < D)[:, None], other=0.0)
            product = tl.dot(q, k, product)
        product = tl.minimum(tl.maximum(product * 32766, -32766), 32766)
        value = tl.where(j[None, :] < seen[:, None], product, -32767).to(tl.int16)
        values, best = values + b * tile * padded, best + b * tile * (padded // EVENTS)
        tl.store(values + t[:, None] * padded + j[None, :], value, mask=there[:, None])
        highest = tl.max(tl.reshape(value, [TILE_Q, TILE_N // EVENTS, EVENTS]), 2)
        block = tl.program_id(0) * (TILE_N // EVENTS) + tl.arange(0, TILE_N // EVENTS)
        tl.store(best + t[:, None] * (padded // EVENTS) + block[None, :], highest, mask=there[:, None])


@triton.jit
def _keep_largest(value, count, out):
    """Places of the `count` largest of 16-bit values, none of 0, of equal ones the later; ascending, to `out`."""
    least = 0
    for step in range(16):
        higher = least | (1 << (15 - step))
        least = tl.where(tl.sum((value >= higher).to(tl.int32), 0) >= count, higher, least)
    least = tl.maximum(least, 1)
    above, equal = (value > least).to(tl.int32), (value == least).to(tl.int32)
    later = tl.sum(equal, 0) - tl.cumsum(equal, 0)
    kept = above + equal * (later < count - tl.sum(above, 0)).to(tl.int32)
    tl.store(out + tl.cumsum(kept, 0) - 1, tl.arange(0, value.shape[0]), mask=kept > 0)


@triton.jit
def _best_blocks(visible, best, out, first, tile, queries, padded, count,
                 EVENTS: tl.constexpr, BLOCKS: tl.constexpr, SURVIVORS: tl.constexpr):  # fmt: skip
    """The blocks whose best relevances are the `count` largest, of equal ones the more recent; ascending, -1 beyond."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, block = b * tile + t, tl.arange(0, BLOCKS)
    there = block * EVENTS < tl.load(visible + b * queries + first + t)
    value = tl.load(best + row * (padded // EVENTS) + block, mask=there, other=-32767).to(tl.int32) + 32767
    out += row * SURVIVORS
    tl.store(out + tl.arange(0, SURVIVORS), tl.full([SURVIVORS], -1, tl.int32))
    tl.debug_barrier()
    _keep_largest(value, count, out)


@triton.jit
def _best_events(visible, values, blocks, out, first, tile, queries, padded, count,
                 EVENTS: tl.constexpr, SURVIVORS: tl.constexpr):  # fmt: skip
    """Of the events of these blocks, places (block's slot and event) of the `count` best by screened relevance."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, place = b * tile + t, tl.arange(0, SURVIVORS * EVENTS)
    block = tl.load(blocks + row * SURVIVORS + place // EVENTS)
    j = block * EVENTS + place % EVENTS
    there = (block >= 0) & (j < tl.load(visible + b * queries + first + t))
    value = tl.load(values + row * padded + j, mask=there, other=-32767).to(tl.int32) + 32767
    out += row * SURVIVORS
    tl.store(out + tl.arange(0, SURVIVORS), tl.full([SURVIVORS], -1, tl.int32))
    tl.debug_barrier()
    _keep_largest(value, count, out)


@triton.jit
def _choose(query, key, blocks, places, anchors, first, tile, queries, n, top_k,
            D: tl.constexpr, EVENTS: tl.constexpr, SURVIVORS: tl.constexpr, TILE_D: tl.constexpr):  # fmt: skip
    """The K survivors of largest relevance (float64, rounded once), the most recent first; -1 where there are fewer."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, s = b * tile + t, tl.arange(0, SURVIVORS)
    place = tl.load(places + row * SURVIVORS + s)
    real = place >= 0
    j = tl.load(blocks + row * SURVIVORS + place // EVENTS, mask=real, other=0) * EVENTS + place % EVENTS
    product = tl.zeros([SURVIVORS], tl.float64)
    for start in range(0, D, TILE_D):
        d = start + tl.arange(0, TILE_D)
        q = tl.load(query + (b * queries + first + t) * D + d, mask=d < D, other=0.0).to(tl.float64)
        k = tl.load(key + (b * n + j)[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        product += tl.sum(k.to(tl.float64) * q[None, :], 1)
    bits = (product.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    ranked = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | j
    ahead = tl.sum(((ranked[None, :] > ranked[:, None]) & real[None, :]).to(tl.int32), 1)
    kept = (real & (ahead < top_k)).to(tl.int32)
    out = anchors + (b * queries + first + t) * top_k
    tl.store(out + tl.sum(kept, 0) - tl.cumsum(kept, 0), j, mask=kept > 0)


@triton.jit
def _spread(anchors, visible, level, index, weight, top_k, slots, radius, ANCHORS: tl.constexpr):
    """The first `slots` events by distance to their nearest anchor, as `select._around` has them. A program a query."""
    r, a = tl.program_id(0).to(tl.int64), tl.arange(0, ANCHORS)
    seen, own = tl.load(visible + r), anchors + r * top_k + a
    anchor = tl.load(own, mask=a < top_k, other=-1)
    real = anchor >= 0
    newer = tl.load(own - 1, mask=(a > 0) & (a < top_k), other=1 << 30)
    older = tl.load(own + 1, mask=a + 1 < top_k, other=-1)
    older = tl.where(older < 0, -(1 << 30), older)
    index, weight, found = index + r * slots, weight + r * slots, tl.sum(real.to(tl.int32), 0)
    tl.store(index + a, anchor.to(tl.int64), mask=real & (a < slots))
    tl.store(weight + a, tl.full([ANCHORS], 1.0, tl.float32), mask=real & (a < slots))
    for distance in range(1, radius + 1):
        after, before = anchor + distance, anchor - distance
        has_after = (real & (newer - anchor >= 2 * distance) & (after < seen)).to(tl.int32)
        has_before = (real & (anchor - older > 2 * distance) & (before >= 0)).to(tl.int32)
        place = found + tl.cumsum(has_after + has_before, 0) - has_before
        w = tl.zeros([ANCHORS], tl.float32) + tl.load(level + distance)
        tl.store(index + place - 1, after.to(tl.int64), mask=(has_after > 0) & (place <= slots))
        tl.store(weight + place - 1, w, mask=(has_after > 0) & (place <= slots))
        tl.store(index + place, before.to(tl.int64), mask=(has_before > 0) & (place < slots))
        tl.store(weight + place, w, mask=(has_before > 0) & (place < slots))
        found += tl.sum(has_after + has_before, 0)


def choose_anchors(query: Tensor, key: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Anchors of each query, the most recent first: [B, Q, K] int32, -1 where there are fewer.

    Args:
        query: [B, Q, D] item vectors of the queries, of any length.
        key: [B, N, D] item vectors of the history, of length 1 at most: longer ones screen alike.
        visible: [B, Q] how many events of the history are strictly past.
        top_k: K.

    Raises:
        ConfigError: more events or anchors than can be ranked.
    """
    (rows, queries, width), n = query.shape, key.shape[1]
    if n > FUSED_EVENTS or top_k > FUSED_ANCHORS:
        raise ConfigError(
            f"model.pgsa.impl triton: got {n} events and top_k {top_k}, expected at most {FUSED_EVENTS} and "
            f"{FUSED_ANCHORS}; use model.pgsa.impl=gather there"
        )
    anchors = torch.full((rows, queries, top_k), -1, dtype=torch.int32, device=key.device)
    if not n * queries * rows:
        return anchors
    query, key, visible = query.contiguous(), key.contiguous(), visible.contiguous()
    half_query, half_key = F.normalize(query, dim=-1).half(), key.half()  # a query's length changes no order
    count, padded = top_k + MARGIN, triton.cdiv(n, TILE_N) * TILE_N
    survivors = triton.next_power_of_2(count)
    tile = max(TILE_Q, min(queries, SCREENED // (rows * padded)))
    values = torch.empty(rows, tile, padded, dtype=torch.int16, device=key.device)
    best = values.new_empty(rows, tile, padded // EVENTS)
    blocks, places = (anchors.new_empty(rows, tile, survivors) for _ in range(2))
    with torch.cuda.device_of(key):  # Triton launches on the current device, wherever the tensors are
        for first in range(0, queries, tile):
            here, of = min(tile, queries - first), (first, tile, queries)
            _screen[(padded // TILE_N, triton.cdiv(here, TILE_Q), rows)](
                half_query, half_key, visible, values, best, *of, n, padded,
                D=width, EVENTS=EVENTS, TILE_Q=TILE_Q, TILE_N=TILE_N, TILE_D=TILE_D,
            )  # fmt: skip
            _best_blocks[(here, rows)](
                visible, best, blocks, *of, padded, count, EVENTS=EVENTS,
                BLOCKS=triton.next_power_of_2(padded // EVENTS), SURVIVORS=survivors,
            )  # fmt: skip
            _best_events[(here, rows)](
                visible, values, blocks, places, *of, padded, count, EVENTS=EVENTS, SURVIVORS=survivors
            )
            _choose[(here, rows)](
                query, key, blocks, places, anchors, *of, n, top_k,
                D=width, EVENTS=EVENTS, SURVIVORS=survivors, TILE_D=TILE_D,
            )  # fmt: skip
    return anchors


def spread_anchors(anchors: Tensor, visible: Tensor, n: int, sigma: float, slots: int) -> tuple[Tensor, Tensor]:
    """Kept keys around anchors, [B, Q, S] int64, and their weights, float32; weight 0 and index 0 where unused."""
    levels = [1.0, *(gaussian_level(d, sigma) for d in range(1, min(math.ceil(3 * sigma), n - 1) + 1))]
    levels = [level for level in levels if level > 0]
    index = torch.zeros(*visible.shape, slots, dtype=torch.int64, device=anchors.device)
    weight = torch.zeros(index.shape, device=anchors.device)
    if not index.numel():
        return index, weight
    level = torch.tensor(levels, device=anchors.device)
    top_k = anchors.shape[-1]
    with torch.cuda.device_of(anchors):
        _spread[(visible.numel(),)](
            anchors, visible.contiguous(), level, index, weight, top_k, slots, len(levels) - 1,
            ANCHORS=triton.next_power_of_2(top_k),
        )  # fmt: skip
    return index, weight
