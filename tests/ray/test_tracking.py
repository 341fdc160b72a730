"""Finished runs and searches at MLflow: what is recorded, and that a server can cost nothing but a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpgr.artifacts import Folder
from hpgr.config import Config, validate
from hpgr.errors import ConfigError
from hpgr.on_ray import tracking

CURVES = [
    {"stage": "stage2", "step": 7, "epoch": 1, "train_loss": 0.6, "validation": {"auc": 0.7, "gauc": None}},
    {"stage": "stage2", "step": 14, "epoch": 2, "train_loss": 0.5, "validation": {"auc": 0.75, "gauc": 0.6}},
]
METRICS = {"stage1": None, "stage2": {"test": {"auc": 0.72, "ndcg@10": 0.1}}}


def tracked(address: str) -> Config:
    return validate({"name": "shop", "tracking": {"mlflow": address}})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "runs" / "first"))
    folder.write("report.html", b"<p>report</p>")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_what_is_recorded(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    address, said = f"sqlite:///{tmp_path}/mlflow.db", list[str]()
    tracking.record_run(tracked(address), folder, METRICS, CURVES, said.append)
    assert said == ["tracking: recorded at MLflow"]
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("shop")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.pgsa.top_k"] == "32"
    assert run.data.metrics["stage2/test/auc"] == 0.72
    assert run.data.metrics["stage2/test/ndcg_at_10"] == 0.1
    history = client.get_metric_history(run.info.run_id, "stage2/validation/auc")
    assert [(point.step, point.value) for point in history] == [(7, 0.7), (14, 0.75)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.filterwarnings("ignore")
def test_trials_lie_below_their_search(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    trials = [{"number": 0, "auc": 0.7, "values": {}}, {"number": 1, "auc": None, "values": {"model.dropout": 0.3}}]
    result: dict[str, Any] = {"best": {"test": {"auc": 0.7}}, "trials": 2, "history": trials}
    tracking.record_search(tracked(address), folder, result, print)
    client = MlflowClient(address)
    runs = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "first")
    below = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert parent.data.metrics["trials"] == 2
    assert below.keys() == {"trial 0", "trial 1"}
    assert below["trial 0"].data.metrics == {"auc": 0.7}
    assert below["trial 1"].data.params == {"model.dropout": "0.3"}
    assert below["trial 1"].data.metrics == {}


@pytest.mark.filterwarnings("ignore")
def test_rows_lie_below_their_comparison(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    test = {"auc": {"mean": 0.7, "sd": 0.01}, "gauc": {"mean": None, "sd": None}}
    models = [{"model": "without SEM", "settings": {"model.sem.in_stage2": False}, "test": test}]
    tracking.record_comparison(tracked(address), folder, {"models": models, "seconds": 9.5}, print)
    client = MlflowClient(address)
    runs = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert found["first"].data.metrics == {"seconds": 9.5}
    assert found["without SEM"].data.metrics == {"test/auc/mean": 0.7, "test/auc/sd": 0.01}
    assert found["without SEM"].data.params == {"model.sem.in_stage2": "False"}
    assert found["without SEM"].data.tags["mlflow.parentRunId"] == found["first"].info.run_id


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_refuses_costs_a_warning(folder: Folder) -> None:
    pytest.importorskip("mlflow")
    said = list[str]()
    tracking.record_run(tracked("http://127.0.0.1:9"), folder, METRICS, CURVES, said.append)
    assert len(said) == 1
    assert "not recorded" in said[0]


def test_off_by_default(folder: Folder) -> None:
    said = list[str]()
    tracking.record_run(validate({}), folder, METRICS, CURVES, said.append)
    assert said == []


def test_a_missing_package_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    tracking.check_tracking(validate({}))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[mlflow\]'"):
        tracking.check_tracking(tracked("http://127.0.0.1:9"))


def test_keys_in_the_address_are_refused() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        tracked("https://me:hunter2@mlflow.example.org")
    assert "hunter2" not in str(refused.value)
