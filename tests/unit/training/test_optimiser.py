"""Which parameters decay, and which learn at a share of the rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_model import FailingSource, Interrupted, log_config, make_run, weights, worker
from torch import Tensor, nn

from hpgr.config import Optimiser
from hpgr.model.base import ITEM_TABLE, shrunk
from hpgr.training.checkpoint import from_bytes
from hpgr.training.optimiser import clip, make_optimiser, make_tables_sparse
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


TABLE = 12


def two_tables(seed: int = 0) -> list[nn.Embedding]:
    """The same table, with a dense and with a sparse gradient."""
    torch.manual_seed(seed)
    dense, sparse = nn.Embedding(TABLE, 4, padding_idx=0), nn.Embedding(TABLE, 4, padding_idx=0, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    return [dense, sparse]


@pytest.mark.parametrize("longest", [0.1, 1e9])
def test_sparse_gradients_move_rows_as_dense_ones_do(longest: float) -> None:
    """Where every row has a gradient in every step there is no difference, clipped or not; rows repeat in a step."""
    tables = two_tables()
    optimisers = [make_optimiser(table, Optimiser(lr=0.01, weight_decay=0.5), {"weight": 0.5}) for table in tables]
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        rows = torch.cat([torch.arange(TABLE), torch.randint(0, TABLE, (30,), generator=draw)])
        goal, norms = torch.randn(len(rows), 4, generator=draw), []
        for table, optimiser in zip(tables, optimisers, strict=True):
            (table(rows) * goal).sum().backward()
            norms.append(float(clip(table, longest)))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        torch.testing.assert_close(tables[0].weight, tables[1].weight)
    assert all((table.weight[0] == 0).all() for table in tables), "padding learns nothing"


def test_rows_without_a_gradient_stay_where_a_dense_step_would_move_them() -> None:
    _, table = two_tables()
    optimiser = make_optimiser(table, Optimiser(lr=0.01), {})
    before = table.weight.detach().clone()
    for rows in ([3, 5], [5]):
        table(torch.tensor(rows)).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    moved = (table.weight != before).any(-1).nonzero()[:, 0].tolist()
    assert moved == [3, 5]
    assert (table.weight[3] - before[3]).abs().max() < (table.weight[5] - before[5]).abs().min()


def test_tables_are_sparse_where_they_are_large_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpgr.training.optimiser.SPARSE_ROWS", 6)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Embedding(6, 2), nn.Embedding(7, 2))
    for device, sparse in (("cpu", [False, True, False]), ("cuda", [False] * 3)):
        make_tables_sparse(model, ("0.weight", "1.weight"), torch.device(device))
        assert [table.sparse for table in model] == sparse


def test_training_by_rows_ends_near_where_dense_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, the first with sampled negatives. One that is cut and resumed ends alike, to the bit."""
    found = {}
    for rows in (10**9, 1):
        monkeypatch.setattr("hpgr.training.optimiser.SPARSE_ROWS", rows)
        config = log_config(tmp_path, stage1={"epochs": 3, "full_softmax_items": 0}, stage2={"epochs": 2})
        run = make_run(config, tmp_path / f"run{rows}")
        curves = train(run, worker(), test=False)["curves"]
        found[rows] = [point["train_loss"] for point in curves]
    cut = make_run(config, tmp_path / "cut")
    with pytest.raises(Interrupted):
        train(cut, worker(FailingSource(7)), test=False)
    train(cut, worker(), test=False)
    assert all(weights(cut, stage) == weights(run, stage) for stage in ("stage1", "stage2"))
    assert found[1] != found[10**9]
    assert found[1] == pytest.approx(found[10**9], rel=0.05)


def table_of(run: Run, stage: str) -> Tensor:
    return from_bytes(weights(run, stage))[ITEM_TABLE]


def trained(folder: Path, share: float, pretrained: bool, new: float = 1.0) -> tuple[Run, list[float]]:
    """A run of HSTU and the learning rates that it tells of."""
    shares = {"item_lr_share": share, "new_item_lr_share": new}
    stages = {"stage1": {"enabled": pretrained, "epochs": 1}, "stage2": {"epochs": 1} | shares}
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


def test_item_vectors_from_nothing_learn_slowly_where_asked(tmp_path: Path) -> None:
    def table(new: float, pretrained: bool) -> Tensor:
        run, _ = trained(tmp_path / f"{new}-{pretrained}", 0.1, pretrained, new)
        return table_of(run, "stage2")

    least, slow, fast = (table(share, pretrained=False) for share in (1e-9, 0.1, 1.0))
    assert 0 < float((slow - least).abs().mean()) < float((fast - least).abs().mean()) / 2
    assert torch.equal(table(0.1, pretrained=True), table(1.0, pretrained=True))
