"""What predicted actions tell of clicks is taken or left by each validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import log_config, make_run, merged

from hpgr.data.stream import LocalSource
from hpgr.training.stages import ClickStage


def click_stage(folder: Path, over: dict[str, Any]) -> ClickStage:
    """On a log whose clicks are of several actions."""
    torch.manual_seed(0)
    run = make_run(log_config(folder, **merged({"data": {"columns": {"action": "device"}}}, over)), folder / "run")
    return ClickStage(run.config, run.sizes(), run.spec("click-train"), run.spec("click-validation"))


@pytest.mark.parametrize(
    ("without", "with_them", "taken"),
    [(0.6, 0.61, 0.75), (0.6, 0.59, 0.0), (0.6, 0.6, 0.0), (None, None, 0.0)],
    ids=["better", "worse", "no better", "not measured"],
)
def test_each_validation_takes_or_leaves_what_actions_tell(
    without: float | None, with_them: float | None, taken: float, tmp_path: Path
) -> None:
    """And best weights hold what was taken, so that tests and scoring do as validation did."""
    stage = click_stage(tmp_path, {"data": {"history": None}, "stage2": {"action_share": 0.75}})
    figures = {0.0: without, 0.75: with_them}
    stage._figures = lambda *_: {"auc": figures[stage.model.answers.share.item()]}  # type: ignore[method-assign]
    found = stage.validate(LocalSource(), torch.device("cpu"))
    assert found == {"auc": figures[taken], "action_share": taken}
    assert stage.model.state_dict()["answers.share"] == taken


@pytest.mark.parametrize("over", [{}, {"data": {"columns": {"action": None}}}], ids=["one action a label", "none"])
def test_a_second_answer_about_the_label_is_taken_where_histories_hold_clicks_alone(
    over: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    run = make_run(log_config(tmp_path, **over), tmp_path / "run")
    assert not run.sizes().graded
    assert not run.sizes().misses_known
    stage = ClickStage(run.config, run.sizes(), run.spec("click-train"), run.spec("click-validation"))
    figures = {0.0: 0.6, 0.5: 0.7}
    stage._figures = lambda *_: {"auc": figures[stage.model.answers.share.item()]}  # type: ignore[method-assign]
    assert stage.validate(LocalSource(), torch.device("cpu")) == {"auc": 0.7, "action_share": 0.5}


@pytest.mark.parametrize("over", [{}, {"data": {"history": None}, "stage2": {"action_share": 0.0}}])
def test_actions_are_left_where_they_cannot_tell_or_may_not(over: dict[str, Any], tmp_path: Path) -> None:
    """Here there are ratings, but histories hold clicks alone, or the share is none."""
    stage = click_stage(tmp_path, over)
    found = stage.validate(LocalSource(), torch.device("cpu"))
    assert found["auc"] == pytest.approx(0.5, abs=0.3)
    assert stage.model.state_dict()["answers.share"] == 0.0
    assert ("action_share" in found) == bool(over)
