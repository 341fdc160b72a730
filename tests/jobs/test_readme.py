"""The README's way from an own CSV log to a report, scores and a search, as typed, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("hpgr", "jobs", "tune_spaces", "cluster")


def blocks(title: str) -> list[str]:
    """Shell blocks of a section of the README, in order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    """What the script prints; it stops at the first command that fails."""
    environment = os.environ | {"PYTHONPATH": str(folder), "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_own_log_to_report_and_scores(tmp_path: Path) -> None:
    """On a tenth of the README's users and one epoch a stage."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    make, configure, train = blocks("Your own log")
    (score,) = blocks("Score")
    assert "range(800)" in make
    assert configure.count("epochs: 3") == 2
    run(make.replace("range(800)", "range(80)"), tmp_path)
    run(configure.replace("epochs: 3", "epochs: 1"), tmp_path)
    printed = run(train, tmp_path)
    assert "rows = " in printed
    assert "0 quarantined" in printed
    assert (tmp_path / "runs/mine/report.html").is_file()
    run(score, tmp_path)
    assert (tmp_path / "scores/top/_SUCCESS").is_file()
