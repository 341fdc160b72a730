"""PGSA over kept keys against dense HSTU attention: forward and backward of the encoder by history length.

Both ways run the same layers with the same relative bias on the same tokens, in turns; PGSA's time includes its choice
of keys. `ratios` compares what `pgsa.impl: auto` runs with dense attention as the platform trains it, `gather_ratios`
the gather at every length, and `ratios_over_tiled_dense` takes a harder
baseline: dense attention in causal tiles of queries that are computed again for gradients, half the work in little
memory. A step holds as many events whatever their length, as a training batch does, so short histories come several at
a time. Peak memory is that of a fresh process during one step, above what it held right before: imports, a small step
that loads what is loaded once, the model and its input are made by then, and their peaks are forgotten.

On a GPU the step is in bf16 (autocast) and the baseline a fused dense kernel without the bias, `dense_kernel`; maps in
memory (`dense`) are measured as far as they fit. `parts` are the milliseconds of one layer's kernels and of the choice,
with the floating-point operations or bytes that each needs a second; `attention_alone_ratios` compares their sums over
the layers, without what both ways share; `limits` is what the GPU reached on a large matrix product and a large copy.

Threads wait for one another many times a step. Where other programs use the cores, that wait is what two threads
measure: take `--threads 1` there, and read the ratios of processor time.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpgr.config import Model, dump, validate
from hpgr.model.attention import attend
from hpgr.model.hstu import HstuEncoder, HstuLayer
from hpgr.model.inputs import Inputs
from hpgr.model.pgsa import visible_mask
from hpgr.model.relation import Queries, Relation, relate, relate_sparsely
from hpgr.on_ray.benchmarks import machine, spread
from hpgr.schema import SECOND

Say = Callable[[str], None]
ITEMS = 5000
WAYS = {"cpu": ("dense", "tiled_dense", "auto", "gather"), "cuda": ("dense_kernel", "auto", "dense")}
TILE = 1 << 20
"""Query-key pairs of a tile."""
LENGTHS, LENGTHS_ON_GPU = "200,1024,4096,8192", "2048,4096,8192,16384,32768"
Measured = dict[str, dict[str, dict[str, float]]]
"""By length, then by way: median, least and greatest."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is built and measured."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", help="history lengths, separated by commas (200 to 8192; on a GPU 2048 to 32768)")
    parser.add_argument("--tokens", type=int, help="events a step, at least one history (4096; on a GPU 32768)")
    parser.add_argument("--width", type=int, help="of the model (64; on a GPU 256)")
    parser.add_argument("--heads", type=int, help="of attention (2; on a GPU 4)")
    parser.add_argument("--threads", type=int, help="of torch (default: the cores)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the ways")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--max-keys", type=int, default=64)


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Measure every length; returns the figures."""
    cuda = options.device == "cuda"
    pgsa = {"top_k": options.top_k, "sigma": options.sigma, "max_keys": options.max_keys}
    size = {"width": options.width or (256 if cuda else 64), "heads": options.heads or (4 if cuda else 2)}
    config = validate({"model": {**size, "layers": 2, "dropout": 0.0, "pgsa": pgsa}})
    threads = options.threads or os.cpu_count() or 1
    lengths = [int(n) for n in (options.lengths or (LENGTHS_ON_GPU if cuda else LENGTHS)).split(",")]
    tokens = options.tokens or (32768 if cuda else 4096)
    cases = {n: Case(config.model, n, max(1, tokens // n), options.device, threads) for n in lengths}
    seconds: Measured = {}
    processor: Measured = {}
    memory: dict[str, dict[str, float]] = {}
    for n, case in cases.items():
        seconds[str(n)], processor[str(n)] = turns(case, options.rounds)
        memory[str(n)] = {way: (peak_mb if cuda else apart)(case, way) for way in seconds[str(n)]}
        middle = {way: of["median"] for way, of in seconds[str(n)].items()}
        say(f"attention: {n}: " + ", ".join(f"{w} {t:.4f} s {memory[str(n)][w]:,.0f} MB" for w, t in middle.items()))
    events = {str(n): n * case.rows for n, case in cases.items()}
    base = "dense_kernel" if cuda else "dense"
    return {
        "ratios": ratios(seconds, "auto", base),
        **({} if cuda else {"gather_ratios": ratios(seconds, "gather")}),
        **({} if cuda else {"ratios_over_tiled_dense": ratios(seconds, "auto", "tiled_dense")}),
        **({} if cuda else {"ratios_by_cpu_time": ratios(processor, "auto")}),
        "memory_ratios": {n: ways[base] / max(ways["auto"], 0.1) for n, ways in memory.items()},
        "kilobytes_an_event": {n: {w: mb * 1e3 / events[n] for w, mb in ways.items()} for n, ways in memory.items()},
        "peak_mb": memory,
        "seconds": seconds,
        **({} if cuda else {"cpu_seconds": processor}),
        **(on_gpu(cases) if cuda else {}),
        "rows": {str(n): case.rows for n, case in cases.items()},
        "settings": {"rounds": options.rounds, "device": options.device, "threads": threads}
        | {"model": dump(config)["model"]},
        "machine": machine(),
    }  # fmt: skip


def on_gpu(cases: dict[int, Case]) -> dict[str, Any]:
    """Attention alone, where its time goes, and what the GPU can do."""
    from hpgr.on_ray.benchmarks.attention_parts import attention_alone, limits, parts  # needs triton

    found = {str(n): parts(case.model, case.inputs()) for n, case in cases.items()}
    alone = {n: attention_alone(of, cases[int(n)].model.layers) for n, of in found.items()}
    return {"attention_alone_ratios": alone, "limits": limits(), "parts": found}


def ratios(measured: Measured, way: str, baseline: str = "dense") -> dict[str, float]:
    """The baseline's time over that of `way`, by length."""
    return {n: ways[baseline]["median"] / ways[way]["median"] for n, ways in measured.items()}


@dataclass(frozen=True)
class Case:
    """Histories of one length, and the encoder that reads them."""

    model: Model
    n: int
    rows: int
    device: str
    threads: int

    def build(self) -> Callable[[str], None]:
        """What runs one step, forward and backward, in the way of a name."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        x = self.inputs()
        encoder = HstuEncoder(self.model, self.n).to(self.device)
        tokens = torch.randn(self.rows, self.n, self.model.width, device=self.device, requires_grad=True)
        table = F.normalize(torch.randn(ITEMS, self.model.width, device=self.device), dim=-1)
        target = torch.randn(tokens.shape, device=self.device)

        def step(way: str) -> None:
            """Forward and backward in one way."""
            encoder.zero_grad()
            tokens.grad = None
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
                if way == "tiled_dense":
                    state = encoded_in_tiles(encoder, tokens, x, self.model)
                elif way == "dense_kernel":
                    state = encoded_by_kernel(encoder, tokens, x)
                else:
                    state = encoded(encoder, tokens, self.relation(x, table, way))
                loss = (state * target).sum()
            torch.autograd.backward(loss)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return step

    def inputs(self) -> Inputs:
        """The histories."""
        return histories(self.n, self.rows, self.device)

    def relation(self, x: Inputs, table: Tensor, way: str) -> Relation:
        """What queries see, its choice included."""
        queries = Queries(x.h_item, x.h_time, x.h_visible)
        if way == "dense":
            return relate(x, *queries, visible_mask(x.h_visible, self.n), self.model, self.n)
        vectors = table[x.h_item]
        return relate_sparsely(x, queries, (vectors, vectors), self.model, self.n, way)


def histories(n: int, rows: int, device: str) -> Inputs:
    """Full histories of random items, some repeated, seconds to days apart."""
    rng = np.random.default_rng(0)
    gaps = np.where(rng.random((rows, n)) < 0.1, 86_400, rng.integers(1, 600, (rows, n)))
    item = rng.integers(0, ITEMS, (rows, n))
    time, visible = np.cumsum(gaps, 1) * SECOND, np.tile(np.arange(n), (rows, 1))
    nothing = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    columns: dict[str, Any] = {f.name: nothing for f in fields(Inputs)}
    for name, values in (("h_item", item), ("h_time", time), ("h_visible", visible)):
        columns[name] = torch.from_numpy(values).to(device)
    return Inputs(**columns | {"key": np.arange(rows)})


def encoded(encoder: HstuEncoder, tokens: Tensor, relation: Relation) -> Tensor:
    """The history through all layers, the last one's attention included."""
    for layer in cast("list[HstuLayer]", encoder.layers):
        own = layer.uvqk(tokens)
        tokens = layer.update(tokens, own, (own[3], own[1]), relation, None, 0)
    return tokens


def encoded_by_kernel(encoder: HstuEncoder, tokens: Tensor, x: Inputs) -> Tensor:
    """The same by the fused dense kernel, without the bias of distances and ages."""
    from hpgr.on_ray.benchmarks.dense_kernel import DenseKernel  # needs triton

    for layer in cast("list[HstuLayer]", encoder.layers):
        u, v, q, k = layer.uvqk(tokens)
        own = F.silu((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]) + layer.bias.own[:, None, None])
        past: Tensor = DenseKernel.apply(q, k, v)  # type: ignore[no-untyped-call]
        mixed = (past + own * v) / (1 + x.h_visible)[:, None, :, None]
        tokens = tokens + layer.out(layer.norm_out(mixed.transpose(1, 2).flatten(2)) * u)
    return tokens


def encoded_in_tiles(encoder: HstuEncoder, tokens: Tensor, x: Inputs, model: Model) -> Tensor:
    """The same by dense attention, a tile of queries at a time over the keys up to its end."""
    rows, n = x.h_item.shape
    size = max(1, TILE // (rows * n))
    for layer in cast("list[HstuLayer]", encoder.layers):
        u, *vqk = layer.uvqk(tokens)
        tiles = [checkpoint(one_tile, layer, vqk, x, slice(i, i + size), model, use_reentrant=False)
                 for i in range(0, n, size)]  # fmt: skip
        tokens = tokens + layer.out(layer.norm_out(torch.cat(tiles, 2).transpose(1, 2).flatten(2)) * u)
    return tokens


def one_tile(layer: HstuLayer, vqk: list[Tensor], x: Inputs, tile: slice, model: Model) -> Tensor:
    """Dense attention of a tile's queries: [B, H, T, E]."""
    v, q, k = vqk
    n = x.h_item.shape[1]
    upto = min(n, tile.stop)
    past = replace(x, h_item=x.h_item[:, :upto], h_time=x.h_time[:, :upto])
    queries = Queries(x.h_item[:, tile], x.h_time[:, tile], x.h_visible[:, tile])
    r = relate(past, *queries, visible_mask(queries.visible, upto), model, n)
    assert isinstance(r.weights, Tensor)
    own = k[:, :, tile], v[:, :, tile]
    return attend(q[:, :, tile], k[:, :, :upto], v[:, :, :upto], own, layer.bias(r.pairs), layer.bias.own, r.weights)


def turns(case: Case, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Seconds, and processor seconds, of a step in each way, by turns; the first round warms up. A way that a GPU has
    no memory for is left out."""
    step = case.build()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS[case.device]}
    processor: dict[str, list[float]] = {way: [] for way in WAYS[case.device]}
    for turn in range(rounds + 1):
        for way in list(seconds):
            start, cpu = time.perf_counter(), time.process_time()
            try:
                step(way)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                del seconds[way], processor[way]
                continue
            if turn:
                seconds[way].append(time.perf_counter() - start)
                processor[way].append(time.process_time() - cpu)
    clock, cpu_time = ({way: spread(values) for way, values in of.items()} for of in (seconds, processor))
    return clock, cpu_time


def apart(case: Case, way: str) -> float:
    """Peak memory of a step in a fresh process, in MB above what it held right before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_mb, case, way).result()


def peak_mb(case: Case, way: str) -> float:
    """Peak memory of one step, in MB above what is held right before; a tiny step first loads what is loaded once."""
    replace(case, n=64, rows=1).build()(way)
    step = case.build()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    forget_peak()
    before = resident("VmRSS")
    step(way)
    return (resident("VmHWM") - before) / 1e6


def forget_peak() -> None:
    """From here on VmHWM is the greatest of what comes, not of imports or of steps before. Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Resident memory (VmRSS) or its peak so far (VmHWM), in bytes. Linux."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024
