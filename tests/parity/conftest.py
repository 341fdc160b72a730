"""One thread and torch's global switches as they were: tests share the machine and the process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(next(p for p in Path(__file__).parents if p.name == "tests")))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
