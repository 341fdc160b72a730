"""Batch jobs of runs of another kind, and of runs whose log or folder has gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_model import quiet
from helpers_scoring import batch, finished_run, raw_log, write

from hpgr.artifacts import Folder
from hpgr.data.new_log import prepare_new
from hpgr.data.preparation import Prepared, in_process
from hpgr.errors import ArtifactError, ConfigError
from hpgr.scoring.finished import open_finished


def test_request_columns_may_bear_the_outputs_names(tmp_path: Path) -> None:
    log = raw_log(finished_run(tmp_path / "plain").run)
    names = {"list_id": "score", "user_id": "user"}
    path = write(tmp_path / "log.parquet", log.rename_columns([names.get(n, n) for n in log.column_names]))
    columns = {"user": "user", "request": ["user", "score"]}
    finished = finished_run(tmp_path / "run", data={"path": path, "columns": columns})
    asked = write(tmp_path / "c.parquet", {"user": ["u", "u"], "item_id": ["x", "y"], "score": ["l", "l"]})
    table = batch(finished, tmp_path / "out", candidates=asked)[1]
    assert table.column_names == ["user", "item", "request:user", "request:score", "score", "rank", "run"]
    assert table["request:score"].to_pylist() == ["l", "l"]


def test_runs_without_pgsa_or_stage_1_say_what_they_lack(tmp_path: Path) -> None:
    plain = finished_run(tmp_path, model={"pgsa": {"enabled": False, "summaries": 0}}, stage1={"enabled": False})
    with pytest.raises(ArtifactError, match="no stage 1"):
        batch(plain, tmp_path / "out", top_n=3)
    with pytest.raises(ConfigError, match="--explain"):
        batch(plain, tmp_path / "out", candidates="c.parquet", explain=True)


def test_a_run_folder_is_enough_for_new_users(tmp_path: Path) -> None:
    """The prepared log is gone: the run's copy of its vocabulary scores a new log as before, and nothing else."""
    before = finished_run(tmp_path)
    log = write(tmp_path / "new/log.parquet", raw_log(before.run))
    items = before.run.prepared.vocabulary().items["value"].to_pylist()[:3]
    asked = {"users": log, "candidates": write(tmp_path / "items.parquet", {"item_id": items})}
    _, expected = batch(before, tmp_path / "before", **asked)
    before.run.prepared.keep(before.run.folder.sub("prepared"))
    shutil.rmtree(before.run.prepared.folder.uri)
    after = open_finished(before.run.folder.uri)
    assert after.run.prepared.folder.uri == before.run.folder.sub("prepared").uri
    _, found = batch(after, tmp_path / "after", **asked)
    assert found.equals(expected)
    with pytest.raises(ArtifactError, match=r"timelines of the log .* are gone; give --users"):
        batch(after, tmp_path / "own", candidates=asked["candidates"])


def test_a_run_knows_where_its_log_is(tmp_path: Path) -> None:
    finished = finished_run(tmp_path)
    moved = tmp_path / "elsewhere/log"
    moved.parent.mkdir()
    shutil.move(finished.run.prepared.folder.uri, moved)
    with pytest.raises(ArtifactError, match="name the prepared log with --prepared"):
        open_finished(finished.run.folder.uri)
    Prepared.open(Folder(str(moved))).keep(finished.run.folder.sub("prepared"))
    again = open_finished(finished.run.folder.uri)
    assert again.run.prepared.folder.uri == str(moved)
    new = write(tmp_path / "new/log.parquet", raw_log(finished.run))
    users = prepare_new(again.config.data, again.run.prepared, [new], in_process, quiet)
    assert Path(users.folder.uri).parent == moved.parent  # beside the log, wherever the job runs
