"""Benchmarks of `jobs/benchmark.py`: each measures a way and its baseline in one run, and tells their ratio first.

A benchmark is a module with `arguments(parser)` and `run(arguments, say) -> dict`, whose `ratios` are printed first.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from hpgr.data.preparation import versions


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "versions": versions() | {"torch": torch.__version__},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {"median": median(values), "least": min(values), "greatest": max(values)}
