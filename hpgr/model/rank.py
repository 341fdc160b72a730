"""The largest of relevances made sortable (see `pgsa.sortable`), and where they are. Any leading shape."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpgr.model.pgsa import LOWEST

TILE_WHOLE = 1 << 17
"""Most relevances alive at once on a CPU where each is read and written often: what stays in a core's own cache.
Measured on two cores."""
TILE_GPU = 1 << 25
"""Most numbers alive at once on a GPU, where few launches count."""
FAR = 1 << 40
"""A distance no history reaches."""


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of the last axis, the least of them first. On a CPU by NumPy, in a third of `topk`'s time."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.topk(count, dim=-1).values.flip(-1)
    first = values.shape[-1] - count
    return torch.from_numpy(np.partition(values.numpy(), first, axis=-1)[..., first:])


def places(ranked: Tensor) -> Tensor:
    """Positions of relevances made sortable, -FAR of those that are not visible."""
    return (ranked & 0xFFFFFFFF).masked_fill_(ranked == LOWEST, -FAR)
