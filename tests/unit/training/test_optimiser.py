"""Which parameters decay, and which learn at a share of the rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_model import log_config, make_run, weights, worker
from torch import Tensor, nn

from hpgr.config import Optimiser
from hpgr.model.base import ITEM_TABLE, shrunk
from hpgr.training.checkpoint import from_bytes
from hpgr.training.optimiser import make_optimiser
from hpgr.training.two_stage import Run, train


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_named_parameter_takes_a_share_of_the_step(share: float) -> None:
    """Adam's first step is the learning rate, whatever the gradient's size."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = make_optimiser(model, Optimiser(lr=0.01, weight_decay=0.0), {"0.weight": share})
    (model(torch.arange(5)) * torch.arange(1, 5)).sum().backward()
    optimiser.step()
    steps = [(a - b).abs().amax().item() for a, b in zip(model.parameters(), before, strict=True)]
    assert steps == pytest.approx([0.01 * share, 0.01, 0.01], rel=1e-3)


def test_weights_of_linear_layers_alone_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = make_optimiser(model, Optimiser(lr=0.01, weight_decay=0.5), {"0.weight": 0.5})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"1.weight"}


def table_of(run: Run, stage: str) -> Tensor:
    return from_bytes(weights(run, stage))[ITEM_TABLE]


def trained(folder: Path, share: float, pretrained: bool) -> tuple[Run, list[float]]:
    """A run of HSTU and the learning rates that it tells of."""
    stages = {"stage1": {"enabled": pretrained, "epochs": 1}, "stage2": {"epochs": 1, "item_lr_share": share}}
    run = make_run(log_config(folder, model={"name": "hstu"}, **stages), folder / "run")
    return run, [point["lr"] for point in train(run, worker(), test=False)["curves"]]


def test_inherited_item_vectors_learn_slowly_and_others_do_not(tmp_path: Path) -> None:
    moved, rates = {}, {}
    for share in (0.0, 0.1, 1.0):
        run, rates[share] = trained(tmp_path / str(share), share, pretrained=True)
        seen = torch.from_numpy(run.prepared.vocabulary().history)
        inherited = shrunk(table_of(run, "stage1"), seen, run.config.stage2.shrinkage)
        moved[share] = float((table_of(run, "stage2") - inherited).abs().mean())
    assert rates[0.0] == rates[0.1] == rates[1.0], "what is told is the stage's own rate"
    assert moved[0.0] == 0
    assert 0 < moved[0.1] < moved[1.0] / 2
    (ours, _), (theirs, _) = (trained(tmp_path / f"alone-{share}", share, pretrained=False) for share in (0.0, 1.0))
    assert torch.equal(table_of(ours, "stage2"), table_of(theirs, "stage2"))
