"""Which kind of node the autoscaler starts next: spot machines first, and their on-demand twins where there are none.

A cluster file names `score` in RAY_AUTOSCALER_UTILIZATION_SCORER, Ray's place for it. Ray 2.60 writes down which kinds
a cloud has just refused, but neither its own scorer nor autoscaler v2 (which counts nodes that are late, not refused
ones) looks at that, so they would ask for the same spot machines for ever.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

SPOT = "_spot"
"""How the names of spot node types end."""


def score(
    resources: dict[str, float],
    demands: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """Ray's own score of a node type for demands, larger is better, None if none fits; after the waste of GPUs comes
    whether the cloud has refused the type (Ray forgets that after half an hour), at the end whether it is spot."""
    usual = _default_utilization_scorer(
        resources, demands, node_type, node_availability_summary=node_availability_summary
    )
    if usual is None:
        return None
    wastes_no_gpu, *fit = usual
    known = node_availability_summary.node_availabilities.get(node_type)
    return wastes_no_gpu, known is None or known.is_available, *fit, node_type.endswith(SPOT)
