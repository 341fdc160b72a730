"""Benchmarks of `jobs/benchmark.py`: each measures a way and its baseline in one run, and tells their ratio first.

A benchmark is a module with `arguments(parser)` and `run(arguments, say) -> dict`, whose `ratios` are printed first.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hpgr.data.preparation import versions
from hpgr.errors import ConfigError

LOAD_BEFORE = os.getloadavg()[0]
"""Processes that wanted a core before the benchmark began: above a few tenths, others were at work."""


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on, when, by which command and with which versions, those of `packages` too."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", *sys.argv]),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(LOAD_BEFORE, 2),
        "versions": versions() | {name: version(name) for name in ("torch", "ray", *packages)},
    }


def processor() -> str:
    """The processor's model, or its kind where the system does not tell (Linux tells)."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def peers_of(
    text: str, modules: Mapping[str, Sequence[str]], extra: str, say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """The peers that `--peers` names, separated by commas, which are here; and why the others are left out.

    Args:
        modules: what each peer is imported as.
        extra: of this package, which installs them.

    Raises:
        ConfigError: one is unknown.
    """
    asked = [name for name in text.split(",") if name]
    for name in asked:
        if name not in modules:
            raise ConfigError(f"--peers: got {name}, expected some of {', '.join(modules)}")
    missing = [name for name in asked if any(find_spec(module) is None for module in modules[name])]
    left_out = dict.fromkeys(missing, f"not installed: pip install '.[{extra}]'")
    for name, why in left_out.items():
        say(f"{name} is left out, {why}")
    return [name for name in asked if name not in left_out], left_out


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {"median": median(values), "least": min(values), "greatest": max(values)}


@dataclass
class Greatest:
    """Greatest value of a measure while the block runs, looked at some times a second."""

    measure: Callable[[], float]
    value: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Greatest:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.value = max(self.value, self.measure())
