"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hpgr.config import Optimiser


def make_optimiser(model: nn.Module, config: Optimiser) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices of linear layers only, not on tables, biases or gains."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def make_schedule(optimiser: torch.optim.Optimizer, config: Optimiser, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine from lr to lr * final_lr_share at `total_steps`."""

    def share(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        return config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimiser, share)
