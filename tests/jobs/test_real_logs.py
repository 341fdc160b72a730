"""Accuracy on real logs, and ten million rows. Minutes each."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[2]


def metrics_of(folder: Path, config: str, log: str, *more: str) -> dict[str, dict[str, dict[str, float]]]:
    values = [f"data.path={log}", f"data.prepared={folder}/prepared", *more]
    command = [sys.executable, str(ROOT / "jobs/two_stage.py"), "--config", str(ROOT / f"jobs/configs/{config}.yaml")]
    command += ["--run", str(folder / "run"), *(word for value in values for word in ("--set", value))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "run/metrics.json").read_text())


@pytest.mark.timeout(1600)
def test_ml_100k_reaches_its_floor(tmp_path: Path, shared_data: Callable[[str], str]) -> None:
    fewer = ("stage1.epochs=15", "stage2.epochs=4")  # less than half of the time, and all but as good
    metrics = metrics_of(tmp_path, "ml-100k", shared_data("ml-100k.parquet"), *fewer)
    assert metrics["stage2"]["test"]["auc"] > 0.79
    assert metrics["stage2"]["test"]["auc"] > metrics["baselines"]["item click rate"] + 0.05


@pytest.mark.timeout(1600)
def test_trivago_sees_position_history_and_lists(tmp_path: Path, shared_data: Callable[[str], str]) -> None:
    metrics = metrics_of(tmp_path, "trivago", shared_data("trivago.parquet"))
    assert metrics["stage2"]["test"]["auc"] > 0.885


@pytest.mark.timeout(900)
def test_ten_million_rows_in_six_gibibytes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    rng, rows, files = np.random.default_rng(0), 500_000, 20
    for i in range(files):
        user = rng.integers(0, 200_000, rows)
        user[: rows // 100] = 7  # one user with one percent of all rows
        table = {
            "user_id": user, "item_id": rng.zipf(1.2, rows) % 50_000,
            "timestamp": 1_700_000_000 + rng.integers(0, 90 * 86400, rows),
            "label": (rng.random(rows) < 0.2).astype("int8"),
        }  # fmt: skip
        pq.write_table(pa.table(table), log / f"{i:02d}.parquet")
    (tmp_path / "config.yaml").write_text("data: {columns: {label: label}}")
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), "--config", "config.yaml", "--set", f"data.path={log}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as job:
        peak: list[float] = [0.0]
        watcher = threading.Thread(target=_watch, args=(job.pid, peak), daemon=True)
        watcher.start()
        out = job.communicate()[0]
    assert job.returncode == 0, out
    print(out, f"peak {peak[0]:.2f} GiB")
    assert "10,000,000 rows = " in out
    assert 0 < peak[0] < 6


def _watch(pid: int, peak: list[float]) -> None:
    """Largest sum, in GiB, of the proportional memory of a process and all that it started."""
    root = psutil.Process(pid)
    while root.is_running():
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak[0] = max(peak[0], total / 2**30)
        time.sleep(0.5)
