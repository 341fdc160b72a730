"""Where attention's time goes on a GPU: kernels and the choice of keys alone, against what the GPU can do."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.fused import sum_kept
from hpgr.model.gather import Links
from hpgr.model.hstu import RelativeBias
from hpgr.model.inputs import Inputs
from hpgr.model.relation import Queries, keep, relate_kept
from hpgr.on_ray.benchmarks.dense_kernel import DenseKernel

ROUNDS = 10
Work = Callable[[], Any]


def parts(model: Model, x: Inputs) -> dict[str, dict[str, float]]:
    """Milliseconds of each part, and the TFLOP or GB that it needs, in all and a second.

    The choice, the relation and the order of pairs are made once a step, both kinds of attention in each layer. FLOP of
    dense attention are those of its seven products; bytes are keys, values, queries and gradients of the kept pairs.
    """
    rows, n = x.h_item.shape
    heads, width = model.heads, model.width // model.heads
    item = F.normalize(torch.randn(int(x.h_item.max()) + 1, model.width, device=x.h_item.device), dim=-1)[x.h_item]
    queries = Queries(x.h_item, x.h_time, x.h_visible)

    def related() -> Links:
        links = relate_kept(x, queries, kept, model, n, fused=True).weights
        assert isinstance(links, Links)
        return links

    kept = keep(item, item, x.h_visible, model.pgsa, x.h_session, fused=True)
    links = related()
    bias = RelativeBias(heads, n, model.time_buckets).to(item.device)
    q, k, v = (torch.randn(rows, heads, n, width, device=item.device, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))  # fmt: skip
    square, slots = rows * n * n / 2, kept.index.numel()
    relation = milliseconds(related)
    found = {
        "choice": {
            "forward": milliseconds(lambda: keep(item, item, x.h_visible, model.pgsa, x.h_session, fused=True)),
            "tflop": 2 * model.width * square / 1e12,
        },
        "relation": {"forward": relation},
        "order": {"forward": milliseconds(lambda: related().by_event) - relation},
        "sparse": both(lambda: sum_kept(q, k, v, bias, links), [q, k, v, *list(bias.parameters())[:3]])
        | {"gigabytes": 3 * 2 * 2 * model.width * slots / 1e9},
        "dense_kernel": both(lambda: DenseKernel.apply(q, k, v), [q, k, v])  # type: ignore[no-untyped-call]
        | {"tflop": 7 * 2 * model.width * square / 1e12},
    }
    for part in found.values():
        second = (part["forward"] + part.get("backward", 0.0)) / 1e3
        part |= {f"{unit}_a_second": part[unit] / second for unit in ("tflop", "gigabytes") if unit in part}
    return found


def attention_alone(found: dict[str, dict[str, float]], layers: int) -> float:
    """Time of the dense kernel in all layers over that of PGSA, all that it takes included."""

    def whole(name: str) -> float:
        return found[name]["forward"] + found[name].get("backward", 0.0)

    once = sum(whole(name) for name in ("choice", "relation", "order"))
    return layers * whole("dense_kernel") / (once + layers * whole("sparse"))


def both(forward: Callable[[], Tensor], inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of a forward pass, and of a backward pass after it."""
    out = forward()
    grad = torch.randn_like(out)
    back = milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
    return {"forward": milliseconds(forward), "backward": back}


def milliseconds(work: Work) -> float:
    """Median of some runs on the GPU, after two to warm up."""
    times = []
    for turn in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end))
    return median(times)


def limits() -> dict[str, float]:
    """What the GPU reaches: TFLOP a second of a bf16 matrix product, GB a second read and written by a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.randn(1 << 29, device="cuda")
    product, copy = milliseconds(lambda: a @ b), milliseconds(big.clone)
    return {"tflop_a_second": 2 * 8192**3 / product / 1e9, "gigabytes_a_second": 2 * 4 * big.numel() / copy / 1e6}
