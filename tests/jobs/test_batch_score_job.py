"""Batch scoring by its command line, and killed there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_scoring import batch, finished_run, scores_in, write

from hpgr.scoring.finished import Finished

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def command(finished: Finished, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/batch_score.py"), "--run", finished.run.folder.uri, *arguments]


def run(finished: Finished, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(finished, *arguments), capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pairs(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> str:
    users = finished.run.prepared.timelines(0)["user"].to_pylist()
    items = finished.run.prepared.vocabulary().items["value"].to_pylist()
    table = {"user_id": [u for u in users for _ in items], "item_id": items * len(users)}
    return write(tmp_path_factory.mktemp("pairs") / "pairs.parquet", table)


def test_a_job_from_its_command_line(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["--top-n", "4", "--drop-seen", "--explain", "--embeddings", "--measure", "--output", str(out)]
    done = run(finished, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((out / "_SUCCESS").read_text())
    assert f"{told['account']['written']:,} written" in done.stdout
    assert str(out) in done.stdout
    account = done.stdout[done.stdout.index("\nusers ") :].splitlines()
    assert len(account) <= 24
    _, here = batch(finished, tmp_path / "here", top_n=4, drop_seen=True, explain=True, embeddings=True)
    table = scores_in(out)
    assert table.drop_columns(["anchors"]).equals(here.drop_columns(["anchors"]))
    again = run(finished, *asked, "--resume")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "starting a local Ray" not in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--candidates", "nowhere.parquet", "--output", "out"], "--candidates nowhere.parquet"),
        (["--top-n", "5", "--output", "out", "--workers", "many"], "expected MIN or MIN:MAX"),
        (["--top-n", "five", "--output", "out"], "got 'five', expected a whole number of 1 or more"),
        (["--top-n", "5", "--output", "out", "--resume"], "there is no job"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(finished: Finished, arguments: list[str], words: str) -> None:
    failed = run(finished, *arguments)
    assert failed.returncode == 2, failed.stdout
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_driver_goes_on_to_the_undisturbed_result(
    finished: Finished, pairs: str, tmp_path: Path, seed: int
) -> None:
    """The whole process group is killed as so many shards have been committed; the same command finishes the job."""
    out, after = tmp_path / "out", random.Random(seed).randrange(0, 20)
    asked = ["--candidates", pairs, "--shard-pairs", "100", "--output", str(out)]
    with subprocess.Popen(command(finished, *asked), stdout=subprocess.DEVNULL, start_new_session=True) as job:
        commits, deadline = out / "_commits", time.monotonic() + 200
        while time.monotonic() < deadline and job.poll() is None:
            if commits.is_dir() and len(list(commits.glob("*.json"))) >= after:
                break
            time.sleep(0.002)
        killed = job.poll() is None
        os.killpg(job.pid, signal.SIGKILL)
    assert killed, "the job ended before it could be killed"
    assert not (out / "_SUCCESS").exists()
    done = run(finished, *asked)
    assert done.returncode == 0, done.stderr
    _, expected = batch(finished, tmp_path / "here", candidates=pairs, shard_pairs=100)
    assert scores_in(out).equals(expected)
    assert {p.name for p in out.iterdir() if p.name.startswith("_")} == {"_SUCCESS", "_request.json"}
