"""What Ray runs equals what runs in this process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpgr.artifacts import Folder
from hpgr.config import Config, load_config
from hpgr.data.preparation import Prepared, in_process, prepare
from hpgr.data.stream import LocalSource, Step, build_index
from hpgr.errors import DataError
from hpgr.training.two_stage import INDEXES, Run

SETTINGS = [
    "data.synthetic.users=240", "data.synthetic.items=60", "data.synthetic.categories=6", "stream.window=40",
    "stream.stride=20", "stream.batch_tokens=1024", "model.width=16", "stage1.epochs=2", "stage2.epochs=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Config:
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("ray")
    return load_config(root / "jobs/configs/synthetic.yaml", [*SETTINGS, f"data.prepared={folder}"])


@pytest.fixture(scope="module")
def prepared(configured: Config) -> Prepared:
    return prepare(configured, in_process, print)


def _run(config: Config, prepared: Prepared, folder: Path) -> Run:
    for name in INDEXES:
        build_index(prepared, config, Folder(str(folder / "index")), name, in_process)
    return Run(config, Folder(str(folder)), prepared)


def test_preparation_on_ray_writes_the_same_timelines(
    local_ray: None, configured: Config, prepared: Prepared, tmp_path: Path
) -> None:
    from hpgr.on_ray.parallel import RayExecute

    data = configured.data.model_copy(update={"prepared": str(tmp_path), "path": _log(prepared)})
    on_ray = prepare(configured.model_copy(update={"data": data}), RayExecute(print), print)
    assert on_ray.buckets == prepared.buckets
    for bucket in range(prepared.buckets):
        assert on_ray.timelines(bucket).equals(prepared.timelines(bucket))


def _log(prepared: Prepared) -> str:
    return str(Path(prepared.manifest["inputs"][0]["uri"]).parent)


def test_a_user_error_in_a_task_arrives_as_itself(local_ray: None) -> None:
    from hpgr.on_ray.parallel import RayExecute

    def fails(item: int) -> int:
        raise DataError(f"row {item} is odd")

    with pytest.raises(DataError, match="row 3 is odd"):
        list(RayExecute(print)("scan", fails, [3]))


def test_results_come_in_the_order_of_the_items(local_ray: None) -> None:
    from hpgr.on_ray.parallel import RayExecute

    assert list(RayExecute(print)("square", lambda i: i * i, range(7))) == [i * i for i in range(7)]


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_on_ray_are_the_local_ones(
    local_ray: None, configured: Config, prepared: Prepared, tmp_path: Path, rank: int, world: int
) -> None:
    from hpgr.on_ray.stream import RaySource

    run = _run(configured, prepared, tmp_path)
    for name in ("masked", "click-train"):
        spec = run.spec(name)
        expected = list(LocalSource(rank, world).steps(spec, range(1, 3), 2))
        found = list(RaySource(rank, world, 0.25, 2).steps(spec, range(1, 3), 2))
        assert len(expected) > 3
        assert [_plain(s) for s in found] == [_plain(s) for s in expected]


def _plain(step: Step) -> tuple[Any, ...]:
    batch = step.batch
    return (step.epoch, step.step, step.steps, step.real, batch.row_key.tolist(), batch.h_item.tolist(),
            batch.h_masked.tolist(), batch.t_label.tolist(), batch.h_session.tolist())  # fmt: skip


@pytest.mark.slow
def test_one_worker_two_workers_and_none_have_one_loss_curve(
    local_ray: None, configured: Config, prepared: Prepared, tmp_path: Path
) -> None:
    from hpgr.on_ray.train import run_training

    curves, aucs = [], []
    for workers in (0, 1, 2):
        resources = configured.resources.model_copy(update={"workers": workers})
        config = configured.model_copy(update={"resources": resources})
        figures = run_training(_run(config, prepared, tmp_path / str(workers)), print)
        curves.append([point["train_loss"] for point in figures["curves"]])
        aucs.append(figures["stage2"]["test"]["auc"])
    assert len(curves[0]) == 4
    for curve, auc in zip(curves[1:], aucs[1:], strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(curve, curves[0], strict=True))
        assert math.isclose(auc, aucs[0], abs_tol=2e-3)


def test_chunks_hold_every_step_once_in_order_and_grow() -> None:
    from hpgr.data.stream import Item
    from hpgr.on_ray.stream import chunked

    items = [Item(0, 0, 3, 40), Item(0, 1, 0, 5), Item(1, 0, 0, 300)]
    chunks = list(chunked(items, 8, 64, 2))
    steps = [(p.epoch, p.group, s) for chunk in chunks for p in chunk for s in range(p.first, p.stop)]
    assert steps == [(i.epoch, i.group, s) for i in items for s in range(i.first, i.stop)]
    sizes = [sum(p.stop - p.first for p in chunk) for chunk in chunks]
    assert sizes[:4] == [8, 32, 64, 64]
    assert all(size == 64 for size in sizes[2:-1])
    assert all(len(chunk) >= 2 for chunk in chunks[:-1])
