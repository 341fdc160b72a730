"""What a Ray task finds wrong in a log, its user sees as one message, with no traceback of Ray's before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_faults import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


def test_an_error_in_a_task_is_one_message(tmp_path: Path) -> None:
    nested = pa.table({"user_id": [{"a": 1}] * 9, "item_id": [1] * 9, "timestamp": [1_600_000_000] * 9, "y": [1] * 9})
    pq.write_table(nested, tmp_path / "log.parquet")
    (tmp_path / "plain.yaml").write_text("name: plain")
    words = [
        "--config",
        "plain.yaml",
        "--set",
        "data.path=log.parquet",
        "--set",
        "data.columns.label=y",
        "--set",
        "data.prepared=prepared",
    ]
    done = subprocess.run([sys.executable, str(ROOT / "jobs/prepare.py"), *words], cwd=tmp_path, capture_output=True,
                          text=True, timeout=250, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: column 'user_id' (user ids) is struct<a: int64>; expected")
    assert "Traceback" not in done.stdout + done.stderr
    assert "to go on" not in done.stderr
