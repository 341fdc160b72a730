"""Mass on events that do not matter, and overlap of anchors with dense attention, against the log's own truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import CPU
from helpers_scoring import finished_run

from hpgr.data.stream import LocalSource
from hpgr.data.synthetic import relevance
from hpgr.model.inputs import pad
from hpgr.schema import SECOND
from hpgr.scoring.attention import EDGES, Truth, anchor_overlap, irrelevant_mass, shares

VIEWS = {"history": [[{"column": "event", "value": "view"}]]}
SPARSE = {"pgsa": {"top_k": 2, "sigma": 0.0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A sparse and a dense run with shaken weights on one log of engagements."""
    root: Path = tmp_path_factory.mktemp("attention")
    sparse = finished_run(root / "sparse", data=VIEWS, model=SPARSE)
    return sparse, finished_run(root / "dense", data=VIEWS, model={"pgsa": {"enabled": False}})


def steps(run: Any) -> list[Any]:
    return list(LocalSource().evaluation(run.run.spec("click-validation")))


def test_what_matters_is_what_the_log_planted(runs: tuple[Any, Any]) -> None:
    """Every pair that `relevance` gives a weight, and no other, of those in the window."""
    run = runs[0]
    truth = Truth.of(run.config.data.synthetic, run.run.prepared)
    index = run.run.prepared.vocabulary()
    names = dict(enumerate(index.items["value"].to_pylist(), index.first_item))
    seen = 0
    for step in steps(run):
        x, batch = pad(step.batch, CPU), step.batch
        matters, known = truth.matters(x, batch)
        pairs = relevance(run.config.data.synthetic, sorted(set(batch.user.to_pylist())))
        keys = (pairs[name].to_pylist() for name in ("user_id", "item_id", "timestamp", "past_timestamp"))
        weighed = set(zip(*keys, (pairs["weight"].to_numpy() > 0).tolist(), strict=True))
        for row, user in enumerate(batch.user.to_pylist()):
            for m in np.flatnonzero(x.c_real[row].numpy() & known[row].numpy()):
                item, time = names[int(x.c_item[row, m])], int(x.c_time[row, m]) // SECOND
                for n in range(int(x.c_visible[row, m])):
                    key = (user, item, time, int(x.h_time[row, n]) // SECOND, bool(matters[row, m, n]))
                    assert key in weighed
                    seen += 1
                assert not matters[row, m, int(x.c_visible[row, m]) :].any()
    assert seen > 300


def test_shares_sum_to_one_over_what_is_visible(runs: tuple[Any, Any]) -> None:
    for run in runs:
        model = run.click_model(CPU)
        for step in steps(run):
            x = pad(step.batch, CPU)
            found = shares(model, x)
            some = x.c_real & (x.c_visible > 0)
            assert found.sum(-1)[some].numpy() == pytest.approx(1.0, abs=1e-5)
            hidden = torch.arange(found.shape[-1]) >= x.c_visible[..., None]
            assert (found[hidden] == 0).all()


def test_shares_are_of_all_events_by_whatever_form_the_model_attends(runs: tuple[Any, Any]) -> None:
    model = runs[0].click_model(CPU)
    for step in steps(runs[0]):
        x, found = pad(step.batch, CPU), []
        for impl in ("reference", "gather"):
            model.attend_by(impl)
            found.append(shares(model, x))
        assert found[1].shape == (*x.c_visible.shape, x.h_item.shape[1])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_mass_is_that_of_a_loop_and_dense_differs_from_sparse(runs: tuple[Any, Any]) -> None:
    models = {"sparse": runs[0].click_model(CPU), "dense": runs[1].click_model(CPU)}
    truth = Truth.of(runs[0].config.data.synthetic, runs[0].run.prepared)
    sums = irrelevant_mass(models, steps(runs[0]), truth, CPU)
    expected: dict[str, list[float]] = {name: [0.0] * len(EDGES) for name in ("n", "sparse", "dense", "uniform")}
    for step in steps(runs[0]):
        x = pad(step.batch, CPU)
        matters, known = truth.matters(x, step.batch)
        found = {name: shares(model, x) for name, model in models.items()}
        for b, m in zip(*np.nonzero(x.c_real.numpy() & known.numpy()), strict=True):
            visible = int(x.c_visible[b, m])
            relevant = matters[b, m, :visible]
            if not relevant.any():
                continue
            place = max(i for i, edge in enumerate(EDGES) if edge <= visible)
            expected["n"][place] += 1
            expected["uniform"][place] += 1 - float(relevant.float().mean())
            for name in models:
                expected[name][place] += 1 - float(found[name][b, m, :visible][relevant].sum())
    for name, values in expected.items():
        assert sums[name] == pytest.approx(values, abs=1e-4)
    assert sum(sums["n"]) > 20
    assert sum(sums["sparse"]) != pytest.approx(sum(sums["dense"]), rel=1e-3)


def test_overlap_of_a_model_whose_attention_is_its_anchors_is_whole(runs: tuple[Any, Any]) -> None:
    """A sparse model with sigma 0 attends to its anchors alone: they are its most attended, and hold all its mass."""
    sparse, dense = (run.click_model(CPU) for run in runs)
    own = anchor_overlap(sparse, sparse, steps(runs[0]), CPU)
    assert sum(own["n"]) > 20
    assert own["mass"] == pytest.approx(own["n"], abs=1e-4)
    assert own["overlap"] == pytest.approx(own["n"])
    other = anchor_overlap(sparse, dense, steps(runs[0]), CPU)
    assert other["n"] == own["n"]
    assert 0 < sum(other["overlap"]) < sum(own["overlap"])
    assert 0 < sum(other["mass"]) < sum(own["mass"])
    assert other["n"][:2] == [0.0, 0.0]  # with at most K events there is no choice
