"""Batches a second of the stream that feeds the trainers, against what training takes and against no Ray at all.

A generated log is prepared and both stages train on it, so that waiting is that of real training. Then each stage's
stream runs alone, in turns: as the trainers get it (Ray Data tasks), and made in this process (`LocalSource`, the same
batches). `stream_over_training` says how many times faster batches come than training takes them: above 1, trainers
need not wait. Padding counts places of history and candidates, as the budget of a batch does.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpgr.artifacts import Folder
from hpgr.config import load_config
from hpgr.data.plan import padding_share
from hpgr.data.stream import LocalSource, Source
from hpgr.on_ray.benchmarks import machine, spread
from hpgr.on_ray.command import DEFAULT
from hpgr.on_ray.parallel import RayExecute
from hpgr.on_ray.pipeline import Request, prepared_log, two_stage
from hpgr.on_ray.session import session
from hpgr.on_ray.stream import RaySource
from hpgr.training.two_stage import Run

Say = Callable[[str], None]
STREAMS = {"stage1": "masked", "stage2": "click-train"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is built and measured."""
    parser.add_argument("--users", type=int, default=8000, help="users of the generated log")
    parser.add_argument("--epochs", type=int, default=2, help="epochs each stage trains")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the two sources")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Train, then drain each stream alone; returns the figures."""
    folder = Path(tempfile.mkdtemp(prefix="hpgr-benchmark-"))
    training = [f"stage{n}.{key}={options.epochs}" for n in (1, 2) for key in ("epochs", "patience")]
    log = [f"data.prepared={folder}/prepared", f"data.synthetic.users={options.users}"]
    config = load_config(DEFAULT, training + log)
    try:
        with session(say):
            metrics, uri = two_stage(Request(str(folder / "run"), config, False), say)
            curves = Folder(uri).read_json("curves.json")
            trained = Run(config, Folder(uri), prepared_log(config, RayExecute(say), say))
            figures = {stage: drained(trained, name, options, say) for stage, name in STREAMS.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    waits = {stage: next(row["data_wait"] for row in reversed(curves) if row["stage"] == stage) for stage in STREAMS}
    waited = {stage: metrics["seconds"][f"{stage}_waiting_for_data"] for stage in STREAMS}
    taken = {s: options.epochs * of["tokens"] * waits[s] / max(waited[s], 1e-9) for s, of in figures.items()}
    return {
        "ratios": {
            "stream_over_training": {s: of["ray"]["median"] / taken[s] for s, of in figures.items()},
            "ray_over_local": {s: of["ray"]["median"] / of["local"]["median"] for s, of in figures.items()},
        },
        "data_wait_share": waits,
        "padding_share": {s: of["padding"] for s, of in figures.items()},
        "tokens_per_second": {s: {"training": taken[s], "ray": of["ray"], "local": of["local"]}
                              for s, of in figures.items()},
        "settings": {"users": options.users, "epochs": options.epochs, "rounds": options.rounds},
        "machine": machine(),
    }  # fmt: skip


def drained(run: Run, name: str, options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Tokens a second of a stream from both sources, in turns; the first turn warms up."""
    spec = run.spec(name)
    resources = run.config.resources
    through_ray = RaySource(0, 1, resources.data_cpus, resources.data_workers)
    sources: dict[str, Source] = {"ray": through_ray, "local": LocalSource()}
    rates: dict[str, list[float]] = {way: [] for way in sources}
    tokens = 0
    for turn in range(options.rounds + 1):
        for way, source in sources.items():
            start = time.perf_counter()
            tokens = sum(int(step.batch.h_lengths.sum()) for step in source.steps(spec, range(turn, turn + 1), 0))
            if turn:
                rates[way].append(tokens / (time.perf_counter() - start))
    out: dict[str, Any] = {way: spread(values) for way, values in rates.items()}
    say(f"stream: {name}: " + ", ".join(f"{way} {of['median']:,.0f} tokens/s" for way, of in out.items()))
    return out | {"tokens": tokens, "padding": padding_share(spec.windows(), spec.plan(0))}
