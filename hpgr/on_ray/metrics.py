"""The platform's figures at Ray's metrics endpoint, from where Prometheus takes them.

Each bears the run's and the trial's name, and what part of the job it is of; Ray puts `ray_` before its name. The
dashboard of cluster/grafana.json draws them.
"""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

from hpgr.artifacts import Folder

PREFIX = "hpgr_"
TAGS = ("run", "trial", "stage")
GAUGES = {
    "loss": "training loss since the last report",
    "rows_per_second": "windows trained on a second, all workers",
    "sessions_per_second": "sessions trained on a second, all workers",
    "tokens_per_second": "history events trained on a second, all workers",
    "data_wait_share": "share of the step's time that the first worker waits for a batch",
    "padding_share": "share of a batch's places that hold padding",
    "lr": "learning rate",
    "rows_in": "rows of the log",
    "rows_kept": "rows that passed validation",
    "rows_quarantined": "rows put aside with a reason",
    "rows_duplicates": "rows that repeat another",
    "pairs_per_second": "pairs scored a second, all workers",
    "pairs_scored": "pairs scored by the job that runs",
}
"""Everything exported, with what it means."""

_made: dict[str, Gauge] = {}


def ids_of(folder: Folder) -> dict[str, str]:
    """Names of the run, and of the trial or cell in it ("" outside a search): runs/<run>/trials/<trial>."""
    *before, name = folder.uri.rstrip("/").split("/")
    if len(before) > 1 and before[-1] in ("trials", "cells"):
        return {"run": before[-2], "trial": name}
    return {"run": name, "trial": ""}


def export(folder: Folder, stage: str, values: Mapping[str, float]) -> None:
    """Set the gauges that are named so; other values stay out, and so do all where no Ray runs."""
    if not ray.is_initialized():
        return
    tags = ids_of(folder) | {"stage": stage}
    for name in values.keys() & GAUGES.keys():
        if name not in _made:
            _made[name] = Gauge(PREFIX + name, GAUGES[name], TAGS)
        _made[name].set(float(values[name]), tags)
