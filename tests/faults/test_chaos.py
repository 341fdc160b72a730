"""Random deaths: `pytest -m chaos --chaos-runs N --chaos-seed S`.

Each run draws a job, and how often, when and of what it dies, from (seed, number of the run) alone, and prints it;
`-k <seed>-<number>` replays one. After the last death the same command must finish, with the undisturbed result.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers_faults import (
    Job,
    batch_score,
    close,
    kill_group,
    outcome,
    prepare,
    ray_workers,
    tree,
    tune,
    two_stage,
    wait_for,
)

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1500)]
ONE_WORKER = ["resources.workers=1"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    seed, runs = metafunc.config.getoption("--chaos-seed"), metafunc.config.getoption("--chaos-runs")
    metafunc.parametrize("draw", [(seed, n) for n in range(runs)], ids=lambda d: f"{d[0]}-{d[1]}")


@dataclass
class Undisturbed:
    """What each job gives when left alone, made when first asked for, and how long that took."""

    folder: Path
    made: dict[str, tuple[Any, float]]

    def of(self, kind: str) -> tuple[Any, float]:
        if kind not in self.made:
            job = self.job(kind, self.folder / kind)
            start = time.monotonic()
            job.finish()
            self.made[kind] = outcome(job), time.monotonic() - start
        return self.made[kind]

    def job(self, kind: str, folder: Path) -> Job:
        makers: dict[str, Callable[[Path], Job]] = {
            "two_stage": two_stage,
            "two_stage on a worker": lambda f: two_stage(f, *ONE_WORKER),
            "tune": tune,
            "prepare": lambda f: prepare(f, "data.synthetic.users=3000"),
            "batch_score": lambda f: batch_score(f, self.folder / "two_stage/run"),
        }
        if kind == "batch_score":
            self.of("two_stage")
        return makers[kind](folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), {})


def all_at_once(pid: int, _: random.Random) -> str:
    """The machine: driver and Ray."""
    for process in tree(pid):
        process.kill()
    return "everything"


def driver(pid: int, _: random.Random) -> str:
    tree(pid)[0].kill()
    return "the driver"


def worker(pid: int, rng: random.Random) -> str:
    """A process of Ray's at work: a task, a trial, a trainer, a scorer."""
    while tree(pid) and tree(pid)[0].status() != psutil.STATUS_ZOMBIE:
        with suppress(psutil.Error):
            named = {p: p.cmdline()[0] for p in ray_workers(pid)}
            found = [p for p, name in named.items() if "IDLE" not in name]
            if found:
                victim = rng.choice(sorted(found, key=lambda p: p.pid))
                victim.kill()
                return named[victim]
        time.sleep(0.02)
    return "no worker, as none was at work"


def raylet(pid: int, _: random.Random) -> str:
    found = [p for p in tree(pid) if p.name() in ("raylet", "gcs_server")]
    for process in found:
        process.kill()
    return "the raylet" if found else "no raylet, as there was none"


DEATHS = [all_at_once, driver, worker, worker, raylet]


def test_any_deaths_then_the_undisturbed_result(
    draw: tuple[int, int], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = random.Random(f"{draw[0]}-{draw[1]}")
    kind = rng.choice(["two_stage", "two_stage on a worker", "tune", "tune", "batch_score", "batch_score", "prepare"])
    plan = [(rng.choice(DEATHS), rng.uniform(0.05, 1.0)) for _ in range(rng.randint(1, 3))]
    expected, seconds = undisturbed.of(kind)
    job = undisturbed.job(kind, tmp_path)
    print(f"\nchaos {draw[0]}-{draw[1]}: {kind}, {seconds:.0f} s when left alone")
    for death, share in plan:
        with job.started() as process:
            end = time.monotonic() + share * seconds
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                print(f"  finished before {share:.2f} of its time")
                break
            print(f"  at {share:.2f} of its time died {death(process.pid, rng)}")
            if death in (all_at_once, driver):
                kill_group(process)
            else:
                process.wait(500)  # it goes on by itself, or ends and says so
                print(f"  and the job ended with {process.returncode}")
                with suppress(AssertionError):
                    wait_for(lambda: process.returncode == 0 or "error: " in job.said(), 10)  # the watcher's, after it
                assert process.returncode == 0 or "error: " in job.said(), job.said()[-6000:]
    job.finish()
    assert close(outcome(job), expected), f"chaos {draw[0]}-{draw[1]}: another result\n{job.said()[-6000:]}"
