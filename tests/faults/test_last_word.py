"""A job that dies says so and names the command that goes on with it; that command ends with the same result."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_faults import ROOT, Job, close, outcome, tree, two_stage, wait_for

SOON = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Ray's core gives a lost GCS up after this long, not after its minute."""
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from hpgr.errors import ArtifactError, StoreError
from hpgr.on_ray import command
def job(argv):
    with command.resumable(argv, "a b"):
        {body}
command.main(job)
"""


def ended(body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", SCRIPT.format(root=str(ROOT), body=body), *argv]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_killed_job_has_its_last_word_said(name: str) -> None:
    done = ended(f"os.kill(os.getpid(), signal.{name})", "--set", "name=x y")
    assert done.returncode == -signal.Signals[name]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the job has died")
    assert line.endswith("to go on: python -c --set 'name=x y' --run 'a b' --resume")


def test_an_end_from_c_has_it_too() -> None:
    done = ended("os._exit(1)")
    assert done.returncode == 1
    assert done.stderr.count("to go on: python -c --run 'a b' --resume") == 1


@pytest.mark.parametrize(
    ("body", "code", "goes_on"),
    [
        ("pass", 0, False),
        ("raise StoreError('cannot write x')", 2, True),
        ("raise ArtifactError('no run in x')", 2, False),
        ("raise KeyboardInterrupt", 130, True),
        ("raise RuntimeError('unforeseen')", 1, True),
    ],
)
def test_a_job_that_ends_by_itself_names_the_command_once_if_it_can_go_on(body: str, code: int, goes_on: bool) -> None:
    done = ended(body)
    assert done.returncode == code
    assert "has died" not in done.stderr
    assert done.stderr.count("to go on: python -c --run 'a b' --resume") == goes_on


def test_what_was_typed_is_not_repeated() -> None:
    for words in ["--resume --run x", "--run x --resume", "--resume --run=x"]:
        assert ended("os._exit(1)", *words.split()).stderr.endswith(f"to go on: python -c {words}\n")
    assert ended("os._exit(1)", "--run", "x").stderr.endswith("to go on: python -c --run x --resume\n")


def typed(job: Job) -> list[str]:
    """The command that the job's log names, with this Python."""
    line = next(line for line in job.said().splitlines() if "to go on: python " in line)
    return [sys.executable, *shlex.split(line.partition("to go on: python ")[2])]


def kill_core(pid: int) -> None:
    """GCS and raylet of the job's own local Ray."""
    found = [p for p in tree(pid) if p.name() in ("raylet", "gcs_server")]
    assert len(found) == 2
    for process in found:
        process.kill()


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_that_loses_its_ray_goes_on_as_it_says(tmp_path: Path) -> None:
    alone = two_stage(tmp_path / "alone")
    alone.finish()
    job = two_stage(tmp_path / "lost", **SOON)
    with job.started() as process:
        wait_for(lambda: "file(s)" in job.said(), 200, process)  # in the middle of its preparation
        kill_core(process.pid)
        assert process.wait(200) != 0, job.said()
        wait_for(lambda: "to go on: " in job.said(), 10)
    assert job.said().count("to go on: ") == 1
    subprocess.run(typed(job), cwd=job.cwd, check=True, capture_output=True, timeout=300)
    assert close(outcome(job), outcome(alone))
