"""Notebooks run from the first cell to the last in a fresh process, and are committed without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "jobs" / "notebooks").glob("*.ipynb"))
CHECKS = """
assert log.account["rows_in"] == sum(log.account[name] for name in ("kept", "quarantined", "duplicates")) > 0
assert 0 < trained.metrics["stage2"]["test"]["auc"] < 1
assert Path(trained.report).read_text().startswith("<!")
assert len(scores) == len(pairs) and scores["score"].between(0, 1).all()
assert set(best["user"]) == set(users) and (best.groupby("user").size() == 5).all()
assert manifest["run"] == scorer.id and callable(program)
"""


def code_of(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.slow
@pytest.mark.ray
def test_the_quickstart_runs(tmp_path: Path) -> None:
    cells = code_of(json.loads((ROOT / "jobs" / "notebooks" / "quickstart.ipynb").read_text()))
    script = tmp_path / "cells.py"
    script.write_text("\n".join([f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}", *cells, CHECKS]))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
