"""Run the passes of data preparation as tasks over the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayError

import hpgr.errors
from hpgr.errors import HpgrError, StoreError

T = TypeVar("T")
R = TypeVar("R")
SAY_EVERY_SECONDS, SAY_SHARE = 5.0, 0.2
"""A line of progress comes after so many seconds, and after this share of the time before: long passes speak less."""
LOOK_EVERY_SECONDS = 1.0
"""A look costs as much as there are tasks; a failure shows this late, the end at once."""


class _Failed(NamedTuple):
    """A user's error, or a disk's or store's: it comes back as a value, so that it is shown as it is."""

    kind: str
    message: str


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (HpgrError, OSError) as error:
        kind = type(error) if isinstance(error, HpgrError) else StoreError
        return _Failed(kind.__name__, str(error))


@dataclass(frozen=True)
class RayExecute:
    """An `Execute` (see hpgr.data.preparation) over the cluster: one task an item, all asked for at once.

    A pass is short and its files are named by its items, so tasks alone do, and a Ray Data pipeline around them would
    only take time. A task that a node took with it runs again. After a failure the tasks that wait are left to run, or
    to end with the driver: to cancel one that is just ending aborts the driver (Ray 2.60).
    """

    say: Callable[[str], None]

    def __call__(self, name: str, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
        """Results in the items' order.

        Raises:
            HpgrError: of the kind that the function raised on any item.
        """
        start = spoken = time.monotonic()
        task = ray.remote(_call).options(name=name, num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")
        shared = ray.put(function)
        left = {task.remote(shared, item): place for place, item in enumerate(items)}
        results: dict[int, Any] = {}
        try:
            while left:
                for done in ray.wait(list(left), num_returns=len(left), timeout=LOOK_EVERY_SECONDS)[0]:
                    result = ray.get(done)
                    if isinstance(result, _Failed):
                        raise getattr(hpgr.errors, result.kind)(result.message)
                    results[left.pop(done)] = result
                if left and time.monotonic() - spoken > max(SAY_EVERY_SECONDS, SAY_SHARE * (spoken - start)):
                    spoken = time.monotonic()
                    self.say(f"{name}: {len(results)}/{len(items)} pieces, {spoken - start:.0f} s")
        except RayError as error:
            raise HpgrError(f"{name}: a task failed: {cause(error)}") from error
        return [results[place] for place in range(len(items))]


def cause(error: BaseException) -> str:
    """The innermost message of a Ray error, one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
