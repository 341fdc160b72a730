"""Two processes train the same model as one: real gloo, dropout on, batches that do not divide evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
from helpers_model import gloo_worker, log_config, make_run, merged, worker

from hpgr.config import Config, dump
from hpgr.training.two_stage import Run, train

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "full softmax": {},
    "sampled softmax": {"stage1": {"full_softmax_items": 0, "negatives": 32}, "model": {"sem": {"in_stage2": False}}},
}


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Run, list[dict[str, Any]]]:
    """The run of one process and its figures, that of two and each one's figures."""
    root = tmp_path_factory.mktemp("workers")
    config: Config = log_config(root, **merged({"stream": {"batch_tokens": 120}, "stage1": {"optimiser": {"lr": 1e-3}}, "stage2": {"optimiser": {"lr": 1e-3}}}, request.param))
    assert config.model.dropout > 0
    assert config.model.sem.dropout > 0
    alone = make_run(config, root / "one")
    figures = train(alone, worker())
    together = make_run(config, root / "two")
    mp.spawn(gloo_worker, (WORLD, dump(config), together.folder.uri, str(root / "meeting")), nprocs=WORLD)
    return alone, figures, together, [together.folder.read_json(f"figures-{rank}.json") for rank in range(WORLD)]


def test_some_batches_leave_a_worker_without_rows(runs: tuple[Run, Any, Run, Any]) -> None:
    """The premise: global batches of one row, of odd numbers of rows, and rows of different lengths."""
    for name in ("masked", "click-train"):
        spec = runs[0].spec(name)
        sizes = [len(b) for epoch in range(2) for g in spec.plan(epoch) for b in g.batches]
        assert any(size % 2 for size in sizes)
        assert any(size > 2 for size in sizes)
    windows = runs[0].spec("masked").windows()
    assert len(np.unique(windows.tokens)) > 3
    assert 1 in [len(b) for name in ("masked", "click-train") for e in range(2) for g in runs[0].spec(name).plan(e) for b in g.batches]


def test_two_workers_have_the_loss_curve_of_one(runs: tuple[Run, dict[str, Any], Run, list[dict[str, Any]]]) -> None:
    _, one, _, two = runs
    assert [p["step"] for p in one["curves"]] == [p["step"] for p in two[0]["curves"]]
    for a, b in zip(one["curves"], two[0]["curves"], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["lr"] == a["lr"]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_two_workers_have_the_figures_of_one(
    part: str, runs: tuple[Run, dict[str, Any], Run, list[dict[str, Any]]]
) -> None:
    _, one, _, two = runs
    for stage in ("stage1", "stage2"):
        ours, theirs = one[stage][part], two[0][stage][part]
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=1e-4), (stage, name)


def test_all_workers_say_the_same(runs: tuple[Run, dict[str, Any], Run, list[dict[str, Any]]]) -> None:
    first, second = runs[3]
    for stage in ("stage1", "stage2"):
        for part in ("validation", "test", "best_file", "steps"):
            assert first[stage][part] == second[stage][part]


def test_every_test_impression_is_scored_once(runs: tuple[Run, dict[str, Any], Run, Any]) -> None:
    one, two = (r.folder.read_parquet("stage2/test_scores.parquet") for r in (runs[0], runs[2]))
    assert two.num_rows == one.num_rows == runs[1]["stage2"]["test"]["n"]
    plain = [name for name in one.column_names if name != "score"]
    assert one.select(plain).equals(two.select(plain))
    np.testing.assert_allclose(two["score"].to_numpy(), one["score"].to_numpy(), atol=1e-4)
