"""Logs larger than the memory given to Ray, and users far longer than others, do not make a job grow."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_faults import STORE_BYTES, Job, raylets, tree, two_stage

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1500)]
FILES, ROWS = 21, 400_000
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


def two_stage_on(log: Path, folder: Path, *more: str, **environment: str) -> Job:
    """Both stages on that log, of which all rows are impressions."""
    job = two_stage(folder, f"data.path={log}", *more, **environment)
    (folder / "plain.yaml").write_text("data: {columns: {label: clicked}, split: {by: user_fraction}}")
    return replace(job, first=["--config", "plain.yaml", *job.first])


def largest(job: Job, name: str, *roots: int, limit: float = 1400) -> dict[str, float]:
    """Run a job to its end; the most memory of its own, in bytes, that any process had, by the first words of those
    commands that begin with a name."""
    most: dict[str, float] = {}
    with job.started() as process:
        end = time.monotonic() + limit
        while process.poll() is None:
            assert time.monotonic() < end, job.said()[-3000:]
            for root in roots or (process.pid,):
                for found in tree(root):
                    with suppress(psutil.Error, IndexError):
                        command = found.cmdline()[0]
                        if command.startswith(name):
                            info = found.memory_info()
                            most[command] = max(most.get(command, 0.0), info.rss - info.shared)
            time.sleep(0.2)
    assert process.returncode == 0, job.said()[-6000:]
    print("".join(f"\n{held / 1e6:8,.0f} MB {command}" for command, held in most.items()))
    return most


def test_a_log_ten_times_the_object_store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared, streamed and scored: nothing of it is ever whole in the store or in a process."""
    rng = np.random.default_rng(0)
    size = sum(write_log(tmp_path / "log", rng.integers(0, 20_000, ROWS), rng, f"{i:02d}", WIDE) for i in range(FILES))
    assert size >= 10 * STORE_BYTES
    features = ", ".join(f"{{name: {x}, column: {x}, role: candidate, kind: numeric}}" for x in WIDE)
    with raylets(tmp_path_factory.mktemp("ray"), nodes=1) as cluster:
        job = two_stage_on(
            tmp_path / "log", tmp_path / "job", f"data.features=[{features}]",
            "model.name=logistic", "stage1.enabled=false", "stage2.epochs=1", "stream.batch_tokens=65536",
            "stream.group_tokens=1000000",
            "resources.workers=1", "resources.cpus_per_worker=0.5", **cluster.environment,
        )  # fmt: skip
        nodes = [p.pid for p in (cluster.head, *cluster.nodes) if p is not None]
        most = largest(job, "ray::", *nodes)
    assert f"{FILES * ROWS:,} rows = " in job.said()
    assert max(most.values()) < size


def test_a_user_five_hundred_times_as_long_as_others_does_not_make_training_grow(tmp_path: Path) -> None:
    """Trained in the driver, in full windows: what matters is the budget of a batch, not the longest user."""
    rng = np.random.default_rng(0)
    even = np.repeat(np.arange(600), 200)
    skewed = np.where(even < 100, even, 0)  # one user has 100,000 of the 120,000 events
    most = {}
    for name, user in (("even", even), ("skewed", skewed)):
        write_log(tmp_path / name, user, rng, "log", [])
        job = two_stage_on(tmp_path / name, tmp_path / f"job-{name}", "stage1.epochs=1", "stage2.epochs=1")
        most[name] = max(largest(job, sys.executable).values())
        assert "120,000 rows = " in job.said()
    assert most["skewed"] < 1.3 * most["even"]
