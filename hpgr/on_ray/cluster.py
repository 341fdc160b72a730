"""The cluster as it is and may become, told to hpgr.sizing; and waiting for a share of it that is not free yet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

import ray
import ray._private.state
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group, remove_placement_group

from hpgr.config import Config
from hpgr.errors import HpgrError
from hpgr.sizing import ENOUGH, Ask, Cluster, Node, refuse_impossible, settled

SAY_EVERY_SECONDS = 30.0
HEAD = "node:__internal_head__"
"""A resource that Ray gives its head alone."""


def here() -> Cluster:
    """The cluster that this process is connected to."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(_node(resources) for resources in alive)
    return Cluster(nodes, _most(alive) if autoscales(nodes) else None)


def _node(resources: Mapping[str, float], count: int = 1) -> Node:
    return Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), count)


def _most(alive: list[dict[str, float]]) -> tuple[Node, ...]:
    """Nodes that there may be: kinds the autoscaler may start, the head, and nodes up that are of no such kind."""
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    kinds = [_node(group.resources, group.max_count if group.max_count >= 0 else ENOUGH) for group in groups]
    kinds = [kind for kind in kinds if kind.count]
    shapes = {(kind.cpus, kind.gpus) for kind in kinds}
    others = [r for r in alive if HEAD in r or (r.get("CPU", 0.0), r.get("GPU", 0.0)) not in shapes]
    return (*kinds, *map(_node, others)) if kinds else ()


def autoscales(nodes: tuple[Node, ...]) -> bool:
    """Whether an autoscaler may add nodes. Ray's monitor names kinds of nodes; those it only watches are node_<id>."""
    status = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}")
    kinds = status.get("autoscaler_report", {}).get("node_type_mapping") or {}
    named = any(not kind.startswith("node_") for kind in kinds.values())
    return named or not any(n.cpus for n in nodes) or os.environ.get("RAY_ENABLE_AUTOSCALER") == "1"


def settle(config: Config, cluster: Cluster, say: Callable[[str], None], of: str = "") -> Config:
    """The configuration with `auto` workers and GPUs decided, and told: of a job, or `of` each trial or cell of one."""
    resources = settled(config.resources, cluster, alone=not of)
    if resources != config.resources:
        each = f" of each {of}" if of else ""
        say(f"resources: auto is {resources.count} worker(s){each}, {'a GPU each' if resources.on_gpu else 'no GPU'}")
    return config.model_copy(update={"resources": resources})


def wait_for(ask: Ask, minutes: float, say: Callable[[str], None]) -> None:
    """Wait until an ask is free, so that an autoscaler starts nodes for it; tells what is waited for.

    Raises:
        ConfigError: the cluster can never give it.
        HpgrError: it was not free in time.
    """
    refuse_impossible(here(), ask)
    each = {name: amount for name, amount in (("CPU", ask.cpus), ("GPU", ask.gpus)) if amount}
    beside = [{"CPU": ask.beside}] if ask.beside else []
    group = placement_group([each] * ask.count + beside)
    start = time.monotonic()
    try:
        while True:
            left = start + 60 * minutes - time.monotonic()
            if group.wait(max(0.1, min(SAY_EVERY_SECONDS, left))):
                return
            waited = time.monotonic() - start
            free = ray.available_resources()
            state = f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU of {len(ray.nodes())} node(s) are free"
            if waited >= 60 * minutes:
                raise HpgrError(
                    f"resources: {ask} not free after {waited / 60:.1f} minutes ({state}); {ask.remedy}, "
                    "raise resources.wait_minutes, or ask `ray status` who holds the cluster"
                )
            say(f"resources: waiting for {ask}, {waited:.0f} s; {state}")
    finally:
        remove_placement_group(group)
