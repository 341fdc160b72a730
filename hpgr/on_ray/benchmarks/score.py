"""Cached batch scoring against encoding the history anew for each candidate.

Both ways score the same users with the same weights (random: speed does not depend on them) on all cores, in turns.
The naive way is the training forward on rows of one candidate, each with its own history. Then the whole job runs on
Ray, for a quarter of the users and for all: pairs a second from files to files, and the workers' peak memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hpgr.artifacts import FORMAT, Folder
from hpgr.config import Config, dump, validate
from hpgr.data.batches import Assembler
from hpgr.data.preparation import prepare
from hpgr.data.windows import serving_windows
from hpgr.model.hpgr import HpgrClick
from hpgr.model.inputs import pad, unpad, with_candidates
from hpgr.on_ray.benchmarks import Greatest, machine, spread
from hpgr.on_ray.parallel import RayExecute
from hpgr.on_ray.score import Pool, batch_score
from hpgr.on_ray.session import session
from hpgr.schema import Floats, Timelines
from hpgr.scoring.finished import open_finished
from hpgr.scoring.job import Wish
from hpgr.scoring.pairs import Pairs, Scorer
from hpgr.training.checkpoint import to_bytes
from hpgr.training.two_stage import Run, stage_key

Say = Callable[[str], None]
USERS_A_FILE = 1000
SETTINGS = ("users", "candidates", "history", "items", "rounds", "sample", "workers")
NAIVE_ROWS = 16
"""Histories the naive way encodes at once."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is built and measured."""
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=100, help="candidates a user")
    parser.add_argument("--history", type=int, default=200, help="events a user")
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the two ways")
    parser.add_argument(
        "--sample", type=int, default=16, help="users scored in a turn; the naive way takes 4 candidates"
    )
    parser.add_argument("--workers", type=int, help="workers of the job (default: the CPUs; on GPUs one)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of both ways and of the job's workers"
    )
    parser.add_argument("--keep", metavar="DIR", help="build in this folder and leave it")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Build, measure both ways, run the job; returns the figures."""
    folder = Path(options.keep or tempfile.mkdtemp(prefix="hpgr-benchmark-"))
    try:
        with session(say):
            config = build(options, folder, say)
            ways = compare(folder, options, say)
            quarter, whole = (job(folder, options, share, say) for share in (4, 1))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    agreement, cpu = ways.pop("agreement"), ways.pop("cpu")
    cached, naive = ways["cached"]["median"], ways["reencode"]["median"]
    return {
        "ratios": {
            "cached_over_reencode": cached / naive,
            "cached_over_reencode_by_cpu_time": cpu["cached"]["median"] / cpu["reencode"]["median"],
            "job_over_reencode": whole["pairs_per_second"] / naive,
            "peak_memory_all_over_quarter": whole["peak_mb"] / quarter["peak_mb"],
        },
        "pairs_per_cpu_second": cpu,
        "pairs_per_second": ways | {"job": whole["pairs_per_second"]},
        "agreement": agreement,
        "jobs": {"quarter": quarter, "all": whole},
        "settings": {k: v for k, v in vars(options).items() if isinstance(v, int | None)}
        | {"device": options.device, "model": dump(config)["model"]},
        "machine": machine(),
    }


def build(options: argparse.Namespace, folder: Path, say: Say) -> Config:
    """A log of equal histories, prepared, a run with random weights, and candidates for every user."""
    rng = np.random.default_rng(0)
    users = [f"u{i:07d}" for i in range(options.users)]
    for first in range(0, options.users, USERS_A_FILE):
        some = users[first : first + USERS_A_FILE]
        _write(folder / f"log/{first:07d}.parquet", _events(rng, some, options))
        for share in (4, 1):
            n = len(some) // share
            _write(folder / f"candidates-{share}/{first:07d}.parquet", {
                "user_id": np.repeat(some[:n], options.candidates),
                "item_id": _distinct(rng, n, options),
            })  # fmt: skip
    config = validate({
        "name": "benchmark",
        "data": {"path": str(folder / "log"), "columns": {"label": "clicked"}, "prepared": str(folder / "prepared")},
        "stream": {"window": max(200, options.history), "batch_tokens": max(4096, options.history)},
    })  # fmt: skip
    prepared = prepare(config, RayExecute(say), say)
    run = Run(config, Folder(str(folder / "run")), prepared)
    run.folder.write_json("run.json", {"format": FORMAT, "config": dump(config)})
    stage2 = run.folder.sub("stage2")
    torch.manual_seed(0)
    model = HpgrClick(config, run.sizes())
    model.anchor_table.copy_(torch.nn.functional.normalize(torch.randn(model.anchor_table.shape), dim=-1))
    stage2.write("best.safetensors", to_bytes(model.state_dict()))
    stage2.write_json("done.json", {"settings": stage_key(config, prepared, "stage2"), "best_file": "best.safetensors"})
    return config


def _events(rng: np.random.Generator, users: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Sessions of some ten events, a day apart."""
    n = options.history
    gaps = np.where(rng.random((len(users), n)) < 0.1, 86_400, rng.integers(1, 600, (len(users), n)))
    return {
        "user_id": np.repeat(users, n),
        "item_id": rng.integers(0, options.items, len(users) * n),
        "timestamp": (1_600_000_000 + np.cumsum(gaps, 1)).ravel(),
        "clicked": rng.integers(0, 2, len(users) * n),
    }


def _distinct(rng: np.random.Generator, users: int, options: argparse.Namespace) -> Any:
    """Random items, each once a user: [users * candidates]."""
    return np.argpartition(rng.random((users, options.items)), options.candidates, axis=1)[
        :, : options.candidates
    ].ravel()


def _write(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def compare(folder: Path, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Pairs a second of both ways, in turns, and how far their scores differ."""
    torch.set_num_threads(options.workers or os.cpu_count() or 1)
    finished = open_finished(str(folder / "run"))
    device = torch.device(options.device)
    scorer = Scorer(finished.click_model(device), finished.config.stream, device)
    table = finished.run.prepared.timelines(0).slice(0, options.sample).combine_chunks()
    assembler = Assembler({0: table}, finished.config.stream.session_gap_minutes)
    sizes = finished.run.sizes()
    pairs = sample_pairs(assembler.timelines, options.candidates, sizes.first_item, sizes.items)
    few = pairs.take(np.flatnonzero(np.arange(len(pairs)) % options.candidates < min(4, options.candidates)))
    rates: dict[str, list[float]] = {"cached": [], "reencode": []}
    by_cpu: dict[str, list[float]] = {"cached": [], "reencode": []}
    scores: dict[str, Floats] = {}
    ways: dict[str, tuple[Pairs, Callable[[], Floats]]] = {
        "cached": (pairs, lambda: scorer.score(assembler, pairs)),
        "reencode": (few, lambda: reencode(scorer, assembler, few)),
    }
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, (scored, way) in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            scores[name] = way()
            if turn:
                rates[name].append(len(scored) / (time.perf_counter() - start))
                by_cpu[name].append(len(scored) / (time.process_time() - cpu))
    same = scores["cached"][np.arange(len(pairs)) % options.candidates < min(4, options.candidates)]
    out: dict[str, Any] = {name: spread(values) for name, values in rates.items()}
    say(f"score: cached {out['cached']['median']:,.0f}, encoding anew {out['reencode']['median']:,.0f} pairs/s")
    cpu_rates = {name: spread(values) for name, values in by_cpu.items()}
    return out | {"cpu": cpu_rates, "agreement": float(np.abs(same - scores["reencode"]).max())}


def sample_pairs(timelines: Timelines, candidates: int, first: int, end: int) -> Pairs:
    """Random candidates of every timeline after its whole history, of the items [first, end)."""
    rng, n = np.random.default_rng(1), len(timelines) * candidates
    row = np.repeat(np.arange(len(timelines)), candidates)
    last = timelines.h_time[timelines.h_offsets[1:] - 1]
    features = np.zeros((n, 0), np.int64), np.zeros((n, 0), np.float32)
    return Pairs(row, rng.integers(first, end, n), last[row] + 1, np.diff(timelines.h_offsets)[row], *features)


def reencode(scorer: Scorer, assembler: Assembler, pairs: Pairs) -> Floats:
    """The naive way: each candidate a row of its own with its whole history, through the training forward."""
    out = np.zeros(len(pairs), np.float32)
    for first in range(0, len(pairs), NAIVE_ROWS):
        index = np.arange(first, min(first + NAIVE_ROWS, len(pairs)))
        some = pairs.take(index)
        windows, order, bounds = serving_windows(assembler.timelines, scorer.stream, some.row, some.visible)
        some, rows = some.take(order), np.repeat(np.arange(len(windows)), np.diff(bounds))
        x = pad(assembler.batch(windows.take(rows), targets=False), scorer.device)
        columns = {"c_item": some.item, "c_time": some.time, "c_visible": some.visible - windows.start[rows],
                   "c_cat": some.cat, "c_num": some.num}  # fmt: skip
        x = with_candidates(x, np.arange(len(rows)), np.ones(len(rows), np.int64), columns)
        with torch.no_grad():
            out[index[order]] = unpad(torch.sigmoid(scorer.model(x).scores), x.c_real)
    return out


def job(folder: Path, options: argparse.Namespace, share: int, say: Say) -> dict[str, Any]:
    """The whole job for one in `share` users: its rate and account, and the workers' peak memory."""
    wish = Wish(str(folder / "run"), str(folder / f"output-{share}"), candidates=str(folder / f"candidates-{share}"))
    on_gpu = options.device == "cuda"
    workers = options.workers or (1 if on_gpu else os.cpu_count() or 1)
    with Greatest(largest_worker) as memory:
        start = time.monotonic()
        summary = batch_score(wish, Pool(workers, workers, on_gpu), say)
        seconds = time.monotonic() - start
    shutil.rmtree(folder / f"output-{share}")
    written = summary["account"]["written"]
    return {"pairs": written, "users": summary["account"]["users"], "seconds": round(seconds, 2),
            "pairs_per_second": written / seconds, "while_scoring": summary["pairs_per_second"],
            "peak_mb": round(memory.value / 1e6, 1)}  # fmt: skip


def largest_worker() -> float:
    """Resident bytes of the largest pool worker. Linux."""
    page, most = os.sysconf("SC_PAGE_SIZE"), 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"MapWorker" in (process / "cmdline").read_bytes():
                most = max(most, int((process / "statm").read_text().split()[1]) * page)
    return most
