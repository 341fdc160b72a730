"""Two processes train the same model as one: real gloo, dropout on, batches that do not divide evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as mp
from helpers_model import gloo_worker, log_config, make_run, merged, worker

from hpgr.config import dump
from hpgr.model.registry import click_model
from hpgr.training import optimiser
from hpgr.training.two_stage import Run, train

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "full softmax": {},
    "asking about actions": {"data": {"columns": {"action": "device"}}},
    "sampled softmax": {"stage1": {"full_softmax_items": 0, "negatives": 32}, "model": {"sem": {"in_stage2": False}}},
    "sparse tables": {"stage1": {"full_softmax_items": 0, "negatives": 32}, "name": "sparse tables"},
}


def sparse_rows(case: str) -> int:
    """Rows from which tables have sparse gradients."""
    return 1 if case == "sparse tables" else optimiser.SPARSE_ROWS


Both = tuple[Run, dict[str, Any], Run, list[dict[str, Any]]]
"""The run of one process and its figures, that of two and each one's figures."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Every case, by one process each and by the same two processes."""
    root = tmp_path_factory.mktemp("workers")
    small = {"epochs": 2, "optimiser": {"lr": 1e-3}}
    base = {"stream": {"batch_tokens": 100}, "stage1": small, "stage2": small}
    configs = {name: log_config(root, **merged(base, over)) for name, over in CASES.items()}
    pairs = {name: [make_run(c, root / name / n) for n in ("one", "two")] for name, c in configs.items()}
    figures = {}
    for name in CASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimiser, "SPARSE_ROWS", sparse_rows(name))
            figures[name] = train(pairs[name][0], worker())
    jobs = [(dump(run.config), run.folder.uri, sparse_rows(name)) for name, (_, run) in pairs.items()]
    mp.spawn(gloo_worker, (WORLD, jobs, str(root / "meeting")), nprocs=WORLD)
    return {
        name: (one, figures[name], two, [two.folder.read_json(f"figures-{rank}.json") for rank in range(WORLD)])
        for name, (one, two) in pairs.items()
    }


@pytest.fixture(params=list(CASES))
def runs(request: pytest.FixtureRequest, trained: dict[str, Both]) -> Both:
    return trained[request.param]


def test_dropout_is_on(runs: Both) -> None:
    assert runs[0].config.model.dropout > 0
    assert runs[0].config.model.sem.dropout > 0


def test_one_case_asks_about_actions_and_the_others_about_clicks_twice(runs: Both) -> None:
    run = runs[0]
    answers = click_model(run.config, run.sizes()).answers
    assert answers is not None
    assert answers.graded == (run.config.data.columns.action == "device")


def test_some_batches_divide_unevenly(runs: Both) -> None:
    """The premise: global batches of one row (a worker has none), of odd numbers, and rows of different lengths."""
    plans = [runs[0].spec(name).plan(epoch) for name in ("masked", "click-train") for epoch in range(2)]
    sizes = {len(batch) for plan in plans for group in plan for batch in group.batches}
    assert 1 in sizes
    assert any(size > 2 and size % 2 for size in sizes)
    assert len(np.unique(runs[0].spec("masked").windows().tokens)) > 3


def test_two_workers_have_the_loss_curve_of_one(runs: Both) -> None:
    _, one, _, two = runs
    assert [p["step"] for p in one["curves"]] == [p["step"] for p in two[0]["curves"]]
    for a, b in zip(one["curves"], two[0]["curves"], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["lr"] == a["lr"]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_two_workers_have_the_figures_of_one(part: str, runs: Both) -> None:
    _, one, _, two = runs
    for stage in ("stage1", "stage2"):
        ours, theirs = one[stage][part], two[0][stage][part]
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=1e-4), (stage, name)


def test_all_workers_say_the_same(runs: Both) -> None:
    first, second = runs[3]
    for stage in ("stage1", "stage2"):
        for part in ("validation", "test", "best_file", "steps"):
            assert first[stage][part] == second[stage][part]


def test_every_test_impression_is_scored_once(runs: Both) -> None:
    one, two = (r.folder.read_parquet("stage2/test_scores.parquet") for r in (runs[0], runs[2]))
    assert two.num_rows == one.num_rows == runs[1]["stage2"]["test"]["n"]
    plain = [name for name in one.column_names if name != "score"]
    assert one.select(plain).equals(two.select(plain))
    np.testing.assert_allclose(two["score"].to_numpy(), one["score"].to_numpy(), atol=1e-4)
