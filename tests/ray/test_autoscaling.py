"""A search on real raylets that Ray's autoscaler starts and stops: from none to three workers, and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "data.synthetic.users=160", "data.synthetic.items=60", "data.synthetic.categories=6", "stream.window=40",
    "stream.stride=20", "model.width=16", "stage1.epochs=10", "stage2.epochs=10", "stage2.patience=10",
]  # fmt: skip
SPACE = {
    "name": "wide",
    "scheduler": {"kind": "none"},
    "budget": {"trials": 6},
    "concurrency": 3,
}
COUNTED = """
import json, sys, time, ray
ray.init(log_to_driver=False)
seen = []
for _ in range(90):
    workers = sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes())
    seen.append(workers)
    if not workers:
        break
    time.sleep(1)
json.dump(seen, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_from_no_worker_to_three_and_back(tmp_path: Path) -> None:
    parameters = {"stage1.mask_ratio": {"choice": [0.2, 0.3, 0.4]}, "model.pgsa.top_k": {"choice": [4, 32]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE | {"parameters": parameters}))
    (tmp_path / "counted.py").write_text(COUNTED)
    settings = " ".join(f"--set {s}" for s in [*SETTINGS, f"data.prepared={tmp_path}/prepared"])
    search = f"{sys.executable} {ROOT}/jobs/tune.py --space space.yaml --run r {settings}"
    count = f"{sys.executable} counted.py"
    words = [sys.executable, str(ROOT / "cluster/local.py"), "--workers", "3", "--idle", "5", "--",
             "bash", "-c", f"{count} before.json && {search} && {count} after.json"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # Before there is a cluster: preparing on it starts nodes, too.
    prepare = [sys.executable, f"{ROOT}/jobs/prepare.py", *settings.split()]
    subprocess.run(prepare, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=420, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r/search.json").read_text())
    assert found["trials_finished"] == 6
    assert json.loads((tmp_path / "before.json").read_text()) == [0]
    assert max(nodes for _, nodes, _ in found["nodes"]) == 3
    assert 0 < found["node_hours"] <= 3 * found["seconds"] / 3600
    assert json.loads((tmp_path / "after.json").read_text())[-1] == 0


@pytest.mark.slow
def test_a_cluster_that_is_told_to_end_leaves_no_process_behind(tmp_path: Path) -> None:
    """As a scheduler's timeout ends it."""
    words = [sys.executable, str(ROOT / "cluster/local.py"), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        found = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)/token", cluster.stdout.readline())
        assert found
        assert of_cluster(found[1])
        cluster.send_signal(signal.SIGTERM)
        assert cluster.wait(60) == 143
    assert not of_cluster(found[1])
    assert not Path(found[1]).exists()


def of_cluster(folder: str) -> list[psutil.Process]:
    """Processes whose command lines name its folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(folder in word for word in p.info["cmdline"] or [])]
