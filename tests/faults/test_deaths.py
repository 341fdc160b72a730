"""The short set: a train worker, a node and a driver die, a node is paused or cut off, all in the middle of work; the
result is the undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import (
    Job,
    Raylets,
    batch_score,
    close,
    network,
    outcome,
    ray_workers,
    raylets,
    two_stage,
    wait_for,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ON_A_WORKER = ["resources.workers=1", "resources.cpus_per_worker=0.5"]
TRAINER = "ray::RayTrainWorker"


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


def returns_while_another_trains(
    cluster: Raylets, job: Job, lose: Callable[[int], None], back: Callable[[int], None]
) -> None:
    """A node is lost with the trainer alive on it, and comes back once the job works elsewhere or has ended."""
    with in_stage_2(job) as process:
        node = wait_for(lambda: cluster.at_work(TRAINER), 200, process)[0]
        lose(node)
        wait_for(lambda: process.poll() is not None or set(cluster.at_work(TRAINER)) - {node}, 200)
        back(node)
        end(job, process)


@pytest.mark.faults
def test_a_paused_node_wakes_after_it_was_given_up(alone: Job, cluster: Raylets, tmp_path: Path) -> None:
    job = two_stage(tmp_path, *ON_A_WORKER, **cluster.environment)

    def pause(node: int) -> None:
        cluster.signal(node, signal.SIGSTOP)

    def wake(node: int) -> None:
        cluster.signal(node, signal.SIGCONT)

    returns_while_another_trains(cluster, job, pause, wake)
    assert close(outcome(job), outcome(alone))


@pytest.mark.faults
def test_a_node_is_cut_off_and_its_link_healed(
    alone: Job, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        try:
            wires = stack.enter_context(network())
            hosts = [wires.host() for _ in range(2)]
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        folder = tmp_path_factory.mktemp("ray")
        cluster = stack.enter_context(raylets(folder, nodes=0, head_cpus=0, host=wires.address))
        for host, within in hosts:
            cluster.add(1, host, within)
        job = two_stage(tmp_path, *ON_A_WORKER, **cluster.environment)
        returns_while_another_trains(cluster, job, wires.cut, wires.heal)
    assert close(outcome(job), outcome(alone))
