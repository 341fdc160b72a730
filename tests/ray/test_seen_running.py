"""A run can be seen: figures at Ray's metrics endpoint, and a wait for the cluster that speaks and ends."""

from __future__ import annotations

import json
import resource
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from hpgr.artifacts import Folder
from hpgr.errors import ConfigError, HpgrError
from hpgr.sizing import Ask


def _scraped() -> str:
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_figures_come_to_the_metrics_endpoint(local_ray: None) -> None:
    from hpgr.on_ray.metrics import export

    export(Folder("/runs/search/trials/0003"), "stage1", {"loss": 1.25, "validation/auc": 0.5})
    found: list[str] = []
    end = time.monotonic() + 60
    while not found and time.monotonic() < end:
        time.sleep(1)
        found = [line for line in _scraped().splitlines() if line.startswith("ray_hpgr_") and "0003" in line]
    assert len(found) == 1
    assert found[0].startswith("ray_hpgr_loss{")
    assert found[0].split()[-1] == "1.25"
    for tag in ('run="search"', 'trial="0003"', 'stage="stage1"'):
        assert tag in found[0]


def test_what_never_comes_is_refused_at_once_and_what_is_taken_is_waited_for(local_ray: None) -> None:
    import ray

    from hpgr.on_ray.cluster import here, wait_for

    cluster = here()
    assert cluster.most is None, "a local Ray has no autoscaler"
    cpus = int(cluster.nodes[0].cpus)
    with pytest.raises(ConfigError, match=r"can never be had.*lower the keys"):
        wait_for(Ask("worker", "lower the keys", 1, cpus + 1.0), 30, print)

    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    lines: list[str] = []
    with pytest.raises(HpgrError, match=r"not free after 0\.0 minutes.*resources\.wait_minutes"):
        wait_for(Ask("worker", "lower the keys", cpus, 1.0), 0.02, lines.append)
    ray.kill(holder)
    wait_for(Ask("worker", "lower the keys", cpus, 1.0), 1, lines.append)


def test_a_line_that_a_full_disk_cuts_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one would be glued to it."""
    from hpgr.errors import StoreError
    from hpgr.on_ray.journal import journal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with journal(Folder(str(tmp_path)), lambda _: None) as say:
        say("one")
        whole = (tmp_path / "log.jsonl").read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, hard))
            with pytest.raises(StoreError, match=r"cannot write .*log\.jsonl"):
                say("two")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        say("three")
    assert [json.loads(line)["text"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ["one", "three"]


def test_a_journal_has_a_json_object_a_line(tmp_path: Path) -> None:
    from hpgr.on_ray.journal import journal

    said: list[str] = []
    for _ in range(2):
        with journal(Folder(str(tmp_path / "search/trials/0001")), said.append) as say:
            say("stage1: epoch 1/2 loss 3.0")
            say("a note: of no stage")
    rows = [json.loads(line) for line in (tmp_path / "search/trials/0001/log.jsonl").read_text().splitlines()]
    assert len(rows) == len(said) == 4
    assert {(r["run"], r["trial"]) for r in rows} == {("search", "0001")}
    assert [(r["stage"], r["text"]) for r in rows[2:]] == [
        ("stage1", "epoch 1/2 loss 3.0"),
        ("", "a note: of no stage"),
    ]
    assert rows[0]["time"] <= rows[-1]["time"]
