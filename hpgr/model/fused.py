"""Pointwise attention over kept keys as fused Triton kernels: what `gather.attend_kept` does, for GPUs.

Shapes: B rows, H heads, Q queries, N history events, E head width, S slots, A ages; R = B H Q queries, C = B H N keys.

Bytes decide: a query's program reads its S keys and values once (S E numbers each, bf16 as they come), its slots and
their codes, and writes E numbers; the relative bias is looked up inside. Nothing of size R S goes through memory but,
for gradients, two float32 arrays. Sums are float32. Gradients of keys are summed key by key in the order of
`Links.by_event`, those of ages by chunks of pairs, and those of distances as integers, whose sum has no order: nothing
changes from run to run. Import needs triton; kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1.
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
from hpgr.model.hstu import RelativeBias
from hpgr.model.relation import Queries
from hpgr.model.timing import bucket_scale
from hpgr.schema import SECOND

SLOTS, SLOTS_BACK, PAIRS = 32, 16, 32
"""Slots of a query, forward and backward, and pairs of a key, that a warp looks at together: measured on an H200."""
CHUNK, ROUND = 4096, 32
"""Pairs of a program that sums gradients of the bias, and how many it looks at together."""
BLOCK = 1024
"""Pairs of a program that codes them."""
FIXED = 2.0**38
"""What the largest gradient of a bias is as an integer: 2^24 of them fit 63 bits."""


@triton.jit
def _slots(q_r, k, v, code, index, weight, position, time, match, r, s, e, scale, heads, queries, n, slots, distances,
           ages: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Weights, keys, values and biased dot products of slots s of query r; zeros where a slot is unused."""
    row, head = r // queries, (r // queries) % heads
    shared = ((r // (heads * queries)) * queries + r % queries) * slots  # the choice is the same for all heads
    w = tl.load(weight + shared + s, mask=s < slots, other=0.0)
    place = tl.load(index + shared + s, mask=s < slots, other=0).to(tl.int32)
    c = tl.load(code + shared + s, mask=s < slots, other=0)
    used = w > 0
    both, at = used[:, None] & (e < E)[None, :], place[:, None] * E + e[None, :]
    k_s = tl.load(k + row * n * E + at, mask=both, other=0.0).to(tl.float32)
    v_s = tl.load(v + row * n * E + at, mask=both, other=0.0).to(tl.float32)
    bias = tl.load(position + head * distances + c // (2 * ages), mask=used, other=0.0)
    bias += tl.load(time + head * ages + (c // 2) % ages, mask=used, other=0.0)
    bias += tl.where(c % 2 == 1, tl.load(match + head), 0.0)
    return w, k_s, v_s, tl.sum(k_s * q_r[None, :], 1) * scale + bias


@triton.jit
def _forward(q, k, v, code, index, weight, position, time, match, out, scale, heads, queries, n, slots, distances,
             ages: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """out[r] = sum_s w_s SiLU(<q_r, k_s> scale + b_s) v_s, a program a query."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    q_r = tl.load(q + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        w, _, v_s, z = _slots(q_r, k, v, code, index, weight, position, time, match, r, s, e, scale, heads, queries, n,
                              slots, distances, ages, E)  # fmt: skip
        total += tl.sum((w * z * tl.sigmoid(z))[:, None] * v_s, 0)
    tl.store(out + r * E + e, total, mask=e < E)


@triton.jit
def _backward_of_queries(q, k, v, code, index, weight, position, time, match, grad, grad_q, kept, grad_z,
                         scale, heads, queries, n, slots, distances, ages: tl.constexpr,
                         E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """grad_q; of each slot, w SiLU(z) and the gradient of z, which is the bias's too. A program a query."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    q_r = tl.load(q + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    g_r = tl.load(grad + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, slots, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        w, k_s, v_s, z = _slots(q_r, k, v, code, index, weight, position, time, match, r, s, e, scale, heads, queries,
                                n, slots, distances, ages, E)  # fmt: skip
        gate = tl.sigmoid(z)
        d_z = tl.sum(v_s * g_r[None, :], 1) * w * gate * (1 + z * (1 - gate))
        tl.store(kept + r * slots + s, w * z * gate, mask=s < slots)
        tl.store(grad_z + r * slots + s, d_z, mask=s < slots)
        total += tl.sum(d_z[:, None] * k_s, 0)
    tl.store(grad_q + r * E + e, total * scale, mask=e < E)


@triton.jit
def _backward_of_keys(q, grad, kept, grad_z, place, query, start, grad_k, grad_v, scale, heads, queries, n, slots,
                      E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """grad_k and grad_v: sums over the pairs that keep a key, in their order. A program a key."""
    c = tl.program_id(0).to(tl.int64)
    e, row = tl.arange(0, BLOCK_E), c // n
    d_k, d_v = tl.zeros([BLOCK_E], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    event = start + (row // heads) * n + c % n
    q, grad = q + row * queries * E, grad + row * queries * E
    kept, grad_z = kept + row * queries * slots, grad_z + row * queries * slots
    stop = tl.load(event + 1)
    for first in range(tl.load(event), stop, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        slot = tl.load(place + p, mask=p < stop, other=0)
        at = tl.load(query + p, mask=p < stop, other=0)[:, None] * E + e[None, :]
        there = (p < stop)[:, None] & (e < E)[None, :]
        q_p = tl.load(q + at, mask=there, other=0.0).to(tl.float32)
        g_p = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        d_k += tl.sum(tl.load(grad_z + slot, mask=p < stop, other=0.0)[:, None] * q_p, 0)
        d_v += tl.sum(tl.load(kept + slot, mask=p < stop, other=0.0)[:, None] * g_p, 0)
    tl.store(grad_k + c * E + e, d_k * scale, mask=e < E)
    tl.store(grad_v + c * E + e, d_v, mask=e < E)


@triton.jit
def _backward_of_bias(grad_z, code, fixed, by_distance, by_age, by_match, pairs, distances,
                      ages: tl.constexpr, BLOCK_A: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """Sums of grad_z by distance (integers, scaled by `fixed`), by age and of pairs of the same item; of a row, a head
    and a chunk of its pairs."""
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, scale = tl.num_programs(1), tl.load(fixed)
    age = tl.arange(0, BLOCK_A)
    ages_sum, match_sum = tl.zeros([ROUND, BLOCK_A], tl.float32), tl.zeros([ROUND], tl.float32)
    grad_z, code = grad_z + (row * heads + head) * pairs, code + row * pairs
    for first in range(0, CHUNK, ROUND):
        p = chunk * CHUNK + first + tl.arange(0, ROUND)
        g = tl.load(grad_z + p, mask=p < pairs, other=0.0)
        c = tl.load(code + p, mask=p < pairs, other=0)
        tl.atomic_add(by_distance + head * distances + c // (2 * ages), (g * scale).to(tl.int64),
                      mask=(p < pairs) & (g != 0), sem="relaxed")  # fmt: skip
        ages_sum += tl.where(((c // 2) % ages)[:, None] == age[None, :], g[:, None], 0.0)
        match_sum += tl.where(c % 2 == 1, g, 0.0)
    out = (row * tl.num_programs(0) + chunk) * heads + head
    tl.store(by_age + out * BLOCK_A + age, tl.sum(ages_sum, 0))
    tl.store(by_match + out, tl.sum(match_sum, 0))


@triton.jit
def _code(index, item, time, visible, h_item, h_time, out, pairs, slots, queries, n, window, scale,
          ages: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Codes of some pairs: distance, age (as `timing.time_bucket` has it) and whether the item is the same."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, query = p < pairs, p // slots
    j = tl.load(index + p, mask=there, other=0)
    event = (query // queries) * n + j
    distance = tl.minimum(tl.maximum(tl.load(visible + query, mask=there, other=0) - j, 0), window)
    passed = tl.load(time + query, mask=there, other=0) - tl.load(h_time + event, mask=there, other=0)
    seconds = tl.div_rn(tl.maximum(passed, 0).to(tl.float32), tl.full([BLOCK], SECOND, tl.float32))
    age = tl.minimum((tl.log2(seconds + 1) * scale).to(tl.int32), ages - 1)
    same = tl.load(item + query, mask=there, other=0) == tl.load(h_item + event, mask=there, other=0)
    tl.store(out + p, (distance.to(tl.int32) * ages + age) * 2 + same.to(tl.int32), mask=there)


def code_pairs(index: Tensor, queries: Queries, h_item: Tensor, h_time: Tensor, window: int, ages: int) -> Tensor:
    """`Pairs.code` of kept keys: [B, Q, S] positions in histories [B, N] -> [B, Q, S] int32. An age at the edge of two
    buckets may fall into the other one on a GPU, whose logarithm is rounded otherwise."""
    code = torch.empty(index.shape, dtype=torch.int32, device=index.device)
    columns = (x.contiguous() for x in (index, *queries, h_item, h_time))
    with torch.cuda.device_of(code):  # Triton launches on the current device, wherever the tensors are
        _code[(triton.cdiv(code.numel(), BLOCK),)](
            *columns, code, code.numel(), *index.shape[:0:-1], h_item.shape[1], window, bucket_scale(ages),
            ages=ages, SECOND=SECOND, BLOCK=BLOCK,
        )  # fmt: skip
    return code


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, self_kv: tuple[Tensor, Tensor], bias: RelativeBias, links: Links
) -> Tensor:
    """`gather.attend_kept` with the bias of these pairs, by the kernels above.

    Arguments otherwise as there; the result is float32 at least.
    """
    own = F.silu((q * self_kv[0]).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]) + bias.own[:, None, None])
    return (sum_kept(q, k, v, bias, links) + own * self_kv[1]) / (1 + links.weight[:, None].sum(-1, keepdim=True))


def sum_kept(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, links: Links) -> Tensor:
    """sum_s w_s SiLU(<q, k_s> / sqrt(E) + b_s) v_s over kept keys: [B, H, Q, E] float32."""
    tables = (table.float().contiguous() for table in (bias.position, bias.time, bias.match))
    flat = (x.flatten(0, 2).contiguous() for x in (q, k, v))
    return _Fused.apply(*flat, *tables, links).view(q.shape)


class _Fused(torch.autograd.Function):
    """Sums over kept keys: q [R, E], k and v [C, E], biases by distance and age [H, *] and of the same item [H]
    -> [R, E] float32."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor, match: Tensor, links: Links
    ) -> Tensor:
        """The sums; keeps what gradients need, nothing of the size of a query's keys."""
        out = q.new_empty(q.shape, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, position, time, match)
        ctx.links = links
        with torch.cuda.device_of(q):
            _forward[(len(q),)](
                q, k, v, links.code, links.index, links.weight, position, time, match, out,
                *_sizes(q, links), position.shape[1], ages=time.shape[1], BLOCK_S=SLOTS, **_widths(q),
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the biases."""
        (q, k, v, position, time, match), links = ctx.saved_tensors, ctx.links
        if not len(q):
            return *(torch.zeros_like(x) for x in (q, k, v, position, time, match)), None
        grad = grad.to(q.dtype).contiguous()
        (rows, queries, slots), heads = links.index.shape, links.heads
        kept, grad_z = (torch.empty(len(q), slots, device=q.device) for _ in range(2))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _backward_of_queries[(len(q),)](
            q, k, v, links.code, links.index, links.weight, position, time, match, grad, grad_q, kept, grad_z,
            *_sizes(q, links), position.shape[1], ages=time.shape[1], BLOCK_S=SLOTS_BACK, **_widths(q),
        )  # fmt: skip
        _backward_of_keys[(len(k),)](
            q, grad, kept, grad_z, *links.by_event, grad_k, grad_v, *_sizes(q, links), BLOCK_P=PAIRS, **_widths(q)
        )
        fixed = FIXED / grad_z.abs().amax().clamp(min=1e-20)
        chunks, ages = triton.cdiv(queries * slots, CHUNK), triton.next_power_of_2(time.shape[1])
        by_distance = torch.zeros(position.shape, dtype=torch.int64, device=q.device)
        by_age, by_match = grad_z.new_empty(rows * chunks, heads, ages), grad_z.new_empty(rows * chunks, heads)
        _backward_of_bias[(chunks, heads, rows)](
            grad_z, links.code, fixed, by_distance, by_age, by_match, queries * slots, position.shape[1],
            ages=time.shape[1], BLOCK_A=ages, CHUNK=CHUNK, ROUND=ROUND, num_warps=1,
        )  # fmt: skip
        tables = (by_distance / fixed.double()).float(), by_age.sum(0)[:, : time.shape[1]], by_match.sum(0)
        return grad_q, grad_k, grad_v, *tables, None


def _sizes(q: Tensor, links: Links) -> tuple[float, int, int, int, int]:
    _, queries, slots = links.index.shape
    return 1 / math.sqrt(q.shape[1]), links.heads, queries, links.events, slots


def _widths(q: Tensor) -> dict[str, int]:
    """One warp a program: there are as many programs as queries, and none waits for another warp."""
    return {"E": q.shape[1], "BLOCK_E": triton.next_power_of_2(q.shape[1]), "num_warps": 1}
