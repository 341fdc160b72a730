"""AdamW with warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hpgr.config import Optimiser


def make_optimiser(model: nn.Module, config: Optimiser, lr_shares: Mapping[str, float]) -> torch.optim.AdamW:
    """AdamW; weight decay acts on matrices of linear layers only, not on tables, biases or gains.

    `lr_shares` names parameters that learn at a share of the rate (Howard & Ruder 2018, discriminative fine-tuning).
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = config.weight_decay if id(parameter) in linear else 0.0
        groups.setdefault((decay, lr_shares.get(name, 1.0)), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "lr": config.lr * share}
        for (decay, share), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, fused=True)


def make_schedule(optimiser: torch.optim.Optimizer, config: Optimiser, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine from lr to lr * final_lr_share at `total_steps`."""

    def share(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        return config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimiser, share)
