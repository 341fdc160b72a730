"""DIN (Zhou et al., KDD 2018): target attention, the field's workhorse for click-through rates.

Shapes: B rows, N history events, M candidates, D width, U hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config
from hpgr.model.base import Past, TokenClick
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Dropout, Noise, number_sites
from hpgr.model.pgsa import visible_mask


class ActivationUnit(nn.Module):
    """MLP over (candidate c, event h, c - h, c * h) -> weight of the event; no softmax, as published.

    The first layer is linear in its parts: those of c and h alone are computed once a token, and the product's for
    all pairs by one matrix product, so nothing of size [B, M, N, 4 D] is made.
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.of_candidate, self.of_event = nn.Linear(width, units), nn.Linear(width, units, bias=False)
        self.of_product = nn.Parameter(torch.randn(units, width) / math.sqrt(width))
        self.slope = nn.Parameter(torch.full((units,), 0.25))
        self.out = nn.Linear(units, 1)

    def forward(self, c: Tensor, h: Tensor) -> Tensor:
        """[B, M, D], [B, N, D] -> [B, M, N]."""
        product = torch.einsum("bmd,ud,bnd->bmnu", c, self.of_product, h)
        hidden = product + self.of_candidate(c)[:, :, None] + self.of_event(h)[:, None]
        return self.out(F.prelu(hidden.movedim(-1, 1), self.slope).movedim(1, -1))[..., 0]


class DinClick(TokenClick):
    """The candidate's weighted sum of history tokens beside the candidate, into an MLP."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        width = config.model.width
        self.unit = ActivationUnit(width, config.model.din.attention_units)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(3 * width, width)
        self.dropout = Dropout(config.model.dropout)
        number_sites(self)

    def past(self, x: Inputs, noise: Noise | None) -> Past:
        return Past([(self.events.history(x, noise),)])

    def encoded(self, past: Past, x: Inputs, noise: Noise | None, shares: list[Tensor] | None = None) -> Tensor:
        """As in `TokenClick`; it has no attention shares to show."""
        assert shares is None, "attention shares are shown for hstu and hpgr"
        (h,) = next(iter(past.shown))
        c = self.candidates(x, noise)
        interest = self.norm((self.unit(c, h) * visible_mask(x.c_visible, h.shape[1])) @ h)
        mixed = self.dropout(F.gelu(self.mix(torch.cat([c, interest, c * interest], -1))), noise, stream=1)
        return c + mixed
