"""Pointwise attention over kept keys alone: the fast version of `attention.attend`, in time and memory linear in them.

Shapes: B rows, H heads, Q queries, N history events, E head width, S slots for kept keys, P pairs in use.

Kept keys are a sparse matrix of queries by keys, the same in every layer and head. Three products are enough: dot
products of queries with kept keys (`_dots`), sums of keys for queries, and, with the pairs in order of keys, sums of
queries for keys. Sparse kernels of torch do each without copying keys out, and add up a row in a fixed order.

Every query has all its slots, in use or not: a value's place then depends on shapes alone, and with it, to the last
bit, what vectorised functions make of it. Scores so cannot depend on how many keys another query keeps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once that compressed rows are in beta
    torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1), check_invariants=False)


GATHER_FROM = 256
"""Events of a padded history from which `auto` gathers..."""
GATHER_SHARE = 4
"""... and how many times the slots of a query they must be. Both measured on two cores; shorter is as fast or faster
with weights over the whole history."""


def gather_pays(n: int, slots: int, device: torch.device) -> bool:
    """What `pgsa.impl: auto` asks on a CPU: do histories of N events, with so many slots a query, attend faster by kept
    pairs?"""
    return device.type == "cpu" and n >= max(GATHER_FROM, GATHER_SHARE * slots)


@dataclass(frozen=True)
class Links:
    """Kept keys of B rows of Q queries over histories of N events, the same in every layer and head.

    `index` and `weight` [B, Q, S] as in `select.Kept`, weight 0 where a slot is unused. `code` [B, Q, S] is what
    Triton's kernels look biases up by (see `Pairs.code`); without it torch attends.
    """

    index: Tensor
    weight: Tensor
    events: int
    heads: int
    code: Tensor | None = None

    @cached_property
    def key(self) -> Tensor:
        """As one block-diagonal matrix of all rows and heads: places (b H + h) N + j, [B H Q, S]."""
        rows, queries, slots = self.index.shape
        block = torch.arange(rows * self.heads, device=self.index.device).view(rows, self.heads, 1, 1) * self.events
        return (self.index[:, None] + block).view(rows * self.heads * queries, slots)

    @cached_property
    def start(self) -> Tensor:
        """Where the slots of each query begin: [B H Q + 1]."""
        return torch.arange(len(self.key) + 1, device=self.key.device) * self.key.shape[1]

    @cached_property
    def by_key(self) -> ByKey:
        """The pairs in use in order of keys, of all heads; made for gradients alone."""
        used = (self.weight > 0).repeat_interleave(self.heads, 0).flatten().nonzero()[:, 0]
        key = self.key.flatten()[used]
        order = used[torch.sort(key, stable=True).indices]
        count = torch.bincount(key, minlength=len(self.index) * self.heads * self.events)
        return ByKey(order, order // self.key.shape[1], count.cumsum(0) - count)

    @cached_property
    def by_event(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one head, all int32: of the slots in order of events, the places [B Q S] among the slots of a
        row, and their queries; where each of the B N events begins there and the last one ends, [B N + 1]. Unused
        slots come after that. Nothing here waits for a GPU."""
        (rows, queries, slots), keys = self.index.shape, len(self.index) * self.events
        block = torch.arange(rows, device=self.index.device)[:, None, None] * self.events
        event = torch.where(self.weight > 0, self.index + block, keys).flatten().to(torch.int32)
        ordered = torch.sort(event, stable=True)
        place = (ordered.indices % (queries * slots)).to(torch.int32)
        every = torch.arange(keys + 1, device=event.device, dtype=torch.int32)
        return place, place // slots, torch.searchsorted(ordered.values, every, out_int32=True)


@dataclass(frozen=True)
class ByKey:
    """Places of pairs among all slots, `order` [P], and their queries [P], by key; where each key begins [B H N]."""

    order: Tensor
    query: Tensor
    start: Tensor


def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    self_kv: tuple[Tensor, Tensor],
    bias: Tensor,
    self_bias: Tensor,
    links: Links,
) -> Tensor:
    """`attend` over kept keys. Arguments as there, but for two in index form.

    Args:
        bias: [B, H, Q, S] relative bias of kept keys.
        links: kept keys with their weights.

    Returns:
        [B, H, Q, E].
    """
    scale = 1 / math.sqrt(q.shape[-1])
    g = links.weight[:, None]
    dots = _Dots.apply(_flat(q), _flat(k), links).view(bias.shape)  # type: ignore[no-untyped-call]
    kept = F.silu(dots * scale + bias) * g
    own = F.silu((q * self_kv[0]).sum(-1, keepdim=True) * scale + self_bias[:, None, None])
    mixed = _Sums.apply(kept.view(links.key.shape), _flat(v), links).view(q.shape)  # type: ignore[no-untyped-call]
    return (mixed + own * self_kv[1]) / (1 + g.sum(-1, keepdim=True))


def _flat(x: Tensor) -> Tensor:
    """[B, H, T, E] -> [B H T, E], in float32 at least: the kernels know no less."""
    return x.flatten(0, 2).to(torch.promote_types(x.dtype, torch.float32))


def _dots(q: Tensor, k: Tensor, links: Links) -> Tensor:
    """<q, k> of every slot: [B H Q, E], [B H N, E] -> [B H Q, S]."""
    pattern = torch.sparse_csr_tensor(
        links.start, links.key.flatten(), q.new_zeros(links.key.numel()), (len(q), len(k)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, q, k.T, beta=0.0).values().view(links.key.shape)


def _sums_of_keys(a: Tensor, k: Tensor, links: Links) -> Tensor:
    """sum_s a_s k_s: [B H Q, S], [B H N, E] -> [B H Q, E]."""
    return F.embedding_bag(links.key, k, mode="sum", per_sample_weights=a)


def _sums_of_queries(a: Tensor, q: Tensor, links: Links) -> Tensor:
    """The same for keys, over the queries that keep them: [B H Q, S], [B H Q, E] -> [B H N, E]."""
    by = links.by_key
    return F.embedding_bag(by.query, q, by.start, mode="sum", per_sample_weights=a.flatten()[by.order])


class _Dots(torch.autograd.Function):
    """Dot products of queries with kept keys: q [B H Q, E], k [B H N, E] -> [B H Q, S]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, links: Links) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.links = links
        return _dots(q, k, links)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (q, k), links = ctx.saved_tensors, ctx.links
        return _sums_of_keys(grad, k, links), _sums_of_queries(grad, q, links), None


class _Sums(torch.autograd.Function):
    """Values of kept keys summed for their queries: a [B H Q, S], v [B H N, E] -> [B H Q, E]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, v: Tensor, links: Links) -> Tensor:
        ctx.save_for_backward(a, v)
        ctx.links = links
        return _sums_of_keys(a, v, links)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, v), links, grad = ctx.saved_tensors, ctx.links, grad.contiguous()
        return _dots(grad, v, links), _sums_of_queries(a, grad, links), None
