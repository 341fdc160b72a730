"""What a search costs beyond training: trials that train in their own process, and trials that train by Ray Train.

Both ways search the generated log with the same trials, none stopped early, in a process and folder of their own, and
fill the same CPUs: a trial for each CPU that trains in its own process, or a trial for each two CPUs that starts two
Ray Train workers. Every trial draws another mask ratio, so none shares stage 1 with another. Every second round takes
the ways in reverse.

`nested_over_in_trial` compares wall clocks. `platform_overhead` is the share of a way's wall clock in which its trials
do not train: (wall clock - training time) / wall clock, where training time is the trials' own over trials at once. It
is preparing the log, starting Ray and trials, waiting and testing the best. Training time of the second way holds what
the two workers spend on each other, so hold the wall clocks beside one another too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hpgr.on_ray.benchmarks import machine, spread

Say = Callable[[str], None]
WAYS = {
    "in_trial": (1, ("resources.workers=1", "resources.cpus_per_worker=1")),
    "nested": (2, ("resources.workers=2", "resources.cpus_per_worker=0.5", "resources.data_cpus=0.25")),
}
"""CPUs that a trial asks for, and what makes it ask so; nested, half of them are its data tasks'."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is built and measured."""
    parser.add_argument("--users", type=int, default=3000, help="users of the generated log")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each stage")
    parser.add_argument("--trials", type=int, default=4, help="trials of a search")
    parser.add_argument("--rounds", type=int, default=1, help="turns of the ways (1, ten minutes on 2 cores)")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Search each way in turns; returns the figures."""
    done: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in list(WAYS) if turn % 2 == 0 else reversed(WAYS):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                account = pool.submit(searched, way, options.users, options.epochs, options.trials).result()
            done[way].append(account)
            say(f"search-overhead: {way}: {account['seconds']:.0f} s, {account['training_seconds']:.0f} s of training")
    at_once = {way: max(1, min((os.cpu_count() or 1) // cpus, options.trials)) for way, (cpus, _) in WAYS.items()}
    seconds = {way: spread([one["seconds"] for one in done[way]]) for way in WAYS}
    shares = {way: spread([overhead(one, at_once[way]) for one in done[way]]) for way in WAYS}
    return {
        "ratios": {
            "nested_over_in_trial": seconds["nested"]["median"] / seconds["in_trial"]["median"],
            "platform_overhead": {way: share["median"] for way, share in shares.items()},
        },
        "platform_overhead": shares,
        "seconds": seconds,
        "seconds_a_trial": {way: spread([one["training_seconds"] / options.trials for one in done[way]])
                            for way in WAYS},
        "settings": {"users": options.users, "epochs": options.epochs, "trials": options.trials,
                     "rounds": options.rounds, "at_once": at_once},
        "machine": machine(),
    }  # fmt: skip


def overhead(account: dict[str, float], at_once: int) -> float:
    """Share of a search's wall clock in which its trials, so many at a time, do not train."""
    return 1 - account["training_seconds"] / (account["seconds"] * at_once)


def searched(way: str, users: int, epochs: int, trials: int) -> dict[str, float]:
    """The account of one search."""
    from hpgr.config import load_config
    from hpgr.on_ray.command import DEFAULT
    from hpgr.on_ray.tune import SearchRequest, search
    from hpgr.search.space import parse_space

    folder = Path(tempfile.mkdtemp(prefix="hpgr-benchmark-"))
    settings = [f"data.prepared={folder}/prepared", f"data.synthetic.users={users}", *WAYS[way][1]]
    settings += [f"{key}={epochs}" for key in ("stage1.epochs", "stage2.epochs", "stage2.patience")]
    space = parse_space({
        "name": "overhead",
        "parameters": {"stage1.mask_ratio": {"uniform": [0.1, 0.6]}},
        "sampler": {"kind": "random"},
        "scheduler": {"kind": "none"},
        "budget": {"trials": trials},
    })  # fmt: skip
    try:
        request = SearchRequest(f"{folder}/search", load_config(DEFAULT, settings), space, False)
        _, data = search(request, _quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {key: data.account[key] for key in ("seconds", "training_seconds")}


def _quiet(_: str) -> None:
    """The trials' lines are not the benchmark's."""
