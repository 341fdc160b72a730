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

SHAPES = [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 32, 4, 3)]
"""Rows and columns of a tile, warps, and stages of the pipeline, that are tried."""


def _tuned(kernel: Any) -> Any:
    """The kernel in its fastest shape; without a GPU in the second one."""
    configs = [triton.Config({"ROWS": r, "COLUMNS": c}, num_warps=w, num_stages=s) for r, c, w, s in SHAPES]
    return triton.autotune(configs if torch.cuda.is_available() else configs[1:2], key=["n"])(kernel)


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    """1 / (1 + e^-z); FAST by one instruction of the GPU."""
    if FAST:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * 0.5], tl.float32, is_pure=True, pack=1)
        return half * 0.5 + 0.5
    return tl.sigmoid(z)


@triton.jit
def _queries_forward(total, start, q_i, k, v, i, n, scale, E: tl.constexpr, FAST: tl.constexpr,
                     COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    """A tile's sums, with the keys of one more tile."""
    j, e = start + tl.arange(0, COLUMNS), tl.arange(0, E)
    k_j = tl.load(k + j[None, :] * E + e[:, None], mask=j[None, :] < n, other=0.0)
    v_j = tl.load(v + j[:, None] * E + e[None, :], mask=j[:, None] < n, other=0.0)
    z = tl.dot(q_i, k_j) * scale
    a = z * _sigmoid(z, FAST)
    if DIAGONAL:
        a = tl.where(j[None, :] < i[:, None], a, 0.0)
    return tl.dot(a.to(v_j.dtype), v_j, total)


@_tuned
@triton.jit
def _forward(q, k, v, out, scale, n, E: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program a tile of queries."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    i, e = first + tl.arange(0, ROWS), tl.arange(0, E)
    own, k, v = at + i[:, None] * E + e[None, :], k + at, v + at
    q_i = tl.load(q + own, mask=i[:, None] < n, other=0.0)
    total, whole = tl.zeros([ROWS, E], tl.float32), first // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        total = _queries_forward(total, start, q_i, k, v, i, n, scale, E, FAST, COLUMNS, False)
    for start in range(whole, tl.minimum(first + ROWS, n), COLUMNS):
        total = _queries_forward(total, start, q_i, k, v, i, n, scale, E, FAST, COLUMNS, True)
    tl.store(out + own, total, mask=i[:, None] < n)


@triton.jit
def _queries_backward(total, start, q_i, g_i, k, v, i, n, scale, E: tl.constexpr, FAST: tl.constexpr,
                      COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    """Gradients of a tile's queries, with the keys of one more tile."""
    j, e = start + tl.arange(0, COLUMNS), tl.arange(0, E)
    k_j = tl.load(k + j[:, None] * E + e[None, :], mask=j[:, None] < n, other=0.0)
    v_j = tl.load(v + j[None, :] * E + e[:, None], mask=j[None, :] < n, other=0.0)
    z = tl.dot(q_i, tl.trans(k_j)) * scale
    gate = _sigmoid(z, FAST)
    d_z = tl.dot(g_i, v_j) * gate * (1 + z * (1 - gate))
    if DIAGONAL:
        d_z = tl.where(j[None, :] < i[:, None], d_z, 0.0)
    return tl.dot(d_z.to(k_j.dtype), k_j, total)


@_tuned
@triton.jit
def _backward_of_queries(q, k, v, grad, grad_q, scale, n, E: tl.constexpr, FAST: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program a tile of queries."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    i, e = first + tl.arange(0, ROWS), tl.arange(0, E)
    own, k, v = at + i[:, None] * E + e[None, :], k + at, v + at
    q_i = tl.load(q + own, mask=i[:, None] < n, other=0.0)
    g_i = tl.load(grad + own, mask=i[:, None] < n, other=0.0)
    total, whole = tl.zeros([ROWS, E], tl.float32), first // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        total = _queries_backward(total, start, q_i, g_i, k, v, i, n, scale, E, FAST, COLUMNS, False)
    for start in range(whole, tl.minimum(first + ROWS, n), COLUMNS):
        total = _queries_backward(total, start, q_i, g_i, k, v, i, n, scale, E, FAST, COLUMNS, True)
    tl.store(grad_q + own, total * scale, mask=i[:, None] < n)


@triton.jit
def _keys_backward(d_k, d_v, start, k_j, v_j, q, grad, j, n, scale, E: tl.constexpr, FAST: tl.constexpr,
                   COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr):  # fmt: skip
    """Gradients of a tile's keys and values, with the queries of one more tile."""
    i, e = start + tl.arange(0, COLUMNS), tl.arange(0, E)
    q_i = tl.load(q + i[:, None] * E + e[None, :], mask=i[:, None] < n, other=0.0)
    g_i = tl.load(grad + i[:, None] * E + e[None, :], mask=i[:, None] < n, other=0.0)
    z = tl.dot(k_j, tl.trans(q_i)) * scale
    gate = _sigmoid(z, FAST)
    a, d_z = z * gate, tl.dot(v_j, tl.trans(g_i)) * gate * (1 + z * (1 - gate))
    if DIAGONAL:
        a, d_z = tl.where(j[:, None] < i[None, :], a, 0.0), tl.where(j[:, None] < i[None, :], d_z, 0.0)
    return tl.dot(d_z.to(q_i.dtype), q_i, d_k), tl.dot(a.to(g_i.dtype), g_i, d_v)


@_tuned
@triton.jit
def _backward_of_keys(q, k, v, grad, grad_k, grad_v, scale, n, E: tl.constexpr, FAST: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A program a tile of keys."""
    first, at = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64) * n * E
    j, e = first + tl.arange(0, ROWS), tl.arange(0, E)
    own, q, grad = at + j[:, None] * E + e[None, :], q + at, grad + at
    k_j = tl.load(k + own, mask=j[:, None] < n, other=0.0)
    v_j = tl.load(v + own, mask=j[:, None] < n, other=0.0)
    d_k, d_v = tl.zeros([ROWS, E], tl.float32), tl.zeros([ROWS, E], tl.float32)
    whole = tl.cdiv(first + ROWS, COLUMNS) * COLUMNS
    for start in range(first // COLUMNS * COLUMNS, tl.minimum(whole, n), COLUMNS):
        d_k, d_v = _keys_backward(d_k, d_v, start, k_j, v_j, q, grad, j, n, scale, E, FAST, COLUMNS, True)
    for start in range(whole, n, COLUMNS):
        d_k, d_v = _keys_backward(d_k, d_v, start, k_j, v_j, q, grad, j, n, scale, E, FAST, COLUMNS, False)
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
