"""One job at a time in a folder: on disk and on an S3 API served here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpgr import locks
from hpgr.artifacts import FORMAT, Folder
from hpgr.data.preparation import in_process, prepare
from hpgr.errors import ArtifactError
from hpgr.locks import Claim, held

HOLD = """
import sys, time
from hpgr.artifacts import Folder
from hpgr.locks import held
with held(Folder(sys.argv[1]), "jobs/first.py", print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from helpers_store import store

    with store("locks") as found:
        yield found


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    if request.param == "disk":
        return Folder(str(tmp_path / "run"))
    from helpers_store import environment

    for name, value in environment(request.getfixturevalue("endpoint")).items():
        monkeypatch.setenv(name, value)
    return Folder(f"s3://locks/{tmp_path.name}")


@pytest.fixture
def said() -> list[str]:
    return []


def holder(folder: Folder) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def claims(folder: Folder) -> list[str]:
    """Claims as locks see them: a heartbeat's file that is still being written is none."""
    return [name for name in folder.entries() if name.startswith("lock-") and name.endswith(".json")]


def test_a_second_job_is_refused_with_the_name_of_the_first(folder: Folder) -> None:
    with holder(folder) as first:
        try:
            with pytest.raises(ArtifactError) as caught, held(folder, "jobs/second.py", print):
                pass
            for part in (folder.uri, "in use by jobs/first.py", f"process {first.pid} on ", "give another folder"):
                assert part in str(caught.value)
            assert len(claims(folder)) == 1
        finally:
            first.kill()


def test_the_lock_of_a_killed_job_does_not_count(folder: Folder, said: list[str]) -> None:
    with holder(folder) as first:
        first.send_signal(signal.SIGKILL)
        time.sleep(0.3)  # a process not yet waited for is dead, too
        start = time.monotonic()
        with held(folder, "jobs/second.py", said.append):
            assert len(claims(folder)) == 1
        assert time.monotonic() - start < 5
    assert len(said) == 1
    assert "jobs/first.py" in said[0]
    assert "has died" in said[0]
    assert claims(folder) == []


def test_a_lock_is_free_after_its_block_even_if_that_failed(folder: Folder) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(folder, "job", print):
            raise ZeroDivisionError
    assert claims(folder) == []


def test_a_folder_into_which_nothing_came_is_not_left_behind(tmp_path: Path) -> None:
    with held(Folder(str(tmp_path / "new")), "job", print):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("age", [0.0, 60.0])
def test_a_job_on_another_machine_lives_by_its_heartbeat(
    folder: Folder, said: list[str], monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.0 if age else 120.0)
    elsewhere = replace(Claim.mine("jobs/first.py"), host="far", machine="other", pid=1, holds=True)
    folder.write_json("lock-abc.json", asdict(elsewhere))
    time.sleep(3.1 if age else 0)  # the store's clock ticks in seconds
    if not age:
        with pytest.raises(ArtifactError, match=r"jobs/first.py \(process 1 on far"), held(folder, "second", print):
            pass
        return
    with held(folder, "second", said.append):
        assert claims(folder) != ["lock-abc.json"]
    assert "has died" in said[0]


def test_another_process_of_the_same_number_is_another(folder: Folder, said: list[str]) -> None:
    before = replace(Claim.mine("jobs/first.py"), born="1", holds=True)
    folder.write_json("lock-abc.json", asdict(before))
    with held(folder, "second", said.append):
        assert "jobs/first.py" in said[0]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"job": "of a later version"}'])
def test_a_claim_that_cannot_be_read_lives_as_long_as_it_is_young(tmp_path: Path, content: bytes) -> None:
    folder = Folder(str(tmp_path))
    folder.write("lock-abc.json", content)
    with pytest.raises(ArtifactError, match="in use by another job"), held(folder, "second", print):
        pass
    os.utime(tmp_path / "lock-abc.json", (1, 1))
    with held(folder, "second", print):
        assert not (tmp_path / "lock-abc.json").exists()


def test_of_many_that_ask_at_once_one_holds(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    inside, most, done = [0], [0], []
    guard = threading.Lock()

    def work(number: int) -> None:
        with held(folder, f"job {number}", lambda _: None, wait=True):
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with guard:
                inside[0] -= 1
            done.append(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert most == [1]
    assert sorted(done) == list(range(6))
    assert claims(folder) == []


def test_the_heartbeat_renews_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    folder = Folder(str(tmp_path))
    with held(folder, "job", print):
        (name,) = claims(folder)
        os.utime(tmp_path / name, (1, 1))
        time.sleep(0.5)
        assert time.time() - folder.times()[name] < 5


def test_a_job_that_lost_its_claim_while_paused_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    folder = Folder(str(tmp_path))
    start = time.monotonic()

    def work() -> None:
        with held(folder, "job", print):
            for name in claims(folder):
                folder.remove(name)
            time.sleep(30)

    with pytest.raises(ArtifactError, match="taken over by another job"):
        work()
    assert time.monotonic() - start < 10


def test_a_store_that_refuses_a_heartbeat_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    folder, write, refusals = Folder(str(tmp_path)), Folder.write, []

    def failing(self: Folder, name: str, content: bytes) -> None:
        if len(refusals) < 3 and "lock-" in name:
            refusals.append(name)
            raise ArtifactError("503")
        write(self, name, content)

    with held(folder, "job", print):
        monkeypatch.setattr(Folder, "write", failing)
        time.sleep(1)
        assert len(refusals) == 3
        assert len(claims(folder)) == 1


def test_an_interruption_by_the_user_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), held(Folder(str(tmp_path)), "job", print):
        raise KeyboardInterrupt


def test_of_two_preparing_one_log_one_works_and_the_other_takes_its_result(
    write_log: Callable[..., str], config: Callable[..., Any], log: Callable[..., Any]
) -> None:
    settings, started, scans = config(data={"path": write_log(log())}), threading.Event(), []

    def execute(name: str, function: Callable[[Any], Any], items: Any) -> Any:
        if name == "scan":
            scans.append(name)
            started.set()
            time.sleep(1)
        return in_process(name, function, items)

    with ThreadPoolExecutor(2) as pool:
        lines: list[str] = []
        first = pool.submit(prepare, settings, execute, print)
        assert started.wait(20)
        second = pool.submit(prepare, settings, execute, lines.append)
        assert first.result(60).manifest == second.result(60).manifest
    assert scans == ["scan"]
    assert [line.split(" ")[0] for line in lines] == ["waiting", "prepare:"]
    assert "reusing" in lines[1]
    assert json.loads(Path(first.result().folder.uri, "manifest.json").read_text())["format"] == FORMAT
    assert not list(Path(settings.data.prepared).glob("*.lock-*"))
