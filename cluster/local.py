#!/usr/bin/env python
"""A local autoscaling cluster: real raylets on this machine, started and stopped by Ray's own autoscaler.

python cluster/local.py --workers 3 -- python jobs/tune.py --space tune_spaces/smoke.yaml   # run a command on it
python cluster/local.py --workers 3          # keep it up until Ctrl-C; prints what to export in another terminal

Starts with a head without CPUs; the autoscaler adds workers as work asks for them, and takes them away when idle.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray.util import get_node_ip_address

ROOT = str(Path(__file__).resolve().parents[1])
STORE_BYTES = 200 << 20
START_SECONDS, STAY_SECONDS = 90, 3


@dataclass(frozen=True)
class Shape:
    """Of the cluster: at most `workers` nodes of `cpus` CPUs, taken away after `idle` seconds without work."""

    workers: int
    cpus: float
    idle: float

    def config(self, address: str) -> dict[str, object]:
        """The autoscaler's configuration."""
        worker = {"resources": {"CPU": self.cpus, "object_store_memory": STORE_BYTES}, "node_config": {}}
        return {
            "cluster_name": "local",
            "max_workers": self.workers,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": address,
                "use_node_id_as_ip": True,  # all nodes share this machine's
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "foreground_node_launch": True,
                "worker_liveness_check": False,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": worker | {"min_workers": 0, "max_workers": self.workers},
            },
            "head_node_type": "ray.head.default",
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": self.idle / 60,
            "docker": {},
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            **{f"{part}_commands": [] for part in ("initialization", "setup", "head_setup", "worker_setup",
                                                    "head_start_ray", "worker_start_ray")},
        }  # fmt: skip


@contextmanager
def local_cluster(shape: Shape) -> Iterator[dict[str, str]]:
    """A cluster for the block; yields the environment that finds it. Touches no other Ray on the machine.

    Raises:
        RuntimeError: it did not start; the message holds what Ray said.
    """
    # Ray takes loopback for the machine's own address, so the cluster listens there and asks for a token.
    host, port, folder = get_node_ip_address(), _free_port(), Path(tempfile.mkdtemp(prefix="hpgr-cluster-"))
    (folder / "autoscaling.json").write_text(json.dumps(shape.config(f"{host}:{port}")))
    (folder / "token").write_text(secrets.token_hex(32))
    found = {
        "RAY_ADDRESS": f"{host}:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
    }
    words = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        f"--node-ip-address={host}", "--num-cpus=0", f"--temp-dir={folder}", f"--object-store-memory={STORE_BYTES}",
        f"--dashboard-port={_free_port()}", "--dashboard-agent-listen-port=0", "--disable-usage-stats",
        f"--autoscaling-config={folder}/autoscaling.json",
    ]  # fmt: skip
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment = os.environ | found | fake
    del environment["RAY_ADDRESS"]  # of the cluster that is being made
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(head, folder / "head.log")
            yield found
        finally:
            head.terminate()
            _sweep(folder)
            head.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait(head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the head is up, and has stayed up for long enough to show that its autoscaler runs."""
    end = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in log.read_text() and head.poll() is None and time.monotonic() < end:
        time.sleep(0.3)
    try:
        head.wait(STAY_SECONDS)
    except subprocess.TimeoutExpired:
        if time.monotonic() < end:
            return
    raise RuntimeError(f"the local cluster did not start:\n{log.read_text()[-3000:]}")


def _sweep(folder: Path) -> None:
    """End every process of this cluster: their command lines or environments name its folder."""
    mark = str(folder).encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3, help="most worker nodes, 1 or more")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of a worker node")
    parser.add_argument("--idle", type=float, default=15, help="seconds without work before a node is taken away")
    parser.add_argument("command", nargs="*", help="what to run on it, after --")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, expected 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: no raylet outlives it
    with local_cluster(Shape(arguments.workers, arguments.cpus, arguments.idle)) as found:
        print(
            "local cluster: export " + " ".join(f"{k}={v}" for k, v in found.items() if k != "PYTHONPATH"), flush=True
        )
        if not arguments.command:
            try:
                signal.pause()
            except KeyboardInterrupt:
                return 0
        return subprocess.call(arguments.command, env=os.environ | found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
