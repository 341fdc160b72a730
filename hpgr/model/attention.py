"""HSTU's pointwise attention with weights on its keys: the readable reference."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    self_kv: tuple[Tensor, Tensor],
    bias: Tensor,
    self_bias: Tensor,
    weights: Tensor,
) -> Tensor:
    """sum_j g_j SiLU(q.k_j / sqrt(E) + b_j) v_j / sum_j g_j over the history and the query itself (weight 1).

    No softmax, so a key of weight 0 contributes exactly 0. The divisor is the sum of kept weights, at least 1.

    Args:
        q: [B, H, Q, E].
        k, v: [B, H, N, E] of the history.
        self_kv: the query's own key and value, [B, H, Q, E] each.
        bias: [B, H, Q, N] relative bias; `self_bias` [H] that of the query itself.
        weights: [B, Q, N] g, 0 for whatever the query must not see.

    Returns:
        [B, H, Q, E].
    """
    scale = 1 / math.sqrt(q.shape[-1])
    g = weights[:, None]
    kept = F.silu(q @ k.transpose(-1, -2) * scale + bias) * g
    k_self, v_self = self_kv
    own = F.silu((q * k_self).sum(-1, keepdim=True) * scale + self_bias[:, None, None])
    return (kept @ v + own * v_self) / (1 + g.sum(-1, keepdim=True))
