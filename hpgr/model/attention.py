"""HSTU's pointwise attention with weights on its keys: the readable reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpgr.errors import ConfigError


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
    g = weights[:, None]
    kept, own = _activations(q, k, self_kv[0], bias, self_bias)
    kept = kept * g
    return (kept @ v + own * self_kv[1]) / (1 + g.sum(-1, keepdim=True))


def attention_shares(q: Tensor, k: Tensor, self_k: Tensor, bias: Tensor, self_bias: Tensor, weights: Tensor) -> Tensor:
    """Share of each history event in a query's attention, by size: |g a| over its sum, the query's own included.

    SiLU may be negative, so the size of an activation says how much an event counts [D]. Arguments as `attend`.

    Returns:
        [B, H, Q, N], at most 1 in sum; the rest is the query's own.
    """
    kept, own = (a.abs() for a in _activations(q, k, self_k, bias, self_bias))
    kept = kept * weights[:, None]
    return kept / (own + kept.sum(-1, keepdim=True)).clamp(min=torch.finfo(kept.dtype).tiny)


def _activations(q: Tensor, k: Tensor, self_k: Tensor, bias: Tensor, self_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of the history [B, H, Q, N] and of the query itself [B, H, Q, 1], before weights."""
    scale = 1 / math.sqrt(q.shape[-1])
    own = F.silu((q * self_k).sum(-1, keepdim=True) * scale + self_bias[:, None, None])
    return F.silu(_scores(q * scale, k, bias)), own


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """q.k + bias: [B, H, Q, N]. As one product where types allow, so that fewer maps go through memory; under autocast
    the bias stays in float32."""
    if q.dtype != bias.dtype:
        return q @ k.transpose(-1, -2) + bias
    flat = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return flat.view(bias.shape)


def train_attention(model: nn.Module, recompute: bool, compiled: bool) -> None:
    """Have a model's attention modules train as `resources.recompute` and `resources.compile` say."""
    for module in model.modules():
        for name, wanted in (("recompute", recompute), ("compiled", compiled)):
            if hasattr(module, name):
                setattr(module, name, wanted)


def recomputed(attention: Callable[..., Tensor], wanted: bool) -> Callable[..., Tensor]:
    """Attention whose maps are, if wanted, let go after the forward pass and made again for gradients: the same bits
    for more time. It must not draw anything."""
    if not wanted or not torch.is_grad_enabled():
        return attention
    return partial(checkpoint, attention, use_reentrant=False, preserve_rng_state=False)


def training_attend(compiled: bool) -> Callable[..., Tensor]:
    """`attend`; compiled, if wanted, where gradients are, for fewer maps that go through memory.

    Values agree to float tolerance. Scores are always made by `attend` itself, so that how a model was trained says
    nothing of them.
    """
    return _attend_compiled if compiled and torch.is_grad_enabled() else attend


def _attend_compiled(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    """Sizes of 1 would each be a program of their own, and torch compiles a few alone before it gives up."""
    return (attend if 1 in (len(q), q.shape[2], k.shape[2]) else _program())(q, k, *others)


@cache
def _program() -> Callable[..., Tensor]:
    return torch.compile(attend, dynamic=True)  # histories and candidates of any length: one each


def check_compiler(device: torch.device) -> None:
    """Whether `resources.compile` can be had there, by trying. Raises ConfigError."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing compiler, header or package makes of it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"resources.compile: torch.compile cannot run on {device.type} here: {reason}; install a C++ compiler "
            "(on a GPU triton and a C compiler), or leave it false"
        ) from error
