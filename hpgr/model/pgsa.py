"""Preference-Guided Sparse Attention: which past events a query attends to, and how much (paper, stage 2).

The closed form is ours [D]: anchors are the K visible events whose item vectors are nearest the query's;
an event's weight is its best Gaussian around an anchor, cut off beyond r = ceil(3 sigma). A query so keeps at most
K (2 r + 1) events; `max_keys` keeps the largest of their weights alone. Of very long histories sessions may be chosen
first, anchors inside them. The readable reference; `select.py` is the fast version in index form.

Shapes: B rows, Q queries, N history events, D item vector width, K anchors, S sessions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = torch.iinfo(torch.int64).min


def visible_mask(visible: Tensor, n: int) -> Tensor:
    """Dense attention's weights: 1 for each strictly past event. [B, Q] counts -> [B, Q, N] booleans."""
    return torch.arange(n, device=visible.device) < visible[..., None]


class Sessions(NamedTuple):
    """Anchors come from sessions chosen first: the sessions of the history's events, [B, N] numbers that differ where
    a new one begins, and how many past ones a query looks into beside the last that it sees."""

    number: Tensor
    past: int


def select_anchors(
    query: Tensor, key: Tensor, visible: Tensor, top_k: int, sessions: Sessions | None = None
) -> tuple[Tensor, Tensor]:
    """The `top_k` visible events of largest dot product with each query; ties go to the more recent.

    Args:
        query: [B, Q, D] item vectors of the queries. No gradient flows through the choice.
        key: [B, N, D] item vectors of the history.
        visible: [B, Q] how many events of the history are strictly past.
        top_k: anchors a query.
        sessions: from which anchors come, or None: from all visible events.

    Returns:
        positions [B, Q, K] in the history and whether each is a real anchor (fewer may be visible).
    """
    with torch.no_grad():
        # float64, rounded once by `sortable`: a float32 product may differ in its last bit with the column's place
        # and the batch's shape, and bf16 autocast would make ties of near values; a repeated item must tie exactly.
        ranked = sortable(query.double() @ key.double().transpose(1, 2), visible)
        if sessions is not None:
            ranked.masked_fill_(~in_near_sessions(query, key, visible, sessions), LOWEST)
        best = ranked.topk(min(top_k, key.shape[1]), dim=-1).values
        return best & 0xFFFFFFFF, best != LOWEST


def in_near_sessions(query: Tensor, key: Tensor, visible: Tensor, sessions: Sessions) -> Tensor:
    """Events from which anchors may come where sessions are chosen first [D]: [B, Q, N] booleans, visible or not.

    They are those of the session of the query's last visible event, and of the `past` earlier sessions whose mean item
    vectors have the largest dot product with the query; ties go to the more recent session. Only sessions before that
    of the last visible event are compared: they are wholly past, whatever comes at or after the query's time. Whether
    the last one goes on only the future tells, so it takes part either way. Arguments as of `select_anchors`.
    """
    place = session_places(sessions.number)
    n = place.shape[1]
    last = last_session(place, visible)
    mean, _ = session_means(key, place, n)  # room for as many sessions as events: an exported program knows no number
    best = sortable(query.double() @ mean.transpose(1, 2), last).topk(min(sessions.past, n), dim=-1).values
    near = torch.zeros(*visible.shape, n + 1, dtype=torch.bool, device=key.device)
    near.scatter_(-1, torch.where(best != LOWEST, best & 0xFFFFFFFF, n), True)
    return near.gather(-1, place[:, None].expand(-1, visible.shape[1], -1)) | (place[:, None] == last[..., None])


def session_places(number: Tensor) -> Tensor:
    """Sessions counted from 0 along each row, [B, N]. Padding, whatever its number, is of the last one or after it."""
    return F.pad(number[:, 1:] != number[:, :-1], (1, 0)).cumsum(1)


def last_session(place: Tensor, visible: Tensor) -> Tensor:
    """Session of each query's last visible event, so how many are before it: [B, Q]; 0 where nothing is visible."""
    return place.gather(1, (visible - 1).clamp(0, place.shape[1] - 1))


def session_means(key: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean vector of each of `count` sessions, [B, S, D] float64, and how many events it has, [B, S].

    Sums of float32 vectors in float64 are as good as exact, so that sessions of the same events tie.
    """
    rows, _, width = key.shape
    size = place.new_zeros(rows, count).scatter_add_(1, place, torch.ones_like(place))
    total = torch.zeros(rows, count, width, dtype=torch.float64, device=key.device)
    total.scatter_add_(1, place[..., None].expand(-1, -1, width), key.double())
    return total / size.clamp(min=1)[..., None], size


def sortable(relevance: Tensor, visible: Tensor) -> Tensor:
    """Relevance and position as one integer whose order is (relevance, position): [B, Q, N] int64.

    Exact for float32, so equal relevances are told apart by recency alone; invisible events sort lowest.
    """
    place = torch.arange(relevance.shape[-1], device=relevance.device)
    return sortable_at(relevance, place).masked_fill_(place >= visible[..., None], LOWEST)


def sortable_at(relevance: Tensor, place: Tensor) -> Tensor:
    """The same of relevances whose positions are given, any shape."""
    return (ordered_bits(relevance) << 32) | place


def ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of float32 values, any shape: int64 of 32 bits."""
    bits = (values.float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # negative: all bits but the sign's turn


def gaussian_weights(anchors: Tensor, real: Tensor, visible: Tensor, n: int, sigma: float) -> Tensor:
    """Weight of every event for every query: max over anchors p of exp(-(j - p)^2 / (2 sigma^2)).

    Zero beyond ceil(3 sigma) events from all anchors and for events that are not visible. sigma = 0 keeps the
    anchors alone.

    Args:
        anchors: [B, Q, K] positions.
        real: [B, Q, K] which of them count.
        visible: [B, Q] strictly past events.
        n: history length N.
        sigma: width in events.

    Returns:
        [B, Q, N] float32 weights in [0, 1].
    """
    with torch.no_grad():
        is_anchor = torch.zeros(*visible.shape, n + 1, device=visible.device)
        is_anchor.scatter_(-1, torch.where(real, anchors, n), 1.0)
        centre = is_anchor[..., :n]
        weights = centre.clone()
        for offset in range(1, min(math.ceil(3 * sigma), n - 1) + 1):
            level = gaussian_level(offset, sigma)
            weights[..., offset:].clamp_(min=centre[..., :-offset] * level)
            weights[..., :-offset].clamp_(min=centre[..., offset:] * level)
        return weights * visible_mask(visible, n)


def gaussian_level(distance: int, sigma: float) -> float:
    """Weight of an event at this distance (1 or more) from its nearest anchor, as float32 holds it."""
    return float(np.float32(math.exp(-(distance**2) / (2 * sigma**2))))


def cap_weights(weights: Tensor, max_keys: int | None) -> Tensor:
    """At most `max_keys` of each query's weights, the largest; ties go to the more recent. [B, Q, N] -> [B, Q, N]."""
    n = weights.shape[-1]
    if max_keys is None:
        return weights
    if torch.compiler.is_exporting():  # histories may be shorter than the cap, or longer: there is room for it
        weights = F.pad(weights, (0, max_keys))
    elif max_keys >= n:
        return weights
    everything = torch.full(weights.shape[:-1], weights.shape[-1], device=weights.device)
    kept = sortable(weights, everything).topk(max_keys, dim=-1).indices
    return torch.zeros_like(weights).scatter_(-1, kept, weights.gather(-1, kept))[..., :n]
