"""Batch scoring on Ray: the pool's scores are those of one process, whatever dies on the way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from helpers_model import quiet
from helpers_scoring import batch, finished_run, scores_in, write

from hpgr.artifacts import Folder
from hpgr.errors import ArtifactError
from hpgr.scoring.finished import Finished
from hpgr.scoring.job import Wish

SHARD_PAIRS = 100
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every user with every item: some 2,400 pairs in 24 shards."""
    users = finished.run.prepared.timelines(0)["user"].to_pylist()
    items = finished.run.prepared.vocabulary().items["value"].to_pylist()
    table = {"user_id": [u for u in users for _ in items], "item_id": items * len(users)}
    return write(tmp_path_factory.mktemp("pairs") / "pairs.parquet", table)


@pytest.fixture(scope="module")
def undisturbed(finished: Finished, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("out") / "undisturbed"
    return batch(finished, folder, candidates=pairs, shard_pairs=SHARD_PAIRS)[1]


def on_ray(finished: Finished, folder: Path, workers: int = 2, **wish: Any) -> dict[str, Any]:
    from hpgr.on_ray.score import Pool, batch_score

    asked = Wish(run=finished.run.folder.uri, output=str(folder), **wish)
    return batch_score(asked, Pool(workers, workers), quiet)


def test_a_pool_gives_the_scores_of_one_process(
    local_ray: None, finished: Finished, pairs: str, undisturbed: pa.Table, tmp_path: Path
) -> None:
    summary = on_ray(finished, tmp_path / "out", candidates=pairs, shard_pairs=SHARD_PAIRS)
    assert summary["account"]["written"] == undisturbed.num_rows
    assert len(summary["files"]) > 10
    assert scores_in(tmp_path / "out").equals(undisturbed)


def test_a_users_error_in_a_shard_is_shown_as_it_is(
    local_ray: None, finished: Finished, pairs: str, tmp_path: Path
) -> None:
    """The run's timelines are gone; back in their place, the same command goes on."""
    bucket = Path(finished.run.prepared.folder.uri) / "timelines/bucket-00000.parquet"
    content = bucket.read_bytes()
    bucket.unlink()
    try:
        with pytest.raises(ArtifactError, match=r"cannot read .*bucket-00000"):
            on_ray(finished, tmp_path / "out", candidates=pairs)
    finally:
        bucket.write_bytes(content)
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert on_ray(finished, tmp_path / "out", candidates=pairs)["account"]["pairs"] > 0


def workers_of_pool() -> list[psutil.Process]:
    """Processes of this session's pool that are at work."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def killing(output: Path, after: int, done: threading.Event, killed: list[int]) -> Callable[[], None]:
    """Kills a worker once so many shards have been committed."""

    def run() -> None:
        while not done.is_set():
            committed = len(Folder(str(output)).entries("_commits"))
            workers = workers_of_pool()
            if committed >= after and workers:
                workers[0].kill()
                killed.append(committed)
                return
            time.sleep(0.005)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_loses_and_doubles_nothing(
    local_ray: None, finished: Finished, pairs: str, undisturbed: pa.Table, tmp_path: Path, seed: int
) -> None:
    output, done, killed = tmp_path / "out", threading.Event(), list[int]()
    after = random.Random(seed).randrange(0, 15)
    thread = threading.Thread(target=killing(output, after, done, killed))
    thread.start()
    try:
        summary = on_ray(finished, output, candidates=pairs, shard_pairs=SHARD_PAIRS)
    finally:
        done.set()
        thread.join()
    assert killed, "no worker was killed"
    assert summary["account"]["written"] == undisturbed.num_rows
    assert scores_in(output).equals(undisturbed)


LOST_NODE = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from hpgr.artifacts import Folder
from hpgr.on_ray.score import Pool, batch_score
from hpgr.scoring.job import Wish

run, pairs, out, after = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)
lost = []

def lose():
    while len(Folder(out).entries("_commits")) < int(after):
        time.sleep(0.01)
    lost.append(time.monotonic())
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2)

threading.Thread(target=lose, daemon=True).start()
batch_score(Wish(run=run, output=out, candidates=pairs, shard_pairs=20), Pool(2, 2), print)
assert lost, "the job ended before the node was lost"
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_lost_node_loses_and_doubles_nothing(
    finished: Finished, pairs: str, undisturbed: pa.Table, tmp_path: Path
) -> None:
    """A cluster of its own, in a process of its own: its second node dies with its workers and another one joins."""
    words = [finished.run.folder.uri, pairs, str(tmp_path / "out"), "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    done = subprocess.run([sys.executable, "-c", LOST_NODE, *words], env=environment, cwd=tmp_path, timeout=400,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = scores_in(tmp_path / "out")
    assert table.select(["user", "item", "rank"]).equals(undisturbed.select(["user", "item", "rank"]))
    np.testing.assert_allclose(table["score"].to_numpy(), undisturbed["score"].to_numpy(), rtol=0, atol=1e-6)
