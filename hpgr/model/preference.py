"""What the user did with the past events that a candidate prefers: a neighbourhood model inside HPGR [D].

Shapes: B rows, M candidates, N history events, K anchors, D width, T sharpnesses, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.model.inputs import tiles
from hpgr.model.pgsa import Sessions, select_anchors
from hpgr.model.select import recent_first, select_anchors_in_tiles

SHARPEST, SOFTEST = 32.0, 2.0
"""Sharpnesses at the start lie between these: from the nearest few anchors alone to nearly all alike."""


class PreferenceFeatures(nn.Module):
    """Averages of the actions of a candidate's anchors, the nearer ones counting more, as a vector [D].

    For each of T learnt sharpnesses b: sum over anchors k of softmax_k(b s_k) e(action_k), with s_k the relevance that
    chose them (see `select_anchors`). Attention could express this through its values, but has to learn to compare
    item vectors first; here stage 1's comparison is there from the first step. It starts at zero.
    """

    def __init__(self, count: int, actions: int, width: int) -> None:
        super().__init__()
        ends = torch.tensor([SOFTEST, SHARPEST]).log()
        self.log_sharpness = nn.Parameter(torch.linspace(float(ends[0]), float(ends[1]), count))
        self.action = nn.Parameter(torch.zeros(count, actions, width))

    def forward(self, relevance: Tensor, action: Tensor, real: Tensor) -> Tensor:
        """Relevance, action and reality of each candidate's anchors, [B, M, K] each -> [B, M, D]."""
        logits = relevance[..., None, :] * self.log_sharpness.exp()[:, None]
        logits = logits.masked_fill(~real[..., None, :], torch.finfo(logits.dtype).min)
        share = logits.softmax(-1) * real[..., None, :]
        shares_of_actions = share @ F.one_hot(action, self.action.shape[1]).to(share.dtype)
        return torch.einsum("bmta,tad->bmd", shares_of_actions, self.action)


def nearest(
    query: Tensor, key: Tensor, visible: Tensor, top_k: int, impl: str, sessions: Sessions | None = None
) -> tuple[Tensor, Tensor]:
    """Anchors of queries by item vectors [B, M, D] and [B, N, D]: positions, and which are real, [B, M, K] each.

    The most recent comes first, as in `Kept`: sums over anchors must not depend on how they were found.
    """
    if impl == "reference":
        place, real = select_anchors(query, key, visible, top_k, sessions)
        return recent_first(torch.where(real, place, -1))
    return select_anchors_in_tiles(query, key, visible, top_k, sessions)


def relevance_of(query: Tensor, key: Tensor, place: Tensor) -> Tensor:
    """Dot products of queries [B, M, D] with the keys [B, N, D] at their places [B, M, K]: [B, M, K].

    In float32 under autocast too: bf16 makes ties of near ones, and scores are made without it.
    """
    parts = tiles(place.shape[0], place.shape[1], key.shape[1])
    with torch.autocast(query.device.type, enabled=False):
        return torch.cat([(query[:, t] @ key.transpose(1, 2)).gather(-1, place[:, t]) for t in parts], 1)
