"""The HSTU encoder in two streams that share weights: history, and candidates that read it.

Shapes: B rows, N history events, M candidates, Q queries (N or M), D width, H heads, E head width, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.attention import attention_shares, recomputed, training_attend
from hpgr.model.gather import Links, attend_kept
from hpgr.model.noise import Dropout, Noise
from hpgr.model.relation import Pairs, Relation

KeyValue = tuple[Tensor, Tensor]
SUMS_PAY = 2
"""Pairs for each sum of biases from which all sums are made first; measured on two cores."""


class RelativeBias(nn.Module):
    """Learnt bias by distance in events, by log-bucketed age, and for events with the query's own item [D]."""

    def __init__(self, heads: int, window: int, buckets: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(heads, window + 1) * 0.02)
        self.time = nn.Parameter(torch.randn(heads, buckets) * 0.02)
        self.match = nn.Parameter(torch.zeros(heads))
        self.own = nn.Parameter(torch.zeros(heads))

    def forward(self, p: Pairs) -> Tensor:
        """[B, H, Q, N], or [B, H, Q, S] for kept keys."""
        sums = 2 * self.position.numel() * self.time.shape[1]
        # An exported program is for shapes of any size, so it may not choose by them.
        if not torch.compiler.is_exporting() and p.distance.numel() * len(self.match) >= SUMS_PAY * sums:
            # Every sum that there may be, then one look at each pair: the same values as below, to the bit.
            both = (self.position[:, :, None] + self.time[:, None])[..., None]
            table = torch.cat([both, both + self.match[:, None, None, None]], -1)
            return table.flatten().index_select(0, p.code_of_heads.flatten()).view(p.code_of_heads.shape)
        matched = p.same[:, None] * self.match[:, None, None]
        return _lookup(self.position, p.distance) + _lookup(self.time, p.age) + matched


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    """table[h, index[b, q, n]] -> [B, H, Q, N]. A flat select: its gradient is 20 times cheaper
    than an embedding's."""
    heads, size = table.shape
    flat = index[:, None] + (torch.arange(heads, device=index.device) * size)[:, None, None]
    return table.reshape(-1).index_select(0, flat.reshape(-1)).view(flat.shape)


def _norm(width: int, research: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) if research else nn.LayerNorm(width)


class HstuLayer(nn.Module):
    """norm -> U, V, Q, K -> pointwise attention -> norm * U -> linear -> residual (arXiv 2402.17152).

    `model.hstu_form: research` is the layer of the authors' published research code: norms without gains, a projection
    without bias, SiLU on all four, dot products not scaled, sums divided by the constant window. `platform` [D] divides
    by what a query keeps, so that short histories and sparse attention speak as loudly as long and dense ones.
    """

    def __init__(self, config: Model, window: int) -> None:
        super().__init__()
        research = config.hstu_form == "research"
        self.heads, self.silu_all = config.heads, config.silu_on == "uvqk" or research
        self.gain = math.sqrt(config.width // config.heads) if research else 1.0
        self.divisor = window if research else None
        self.recompute = self.compiled = False
        self.norm, self.norm_out = _norm(config.width, research), _norm(config.width, research)
        self.project = nn.Linear(config.width, 4 * config.width, bias=not research)
        self.out = nn.Linear(config.width, config.width)
        self.bias = RelativeBias(config.heads, window, config.time_buckets)
        self.dropout = Dropout(config.dropout)

    def uvqk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, D] -> U [B, T, D] and V, Q, K [B, H, T, E]."""
        y = self.project(self.norm(x))
        u, v, q, k = (F.silu(y) if self.silu_all else y).chunk(4, -1)
        u = u if self.silu_all else F.silu(u)
        v, q, k = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (v, q, k))
        return u, v, q * self.gain, k

    def update(
        self,
        x: Tensor,
        uvqk: tuple[Tensor, ...],
        history_kv: KeyValue,
        r: Relation,
        noise: Noise | None,
        stream: int,
    ) -> Tensor:
        """One residual step of a stream's tokens [B, Q, D], reading the history's keys and values."""
        u, v, q, k = uvqk
        mixed = recomputed(self._mixed, self.recompute)(q, history_kv, (k, v), r)
        if self.divisor is not None:
            kept = r.weights.weight if isinstance(r.weights, Links) else r.weights
            mixed = mixed * ((1 + kept.sum(-1)) / self.divisor)[:, None, :, None]
        mixed = self.norm_out(mixed.transpose(1, 2).flatten(2)) * u
        return x + self.dropout(self.out(mixed), noise, stream)

    def _mixed(self, q: Tensor, history_kv: KeyValue, own: KeyValue, r: Relation) -> Tensor:
        """Attention of queries [B, H, Q, E] with keys and values of their own, in the form that the relation is in."""
        if r.pairs is None:
            from hpgr.model.fused import attend_fused  # needs triton

            assert isinstance(r.weights, Links)
            return attend_fused(q, *history_kv, own, self.bias, r.weights)
        bias = self.bias(r.pairs)
        if isinstance(r.weights, Links):
            return attend_kept(q, *history_kv, own, bias, self.bias.own, r.weights)
        return training_attend(self.compiled)(q, *history_kv, own, bias, self.bias.own, r.weights)

    def shares(self, uvqk: tuple[Tensor, ...], history_kv: KeyValue, r: Relation) -> Tensor:
        """Share of each history event in a query's attention, mean over heads: [B, Q, N]."""
        assert isinstance(r.weights, Tensor), "shares need the weights of all events"
        assert r.pairs is not None
        _, _, q, k = uvqk
        return attention_shares(q, history_kv[0], k, self.bias(r.pairs), self.bias.own, r.weights).mean(1)


class HstuEncoder(nn.Module):
    """Layers over both streams: histories are encoded once, candidates read them and never one another."""

    def __init__(self, config: Model, window: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HstuLayer(config, window) for _ in range(config.layers))

    def encode(self, h: Tensor, relation: Relation, noise: Noise | None) -> Iterator[KeyValue]:
        """History [B, N, D] -> what each layer shows of it: keys and values, [B, H, N, E] each.

        Lazy, so that in training both streams go through a layer before the next one begins: gradients are then
        summed in one order, whoever calls.
        """
        for i, layer in enumerate(cast("list[HstuLayer]", self.layers)):
            own = layer.uvqk(h)
            shown = (own[3], own[1])
            yield shown
            if i + 1 < len(self.layers):
                h = layer.update(h, own, shown, relation, noise, 0)

    def outputs(self, h: Tensor, relation: Relation, noise: Noise | None) -> Tensor:
        """History [B, N, D] after all layers: [B, N, D]."""
        for layer in cast("list[HstuLayer]", self.layers):
            own = layer.uvqk(h)
            h = layer.update(h, own, (own[3], own[1]), relation, noise, 0)
        return h

    def read(
        self,
        c: Tensor,
        shown: Iterable[tuple[Tensor, ...]],
        relation: Relation,
        noise: Noise | None,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """Candidates [B, M, D] read encoded histories -> encoded candidates [B, M, D].

        A list given as `shares` gets each layer's attention shares, [B, M, N] (see `HstuLayer.shares`).
        """
        for layer, (key, value) in zip(cast("list[HstuLayer]", self.layers), shown, strict=True):
            own, history_kv = layer.uvqk(c), (key, value)
            if shares is not None:
                shares.append(layer.shares(own, history_kv, relation))
            c = layer.update(c, own, history_kv, relation, noise, 1)
        return c
