"""Where attention's time goes on a GPU: kernels and the choice of keys alone, against what the GPU can do."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.gather import attend_kept
from hpgr.model.hstu import RelativeBias
from hpgr.model.inputs import Inputs
from hpgr.model.relation import Queries, keep, relate_kept
from hpgr.on_ray.benchmarks.dense_kernel import DenseKernel

ROUNDS = 10
Work = Callable[[], Any]


def parts(model: Model, x: Inputs) -> dict[str, dict[str, float]]:
    """Milliseconds of each part, once a step or once a layer, and the TFLOP or GB a second that it needs at least."""
    rows, n = x.h_item.shape
    heads, width = model.heads, model.width // model.heads
    item = F.normalize(torch.randn(int(x.h_item.max()) + 1, model.width, device=x.h_item.device), dim=-1)[x.h_item]
    queries = Queries(x.h_item, x.h_time, x.h_visible)
    kept = keep(item, item, x.h_visible, model.pgsa, fused=True)
    relation = relate_kept(x, queries, kept, model, n, fused=True)
    links, pairs = relation.weights, relation.pairs
    bias = RelativeBias(heads, n, model.time_buckets).to(item.device)
    q, k, v = (torch.randn(rows, heads, n, width, device=item.device, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))  # fmt: skip
    values = bias(pairs).detach().requires_grad_()
    half_square = rows * n * n / 2
    dense, kept_bytes = heads * width * half_square, 2 * 2 * width * heads * kept.index.numel()

    def sparse() -> Tensor:
        return attend_kept(q, k, v, (k, v), values, bias.own, links)

    found = {
        "choice": milliseconds(lambda: keep(item, item, x.h_visible, model.pgsa, fused=True))
        | {"tflop": 2 * model.width * half_square / 1e12},
        "relation": milliseconds(lambda: relate_kept(x, queries, kept, model, n, fused=True)),
        "order": milliseconds(lambda: type(links).by_event.func(links)),
        "bias": both(lambda: bias(pairs), list(bias.parameters())[:3]),
        "sparse": both(sparse, [q, k, v, values]) | {"gigabytes": 3 * kept_bytes / 1e9},
        "dense_kernel": both(lambda: DenseKernel.apply(q, k, v), [q, k, v]) | {"tflop": 7 * 2 * dense / 1e12},
    }
    for part in found.values():
        second = (part["forward"] + part.get("backward", 0.0)) / 1e3
        for unit, name in (("tflop", "tflop_a_second"), ("gigabytes", "gigabytes_a_second")):
            if unit in part:
                part[name] = part[unit] / second
    return found


def both(forward: Callable[[], Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of a forward pass, and of a backward pass after it."""
    out = forward()
    grad = torch.randn_like(out)
    back = milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    return milliseconds(forward) | {"backward": back["forward"]}


def milliseconds(work: Work) -> dict[str, float]:
    """Median of some runs on the GPU, after two to warm up."""
    times = []
    for turn in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end))
    return {"forward": median(times)}


def limits() -> dict[str, float]:
    """What the GPU reaches: TFLOP a second of a bf16 matrix product, GB a second read and written by a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(1 << 29, device="cuda")
    product, copy = milliseconds(lambda: a @ b)["forward"], milliseconds(big.clone)["forward"]
    return {"tflop_a_second": 2 * 8192**3 / product / 1e9, "gigabytes_a_second": 2 * 4 * big.numel() / copy / 1e6}
