"""A whole job on an object store: run, prepared log, candidates and output by s3:// URIs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.fs as pafs
import pytest
from helpers_scoring import batch, finished_run, impressions, write

from hpgr.artifacts import Folder
from hpgr.scoring import output
from hpgr.scoring.finished import open_finished


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    environment = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "ENDPOINT_URL": endpoint, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="jobs")
    yield "s3://jobs"
    server.stop()


def test_a_job_lost_between_moves_goes_on_in_a_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = finished_run(tmp_path)
    pairs = write(tmp_path / "asked/pairs.parquet", impressions(local.run))
    # The same shards: other ones share batches otherwise, and may differ in a score's last bit.
    _, expected = batch(local, tmp_path / "out", candidates=pairs, shard_pairs=60)
    for folder in (local.run.folder.uri, local.run.prepared.folder.uri, str(Path(pairs).parent)):
        pafs.copy_files(folder, f"{bucket}/{Path(folder).name}")
    log = f"{bucket}/{Path(local.run.prepared.folder.uri).name}"
    remote = open_finished(f"{bucket}/run", log)
    assert remote.id == local.id
    asked = {"candidates": f"{bucket}/asked", "prepared": log, "shard_pairs": 60, "embeddings": True}

    class Lost(BaseException):
        pass

    moves, move = [], Folder.move

    def failing(self: Folder, source: str, target: str) -> None:
        if len(moves) == 2:
            raise Lost
        moves.append(target)
        move(self, source, target)

    monkeypatch.setattr(Folder, "move", failing)
    monkeypatch.setattr(output, "STORE_THREADS", 1)
    with pytest.raises(Lost):
        batch(remote, f"{bucket}/out", **asked)
    monkeypatch.setattr(Folder, "move", move)
    folder = Folder(f"{bucket}/out")
    assert not folder.exists("_SUCCESS")
    summary, table = batch(remote, folder.uri, **asked)
    assert table.equals(expected)
    assert summary["account"]["written"] == expected.num_rows
    assert [n for n in folder.entries() if n.startswith("_")] == ["_SUCCESS", "_embeddings", "_request.json"]
