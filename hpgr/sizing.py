"""What a cluster can give, and what a run asks of it: arithmetic alone, so that every shape can be tried on paper.

`auto` in the configuration's `resources` is settled here: workers one a GPU (without GPUs one a node; of a trial or a
cell one), gpu where there are any, cpus_per_worker an equal share that leaves the data tasks room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpgr.config import Resources
from hpgr.errors import ConfigError

ENOUGH = 1024
"""Nodes of a kind whose number the autoscaler does not bound."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node, and how many like it there are or may be."""

    cpus: float
    gpus: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Cluster:
    """Nodes that are up, and all that there may be once an autoscaler has started what it may.

    `most` is None where there is no autoscaler, and empty where there is one that does not say what it may start.
    """

    nodes: tuple[Node, ...]
    most: tuple[Node, ...] | None = None

    @property
    def reach(self) -> tuple[Node, ...]:
        """The nodes to plan with."""
        return self.most or self.nodes

    @property
    def is_silent(self) -> bool:
        """Whether an autoscaler may start nodes that nobody knows of."""
        return self.most == ()


@dataclass(frozen=True)
class Ask:
    """`count` processes of `cpus` and `gpus` each, and `beside` CPUs on any node for what feeds them or waits for them.

    `what` names a process in messages, `remedy` what to change to get by with less.
    """

    what: str
    remedy: str
    count: int
    cpus: float
    gpus: float = 0.0
    beside: float = 0.0

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        more = f", and {self.beside:g} CPU beside them" if self.beside else ""
        return f"{self.count} {self.what}(s) of {each}{more}"


def fitting(node: Node, ask: Ask) -> int:
    """How many processes of an ask one such node takes."""
    by_cpu = int(node.cpus / ask.cpus + 1e-9) if ask.cpus else ENOUGH
    return min(by_cpu, int(node.gpus / ask.gpus + 1e-9)) if ask.gpus else by_cpu


def room(nodes: tuple[Node, ...], ask: Ask) -> int:
    """How many processes of an ask all nodes take together."""
    return sum(node.count * fitting(node, ask) for node in nodes)


def fits(nodes: tuple[Node, ...], ask: Ask) -> bool:
    """Whether nodes take the whole ask; the processes may be dealt so that the tasks beside them find a place."""
    if room(nodes, ask) < ask.count:
        return False
    spare = [n for n in nodes if n.cpus - fitting(n, ask) * ask.cpus >= ask.beside - 1e-9]
    if spare or not ask.beside:
        return True
    # Every node is full to the brim: one must give up as many processes as make room for the tasks.
    fewest = min((_given_up(n, ask) for n in nodes if n.cpus >= ask.beside), default=ENOUGH)
    return room(nodes, ask) - fewest >= ask.count


def _given_up(node: Node, ask: Ask) -> int:
    full = fitting(node, ask)
    return full - int(min(full, (node.cpus - ask.beside) / ask.cpus + 1e-9))


def refuse_impossible(cluster: Cluster, ask: Ask) -> None:
    """Refuse what the cluster can never give.

    Raises:
        ConfigError: what the largest node has, what was asked for, and the keys to lower.
    """
    if cluster.is_silent or fits(cluster.reach, ask):
        return
    there = [n for n in cluster.reach if n.cpus or n.gpus]
    largest = max(there, key=lambda n: (n.gpus if ask.gpus else 0.0, n.cpus), default=Node(0.0))
    may = "may grow to" if cluster.most else "has"
    raise ConfigError(
        f"resources: {ask} can never be had: the cluster {may} {sum(n.count for n in there)} node(s), the largest with "
        f"{largest.cpus:g} CPU and {largest.gpus:g} GPU, {sum(n.cpus * n.count for n in there):g} CPU and "
        f"{sum(n.gpus * n.count for n in there):g} GPU in all; {ask.remedy}, or use a larger cluster"
    )


def settled(resources: Resources, cluster: Cluster, alone: bool = True) -> Resources:
    """Resources with `workers` and `gpu` decided for a cluster, or, not `alone`, for one of many trials or cells on
    it: side by side with a worker each they use it best."""
    gpu, workers = resources.gpu, resources.workers
    there = any(n.gpus >= 1 for n in cluster.reach)
    gpu = (there and workers != 0) if gpu == "auto" else gpu
    if workers == "auto" and not alone:
        workers = 1
    elif workers == "auto":
        # Of nodes that an autoscaler may or may not start only a GPU is a reason to take as many as there are.
        nodes = [n for n in (cluster.reach if gpu else cluster.nodes) if (n.gpus >= 1 if gpu else n.cpus >= 1)]
        workers = max(1, sum(n.count * (int(n.gpus) if gpu else 1) for n in nodes))
    return resources.model_copy(update={"workers": workers, "gpu": gpu})


def training_ask(resources: Resources, cluster: Cluster) -> Ask:
    """What the trainers of settled resources ask for, with their data tasks."""
    cpus = cpus_per_worker(resources, cluster)
    without = ", or set resources.gpu to false" if resources.on_gpu else ""
    remedy = f"lower resources.workers or resources.cpus_per_worker{without}"
    return Ask("worker", remedy, resources.count, cpus, float(resources.on_gpu), resources.data_cpus)


def cpus_per_worker(resources: Resources, cluster: Cluster) -> float:
    """CPUs a worker reserves: as configured, else an equal share, as large as the nodes take, with room left for
    its data tasks."""
    if isinstance(resources.cpus_per_worker, float):
        return resources.cpus_per_worker
    total = sum(n.cpus * n.count for n in cluster.reach if not resources.on_gpu or n.gpus >= 1)
    if total < 1:  # an autoscaling cluster that has started nothing yet
        return 1.0
    share = total / resources.count - resources.data_workers * resources.data_cpus
    if share < 1:
        return max(0.25, round(share, 2))
    ask = Ask("", "", resources.count, float(int(share)), float(resources.on_gpu), resources.data_cpus)
    while ask.cpus > 1 and not fits(cluster.reach, ask):
        ask = replace(ask, cpus=ask.cpus - 1)
    return ask.cpus


def scoring_pool(resources: Resources, cluster: Cluster, shards: int) -> tuple[int, int]:
    """Least and most workers of a scoring pool: as configured, at most one a shard; `auto` is as many as the cluster
    takes (at least the least); an autoscaler that does not say what it may start is asked for all."""
    pool = resources.scoring
    if pool.max == "auto" and cluster.is_silent:
        most = shards
    elif pool.max == "auto":
        most = max(pool.min, room(cluster.reach, Ask("", "", 1, 1.0, float(resources.on_gpu))))
    else:
        most = pool.max
    most = max(1, min(shards, most))
    return min(pool.min, most), most
