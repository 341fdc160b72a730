"""Finished runs, searches and comparisons recorded at MLflow, if the configuration names a server (`tracking.mlflow`).

The job records what its folder holds, once it has ended: a server that is slow or gone costs a line of warning and
never the run. A search is one record with one below it for each trial, a comparison likewise with its rows. A finished
run is recorded once; a search or comparison that goes on is recorded anew.
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
FILES = ("config.yaml", "report.html", "metrics.json", "curves.json", "best.yaml", "space.yaml", "search.json",
         "matrix.yaml", "compare.json")  # fmt: skip
WAIT_SECONDS, RETRIES = "20", "1"
BATCH = 100
"""Values of one call; the server takes up to that many parameters."""
Point = tuple[str, float, int]
"""Name, value and step of a figure."""
Below = dict[str, tuple[Mapping[str, Any], list[Point]]]
"""Parts of a job by name: settings and figures of each."""


def check_tracking(config: Config) -> None:
    """Before anything starts: the package is there, if it will be wanted.

    Raises:
        ConfigError: it is not.
    """
    if config.tracking.mlflow is not None and find_spec("mlflow") is None:
        raise ConfigError("tracking.mlflow: got an address, but the package mlflow is not installed; "
                          "pip install -e '.[mlflow]', or leave it out")  # fmt: skip


def record_run(config: Config, folder: Folder, metrics: Mapping[str, Any], curves: Iterable[Mapping[str, Any]],
               say: Say) -> None:  # fmt: skip
    """A run: its settings, its curve by step, its test figures, its files."""
    points = [point for row in curves for point in _points_of(row)]
    for stage in ("stage1", "stage2"):
        test = (metrics.get(stage) or {}).get("test") or {}
        points += _at_end(test, f"{stage}/test/")
    _send(config, say, lambda to: to.run(folder, _flat(dump(config)), points))


def record_search(config: Config, folder: Folder, result: Mapping[str, Any], say: Say) -> None:
    """A search: its account and best test figures, and a record below it for each trial."""
    points = _at_end(result) + _at_end(result["best"]["test"], "test/")
    below: Below = {
        f"trial {row['number']}": (row["values"], _at_end({"auc": row["auc"]})) for row in result["history"]
    }
    _send(config, say, lambda to: to.run(folder, _flat(dump(config)), points, below))


def record_comparison(config: Config, folder: Folder, result: Mapping[str, Any], say: Say) -> None:
    """A comparison: its account, and a record below it for each row, with means and deviations over seeds."""
    below: Below = {}
    for row in result["models"]:
        figures = [point for name, of in row["test"].items() for point in _at_end(of, f"test/{name}/")]
        below[row["model"]] = (row["settings"], figures)
    _send(config, say, lambda to: to.run(folder, _flat(dump(config)), _at_end(result), below))


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

    def run(self, folder: Folder, params: Mapping[str, Any], points: list[Point], below: Below | None = None) -> None:
        """Record a folder, and below it what it consists of."""
        name = folder.uri.rstrip("/").rpartition("/")[2]
        run = self._begun(name, {"hpgr.folder": folder.uri}, params, points)
        with tempfile.TemporaryDirectory() as place:
            for file in FILES:
                if folder.exists(file):
                    Path(place, file).write_bytes(folder.read(file))
            self.client.log_artifacts(run, place)
        for child, (own, figures) in (below or {}).items():
            self.client.set_terminated(self._begun(child, {"mlflow.parentRunId": run}, own, figures))
        self.client.set_terminated(run)

    def _begun(self, name: str, tags: dict[str, str], params: Mapping[str, Any], points: list[Point]) -> str:
        """A record's id, its values written."""
        from mlflow.entities import Metric, Param

        run: str = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        now = int(time.time() * 1000)
        named = [Param(key, str(value)) for key, value in params.items()]
        figures = [Metric(key, value, now, step) for key, value, step in points]
        for first in range(0, max(len(named), len(figures)), BATCH):
            some = slice(first, first + BATCH)
            self.client.log_batch(run, metrics=figures[some], params=named[some])
        return run


def _points_of(row: Mapping[str, Any]) -> list[Point]:
    """Figures of one validation: those of training and those of the validation split."""
    step, stage = int(row["step"]), row["stage"]
    own = [(f"{stage}/{name}", value, step) for name, value in _numbers(row) if name not in ("step", "epoch")]
    return own + [(f"{stage}/validation/{name}", value, step) for name, value in _numbers(row["validation"])]


def _at_end(values: Mapping[str, Any], before: str = "") -> list[Point]:
    """The numbers among some values, as figures of the whole job."""
    return [(before + name, value, 0) for name, value in _numbers(values)]


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
