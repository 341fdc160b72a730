"""Batches by Ray Data: CPU tasks read, cut sessions and mask beside the trainers.

Each worker runs a pipeline over its own share of every global batch, in the plan's order, so the batches are those
of `LocalSource` whatever the number of workers, and a resumed worker starts at any step (Ray restores no position).
Each worker's tasks read the group's timelines; they cut and mask only their own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from hpgr.data.stream import Item, Step, StreamSpec, items_of, produce, step_of

BLOCK_BYTES = 4 << 20
AHEAD = 2
"""Data tasks at work at once for a worker: enough to stay ahead, few enough to bound memory."""


def _produce(row: dict[str, Any], spec: StreamSpec, rank: int, world: int) -> Iterator[pa.Table]:
    for table in ((int(e), int(g), int(f)) for e, g, f in zip(row["epoch"], row["group"], row["first"], strict=True)):
        yield from produce(Item(*table), spec, rank, world)


@dataclass(frozen=True)
class RaySource:
    """A `Source` (see hpgr.data.stream) for one Ray Train worker."""

    rank: int
    world: int
    data_cpus: float

    def steps(self, spec: StreamSpec, epochs: range, first_step: int) -> Iterator[Step]:
        items = items_of(spec, epochs, first_step)
        return self._run(items, spec)

    def evaluation(self, spec: StreamSpec) -> Iterator[Step]:
        return self._run(items_of(spec, [-1], 0), spec)

    def _run(self, items: list[Item], spec: StreamSpec) -> Iterator[Step]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = BLOCK_BYTES
        context.execution_options.preserve_order = True
        rows = [{"epoch": i.epoch, "group": i.group, "first": i.first_step} for i in items]
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            partial(_produce, spec=spec, rank=self.rank, world=self.world),
            batch_size=None,
            num_cpus=self.data_cpus,
            concurrency=AHEAD,
            zero_copy_batch=True,
        )
        for table in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
            yield step_of(table)
