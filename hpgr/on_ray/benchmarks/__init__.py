"""Benchmarks of `jobs/benchmark.py`: each measures a way and its baseline in one run, and tells their ratio first.

A benchmark is a module with `arguments(parser)` and `run(arguments, say) -> dict`, whose `ratios` are printed first.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from hpgr.data.preparation import versions
from hpgr.errors import ConfigError


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "versions": versions() | {"torch": torch.__version__},
    }


def peers_of(text: str, modules: Mapping[str, str], extra: str) -> list[str]:
    """The peers that `--peers` names, separated by commas; `modules` are what each is imported as.

    Raises:
        ConfigError: one is unknown or not installed.
    """
    peers = [name for name in text.split(",") if name]
    for name in peers:
        if name not in modules or find_spec(modules[name]) is None:
            raise ConfigError(f"--peers: got {name}, expected an installed one of {', '.join(modules)}; "
                              f"pip install 'hpgr[{extra}]'")  # fmt: skip
    return peers


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
