"""Run the passes of data preparation as Ray Data pipelines."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray.data import DataContext
from ray.exceptions import RayError

import hpgr.errors
from hpgr.errors import HpgrError, StoreError

T = TypeVar("T")
R = TypeVar("R")
SAY_EVERY_SECONDS, SAY_SHARE = 5.0, 0.2
"""A line of progress comes after so many seconds, and after this share of the time before: long passes speak less."""


@dataclass(frozen=True)
class _Call:
    """Runs the function on one item. A user's error, or a disk's or store's, comes back as a value, so that it is
    shown as it is."""

    function: Callable[[Any], Any]
    items: Sequence[Any]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["id"])
        try:
            result = self.function(self.items[index])
        except (HpgrError, OSError) as error:
            kind = type(error) if isinstance(error, HpgrError) else StoreError
            return {"id": index, "failed": kind.__name__, "result": pickle.dumps(str(error))}
        return {"id": index, "failed": "", "result": pickle.dumps(result)}


@dataclass(frozen=True)
class RayExecute:
    """An `Execute` (see hpgr.data.preparation) over the cluster: one task an item."""

    say: Callable[[str], None]

    def __call__(self, name: str, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
        """Results in the items' order.

        Raises:
            HpgrError: of the kind that the function raised on any item.
        """
        start = spoken = time.monotonic()
        numbers = ray.data.range(len(items), override_num_blocks=len(items))
        unbudgeted(numbers.context)
        rows = numbers.map(_Call(function, items), num_cpus=1)
        results: dict[int, Any] = {}
        try:
            for row in rows.iter_rows():
                if row["failed"]:
                    raise getattr(hpgr.errors, row["failed"])(pickle.loads(row["result"]))
                results[row["id"]] = pickle.loads(row["result"])
                if time.monotonic() - spoken > max(SAY_EVERY_SECONDS, SAY_SHARE * (spoken - start)):
                    spoken = time.monotonic()
                    self.say(f"{name}: {len(results)}/{len(items)} pieces, {spoken - start:.0f} s")
        except RayError as error:
            raise HpgrError(f"{name}: a task failed: {cause(error)}") from error
        return [results[i] for i in range(len(items))]


def unbudgeted(context: DataContext) -> DataContext:
    """Pipelines of this context start tasks as fast as the cluster takes them; for those of bounded output.

    Ray Data holds operators to budgets of what it knows of the cluster, which is nothing for the first one or two
    seconds of every run (Ray 2.60): until then it runs one task at a time. Without budgets all tasks ask for their CPUs
    at once, and an autoscaler hears of all of them.
    """
    context.op_resource_reservation_enabled = False
    return context


def cause(error: BaseException) -> str:
    """The innermost message of a Ray error, one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
