"""Finished runs and searches recorded at MLflow, where the configuration names a server (`tracking.mlflow`).

The job records what its folder holds, once it has ended: a server that is slow or gone costs a line of warning and
never the run. A search is one record, and each of its trials one below it. A finished run is recorded
once; a search that goes on is recorded anew.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpgr.artifacts import Folder
from hpgr.config import Config, dump
from hpgr.errors import ConfigError

Say = Callable[[str], None]
FILES = ("config.yaml", "report.html", "metrics.json", "curves.json", "best.yaml", "space.yaml", "search.json")
WAIT_SECONDS, RETRIES = "20", "1"
BATCH = 100
"""Values of one call; the server takes up to that many parameters."""
Point = tuple[str, float, int]
"""Name, value and step of a figure."""


def check_tracking(config: Config) -> None:
    """Before anything starts: the package is there, if it will be wanted.

    Raises:
        ConfigError: it is not.
    """
    if config.tracking.mlflow is not None and find_spec("mlflow") is None:
        raise ConfigError("tracking.mlflow: got an address, but the package mlflow is not installed; "
                          "pip install 'hpgr[mlflow]', or leave it out")  # fmt: skip


def record_run(config: Config, folder: Folder, metrics: Mapping[str, Any], curves: Iterable[Mapping[str, Any]],
               say: Say) -> None:  # fmt: skip
    """A run: its settings, its curve by step, its test figures, its files."""
    points = [point for row in curves for point in _points_of(row)]
    for stage in ("stage1", "stage2"):
        test = (metrics.get(stage) or {}).get("test") or {}
        points += [(f"{stage}/test/{name}", value, 0) for name, value in _numbers(test)]
    _send(config, say, lambda to: to.run(folder, _flat(dump(config)), points))


def record_search(config: Config, folder: Folder, result: Mapping[str, Any], say: Say) -> None:
    """A search: its account and best test figures, and a record below it for each trial."""
    points = [(name, value, 0) for name, value in _numbers(result)]
    points += [(f"test/{name}", value, 0) for name, value in _numbers(result["best"]["test"])]

    def send(to: _Mlflow) -> None:
        parent = to.run(folder, _flat(dump(config)), points)
        for trial in result["history"]:
            figures = [("auc", trial["auc"], 0)] if trial.get("auc") is not None else []
            to.child(parent, f"trial {trial['number']}", trial.get("values") or {}, figures)

    _send(config, say, send)


def _send(config: Config, say: Say, send: Callable[[_Mlflow], Any]) -> None:
    if config.tracking.mlflow is None:
        return
    try:
        send(_Mlflow(config.tracking.mlflow, config.name))
    except Exception as error:  # any failure of a server or its client: the results are safe in the folder
        told = (str(error).strip().splitlines() or [""])[0][:200]
        say(f"tracking: not recorded at MLflow ({type(error).__name__}: {told}); the run folder has everything")
    else:
        say("tracking: recorded at MLflow")


class _Mlflow:
    """A client of one experiment. The package's global state is left alone."""

    def __init__(self, address: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", WAIT_SECONDS)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(address)
        found = self.client.get_experiment_by_name(experiment)
        self.experiment = found.experiment_id if found else self.client.create_experiment(experiment)

    def run(self, folder: Folder, params: Mapping[str, Any], points: list[Point]) -> str:
        """Record a folder; returns the record's id."""
        name = folder.uri.rstrip("/").rpartition("/")[2]
        run = self.client.create_run(self.experiment, run_name=name, tags={"hpgr.folder": folder.uri}).info.run_id
        self._values(run, params, points)
        with tempfile.TemporaryDirectory() as place:
            for file in FILES:
                if folder.exists(file):
                    Path(place, file).write_bytes(folder.read(file))
            self.client.log_artifacts(run, place)
        self.client.set_terminated(run)
        return run

    def child(self, parent: str, name: str, params: Mapping[str, Any], points: list[Point]) -> None:
        """A record below another."""
        tags = {"mlflow.parentRunId": parent}
        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self._values(run, params, points)
        self.client.set_terminated(run)

    def _values(self, run: str, params: Mapping[str, Any], points: list[Point]) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        named = [Param(key, str(value)) for key, value in params.items()]
        figures = [Metric(key, value, now, step) for key, value, step in points]
        for first in range(0, max(len(named), len(figures)), BATCH):
            some = slice(first, first + BATCH)
            self.client.log_batch(run, metrics=figures[some], params=named[some])


def _points_of(row: Mapping[str, Any]) -> list[Point]:
    """Figures of one validation: those of training and those of the validation split."""
    step, stage = int(row["step"]), row["stage"]
    own = [(f"{stage}/{name}", value, step) for name, value in _numbers(row) if name not in ("step", "epoch")]
    return own + [(f"{stage}/validation/{name}", value, step) for name, value in _numbers(row["validation"])]


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers among some values, under names that MLflow takes."""
    return [(name.replace("@", "_at_"), float(value)) for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)]  # fmt: skip


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Leaves of a tree by their dotted paths."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return out
