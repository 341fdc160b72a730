"""A candidate in the list that it is shown in, and beside that list's preferred item, as a vector [D].

Shapes: B rows, M candidates, G numeric features, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.model.noise import Dropout, Noise

FINEST, PER_DOUBLING, LARGEST = 32.0, 2.0, 24
"""Differences are told apart from about 1 / FINEST standard deviations on, by PER_DOUBLING buckets for each doubling,
up to bucket LARGEST on either side of none."""
BUCKETS = 2 * LARGEST + 2
UNLISTED = 0.1
"""Share of candidates that training shows as if they were of no list."""


class ListFeatures(nn.Module):
    """What `hpgr.data.lists` tells of candidates, each number by its log-spaced bucket; it starts at zero.

    Clicks go by no straight line of these numbers: of a page, the items right below the preferred one are looked at
    next, those above it were passed over. Training hides them now and then: scores are asked for without lists, too.
    """

    def __init__(self, first: int, columns: int, width: int) -> None:
        """Numbers of lists are the `columns` of candidates' numbers from the `first` on."""
        super().__init__()
        self.first, self.columns = first, columns
        self.table = nn.Parameter(torch.zeros(columns * BUCKETS, width))
        self.hiding = Dropout(UNLISTED)

    def forward(self, num: Tensor, noise: Noise | None) -> Tensor:
        """Candidates' numbers [B, M, G], NaN = missing -> [B, M, D]."""
        bucket = difference_bucket(num[..., self.first :])
        bucket = bucket * (self.hiding(torch.ones_like(num[..., :1]), noise, stream=1) > 0)
        start = torch.arange(self.columns, device=num.device) * BUCKETS
        return F.embedding(bucket + start, self.table).sum(-2)


def difference_bucket(difference: Tensor) -> Tensor:
    """Log-spaced bucket of a difference by sign and size: 0 is missing, 1 + LARGEST is none. Any shape, int64."""
    size = (PER_DOUBLING * torch.log2(1 + FINEST * difference.abs())).nan_to_num(0.0).floor().clamp(max=LARGEST)
    bucket = 1 + LARGEST + (size * difference.nan_to_num(0.0).sign()).long()
    return bucket.masked_fill(difference.isnan(), 0)
