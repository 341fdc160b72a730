"""Time differences as buckets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpgr.schema import SECOND

LONGEST = 20 * 365 * 86400.0
"""Seconds that fall into the last bucket: twenty years."""


def bucket_scale(buckets: int) -> float:
    """Buckets for each doubling of a difference."""
    return (buckets - 1) / math.log2(1 + LONGEST)


def time_bucket(delta: Tensor, buckets: int) -> Tensor:
    """Log-spaced bucket in [0, buckets) of a difference in microseconds (negative counts as zero), any shape, int32."""
    seconds = delta.clamp(min=0).to(torch.float32).div_(SECOND)
    return seconds.add_(1).log2_().mul_(bucket_scale(buckets)).to(torch.int32).clamp_(max=buckets - 1)


def time_before(h_time: Tensor, visible: Tensor) -> Tensor:
    """Time of the last visible event of each query: [B, N], [B, Q] -> [B, Q]; of the first event if none is."""
    return h_time.gather(1, (visible - 1).clamp(min=0))
