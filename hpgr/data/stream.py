"""From prepared timelines to each worker's batches, startable at any step.

The unit of work is a *group* of an epoch's plan: read its buckets once, cut sessions, mask, yield its batches.
`produce` is pure; in-process and Ray sources differ only in where it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from hpgr.artifacts import Folder
from hpgr.config import Config
from hpgr.data.batches import Assembler, Masking, next_item_batch, worker_rows
from hpgr.data.plan import Group, plan_epoch
from hpgr.data.preparation import Execute, Prepared
from hpgr.data.windows import Windows, impression_windows, next_item_windows, training_windows
from hpgr.schema import SPLITS, Batch, Timelines

Kind = Literal["masked", "click", "next_item"]


@dataclass(frozen=True)
class StreamSpec:
    """All that decides a stream's batches; small, hashable, sent to data tasks."""

    prepared: str
    index: str
    kind: Kind
    gap_minutes: float
    batch_tokens: int
    group_tokens: int
    seed: int
    mask_ratio: float = 0.0
    causal_share: float = 0.0

    def windows(self) -> Windows:
        folder, _, name = self.index.rpartition("/")
        return Windows.from_table(Folder(folder).read_parquet(name))

    def plan(self, epoch: int | None) -> list[Group]:
        return plan_epoch(self.windows(), self.batch_tokens, self.group_tokens, self.seed, epoch)


class Item(NamedTuple):
    """Steps [first, stop) of a group of an epoch's plan; epoch -1 is evaluation's fixed order."""

    epoch: int
    group: int
    first: int
    stop: int


class Step(NamedTuple):
    """A worker's share of one global batch. `real` is False for a share that must count nothing."""

    epoch: int
    step: int
    steps: int
    real: bool
    batch: Batch


class Source(Protocol):
    """Where the training loop gets its batches."""

    def steps(self, spec: StreamSpec, epochs: range, first_step: int) -> Iterator[Step]:
        """Training steps of the epochs in order, the first one from `first_step`."""

    def evaluation(self, spec: StreamSpec) -> Iterator[Step]:
        """Each row once, over all workers together."""


def build_index(prepared: Prepared, config: Config, folder: Folder, name: str, execute: Execute) -> str:
    """Write the windows of a stream (`masked`, `click-<split>` or `next_item-<split>`); returns the index's URI."""
    file = f"{name}.parquet"
    if not folder.exists(file):
        find = partial(_bucket_windows, prepared=prepared, config=config, name=name)
        parts = list(execute(f"index {name}", find, range(prepared.buckets)))
        table = pa.concat_tables(parts)
        if name.startswith("next_item") and table.num_rows > config.evaluation.next_item_users:
            order = np.argsort(table.column("key").to_numpy().view(np.uint64), kind="stable")
            table = table.take(pa.array(np.sort(order[: config.evaluation.next_item_users])))
        folder.write_parquet(file, table)
    return f"{folder.uri}/{file}"


def _bucket_windows(bucket: int, prepared: Prepared, config: Config, name: str) -> pa.Table:
    timelines = Timelines.from_table(prepared.timelines(bucket))
    kind, _, split = name.partition("-")
    if kind == "masked":
        return training_windows(timelines, config.stream, bucket).to_table()
    if kind == "click":
        return impression_windows(timelines, config.stream, bucket, SPLITS[split]).to_table()
    one_out = config.data.split.by == "leave_one_out"
    return next_item_windows(timelines, config.stream, bucket, SPLITS[split], one_out).to_table()


def items_of(spec: StreamSpec, epochs: Iterable[int], first_step: int) -> Iterator[Item]:
    """Work items of the epochs in order, without the steps before `first_step` of the first one."""
    skip = first_step
    for epoch in epochs:
        sizes = [len(g.batches) for g in _plan(spec, epoch)]
        for group, size in enumerate(sizes):
            if skip < size:
                yield Item(epoch, group, skip, size)
            skip = max(0, skip - size)


@lru_cache(maxsize=4)
def _plan(spec: StreamSpec, epoch: int) -> list[Group]:
    return spec.plan(None if epoch < 0 else epoch)


_group: dict[tuple[str, float, tuple[int, ...]], Assembler] = {}
"""The group that this process read last. One: a group is most of a data task's memory, and goes before the next."""


def _assembler(prepared: str, gap_minutes: float, buckets: tuple[int, ...]) -> Assembler:
    key = (prepared, gap_minutes, buckets)
    if key not in _group:
        _group.clear()
        log = Prepared.open(Folder(prepared))
        _group[key] = Assembler({b: log.timelines(b) for b in buckets}, gap_minutes)
    return _group[key]


@lru_cache(maxsize=4)
def _windows(spec: StreamSpec) -> Windows:
    return spec.windows()


def produce(item: Item, spec: StreamSpec, rank: int, world: int) -> Iterator[pa.Table]:
    """A worker's batches of one group, each as one Arrow row with its epoch, step, steps and real."""
    plan, windows = _plan(spec, item.epoch), _windows(spec)
    group = plan[item.group]
    assembler = _assembler(spec.prepared, spec.gap_minutes, tuple(group.buckets.tolist()))
    before, steps = sum(len(g.batches) for g in plan[: item.group]), sum(len(g.batches) for g in plan)
    for i in range(item.first, item.stop):
        own, real = worker_rows(group.batches[i], rank, world)
        batch = _make(spec, assembler, windows.take(own), item.epoch)
        yield batch.to_table(epoch=item.epoch, step=before + i, steps=steps, real=int(real))


def _make(spec: StreamSpec, assembler: Assembler, windows: Windows, epoch: int) -> Batch:
    if spec.kind == "next_item":
        return next_item_batch(assembler, windows)
    if spec.kind == "click":
        return assembler.batch(windows)
    masking = Masking(spec.mask_ratio, spec.causal_share, (spec.seed, epoch)) if spec.mask_ratio else None
    return assembler.batch(windows, masking, targets=False)


def step_of(table: pa.Table) -> Step:
    """Inverse of a row that `produce` yields."""
    plain = {name: table.column(name)[0].as_py() for name in ("epoch", "step", "steps", "real")}
    return Step(plain["epoch"], plain["step"], plain["steps"], bool(plain["real"]), Batch.from_table(table))


@dataclass(frozen=True)
class LocalSource:
    """Batches made in this process, for runs without workers and for tests."""

    rank: int = 0
    world: int = 1

    def steps(self, spec: StreamSpec, epochs: range, first_step: int) -> Iterator[Step]:
        for epoch in epochs:
            for item in items_of(spec, [epoch], first_step):
                yield from map(step_of, produce(item, spec, self.rank, self.world))
            first_step = 0

    def evaluation(self, spec: StreamSpec) -> Iterator[Step]:
        for item in items_of(spec, [-1], 0):
            yield from map(step_of, produce(item, spec, self.rank, self.world))
