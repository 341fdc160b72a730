"""The few collective operations training needs; each is trivial with one worker."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # as torch calls it from 2.13 on, and before
    if name in inspect.signature(DistributedDataParallel).parameters
)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_workers(values: Tensor) -> Tensor:
    """Elementwise sum over workers, on all of them."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Every worker's value, in rank order, on all of them."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    dist.all_gather_object(out, value)
    return out


def from_first(value: T) -> T:
    """The first worker's value, on all of them."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with gradients averaged over workers. Some parameters have no part in stage 1 (features that only
    candidates show), so unused ones must be looked for; buffers are made alike by all and never change."""
    if world() == 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    as_they_are: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True, **as_they_are)
