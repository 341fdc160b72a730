"""A disk that fills up: a clear error that names the way on, nothing torn, and the same result once there is room."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_faults import Job, close, outcome, two_stage

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB, full but for 300 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    (folder / "ballast").write_bytes(bytes((32 << 20) - (300 << 10)))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on(disk: Path, tmp_path: Path) -> Job:
    """A job whose run folder, but not its prepared log, is on the small disk."""
    job = two_stage(tmp_path / "job", "model.width=32")
    words = [str(disk / "run") if word == "run" else word for word in job.first]
    again = [str(disk / "run") if word == "run" else word for word in job.again]
    return Job(job.name, disk / "run", job.cwd, words, again)


def test_a_run_goes_on_once_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    alone = two_stage(tmp_path / "alone", "model.width=32")
    alone.finish()
    job = on(small_disk, tmp_path)
    with job.started() as process:
        assert process.wait(400) == 2, job.said()
    error = next(line for line in job.said().splitlines() if line.startswith("error: "))
    assert f"cannot write {small_disk}/run/" in error
    assert "No space left on device; check space and permissions" in error
    assert "Traceback" not in job.said()
    assert not list(job.folder.rglob("*.tmp"))  # a full disk needs the room
    on_it = next(line for line in job.said().splitlines() if line.startswith("to go on: python "))
    (small_disk / "ballast").unlink()
    words = [sys.executable, *shlex.split(on_it.removeprefix("to go on: python "))]
    done = subprocess.run(words, cwd=job.cwd, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert close(outcome(job), outcome(alone))
