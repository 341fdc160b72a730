"""Batch scoring on Ray Data: candidates dealt by tasks, shards scored and committed by a pool of stateful workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import torch
from ray.exceptions import RayError

import hpgr.errors
from hpgr.artifacts import Folder, absolute
from hpgr.config import Resources, Scoring, validate
from hpgr.errors import HpgrError
from hpgr.locks import held
from hpgr.on_ray.cluster import here, wait_for
from hpgr.on_ray.metrics import export
from hpgr.on_ray.parallel import SAY_EVERY_SECONDS, SAY_SHARE, RayExecute, cause
from hpgr.on_ray.session import session
from hpgr.scoring import job, output
from hpgr.scoring.request import Request
from hpgr.sizing import Ask, scoring_pool, settled

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pool:
    """Workers: at least and at most how many, and whether each has a GPU; None as the run's `resources` say."""

    least: int | None = None
    most: int | None = None
    gpu: bool | None = None

    def over(self, resources: Resources) -> Resources:
        """A run's resources with what this pool says instead; a least alone leaves the most to the cluster."""
        scoring = resources.scoring
        if self.least is not None:
            scoring = Scoring(min=self.least, max=self.most or "auto")
        gpu = resources.gpu if self.gpu is None else self.gpu
        return resources.model_copy(update={"scoring": scoring, "gpu": gpu})


def batch_score(wish: job.Wish, pool: Pool, say: Say) -> dict[str, Any]:
    """Run a batch job on the cluster; see `hpgr.scoring.job.batch_score`. Ray starts once there is work for it."""
    with ExitStack() as stack:
        stack.enter_context(held(Folder(absolute(wish.output)), "jobs/batch_score.py", say, output.LOCK))

        def execute(name: str, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
            stack.enter_context(session(say))
            return RayExecute(say)(name, function, items)

        def score(request: Request, missing: list[int], expected: output.Expected) -> int:
            stack.enter_context(session(say))
            return score_shards(request, missing, expected, pool, say)

        return job.batch_score(wish, execute, score, say)


def score_shards(request: Request, missing: list[int], expected: output.Expected, pool: Pool, say: Say) -> int:
    """Score and commit shards on a pool of workers; returns the pairs scored now.

    Raises:
        HpgrError: of the kind that a shard raised, or that a worker was lost for good.
    """
    cluster = here()
    resources = settled(pool.over(run_resources(request)), cluster)
    least, most = scoring_pool(resources, cluster, len(missing))
    gpu = resources.on_gpu
    say(f"score: {len(missing)} shard(s), {least} to {most} worker(s){' with a GPU each' if gpu else ''}")
    ask = Ask("scoring worker", "lower --workers (resources.scoring.min) or leave --gpu out", least, 1.0, float(gpu))
    wait_for(ask, resources.wait_minutes, say)
    options: dict[str, Any] = {"num_gpus": 1} if gpu else {}
    rows = ray.data.from_items([{"shard": s} for s in missing], override_num_blocks=len(missing)).map(
        _Worker,
        fn_constructor_kwargs={"request": request, "gpu": gpu},
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=1,
        **options,
    )
    pairs = None if expected.rows is None else sum(expected.rows[s] for s in missing)
    progress = _Progress(say, Folder(request.output), len(missing), pairs)
    try:
        for row in rows.iter_rows():
            if row["failed"]:
                raise getattr(hpgr.errors, row["failed"])(row["result"].decode())
            progress.add(json.loads(row["result"]))
    except RayError as error:
        raise HpgrError(f"score: a worker failed: {cause(error)}; run the same command to go on") from error
    return progress.pairs


def run_resources(request: Request) -> Resources:
    """The `resources` of the run that scores."""
    return validate(Folder(request.run).read_json("run.json")["config"]).resources


@dataclass
class _Progress:
    """Lines of progress, every few seconds."""

    say: Say
    output: Folder
    shards: int
    all_pairs: int | None

    def __post_init__(self) -> None:
        self.start = self.spoken = time.monotonic()
        self.done = self.pairs = self.users = 0

    def add(self, account: dict[str, int]) -> None:
        """One more shard."""
        self.done += 1
        self.pairs += account["pairs"]
        self.users += account["users"]
        now = time.monotonic()
        if now - self.spoken > max(SAY_EVERY_SECONDS, SAY_SHARE * (self.spoken - self.start)):
            self.spoken, took = now, now - self.start
            export(self.output, "score", {"pairs_per_second": self.pairs / took, "pairs_scored": self.pairs})
            share = self.pairs / self.all_pairs if self.all_pairs else self.done / self.shards
            left = took / share - took if share else 0.0
            self.say(f"score: {self.done}/{self.shards} shards, {self.pairs:,} pairs, {self.pairs / took:,.0f} pairs/s,"
                     f" {self.users / took:,.0f} users/s, about {left:.0f} s to go")  # fmt: skip


class _Worker:
    """Holds the models; scores and commits one shard a call. A user's error comes back as a value."""

    def __init__(self, request: Request, gpu: bool) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
        self.request = request
        self.shards = job.open_shards(request, torch.device("cuda" if gpu else "cpu"))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            shard = int(row["shard"])
            written = output.commit(self.request, shard, self.shards.run(shard))
        except HpgrError as error:
            return {"failed": type(error).__name__, "result": str(error).encode()}
        return {"failed": "", "result": json.dumps(written["account"]).encode()}
