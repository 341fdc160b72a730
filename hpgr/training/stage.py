"""What the loop asks of a stage."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from hpgr.config import Optimiser
from hpgr.data.stream import Source, StreamSpec


class Stage(Protocol):
    """A stage knows its model, its loss and how it is validated; never how it is stepped or saved."""

    name: str
    metric: str
    """Validation figure that chooses the best checkpoint; larger is better."""
    shown: tuple[str, ...]
    """Validation figures of a progress line."""
    epochs: int
    """Most epochs, with a validation after each."""
    min_steps: int
    """Steps of all of them: where they make fewer, there are so many times more epochs, and no more validations."""
    patience: int
    validate_every: int
    optimiser: Optimiser
    lr_shares: dict[str, float]
    """Parameters that learn at a share of the optimiser's rate."""
    stream: StreamSpec
    by_rows: tuple[str, ...]
    """Tables that its losses read in every step and by rows alone: large ones may have sparse gradients."""

    @property
    def model(self) -> nn.Module:
        """The module that is trained; its forward returns `hpgr.model.base.Output`."""

    def extras(self, step: int, device: torch.device) -> dict[str, Any]:
        """Further arguments of the model's forward at a step, alike on all workers."""

    def validate(self, source: Source, device: torch.device) -> dict[str, float | int | None]:
        """Validation figures over all workers; the same on each."""
