"""Both stages on Ray Train: the worker's function, and the trainer that starts as many as the config says."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import hpgr.errors
from hpgr.artifacts import SPACE, Folder, refusal
from hpgr.config import validate
from hpgr.data.preparation import Prepared
from hpgr.data.stream import LocalSource
from hpgr.errors import DataError, HpgrError, TrainingError, WorkersLostError
from hpgr.on_ray.cluster import here, wait_for
from hpgr.on_ray.metrics import export
from hpgr.on_ray.session import quieten
from hpgr.on_ray.stream import RaySource
from hpgr.sizing import training_ask
from hpgr.training.two_stage import Run, Worker, train


class Log:
    """Figures to TensorBoard and to Ray's metrics; a remote run folder gets the files when the worker ends."""

    def __init__(self, folder: Folder, active: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._folder = folder, folder.sub("tensorboard")
        self._local = Path(self._folder.path()[1]) if folder.is_local else Path(tempfile.mkdtemp())
        self._writer = SummaryWriter(str(self._local)) if active else None

    def __call__(self, stage: str, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            export(self._run, stage, values)
            with refusal("write", self._folder.uri, SPACE):
                for name, value in values.items():
                    self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Flush, and upload for a remote run folder."""
        if self._writer is None:
            return
        with refusal("write", self._folder.uri, SPACE):
            self._writer.close()
            if not self._folder.is_local:
                filesystem, path = self._folder.path()
                pafs.copy_files(
                    str(self._local),
                    path,
                    source_filesystem=pafs.LocalFileSystem(),
                    destination_filesystem=filesystem,
                )
                shutil.rmtree(self._local, ignore_errors=True)


def run_training(run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and test a run with the workers its config asks for; returns its figures.

    Raises:
        HpgrError: of the worker's kind, or a TrainingError with the cause.
    """
    resources = run.config.resources
    if resources.count == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        return train_here(run, torch.device("cpu"), say, lambda _: None, test=True)
    ask = training_ask(resources, here())
    wait_for(ask, resources.wait_minutes, say)
    threads = max(1, int(sum(n.cpus * n.count for n in here().nodes) // resources.count))
    return train_on_workers(run, say, Crew(ask.cpus, threads))


def train_here(
    run: Run, device: torch.device, say: Callable[[str], None], report: Callable[[dict[str, Any]], None], test: bool
) -> dict[str, Any]:
    """Train in this process; `report` gets the figures of every validation."""
    log = Log(run.folder, True)
    try:
        return train(run, Worker(LocalSource(), device, say, report, log), test)
    finally:
        log.close()


class Mailbox:
    """Lines and results from the first worker to the driver, so that a job's log shows them as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.result: Any = None
        self.error: tuple[str, str] | None = None

    def say(self, line: str) -> None:
        self.lines.append(line)

    def begin(self) -> None:
        """What an attempt before ended with does not tell how this one will."""
        self.error = None

    def finish(self, result: Any) -> None:
        self.result = result

    def fail(self, kind: str, message: str) -> None:
        self.error = (kind, message)

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def outcome(self) -> tuple[Any, tuple[str, str] | None]:
        return self.result, self.error


@dataclass
class _Relay:
    """Prints what arrives in the mailbox, from a thread of the driver."""

    mailbox: Any
    say: Callable[[str], None]
    stopped: bool = field(default=False)

    def drain(self) -> None:
        for line in ray.get(self.mailbox.take.remote()):
            self.say(line)

    def loop(self) -> None:
        while not self.stopped:
            self.drain()
            time.sleep(0.5)


@dataclass(frozen=True)
class Crew:
    """What Ray Train workers get: CPUs reserved and threads of each on a CPU, callbacks of the controller."""

    cpus: float
    threads: int
    callbacks: Sequence[Any] = ()
    test: bool = True


def train_on_workers(run: Run, say: Callable[[str], None], crew: Crew) -> dict[str, Any]:
    """Train on as many Ray Train workers as the config asks for; raises as `run_training`."""
    resources = run.config.resources
    # On the driver's own node: it must outlive every other.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=beside)(Mailbox).remote()
    relay = _Relay(mailbox, say)
    thread = threading.Thread(target=relay.loop, daemon=True)
    payload = {
        "config": run.config.model_dump(mode="json"), "run": run.folder.uri, "prepared": run.prepared.folder.uri,
        "stage1": run.stage1 and run.stage1.uri, "index": run.index_folder.uri, "test": crew.test,
        "mailbox": mailbox, "threads": None if resources.on_gpu else crew.threads,
    }  # fmt: skip
    storage, filesystem = _storage(run.folder)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=payload,
        torch_config=TorchConfig(backend="nccl" if resources.on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.count,
            use_gpu=resources.on_gpu,
            resources_per_worker={"CPU": crew.cpus, **({"GPU": 1} if resources.on_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=storage,
            storage_filesystem=filesystem,
            # A try to place workers that are not there takes Ray Train a minute; by itself it tries for ever.
            failure_config=ray.train.FailureConfig(
                max_failures=resources.max_failures,
                controller_failure_limit=max(1, math.ceil(resources.wait_minutes)) * (resources.max_failures + 1),
            ),
            callbacks=list(crew.callbacks),
        ),
    )
    say(
        f"train: starting {resources.count} Ray Train worker(s), "
        f"{crew.cpus:g} CPU{' and a GPU' if resources.on_gpu else ''} each"
    )
    thread.start()
    failure: Exception | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    finally:
        relay.stopped = True
        thread.join()
        relay.drain()
    result, told = ray.get(mailbox.outcome.remote())
    if told is not None:
        raise getattr(hpgr.errors, told[0])(told[1])
    if failure is not None or result is None:
        raise WorkersLostError(
            f"training failed: {_innermost(failure)}; run the same command with --resume to go on"
        ) from failure
    return dict(result)


def _storage(folder: Folder) -> tuple[str, Any]:
    filesystem, path = folder.path()
    return (path, None) if folder.is_local else (path, filesystem)


def _innermost(error: BaseException | None) -> str:
    if error is None:
        return "no result came back"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _worker(payload: dict[str, Any]) -> None:
    quieten()
    config = validate(payload["config"])
    context = ray.train.get_context()
    rank, mailbox = context.get_world_rank(), payload["mailbox"]
    if payload["threads"]:
        torch.set_num_threads(min(payload["threads"], os.cpu_count() or 1))
    stage1 = Folder(payload["stage1"]) if payload["stage1"] else None
    prepared = Prepared.open(Folder(payload["prepared"]))
    run = Run(config, Folder(payload["run"]), prepared, stage1, Folder(payload["index"]))
    source = RaySource(rank, context.get_world_size(), config.resources.data_cpus, config.resources.data_workers)
    log = Log(run.folder, active=rank == 0)
    say = lambda line: ray.get(mailbox.say.remote(line))
    try:
        if rank == 0:
            ray.get(mailbox.begin.remote())
        place = ray.util.get_current_placement_group()
        where = {"place": place.id.hex()} if place is not None else {}
        report = lambda told: ray.train.report(told | where)
        result = train(run, Worker(source, get_device(), say, report, log), payload["test"])
        if rank == 0:
            ray.get(mailbox.finish.remote(result))
    except HpgrError as error:
        # What all workers end by alike would only repeat itself: hand it over and end without another try. What one
        # may end by alone, such as a node without a compiler (ConfigError), must not: the others would wait for it.
        ray.get(mailbox.fail.remote(type(error).__name__, str(error)))
        if isinstance(error, DataError | TrainingError):
            return
        raise
    finally:
        log.close()
