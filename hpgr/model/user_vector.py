"""A vector of the user after each event, and its dot product with a candidate's [D].

Shapes: B rows, M candidates, N history events, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.noise import Dropout, Noise


class UserVector(nn.Module):
    """What the SEM says of the user after each event, in the space of item vectors [D].

    Attention reads a history candidate by candidate, and has to learn from clicks what goes with what. Stage 1 has
    learnt that: its SEM tells where sessions lead, its vectors what is alike, and those that choose anchors stand
    still, so a dot product with them is of use from the first steps. It starts at zero.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        width, dropout = config.width, config.sem.dropout
        self.norm = nn.LayerNorm(2 * width)
        self.drop_intra, self.drop_context = Dropout(dropout), Dropout(dropout)
        self.hidden, self.out = nn.Linear(2 * width, width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, intra: Tensor, context: Tensor, noise: Noise | None) -> Tensor:
        """Events encoded in their sessions, and what earlier sessions add (see `Sem`): [B, N, D] each -> [B, N, D]."""
        intra, context = self.norm(torch.cat([intra, context], -1)).chunk(2, -1)
        both = torch.cat([self.drop_intra(intra, noise), self.drop_context(context, noise)], -1)
        out: Tensor = self.out(F.gelu(self.hidden(both)))
        return out


def matched(candidate: Tensor, users: Tensor, visible: Tensor) -> Tensor:
    """Dot products of candidates' vectors with the user's after the last event that each sees: [B, M], 0 after none.

    Args:
        candidate: [B, M, D].
        users: [B, N, D], after each event of the history.
        visible: [B, M] how many events each candidate sees.
    """
    rows = torch.arange(users.shape[0], device=users.device)[:, None]
    last = users[rows, (visible - 1).clamp(min=0)]
    return (last * candidate).sum(-1).float() * (visible > 0)
