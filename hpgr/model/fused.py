"""Pointwise attention over kept keys as fused Triton kernels: what `gather.attend_kept` does, for GPUs.

Shapes: B rows, H heads, Q queries, N history events, E head width, S slots; R = B H Q queries, C = B H N keys.

Bytes decide: a query's program reads its S keys and values once (S E numbers each, bf16 as they come), its slots and
bias, and writes E numbers; nothing of size R S but the bias and, for gradients, two float32 arrays goes through memory.
Sums are float32. Gradients of keys are summed key by key in the order of `Links.by_event`, so no atomic addition and no
order that changes from run to run. Import needs triton; kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hpgr.model.gather import Links

SLOTS = 32
"""Slots, or pairs of a key, that a program looks at together."""


@triton.jit
def _slots(q_r, k, v, bias, index, weight, r, s, e, scale, heads, queries, n, slots, E: tl.constexpr):
    """Weights, keys, values and biased dot products of slots s of query r; zeros where a slot is unused."""
    shared = ((r // (heads * queries)) * queries + r % queries) * slots + s  # the choice is the same for all heads
    w = tl.load(weight + shared, mask=s < slots, other=0.0)
    place = (r // queries) * n + tl.load(index + shared, mask=s < slots, other=0)
    used = (w > 0)[:, None] & (e < E)[None, :]
    k_s = tl.load(k + place[:, None] * E + e[None, :], mask=used, other=0.0).to(tl.float32)
    v_s = tl.load(v + place[:, None] * E + e[None, :], mask=used, other=0.0).to(tl.float32)
    z = tl.sum(k_s * q_r[None, :], 1) * scale + tl.load(bias + r * slots + s, mask=s < slots, other=0.0)
    return w, k_s, v_s, z


@triton.jit
def _forward(q, k, v, bias, index, weight, out, scale, heads, queries, n, slots,
             E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """out[r] = sum_s w_s SiLU(<q_r, k_s> scale + b_s) v_s, a program a query."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    q_r = tl.load(q + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        w, _, v_s, z = _slots(q_r, k, v, bias, index, weight, r, s, e, scale, heads, queries, n, slots, E)
        total += tl.sum((w * z * tl.sigmoid(z))[:, None] * v_s, 0)
    tl.store(out + r * E + e, total, mask=e < E)


@triton.jit
def _backward_of_queries(q, k, v, bias, index, weight, grad, grad_q, kept, grad_z, scale, heads, queries, n, slots,
                         E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """grad_q; of each slot, w SiLU(z) and the gradient of z, which is the bias's too. A program a query."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    q_r = tl.load(q + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    g_r = tl.load(grad + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        w, k_s, v_s, z = _slots(q_r, k, v, bias, index, weight, r, s, e, scale, heads, queries, n, slots, E)
        gate = tl.sigmoid(z)
        d_z = tl.sum(v_s * g_r[None, :], 1) * w * gate * (1 + z * (1 - gate))
        tl.store(kept + r * slots + s, w * z * gate, mask=s < slots)
        tl.store(grad_z + r * slots + s, d_z, mask=s < slots)
        total += tl.sum(d_z[:, None] * k_s, 0)
    tl.store(grad_q + r * E + e, total * scale, mask=e < E)


@triton.jit
def _backward_of_keys(q, grad, kept, grad_z, order, start, grad_k, grad_v, scale, heads, queries, n, slots,
                      E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """grad_k and grad_v: sums over the pairs that keep a key, in their order. A program a key."""
    c = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    d_k, d_v = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    event = start + (c // (heads * n)) * n + c % n
    stop = tl.load(event + 1)
    for first in range(tl.load(event), stop, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        pair = tl.load(order + p, mask=p < stop, other=0)
        r = (c // n) * queries + (pair // slots) % queries
        slot = r * slots + pair % slots
        there = (p < stop)[:, None] & (e < E)[None, :]
        q_p = tl.load(q + r[:, None] * E + e[None, :], mask=there, other=0.0).to(tl.float32)
        g_p = tl.load(grad + r[:, None] * E + e[None, :], mask=there, other=0.0).to(tl.float32)
        d_k += tl.sum(tl.load(grad_z + slot, mask=p < stop, other=0.0)[:, None] * q_p, 0)
        d_v += tl.sum(tl.load(kept + slot, mask=p < stop, other=0.0)[:, None] * g_p, 0)
    tl.store(grad_k + c * E + e, d_k * scale, mask=e < E)
    tl.store(grad_v + c * E + e, d_v, mask=e < E)


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    self_kv: tuple[Tensor, Tensor],
    bias: Tensor,
    self_bias: Tensor,
    links: Links,
) -> Tensor:
    """`gather.attend_kept` by the kernels above. Arguments and result as there; the result is float32 at least."""
    g = links.weight[:, None]
    own = F.silu((q * self_kv[0]).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]) + self_bias[:, None, None])
    flat = (x.flatten(0, 2).contiguous() for x in (q, k, v))
    mixed = _Fused.apply(*flat, bias.float().contiguous(), links).view(q.shape)  # type: ignore[no-untyped-call]
    return (mixed + own * self_kv[1]) / (1 + g.sum(-1, keepdim=True))


class _Fused(torch.autograd.Function):
    """Sums over kept keys: q [R, E], k and v [C, E], bias [B, H, Q, S] -> [R, E] float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, links: Links) -> Tensor:
        """The sums; keeps what gradients need, nothing of the size of a query's keys but the bias."""
        out = q.new_empty(q.shape, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias)
        ctx.links = links
        _forward[(len(q),)](
            q, k, v, bias, links.index, links.weight, out, *_sizes(bias, links, q), **_blocks(q, "S")
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v and the bias; none of links."""
        (q, k, v, bias), links, grad = ctx.saved_tensors, ctx.links, grad.contiguous()
        kept, grad_z, grad_q = torch.empty_like(bias), torch.empty_like(bias), torch.empty_like(q)
        sizes = _sizes(bias, links, q)
        _backward_of_queries[(len(q),)](
            q, k, v, bias, links.index, links.weight, grad, grad_q, kept, grad_z, *sizes, **_blocks(q, "S")
        )
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        _backward_of_keys[(len(k),)](
            q, grad, kept, grad_z, *links.by_event, grad_k, grad_v, *sizes, **_blocks(q, "P")
        )  # fmt: skip
        return grad_q, grad_k, grad_v, grad_z, None


def _sizes(bias: Tensor, links: Links, q: Tensor) -> tuple[float, int, int, int, int]:
    _, heads, queries, slots = bias.shape
    return 1 / math.sqrt(q.shape[1]), heads, queries, links.events, slots


def _blocks(q: Tensor, of: str) -> dict[str, int]:
    return {"E": q.shape[1], "BLOCK_E": triton.next_power_of_2(q.shape[1]), f"BLOCK_{of}": SLOTS}
