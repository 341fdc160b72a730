"""A stage 2 trained over kept pairs is the one the reference trains: loss curve and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_model import CPU, inputs, log_config, make_run, worker

from hpgr.data.stream import LocalSource
from hpgr.evaluation import scoring_cost
from hpgr.model.registry import click_model
from hpgr.training.two_stage import Run, train

SETTINGS: dict[str, Any] = {"top_k": 3, "sigma": 1.0, "max_keys": 5, "anchors": "live"}
IMPLS = ("reference", "gather", "auto")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, dict[str, Any]]]:
    """A run and its figures by implementation; no stage 1, dropout on."""
    root: Path = tmp_path_factory.mktemp("gather")
    out = {}
    for impl in IMPLS:
        config = log_config(root, model={"pgsa": SETTINGS | {"impl": impl}}, stage1={"enabled": False})
        run = make_run(config, root / impl)
        out[impl] = run, train(run, worker())
    return out


@pytest.mark.parametrize("impl", ["gather", "auto"])
def test_the_loss_curve_is_the_references(impl: str, trained: dict[str, tuple[Run, dict[str, Any]]]) -> None:
    ours, theirs = trained[impl][1]["curves"], trained["reference"][1]["curves"]
    assert [p["step"] for p in ours] == [p["step"] for p in theirs]
    assert len(ours) >= 2
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.parametrize("impl", ["gather", "auto"])
def test_test_scores_are_the_references(impl: str, trained: dict[str, tuple[Run, dict[str, Any]]]) -> None:
    ours, theirs = (trained[i][0].folder.read_parquet("stage2/test_scores.parquet") for i in (impl, "reference"))
    assert ours.drop_columns(["score"]).equals(theirs.drop_columns(["score"]))
    np.testing.assert_allclose(ours["score"].to_numpy(), theirs["score"].to_numpy(), atol=1e-4)


def test_a_candidate_attends_to_no_more_than_the_cap(trained: dict[str, tuple[Run, dict[str, Any]]]) -> None:
    run = trained["gather"][0]
    steps = list(LocalSource().evaluation(run.spec("click-test")))
    model = click_model(run.config, run.sizes()).eval()
    candidates, keys, _ = scoring_cost(model, steps, CPU)
    expected = 0
    for step in steps:
        x = inputs(step.batch)
        kept = (model.candidate_weights(x, model.encode(x)) > 0).sum(-1)
        assert int(kept.max()) <= SETTINGS["max_keys"]
        expected += int(kept[x.c_real].sum())
    assert candidates > 20
    assert 0 < keys == expected <= SETTINGS["max_keys"] * candidates
