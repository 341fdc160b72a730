"""Logs larger than the memory given to Ray, and users far longer than others, do not make a job grow."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_faults import STORE_BYTES, Job, raylets, tree, two_stage

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1500)]
FILES, ROWS = 20, 400_000
WIDE = [f"x{i}" for i in range(12)]
START = 1_600_000_000


def write_log(folder: Path, user: np.ndarray, rng: np.random.Generator, name: str, wide: list[str]) -> int:
    """One file of events of those users; returns its bytes in memory."""
    n = len(user)
    columns = {"user_id": user, "item_id": rng.zipf(1.3, n) % 5000, "timestamp": START + rng.integers(0, 10**7, n),
               "clicked": rng.integers(0, 2, n)} | {x: rng.standard_normal(n) for x in wide}  # fmt: skip
    table = pa.table(columns)
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / f"{name}.parquet", compression="none")
    return int(table.nbytes)


def largest(job: Job, name: str, *roots: int, limit: float = 1400) -> float:
    """Run a job to its end; the most memory of its own, in bytes, that a process at work under a name had."""
    most = 0.0
    with job.started() as process:
        end = time.monotonic() + limit
        while process.poll() is None:
            assert time.monotonic() < end, job.said()[-3000:]
            for root in roots or (process.pid,):
                for found in tree(root):
                    with suppress(psutil.Error, IndexError):
                        if found.cmdline()[0].startswith(name):
                            info = found.memory_info()
                            most = max(most, info.rss - info.shared)
            time.sleep(0.2)
    assert process.returncode == 0, job.said()[-6000:]
    return most


def test_a_log_ten_times_the_object_store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared, streamed and scored: nothing of it is ever whole in the store or in a process."""
    rng = np.random.default_rng(0)
    size = sum(write_log(tmp_path / "log", rng.integers(0, 20_000, ROWS), rng, f"{i:02d}", WIDE) for i in range(FILES))
    assert size >= 10 * STORE_BYTES
    features = ", ".join(f"{{name: {x}, column: {x}, role: candidate, kind: numeric}}" for x in WIDE)
    with raylets(tmp_path_factory.mktemp("ray"), nodes=1) as cluster:
        job = two_stage(
            tmp_path / "job", f"data.path={tmp_path / 'log'}", "data.columns.label=clicked",
            f"data.features=[{features}]", "data.split.by=user_fraction",
            "model.name=logistic", "stage1.enabled=false", "stage2.epochs=1", "stream.batch_tokens=65536",
            "resources.workers=1", "resources.cpus_per_worker=0.5", **cluster.environment,
        )  # fmt: skip
        nodes = [p.pid for p in (cluster.head, *cluster.nodes) if p is not None]
        most = largest(job, "ray::", *nodes)
    assert f"{FILES * ROWS:,} rows = " in job.said()
    print(f"\n{size / 1e6:,.0f} MB of log, {STORE_BYTES / 1e6:,.0f} MB of store, {most / 1e6:,.0f} MB in a process")
    assert most < size


def test_a_user_a_thousand_times_longer_than_others_does_not_make_training_grow(tmp_path: Path) -> None:
    """Trained in the driver, in full windows: what matters is the budget of a batch, not the longest user."""
    rng = np.random.default_rng(0)
    even = np.repeat(np.arange(600), 200)
    skewed = np.where(even < 100, even, 0)  # one user has 100,000 of the 120,000 events
    most = {}
    for name, user in (("even", even), ("skewed", skewed)):
        write_log(tmp_path / name, user, rng, "log", [])
        job = two_stage(tmp_path / f"job-{name}", f"data.path={tmp_path / name}", "data.columns.label=clicked",
                        "data.split.by=user_fraction", "stage1.epochs=1", "stage2.epochs=1")  # fmt: skip
        most[name] = largest(job, sys.executable)
        assert "120,000 rows = " in job.said()
    print(f"\nthe driver's memory: {most['even'] / 1e6:,.0f} MB, with a long user {most['skewed'] / 1e6:,.0f} MB")
    assert most["skewed"] < 1.3 * most["even"]
