"""Batches by Ray Data: CPU tasks read, cut sessions and mask beside the trainers.

Each worker runs pipelines over its own share of every global batch, in the plan's order, so the batches are those of
`LocalSource` whatever the number of workers, and a resumed worker starts at any step (Ray restores no position).
Each worker's tasks read the group's timelines; they cut and mask only their own rows.

A worker's steps are cut into chunks of bounded bytes. While one is trained on, the next runs as a Ray Data pipeline to
its end. One endless pipeline would be simpler, but Ray's streaming executor polls without pause while its consumer is
behind (seen in 2.60), and in the trainer's process that costs most of a core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from hpgr.data.stream import Item, Step, StreamSpec, items_of, produce, step_of
from hpgr.on_ray.session import quieten

FIRST_CHUNK = 8
"""Steps of the first chunk: training need not wait for more. Each further one is four times as long, up to:"""
CHUNK_BYTES = 64 << 20
TOKEN_BYTES = 64


@dataclass(frozen=True)
class RaySource:
    """A `Source` (see hpgr.data.stream) for one Ray Train worker."""

    rank: int
    world: int
    data_cpus: float
    data_workers: int
    """Data tasks at work at once for this worker."""
    kept: dict[StreamSpec, list[Any]] = field(default_factory=dict, compare=False)
    """Tables of evaluations that fit in one chunk: they never change, so each is made once."""

    def steps(self, spec: StreamSpec, epochs: range, first_step: int) -> Iterator[Step]:
        return self._run(items_of(spec, epochs, first_step), spec)

    def evaluation(self, spec: StreamSpec) -> Iterator[Step]:
        if spec in self.kept:
            return _steps_of(self.kept[spec])
        items = list(items_of(spec, [-1], 0))
        if sum(item.stop - item.first for item in items) > self._most(spec):
            return self._run(items, spec)
        self.kept[spec] = self._chunk(items, spec)
        return _steps_of(self.kept[spec])

    def _most(self, spec: StreamSpec) -> int:
        """Steps of the longest chunk."""
        return max(FIRST_CHUNK, CHUNK_BYTES * self.world // (spec.batch_tokens * TOKEN_BYTES))

    def _run(self, items: Iterable[Item], spec: StreamSpec) -> Iterator[Step]:
        chunks = chunked(items, FIRST_CHUNK, self._most(spec), self.data_workers)
        runner = ThreadPoolExecutor(1, "next-chunk")
        try:
            ahead = runner.submit(self._chunk, next(chunks, []), spec)
            while refs := ahead.result():
                ahead = runner.submit(self._chunk, next(chunks, []), spec)
                yield from _steps_of(refs)
        finally:
            runner.shutdown(wait=False, cancel_futures=True)

    def _chunk(self, pieces: list[Item], spec: StreamSpec) -> list[Any]:
        """Run one chunk's pipeline to its end; references to its tables, in order."""
        if not pieces:
            return []
        quieten()
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        # Budgets come from what Ray Data knows of the cluster, nothing for the first seconds of each pipeline (2.60):
        # until then it runs one task at a time. A chunk's output is bounded, so it goes without.
        context.op_resource_reservation_enabled = False
        data = ray.data.from_items([piece._asdict() for piece in pieces], override_num_blocks=len(pieces))
        make = partial(_produce, spec=spec, rank=self.rank, world=self.world)
        return data.map_batches(
            make, batch_size=None, batch_format="pyarrow", num_cpus=self.data_cpus, concurrency=self.data_workers
        ).to_arrow_refs()


def _steps_of(refs: list[Any]) -> Iterator[Step]:
    for ref in refs:
        table = ray.get(ref)
        for row in range(table.num_rows):
            yield step_of(table.slice(row, 1))


def _produce(rows: pa.Table, spec: StreamSpec, rank: int, world: int) -> pa.Table:
    items = [Item(**row) for row in rows.to_pylist()]
    return pa.concat_tables([table for item in items for table in produce(item, spec, rank, world)])


def chunked(items: Iterable[Item], first: int, most: int, tasks: int) -> Iterator[list[Item]]:
    """Cut items into chunks of `first` steps, then four times as many each time, up to `most`; a chunk's steps are
    dealt, in order, to `tasks` pieces or more."""
    size, room, chunk = first, first, list[Item]()
    for item in items:
        start = item.first
        while start < item.stop:
            stop = min(item.stop, start + min(room, -(-size // tasks)))
            chunk.append(item._replace(first=start, stop=stop))
            room, start = room - (stop - start), stop
            if not room:
                yield chunk
                size = min(most, 4 * size)
                room, chunk = size, []
    if chunk:
        yield chunk
