"""One trial of a search, in its own process: train both stages without reading the test split, report validations."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from hpgr.artifacts import Folder
from hpgr.config import Config, validate
from hpgr.data.preparation import Prepared, in_process
from hpgr.data.stream import build_index
from hpgr.errors import HpgrError
from hpgr.on_ray.cluster import here
from hpgr.on_ray.journal import journal
from hpgr.on_ray.session import quieten
from hpgr.on_ray.train import Crew, train_here, train_on_workers
from hpgr.sizing import Ask, refuse_impossible, room
from hpgr.training.two_stage import INDEXES, Run

UNKNOWN_ROOM = 8
"""Trials or cells at once on a cluster whose autoscaler does not say how far it goes, and the user neither."""
WAITING_CPUS = 0.01
"""CPUs of a trial or cell that starts Ray Train workers: it only waits for them, but Ray must find it a place."""
DONE, FAILED = "done", "failed"
"""Last report of a trial: `stage` is one of these."""


@dataclass(frozen=True)
class Place:
    """Where trials find what they share."""

    prepared: str
    stage1: str
    index: str


def cpus_of(config: Config) -> float:
    """CPUs of a worker of a trial: one unless configured."""
    cpus = config.resources.cpus_per_worker
    return cpus if isinstance(cpus, float) else 1.0


def nested(config: Config) -> bool:
    """Whether a trial starts Ray Train workers; with one it trains in the trial's own process, which is quicker."""
    return config.resources.count > 1


def demand(config: Config) -> dict[str, float]:
    """Resources of a whole trial."""
    resources, cpus = config.resources, cpus_of(config)
    if not nested(config):
        return {"CPU": cpus, **({"GPU": 1.0} if resources.on_gpu else {})}
    data = resources.data_workers * resources.data_cpus
    return {
        "CPU": resources.count * (cpus + data) + WAITING_CPUS,
        **({"GPU": float(resources.count)} if resources.on_gpu else {}),
    }


def reserved(config: Config) -> dict[str, float]:
    """Resources of a trial's or cell's own process: all of them, or next to nothing if it starts workers."""
    return {"CPU": WAITING_CPUS} if nested(config) else demand(config)


def places(config: Config, what: str, wanted: int | None) -> int:
    """How many trials or cells (`what`) may run at once: as wanted, else as many as the cluster takes.

    Raises:
        ConfigError: it can never run one.
    """
    cluster, resources = here(), config.resources
    beside = resources.data_cpus + WAITING_CPUS if nested(config) else 0.0
    remedy = "lower resources.workers or resources.cpus_per_worker"
    workers, gpus = max(1, resources.count), float(resources.on_gpu)
    ask = Ask(f"worker of a {what}", remedy, workers, cpus_of(config), gpus, beside)
    refuse_impossible(cluster, ask)
    if wanted is not None:
        return wanted
    if cluster.is_silent:
        return UNKNOWN_ROOM
    need = demand(config)
    by_cpu = int(sum(n.cpus * n.count for n in cluster.reach) // need["CPU"])
    return max(1, min(by_cpu, room(cluster.reach, ask) // ask.count))


def trial(settings: dict[str, Any], place: Place) -> None:
    """Tune's function. A user's or numerical error ends the trial for good; anything else is tried again by Tune."""
    quieten()
    folder, start = Folder(settings["folder"]), time.monotonic()

    def report(told: dict[str, Any]) -> None:
        ray.tune.report(told | {"seconds": time.monotonic() - start})

    try:
        folder.remove("error.txt")  # of an attempt before: this one's process may die without a word
        figures = _trained(run_of(validate(settings["config"]), folder, settings["stage1"], place), report)
    except Exception as error:
        if isinstance(error, HpgrError) and not error.goes_on:
            return report({"stage": FAILED, "error": str(error)})
        with suppress(HpgrError):  # a store may be what failed
            folder.write("error.txt", f"{type(error).__name__}: {error}".encode())
        raise
    stage2 = figures["stage2"]
    return report({
        "stage": DONE,
        "auc": stage2["validation"]["auc"],
        "keys": stage2["cost"]["keys"],
        "seconds_a_million": figures["seconds"]["scoring_a_million"],
    })  # fmt: skip


def run_of(config: Config, folder: Folder, stage1: str, place: Place) -> Run:
    """The run of a trial or a cell; windows are shared by those that cut alike."""
    prepared = Prepared.open(Folder(place.prepared))
    run = Run(config, folder, prepared, Folder(place.stage1).sub(stage1) if stage1 else None, index_of(config, place))
    for name in INDEXES:
        build_index(prepared, config, run.index_folder, name, in_process)
    return run


def index_of(config: Config, place: Place) -> Folder:
    """Folder of the windows that a configuration cuts."""
    cut = config.stream
    return Folder(place.index).sub(f"{cut.window}-{cut.spacing}-{config.evaluation.next_item_users}")


def _trained(run: Run, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    config, threads = run.config, max(1, int(cpus_of(run.config)))
    with journal(run.folder, partial(print, flush=True)) as say:
        if nested(config):
            crew = Crew(cpus_of(config), threads, [TuneReportCallback()], test=False)
            return train_on_workers(run, say, crew)
        torch.set_num_threads(threads)
        device = torch.device("cuda" if config.resources.on_gpu else "cpu")
        return train_here(run, device, say, report, test=False)
