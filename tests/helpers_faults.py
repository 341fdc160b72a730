"""Jobs on tiny logs as processes, real raylets under them, ways to kill both, and what must be the same afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data.synthetic.users=160", "data.synthetic.items=60", "data.synthetic.categories=6", "stream.window=40",
    "stream.stride=20", "stream.batch_tokens=1024", "model.width=16", "stage1.epochs=2", "stage2.epochs=2",
    "checkpoints.every_steps=3",
]  # fmt: skip
SPACE = {
    "name": "tiny",
    "parameters": {"stage1.mask_ratio": {"choice": [0.2, 0.4]}, "model.pgsa.top_k": {"choice": [4, 32]}},
    "scheduler": {"kind": "none"},
    "budget": {"trials": 4},
}
"""Every configuration there is, so that a search ends with the same ones whatever order it tried them in."""
STORE_BYTES = 100 << 20


@dataclass
class Job:
    """A command that goes on after an interruption. `folder` is the one that it works on."""

    name: str
    folder: Path
    cwd: Path
    first: list[str]
    again: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The command: `--resume` is for a run that there is."""
        words = self.again if (self.folder / "run.json").exists() else self.first
        return [sys.executable, str(ROOT / "jobs" / f"{self.name}.py"), *words]

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """The job at work, in a process group of its own; nothing of it outlives the block."""
        log = (self.cwd / "job.log").open("a")
        process = subprocess.Popen(self.words(), cwd=self.cwd, stdout=log, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | self.environment, start_new_session=True)  # fmt: skip
        try:
            yield process
        finally:
            kill_group(process)
            log.close()

    def finish(self, timeout: float = 400) -> str:
        """Run to the end; returns what it said. Fails with that if it does not end well."""
        before = len(self.said())
        with self.started() as process:
            process.wait(timeout)
        assert process.returncode == 0, self.said()[-6000:]
        return self.said()[before:]

    def said(self) -> str:
        log = self.cwd / "job.log"
        return log.read_text() if log.exists() else ""


def settings(folder: Path, *more: str) -> list[str]:
    values = [*TINY, f"data.prepared={folder}/prepared", *more]
    return [word for value in values for word in ("--set", value)]


def two_stage(folder: Path, *more: str, **environment: str) -> Job:
    """Both stages; trained in the driver unless `more` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*settings(folder, "resources.workers=0", *more), "--run", "run"]
    return Job("two_stage", folder / "run", folder, words, ["--run", "run", "--resume"], environment)


def tune(folder: Path, *more: str, **environment: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    words = [*settings(folder, *more), "--space", "space.yaml", "--run", "run"]
    return Job("tune", folder / "run", folder, words, ["--run", "run", "--resume"], environment)


def prepare(folder: Path, *more: str, **environment: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    words = settings(folder, *more)
    return Job("prepare", folder / "prepared", folder, words, words, environment)


def batch_score(folder: Path, run: Path, *more: str, **environment: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--run", str(run), "--top-n", "5", "--shard-pairs", "400", "--output", "scores", *more]
    return Job("batch_score", folder / "scores", folder, words, words, environment)


# What must be equal


def curves(job: Job) -> list[tuple[Any, ...]]:
    """Loss and validation of every validation of a run."""
    points = json.loads((job.folder / "curves.json").read_text())
    return [(p["stage"], p["step"], p["train_loss"], p["validation"]) for p in points]


def figures(job: Job) -> dict[str, Any]:
    metrics = json.loads((job.folder / "metrics.json").read_text())
    return {name: metrics[name]["test"] for name in ("stage1", "stage2")} | {"data": metrics["data"]}


def trials(job: Job) -> dict[str, tuple[float, float]]:
    """Validation AUC of every finished trial by its values; nothing was tried twice or lost."""
    history = json.loads((job.folder / "search.json").read_text())["history"]
    done = [row for row in history if row["state"] not in ("repeated", "void")]
    assert {row["state"] for row in done} == {"finished"}
    out = {json.dumps(row["values"], sort_keys=True): row["auc"] for row in done}
    assert len(out) == len(done) == len(list(job.folder.glob("trials/*/stage2/done.json")))
    return out


def files(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of each file."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.glob(pattern)) if f.is_file()}  # fmt: skip


def outcome(job: Job) -> Any:
    """All of a job's results that must not depend on what happened on the way."""
    if job.name == "two_stage":
        return curves(job), figures(job)
    if job.name == "tune":
        return trials(job)
    if job.name == "prepare":
        (manifest,) = job.folder.glob("*/manifest.json")
        return json.loads(manifest.read_text())["account"], files(manifest.parent, "timelines/*")
    names = {path.name for path in job.folder.iterdir()}
    assert {name for name in names if name.startswith("_")} == {"_SUCCESS", "_request.json"}
    told = json.loads((job.folder / "_SUCCESS").read_text())
    # Every run of the same settings has weights and an identity of its own, so files are equal for one run only.
    assert files(job.folder, "part-*") == {name: file["sha256"] for name, file in told["files"].items()}
    return told["account"], files(job.folder, "part-*")


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Equal, numbers to a relative tolerance."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(lambda x, y: close(x, y, tolerance), a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
    return bool(a == b)


# Ways to die


def kill_group(process: subprocess.Popen[Any]) -> None:
    """The job and every process that it started on this machine, at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tree(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ray_workers(pid: int, name: str = "ray::") -> list[psutil.Process]:
    """Ray's worker processes below a process that are at work on something whose name begins so."""
    out = []
    for process in tree(pid):
        with suppress(psutil.Error):
            if any(part.startswith(name) for part in process.cmdline()[:1]):
                out.append(process)
    return out


def wait_for(found: Callable[[], Any], timeout: float = 200, process: subprocess.Popen[Any] | None = None) -> Any:
    """Until something is there; fails if time is over or the process has ended first."""
    end = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < end, "it did not happen"
        assert process is None or process.poll() is None, "the job ended before it happened"
        time.sleep(0.05)
    return value


# A cluster of real raylets, each on a host of its own if need be


@dataclass
class Network:
    """Hosts with addresses of their own, each in a network namespace, on one bridge; links can be cut and healed."""

    name: str
    net: str
    hosts: int = 0

    @property
    def address(self) -> str:
        """This machine's on the bridge."""
        return f"{self.net}.1"

    def host(self) -> tuple[str, list[str]]:
        """One more host: its address, and what runs a command on it."""
        self.hosts += 1
        space, link, address = f"{self.name}-{self.hosts}", f"{self.name}v{self.hosts}", f"{self.net}.{self.hosts + 1}"
        for words in (
            f"netns add {space}", f"link add {link} type veth peer name eth0 netns {space}",
            f"link set {link} master {self.name} up", f"-n {space} link set lo up", f"-n {space} link set eth0 up",
            f"-n {space} addr add {address}/24 dev eth0",
        ):  # fmt: skip
            _ip(words)
        return address, ["ip", "netns", "exec", space]

    def cut(self, host: int) -> None:
        """`host` counts from 0."""
        _ip(f"link set {self.name}v{host + 1} down")

    def heal(self, host: int) -> None:
        _ip(f"link set {self.name}v{host + 1} up")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """For the block. Raises CalledProcessError or OSError where this machine may not make one."""
    # Another net each time: what a killed run left of its own must not answer for this one's.
    made = Network(f"hp{secrets.token_hex(3)}", f"10.213.{secrets.randbelow(256)}")
    try:
        for words in (f"link add {made.name} type bridge", f"addr add {made.address}/24 dev {made.name}",
                      f"link set {made.name} up"):  # fmt: skip
            _ip(words)
        yield made
    finally:
        hosts = range(1, made.hosts + 1)
        # A host lives on while a process of it does; its link need not.
        for words in [*(f"link del {made.name}v{n}" for n in hosts), *(f"netns del {made.name}-{n}" for n in hosts),
                      f"link del {made.name}"]:  # fmt: skip
            with suppress(subprocess.CalledProcessError, OSError):
                _ip(words)


@dataclass
class Raylets:
    """A head and worker nodes, each a process tree of its own that can be killed or paused as a machine can."""

    folder: Path
    host: str
    port: int
    token: Path
    head: subprocess.Popen[bytes] | None = None
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What finds it."""
        return {"RAY_ADDRESS": f"{self.host}:{self.port}", "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token), "PYTHONPATH": str(ROOT)}  # fmt: skip

    def start_head(self, cpus: int) -> None:
        self.head = self._start("head", ["--head", f"--port={self.port}", f"--node-ip-address={self.host}",
                                         f"--temp-dir={self.folder}", "--include-dashboard=false",
                                         f"--num-cpus={cpus}"])  # fmt: skip

    def add(self, cpus: int = 1, host: str = "", within: Sequence[str] = ()) -> int:
        """One more node, at an address of its own if given, `within` what a command is run by; returns its index."""
        words = [f"--address={self.host}:{self.port}", f"--node-ip-address={host or self.host}", f"--num-cpus={cpus}"]
        self.nodes.append(self._start(f"node{len(self.nodes)}", words, within))
        return len(self.nodes) - 1

    def _start(self, name: str, words: Sequence[str], within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        # A dead or paused node should be missed within seconds, not after Ray's half minute.
        patience = {"RAY_health_check_initial_delay_ms": "5000", "RAY_health_check_period_ms": "1000",
                    "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "3"}  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | self.environment | patience
        del environment["RAY_ADDRESS"]
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
                 f"--object-store-memory={STORE_BYTES}", *words],
                env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        wait_for(lambda: "Ray runtime started" in log.read_text(), 90, process)
        return process

    def signal(self, node: int, kind: signal.Signals) -> None:
        """Send a signal to every process of a node."""
        for process in tree(self.nodes[node].pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(kind)

    def at_work(self, name: str) -> list[int]:
        """Nodes with a worker process that is at work on something whose name begins so."""
        return [n for n, node in enumerate(self.nodes) if ray_workers(node.pid, name)]

    def stop(self) -> None:
        mark = str(self.folder).encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid() and mark in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
        for process in [self.head, *self.nodes]:
            if process is not None:
                kill_group(process)


@contextmanager
def raylets(folder: Path, nodes: int, head_cpus: int = 1, host: str = "") -> Iterator[Raylets]:
    """A cluster on this machine for the block, at its own address or another, touching no other Ray on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    from ray.util import get_node_ip_address

    cluster = Raylets(folder, host or get_node_ip_address(), port, token)
    try:
        cluster.start_head(head_cpus)
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.stop()
