"""One job at a time in a folder, on a disk or an object store, with no server to ask.

A job that wants a folder writes a claim there, under a name of its own, and then lists all claims. Alone, it has the
lock; where it sees another it steps back. Of any two claims the later is written before its owner looks, so at least
one of the two sees the other and never do both hold. This asks of a store only that a listing shows what was written
before it: true of local disks, of NFS (a client that has just created a file looks afresh), of S3 and of GCS. A lock
file made by exclusive creation would ask for more: pyarrow has none for stores, and the stale lock that one job
removes may by then be another's new one. A claim is only ever removed by its own name.

A claim of a dead process does not count. On its own machine that is known at once, by process id and start time;
elsewhere, when it has not been renewed for STALE_SECONDS by the store's own clock. A job that finds its claim gone
(it was paused, and another took over) is interrupted.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hpgr.artifacts import Folder
from hpgr.errors import ArtifactError

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
"""Age of the last sign of life after which a job on another machine counts as dead."""
ASK_SECONDS = 30.0
"""How long to step back and ask again while others only ask, too."""
POLL_SECONDS = 1.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Claim:
    """Who asks for a folder, or `holds` it. `machine` tells machines of one name apart; `born` is the start of the
    process, so that a later one of the same number is another."""

    job: str
    host: str
    machine: str
    pid: int
    born: str
    since: float
    holds: bool = False

    @classmethod
    def mine(cls, job: str) -> Claim:
        """Of this process."""
        pid = os.getpid()
        return cls(job, socket.gethostname(), _machine(), pid, _born(pid) or "", time.time())

    def is_dead(self, age: float) -> bool:
        """Whether its process is gone; `age` [s] is that of its last sign of life."""
        if self.machine and (self.host, self.machine) == (socket.gethostname(), _machine()):
            return _born(self.pid) != self.born
        return age > STALE_SECONDS

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC)
        return f"{self.job} (process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC)"


@contextmanager
def held(folder: Folder, job: str, say: Say, prefix: str = "lock", wait: bool = False) -> Iterator[None]:
    """Hold a folder for the block.

    Args:
        folder: created if need be; removed again if nothing came into it.
        job: what others are told.
        say: hears of jobs that have died, and of those waited for.
        prefix: of the claims' file names; locks of other prefixes do not mind this one.
        wait: wait for the other job instead of refusing.

    Raises:
        ArtifactError: another job holds it, named, or took it over while this one was paused.
    """
    fresh = not folder.exists()
    lock = _Lock(folder, prefix, Claim.mine(job), say)
    try:
        lock.take(wait)
        try:
            yield
        except KeyboardInterrupt:
            if not lock.lost:
                raise
            raise ArtifactError(f"{folder.uri} was taken over by another job while this one was paused; it goes on "
                                "there, and this one ends") from None  # fmt: skip
    finally:
        lock.release()
        if fresh and folder.is_local:
            with suppress(OSError):
                os.rmdir(folder.path()[1])


class _Lock:
    def __init__(self, folder: Folder, prefix: str, claim: Claim, say: Say) -> None:
        self.folder, self.prefix, self.claim, self.say = folder, prefix, claim, say
        self.name = f"{prefix}-{uuid.uuid4().hex}.json"
        self.lost = False
        self._over = threading.Event()
        self._beat: threading.Thread | None = None

    def take(self, wait: bool) -> None:
        """Hold the folder, at once or when those before have gone; raises as `held`."""
        start, told = time.monotonic(), ""
        while not self._alone():
            others = self._others()
            holder = next((claim for claim in others if claim.holds), None)
            if not wait and others and (holder or time.monotonic() - start > ASK_SECONDS):
                raise ArtifactError(f"{self.folder.uri} is in use by {holder or others[0]}; wait for it to end, or "
                                    "give another folder")  # fmt: skip
            if wait and holder and str(holder) != told:
                told = str(holder)
                self.say(f"waiting for {holder}")
            time.sleep(random.uniform(0.5, 1.0) * (POLL_SECONDS if holder else 0.2))
        self._beat = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._beat.start()

    def _alone(self) -> bool:
        """Write the claim and look; holds the folder if no other claim is there, else withdraws."""
        asked = time.time()
        self._write(holds=False)
        if not self._others() and self.name in self._claims():
            self._write(holds=True)
            if time.time() - asked < STALE_SECONDS / 2:  # else another may have taken this process for dead
                return True
        self.folder.remove(self.name)
        return False

    def _others(self) -> list[Claim]:
        """Claims of others that live; the dead are removed."""
        claims, living = self._claims(), []
        now = claims.pop(self.name, (self.claim, time.time()))[1]  # by the store's clock, if the claim is there
        for name, (claim, seen) in claims.items():
            if not claim.is_dead(now - seen):
                living.append(claim)
                continue
            self.folder.remove(name)
            if claim.holds:
                self.say(f"{claim} has died; taking over from it")
        return living

    def _claims(self) -> dict[str, tuple[Claim, float]]:
        """Claims by file name, each with the store's time of its last sign of life."""
        out = {}
        for name, seen in self.folder.times().items():
            if name.startswith(f"{self.prefix}-") and name.endswith(".json"):
                claim = _claim(self.folder, name, seen)
                if claim is not None:
                    out[name] = (claim, seen)
        return out

    def _write(self, holds: bool = True) -> None:
        self.claim = replace(self.claim, holds=holds)
        self.folder.write_json(self.name, asdict(self.claim))

    def _renew(self) -> None:
        last = time.time()
        while not self._over.wait(BEAT_SECONDS):
            try:
                claims = self._claims()
                paused = time.time() - last > STALE_SECONDS
                rivals = any(c.holds for name, (c, _) in claims.items() if name != self.name)
                if self.name not in claims or (paused and rivals):
                    self.lost = True
                    _interrupt()
                    return
                self._write()
                last = time.time()
            except ArtifactError:
                continue  # a store that refuses for a while; the claim is as old as it is

    def release(self) -> None:
        self._over.set()
        if self._beat is not None:
            self._beat.join()
        with suppress(ArtifactError):
            self.folder.remove(self.name)


def _claim(folder: Folder, name: str, seen: float) -> Claim | None:
    """A claim; None if it has gone. One that this version cannot read lives as long as it is young."""
    try:
        return Claim(**folder.read_json(name))
    except (ArtifactError, TypeError):
        return Claim("another job", "an unknown host", "", 0, "", seen, True) if folder.exists(name) else None


def _interrupt() -> None:
    """Interrupt the main thread, wherever it waits; end the process where interrupts are ignored (nohup)."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        os._exit(2)
    os.kill(os.getpid(), signal.SIGINT)


def _machine() -> str:
    """What processes that see one another's numbers have in common; "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """Start of a process in the kernel's clock ticks; None if there is none, or it has ended and waits to be heard."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
