"""AdamW with warm-up and cosine decay; large tables move in the rows of a step alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hpgr.config import Optimiser

SPARSE_ROWS = 50_000
"""Rows of a table from which its gradient is sparse, on a CPU. A step of AdamW took 38 ms of 100,000 rows of 64 and 522
of a million, on one core; of the rows of a step alone 15 and 17. A GPU's memory is fast enough, and nccl sums no sparse
gradients."""


def make_tables_sparse(model: nn.Module, names: Collection[str], device: torch.device) -> None:
    """Have those of these tables that are large give gradients of the rows that a step looked up; before the model is
    wrapped for workers, which want them to be looked up in every step."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and f"{name}.weight" in names and module.num_embeddings >= SPARSE_ROWS:
            module.sparse = device.type == "cpu"


class RowsAdamW(torch.optim.AdamW):
    """AdamW that moves a table with a sparse gradient in that gradient's rows alone, and their moments, as
    `torch.optim.SparseAdam` does. Its state is AdamW's."""

    def step(self, closure: Any = None) -> Any:
        """One step; sparse gradients are used up by it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    @torch.no_grad()
    def _step_rows(self, table: nn.Parameter, group: dict[str, Any]) -> None:
        assert not group["weight_decay"], "tables do not decay"
        assert table.grad is not None
        state, grad = self.state[table], table.grad.coalesce()
        if not state:
            state |= {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(table),
                "exp_avg_sq": torch.zeros_like(table),
            }
        state["step"] += 1
        (one, two), t = group["betas"], float(state["step"])
        rows, values = grad.indices()[0], grad.values()
        mean = state["exp_avg"][rows].lerp_(values, 1 - one)
        square = state["exp_avg_sq"][rows].mul_(two).addcmul_(values, values, value=1 - two)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        length = square.sqrt_().div_((1 - two**t) ** 0.5).add_(group["eps"])
        table[rows] -= mean.div_(length).mul_(group["lr"] / (1 - one**t))


def clip(model: nn.Module, longest: float) -> Tensor:
    """Scale the gradient to at most this norm; returns the norm it had."""
    given = [p for p in model.parameters() if p.grad is not None]
    if not any(p.grad.is_sparse for p in given if p.grad is not None):
        return nn.utils.clip_grad_norm_(given, longest)
    parts = []
    for parameter in given:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        parts.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    norm = nn.utils.get_total_norm(parts)
    for part in parts:
        part.mul_((longest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def make_optimiser(model: nn.Module, config: Optimiser, lr_shares: Mapping[str, float]) -> RowsAdamW:
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
    return RowsAdamW(settings, lr=config.lr, fused=True)


def make_schedule(optimiser: torch.optim.Optimizer, config: Optimiser, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine from lr to lr * final_lr_share at `total_steps`."""

    def share(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        return config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimiser, share)
