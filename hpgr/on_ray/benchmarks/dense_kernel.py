"""Dense HSTU attention as a fused Triton kernel: the baseline that PGSA has to beat on a GPU.

SiLU(q k / sqrt(E)) v over the strict past, without maps in memory, without a relative bias (which costs lookups for
each pair: this baseline does less work than the attention it stands for), tensor cores in the inputs' type, sums in
float32. Tiles beyond the diagonal are skipped; each kernel takes the fastest of a few shapes, found by measuring.

Shapes: Z rows times heads, N events, E head width (a power of two, 16 or more).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SHAPES = [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)]
"""Rows and columns of a tile, warps, and stages of the pipeline, that are tried."""


def _tuned(kernel: Any) -> Any:
    """The kernel in its fastest shape; without a GPU in the last one."""
    configs = [triton.Config({"ROWS": r, "COLUMNS": c}, num_warps=w, num_stages=s) for r, c, w, s in SHAPES]
    return triton.autotune(configs if torch.cuda.is_available() else configs[2:3], key=["n"])(kernel)


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    """1 / (1 + e^-z); FAST by one instruction of the GPU."""
    if FAST:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * 0.5], tl.float32, is_pure=True, pack=1)
        return half * 0.5 + 0.5
    return tl.sigmoid(z)


@_tuned
@triton.jit
def _forward(q, k, v, out, scale, n, E: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program a tile of queries."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    i, e, columns = first + tl.arange(0, ROWS), tl.arange(0, E), tl.arange(0, COLUMNS)
    own = at + i[:, None] * E + e[None, :]
    q_i = tl.load(q + own, mask=i[:, None] < n, other=0.0)
    total = tl.zeros([ROWS, E], tl.float32)
    for start in range(0, tl.minimum(first + ROWS, n), COLUMNS):
        j = start + columns
        k_j = tl.load(k + at + j[None, :] * E + e[:, None], mask=j[None, :] < n, other=0.0)
        v_j = tl.load(v + at + j[:, None] * E + e[None, :], mask=j[:, None] < n, other=0.0)
        z = tl.dot(q_i, k_j) * scale
        a = tl.where(j[None, :] < i[:, None], z * _sigmoid(z, FAST), 0.0)
        total = tl.dot(a.to(v_j.dtype), v_j, total)
    tl.store(out + own, total, mask=i[:, None] < n)


@_tuned
@triton.jit
def _backward_of_queries(q, k, v, grad, grad_q, scale, n, E: tl.constexpr, FAST: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program a tile of queries."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    i, e, columns = first + tl.arange(0, ROWS), tl.arange(0, E), tl.arange(0, COLUMNS)
    own = at + i[:, None] * E + e[None, :]
    q_i = tl.load(q + own, mask=i[:, None] < n, other=0.0)
    g_i = tl.load(grad + own, mask=i[:, None] < n, other=0.0)
    total = tl.zeros([ROWS, E], tl.float32)
    for start in range(0, tl.minimum(first + ROWS, n), COLUMNS):
        j = start + columns
        k_j = tl.load(k + at + j[:, None] * E + e[None, :], mask=j[:, None] < n, other=0.0)
        v_j = tl.load(v + at + j[None, :] * E + e[:, None], mask=j[None, :] < n, other=0.0)
        z = tl.dot(q_i, tl.trans(k_j)) * scale
        gate = _sigmoid(z, FAST)
        d_z = tl.dot(g_i, v_j) * gate * (1 + z * (1 - gate))
        d_z = tl.where(j[None, :] < i[:, None], d_z, 0.0)
        total = tl.dot(d_z.to(k_j.dtype), k_j, total)
    tl.store(grad_q + own, total * scale, mask=i[:, None] < n)


@_tuned
@triton.jit
def _backward_of_keys(q, k, v, grad, grad_k, grad_v, scale, n, E: tl.constexpr, FAST: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program a tile of keys."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    j, e, columns = first + tl.arange(0, ROWS), tl.arange(0, E), tl.arange(0, COLUMNS)
    own = at + j[:, None] * E + e[None, :]
    k_j = tl.load(k + own, mask=j[:, None] < n, other=0.0)
    v_j = tl.load(v + own, mask=j[:, None] < n, other=0.0)
    d_k, d_v = tl.zeros([ROWS, E], tl.float32), tl.zeros([ROWS, E], tl.float32)
    for start in range(first // COLUMNS * COLUMNS, n, COLUMNS):
        i = start + columns
        q_i = tl.load(q + at + i[:, None] * E + e[None, :], mask=i[:, None] < n, other=0.0)
        g_i = tl.load(grad + at + i[:, None] * E + e[None, :], mask=i[:, None] < n, other=0.0)
        z = tl.dot(k_j, tl.trans(q_i)) * scale
        gate = _sigmoid(z, FAST)
        sees = j[:, None] < i[None, :]
        d_v = tl.dot(tl.where(sees, z * gate, 0.0).to(g_i.dtype), g_i, d_v)
        d_z = tl.dot(v_j, tl.trans(g_i)) * gate * (1 + z * (1 - gate))
        d_k = tl.dot(tl.where(sees, d_z, 0.0).to(q_i.dtype), q_i, d_k)
    tl.store(grad_k + own, d_k * scale, mask=j[:, None] < n)
    tl.store(grad_v + own, d_v, mask=j[:, None] < n)


class DenseKernel(torch.autograd.Function):
    """Sums over the strict past, before any divisor: q, k, v [B, H, N, E] -> [B, H, N, E] float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        _forward[_grid(q)](q, k, v, out, *_sizes(q))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        grad = grad.to(q.dtype).contiguous()
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        _backward_of_queries[_grid(q)](q, k, v, grad, grad_q, *_sizes(q))
        _backward_of_keys[_grid(q)](q, k, v, grad, grad_k, grad_v, *_sizes(q))
        return grad_q, grad_k, grad_v


def _grid(q: Tensor) -> Any:
    rows, heads, n, _ = q.shape
    return lambda shape: (triton.cdiv(n, shape["ROWS"]), rows * heads)


def _sizes(q: Tensor) -> tuple[float, int, int, bool]:
    n, width = q.shape[2:]
    return 1 / math.sqrt(width), n, width, q.is_cuda
