"""Connect to the cluster a job runs on, or start a local Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from hpgr.errors import HpgrError
from hpgr.on_ray.parallel import cause

ROOT = Path(__file__).resolve().parents[2]
LOCAL_OBJECT_STORE = 1 << 30


@contextmanager
def session(say: Callable[[str], None]) -> Iterator[None]:
    """A Ray to work on: the one already connected, the cluster of RAY_ADDRESS (set inside a submitted job),
    or a local one that ends with the block."""
    if ray.is_initialized():
        with in_words():
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes out unless the user says so
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            say("ray: starting a local Ray")
            environment = {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                # Idle OpenMP threads of the trainer would spin for long on the cores that data tasks need.
                "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
            }
            ray.init(
                address="local",  # not a cluster that somebody started on this machine and nobody named
                num_cpus=os.cpu_count(),
                object_store_memory=LOCAL_OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": environment},
            )
    except Exception as error:  # Ray raises plain ones, too: of a node that did not start in time
        address = os.environ.get("RAY_ADDRESS")
        remedy = "check RAY_ADDRESS and RAY_AUTH_MODE, or unset them" if address else "is this machine overloaded?"
        raise HpgrError(f"cannot reach {address or 'a local Ray'}: {_first(error)}; {remedy}") from error
    quieten()
    try:
        with in_words():
            yield
    finally:
        ray.shutdown()


@contextmanager
def in_words() -> Iterator[None]:
    """Turns what Ray loses under a job, such as the actor that controls training, into an HpgrError."""
    try:
        yield
    except RayError as error:
        raise HpgrError(f"Ray lost a part of the job: {cause(error)}") from error


def _first(error: Exception) -> str:
    """Ray's messages hold whole tracebacks; their first line says it."""
    return str(error).partition("\n")[0]


def quieten() -> None:
    """Leave a job's log to the job: no progress bars, no executor chatter."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
