"""The short set: a train worker, a node and a driver die, a node is paused or cut off, all in the middle of work; the
result is the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import (
    Job,
    Network,
    Raylets,
    batch_score,
    close,
    network,
    outcome,
    prepare,
    ray_workers,
    raylets,
    trials,
    tune,
    two_stage,
    wait_for,
)

from hpgr.config import load_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ON_A_WORKER = ["resources.workers=1", "resources.cpus_per_worker=0.5"]
TRAINER = "ray::RayTrainWorker"
GIVEN_UP_SECONDS = 20.0
"""After so long Ray has given up a silent node of `raylets` and begun its work elsewhere (see `Raylets._start`)."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished run that nothing disturbed."""
    job = two_stage(tmp_path_factory.mktemp("alone"), *ON_A_WORKER)
    job.finish()
    return job


@pytest.fixture(scope="module")
def scored(alone: Job, tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = batch_score(tmp_path_factory.mktemp("scored"), alone.folder)
    job.finish()
    return outcome(job)


@contextmanager
def in_stage_2(job: Job) -> Iterator[subprocess.Popen[str]]:
    """The job at work, with a checkpoint of its second stage written."""
    with job.started() as process:
        wait_for(lambda: list(job.folder.glob("stage2/checkpoints/*/checksums.json")), 300, process)
        yield process


def end(job: Job, process: subprocess.Popen[str]) -> None:
    """It goes on by itself, or ends with words and then goes on by the same command."""
    if process.wait(400):
        wait_for(lambda: "error: " in job.said(), 10)  # the last word comes after the death
        assert "Traceback" not in job.said()
        job.finish()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    """Two nodes that work and a head that does not."""
    with raylets(tmp_path_factory.mktemp("ray"), nodes=2, head_cpus=0) as found:
        yield found


def kill_node(cluster: Raylets, name: str, process: subprocess.Popen[str]) -> None:
    """The node where a worker of that name is."""
    node = wait_for(lambda: cluster.at_work(name), 200, process)[0]
    cluster.signal(node, signal.SIGKILL)
    cluster.nodes[node].wait(30)


@pytest.mark.slow
def test_a_train_worker_dies(alone: Job, tmp_path: Path) -> None:
    job = two_stage(tmp_path, *ON_A_WORKER)
    with in_stage_2(job) as process:
        found = wait_for(lambda: ray_workers(process.pid, TRAINER), 60, process)
        os.kill(found[0].pid, signal.SIGKILL)
        end(job, process)
    assert close(outcome(job), outcome(alone))


@pytest.mark.faults
def test_the_driver_dies(alone: Job, tmp_path: Path) -> None:
    job = two_stage(tmp_path, *ON_A_WORKER)
    with in_stage_2(job) as process:
        process.kill()
    job.finish()
    assert close(outcome(job), outcome(alone))


@pytest.mark.faults
def test_a_node_dies_in_stage_2(alone: Job, cluster: Raylets, tmp_path: Path) -> None:
    job = two_stage(tmp_path, *ON_A_WORKER, **cluster.environment)
    with in_stage_2(job) as process:
        kill_node(cluster, TRAINER, process)
        end(job, process)
    assert close(outcome(job), outcome(alone))


@pytest.mark.faults
def test_a_node_dies_while_scoring(alone: Job, scored: Any, cluster: Raylets, tmp_path: Path) -> None:
    job = batch_score(tmp_path, alone.folder, **cluster.environment)
    with job.started() as process:
        wait_for(lambda: list(job.folder.glob("_commits/*.json")), 300, process)
        kill_node(cluster, "ray::MapWorker", process)
        end(job, process)
    assert outcome(job) == scored


@pytest.mark.slow
def test_a_node_dies_under_a_search(cluster: Raylets, tmp_path: Path) -> None:
    """With one of two trials at work. It goes on elsewhere from its last checkpoint, and the search needs no resume."""
    longer = ["stage2.epochs=8", "stage2.patience=8", "space.budget.trials=3"]
    job = tune(tmp_path, *longer, "resources.workers=auto", **cluster.environment)
    with job.started() as process:
        wait_for(lambda: len(in_the_middle(job)) == 2, 300, process)
        running = in_the_middle(job)
        kill_node(cluster, "ray::ImplicitFunc", process)
        assert process.wait(400) == 0, job.said()[-6000:]
    assert len(trials(job)) == 3
    assert "auto is 1 worker(s) of each trial" in job.said(), "two nodes, and two trials at once"
    assert load_config(job.folder / "best.yaml").resources.workers == "auto", "a run of its own may have both"
    found = json.loads((job.folder / "search.json").read_text())
    assert (found["trials"], found["trials_finished"]) == (3, 3)
    assert [nodes for _, nodes, _ in found["nodes"]] == [2, 1]
    logs = {path.parent.name: path.read_text() for path in job.folder.glob("trials/*/log.jsonl")}
    again = [name for name, log in logs.items() if '"continuing from step-' in log]
    assert len(again) == 1
    assert set(again) <= running
    assert f"trial {int(again[0].partition('-')[0])}: interrupted (" in job.said()
    assert "Traceback" not in job.said()
    ends = {name: log.count('"stage": "stage2", "text": "epoch 8 step ') for name, log in logs.items()}
    assert set(ends.values()) == {1}, "none is trained twice to its end"


def in_the_middle(job: Job) -> set[str]:
    """Trials with a checkpoint of stage 2 to go on from, and a part of it to go."""
    begun = {path.parents[3] for path in job.folder.glob("trials/*/stage2/checkpoints/*/checksums.json")}
    return {trial.name for trial in begun if not (trial / "stage2/done.json").exists()}


KINDS = ["prepare", "two_stage", "tune", "batch_score"]


@dataclass(frozen=True)
class Task:
    """A job, what its worker processes are called, and what there is once it is in the middle of its work.

    `elsewhere`: whether its work is begun anew while the lost node is silent. Of plain tasks it is not: Ray counts the
    node dead, and waits for its connections to break, or for the node, for minutes (2.60).
    """

    make: Callable[[Path], Job]
    worker: str
    middle: str
    elsewhere: bool = True


def task(kind: str, alone: Job, environment: dict[str, str]) -> Task:
    return {
        "two_stage": Task(lambda f: two_stage(f, *ON_A_WORKER, **environment), TRAINER,
                          "run/stage2/checkpoints/*/checksums.json"),
        "batch_score": Task(lambda f: batch_score(f, alone.folder, **environment), "ray::MapWorker",
                            "scores/_commits/*.json"),
        # Scan or sort.
        "prepare": Task(lambda f: prepare(f, "data.synthetic.users=3000", **environment), "ray::s",
                        "prepared/*/staging/*", elsewhere=False),
        "tune": Task(lambda f: tune(f, **environment), "ray::ImplicitFunc", "run/trials/*/stage2/checkpoints/*"),
    }[kind]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(alone: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a job of a kind ends in; each is run once."""

    @cache
    def of(kind: str) -> Any:
        if kind == "two_stage":
            return outcome(alone)
        job = task(kind, alone, {}).make(tmp_path_factory.mktemp("undisturbed"))
        job.finish()
        return outcome(job)

    return of


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Raylets, Network]]:
    """A head that does not work, and two nodes on hosts of their own."""
    with ExitStack() as stack:
        try:
            wires = stack.enter_context(network())
            hosts = [wires.host() for _ in range(2)]
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        cluster = stack.enter_context(raylets(folder, nodes=0, head_cpus=0, host=wires.address))
        for host, within in hosts:
            cluster.add(1, host, within)
        yield cluster, wires


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_paused_node_wakes_after_it_was_given_up(
    kind: str, alone: Job, undisturbed: Callable[[str], Any], cluster: Raylets, tmp_path: Path
) -> None:
    pause, wake = (partial(cluster.signal, kind=kind) for kind in (signal.SIGSTOP, signal.SIGCONT))
    job = returning(task(kind, alone, cluster.environment), cluster, tmp_path, pause, wake)
    assert close(outcome(job), undisturbed(kind))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_is_cut_off_and_its_link_healed(
    kind: str,
    alone: Job,
    undisturbed: Callable[[str], Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with two_hosts(tmp_path_factory.mktemp("ray")) as (cluster, wires):
        job = returning(task(kind, alone, cluster.environment), cluster, tmp_path, wires.cut, wires.heal)
    assert close(outcome(job), undisturbed(kind))


def returning(
    doing: Task, cluster: Raylets, folder: Path, lose: Callable[[int], None], back: Callable[[int], None]
) -> Job:
    """The job to its end. In the middle it loses a node at work, whose processes live on and write what they still have
    once they can: after Ray has given it up, or the job has ended."""
    job = doing.make(folder)
    with job.started() as process:
        wait_for(lambda: list(job.cwd.glob(doing.middle)), 300, process)
        node = wait_for(lambda: cluster.at_work(doing.worker), 200, process)[0]
        lose(node)
        time.sleep(GIVEN_UP_SECONDS)
        if doing.elsewhere:
            wait_for(lambda: process.poll() is not None or set(cluster.at_work(doing.worker)) - {node}, 200)
        back(node)
        wait_for(lambda: cluster.nodes[node].poll() is not None, 120)  # Ray ends a node that it had given up
        end(job, process)
    return job
