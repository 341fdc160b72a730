"""MTGR (arXiv 2505.18654): HSTU-like blocks over typed tokens, with a norm of its own for each type.

Token types: history, real-time history, candidates with cross features. The paper's dynamic mask lets history tokens
see each other and be seen by all, real-time events be seen by later tokens only, candidates by themselves only. A
user's samples share one history (user-level grouping). The paper cuts history from real-time by the moment at which
features are made; a log has no such moment, so here a session is real-time while it is open and history once it has
closed [D]: a query sees closed sessions in a form that looks both ways over all sessions up to their own, and its own
session in a form that looks back only. Both forms depend on the past alone. User features are in the tokens of both
streams, as of their time [D]. Relative bias as in HSTU, on which MTGR is built.

Shapes: B rows, N history events, M candidates, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config, Model
from hpgr.model.attention import recomputed, training_attend
from hpgr.model.base import Past, TokenClick
from hpgr.model.embedding import Sizes
from hpgr.model.hstu import KeyValue, RelativeBias
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Dropout, Noise, number_sites
from hpgr.model.pgsa import visible_mask
from hpgr.model.relation import Pairs, relate
from hpgr.schema import SECOND

HISTORY, REAL_TIME, CANDIDATE = 0, 1, 2


class GroupLayerNorm(nn.Module):
    """LayerNorm with a gain and a bias for each token type."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(groups, width)), nn.Parameter(torch.zeros(groups, width))

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Tokens [B, T, D] of one type."""
        return F.layer_norm(x, x.shape[-1:], self.gain[group], self.bias[group])


class MtgrBlock(nn.Module):
    """norm -> K, Q, V, U -> SiLU(Q K + bias) / tokens present, masked -> gate by U -> norm -> MLP -> residual."""

    def __init__(self, config: Model, window: int) -> None:
        super().__init__()
        width, hidden = config.width, config.mtgr.mlp_ratio * config.width
        self.heads, self.recompute, self.compiled = config.heads, False, False
        self.norm, self.norm_out = GroupLayerNorm(3, width), GroupLayerNorm(3, width)
        self.project = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.bias = RelativeBias(config.heads, window, config.time_buckets)
        self.dropouts = nn.ModuleList(Dropout(config.dropout) for _ in range(3))

    def uvqk(self, x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, D] -> U [B, T, D] and V, Q, K [B, H, T, E]."""
        y: Tensor = F.silu(self.project(self.norm(x, group)))
        u, v, q, k = y.chunk(4, -1)
        v, q, k = (z.view(*z.shape[:2], self.heads, -1).transpose(1, 2) for z in (v, q, k))
        return u, v, q, k

    def update(
        self,
        x: Tensor,
        uvqk: tuple[Tensor, ...],
        keys: KeyValue,
        bias: Tensor,
        weights: Tensor,
        noise: Noise | None,
        group: int,
    ) -> Tensor:
        """One residual step of the tokens [B, Q, D] of a type. `bias` [B, H, Q, N]; `keys` and `weights` may have the
        history twice (both forms)."""
        u, v, q, k = uvqk
        bias = bias if keys[0].shape[2] == bias.shape[-1] else torch.cat([bias, bias], -1)
        attend = recomputed(training_attend(self.compiled), self.recompute)
        mixed = attend(q, *keys, (k, v), bias, self.bias.own, weights)
        mixed = mixed.transpose(1, 2).flatten(2)
        return x + self.dropouts[group](self.mlp(self.norm_out(mixed * u, group)), noise)


class MtgrClick(TokenClick):
    """MTGR over a timeline with impressions at many moments."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.gap = config.stream.session_gap_minutes * 60 * SECOND
        self.blocks = nn.ModuleList(MtgrBlock(config.model, config.stream.window) for _ in range(config.model.layers))
        number_sites(self)

    def past(self, x: Inputs, noise: Noise | None) -> Past:
        return Past(self._shown(x, noise))

    def _shown(self, x: Inputs, noise: Noise | None) -> Iterator[KeyValue]:
        """Keys and values of each block, [B, H, 2 N, E] each: all events as history, then all as real-time."""
        closed = live = self.events.history(x, noise)
        pairs, sees = self._relation(x, x.h_item, x.h_time, x.h_visible, closed_mask(x))
        live_sees = torch.cat(live_masks(x, *self._of_events(x)), -1).to(torch.float32)
        blocks = cast("list[MtgrBlock]", self.blocks)
        for i, block in enumerate(blocks):
            own, own_live = block.uvqk(closed, HISTORY), block.uvqk(live, REAL_TIME)
            keys = (torch.cat([own[3], own_live[3]], 2), torch.cat([own[1], own_live[1]], 2))
            yield keys
            if i + 1 < len(blocks):
                bias = block.bias(pairs)
                closed = block.update(closed, own, (own[3], own[1]), bias, sees, noise, HISTORY)
                live = block.update(live, own_live, keys, bias, live_sees, noise, REAL_TIME)

    def encoded(self, past: Past, x: Inputs, noise: Noise | None, shares: list[Tensor] | None = None) -> Tensor:
        """As in `TokenClick`; it has no attention shares to show."""
        assert shares is None, "attention shares are shown for hstu and hpgr"
        c = self.candidates(x, noise)
        weights = torch.cat(live_masks(x, *self._of_candidates(x)), -1)
        pairs, sees = self._relation(x, x.c_item, x.c_time, x.c_visible, weights)
        for block, (key, value) in zip(cast("list[MtgrBlock]", self.blocks), past.shown, strict=True):
            own = block.uvqk(c, CANDIDATE)
            c = block.update(c, own, (key, value), block.bias(pairs), sees, noise, CANDIDATE)
        return c

    def _relation(self, x: Inputs, item: Tensor, time: Tensor, visible: Tensor, sees: Tensor) -> tuple[Pairs, Tensor]:
        relation = relate(x, item, time, visible, sees, self.config, self.window)
        assert isinstance(relation.weights, Tensor)
        assert relation.pairs is not None
        return relation.pairs, relation.weights

    def _of_events(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Visible events and open session of each history event."""
        return x.h_visible, x.h_session

    def _of_candidates(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Visible events and open session of each candidate: that of the last visible event, or one after it if the
        candidate's second begins more than a session gap later. Events inside that second, which it does not see, are
        then past the gap, too, so that a session that is closed holds none of them."""
        last = (x.c_visible - 1).clamp(min=0)
        over = x.c_time // SECOND * SECOND - x.h_time.gather(1, last) > self.gap
        return x.c_visible, x.h_session.gather(1, last) + over.long()


def closed_mask(x: Inputs) -> Tensor:
    """What an event sees in history form: all events of sessions up to its own but itself: [B, N, N]."""
    n = x.h_item.shape[1]
    upto = x.h_session[:, None, :] <= x.h_session[:, :, None]
    return upto & x.h_real[:, None, :] & ~torch.eye(n, dtype=torch.bool, device=upto.device)


def live_masks(x: Inputs, visible: Tensor, session: Tensor) -> tuple[Tensor, Tensor]:
    """What queries with these open sessions see of the history: closed events and real-time ones, [B, Q, N] each.

    Every strictly past event is in exactly one of the two.
    """
    past = visible_mask(visible, x.h_item.shape[1])
    closed = x.h_session[:, None, :] < session[..., None]
    return past & closed, past & ~closed
