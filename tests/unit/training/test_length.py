"""How long a stage trains: so many epochs, or of a small log as many as its steps ask, validated no more often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_model import SIZES, FailingSource, Interrupted, context_of, log_config, make_run, tiny

from hpgr.config import Config
from hpgr.training.loop import Progress, fit
from hpgr.training.stages import ItemStage
from hpgr.training.two_stage import Run, item_stage

EPOCHS, PASSES = 3, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return log_config(tmp_path_factory.mktemp("length"), stream={"batch_tokens": 200}, checkpoints={"every_steps": 2})


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Run:
    return make_run(config, tmp_path)


def stage_of(run: Run) -> tuple[ItemStage, int]:
    """Stage 1 and its steps in an epoch."""
    torch.manual_seed(0)
    stage = item_stage(run, run.prepared.folder.read_parquet("vocabulary.parquet"))
    return stage, sum(len(group.batches) for group in stage.stream.plan(0))


def longer(run: Run) -> ItemStage:
    stage, steps = stage_of(run)
    stage.epochs = stage.patience = EPOCHS
    stage.min_steps = EPOCHS * steps * (PASSES - 1) + 1
    return stage


def validated(progress: Progress) -> list[tuple[int, int]]:
    return [(point["epoch"], point["step"]) for point in progress.curve]


def test_a_small_log_is_read_until_its_steps_are_made(run: Run) -> None:
    steps = stage_of(run)[1]
    assert steps > 1
    progress = fit(longer(run), context_of(run, "stage1"))
    assert validated(progress) == [(n * PASSES, n * PASSES * steps) for n in range(1, EPOCHS + 1)]
    low = run.config.stage1.optimiser.lr * run.config.stage1.optimiser.final_lr_share
    assert progress.curve[-1]["lr"] == pytest.approx(low), "the schedule is as long as the stage"
    assert progress.curve[-2]["lr"] > 2 * low


def test_a_log_of_many_steps_is_read_once_an_epoch(run: Run) -> None:
    stage, steps = stage_of(run)
    stage.epochs = stage.patience = EPOCHS
    stage.min_steps = EPOCHS * steps
    assert validated(fit(stage, context_of(run, "stage1"))) == [(n, n * steps) for n in range(1, EPOCHS + 1)]


def test_it_goes_on_between_two_validations(run: Run, config: Config, tmp_path: Path) -> None:
    whole = longer(run)
    straight = fit(whole, context_of(run, "stage1"))
    other = make_run(config, tmp_path / "other")
    steps = stage_of(other)[1]
    with pytest.raises(Interrupted):
        fit(longer(other), context_of(other, "stage1", FailingSource((PASSES + 2) * steps)))
    again = longer(other)
    resumed = fit(again, context_of(other, "stage1"))
    assert 0 < resumed.earlier < resumed.seconds
    assert validated(resumed) == validated(straight)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_patience_counts_validations(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, steps = longer(run), stage_of(run)[1]
    figures = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(stage, "validate", lambda *_: {"ndcg@10": next(figures)})
    stage.patience = 1
    assert fit(stage, context_of(run, "stage1")).global_step == 2 * PASSES * steps


@pytest.mark.parametrize(
    ("epochs", "train_actions", "expected"),
    [
        ("auto", ((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), (20, 2000, 20)),
        ("auto", ((0, 0, 9, 4, 0), (0, 0, 0, 0, 5)), (20, 2000, 20)),
        ("auto", ((0, 0, 9, 0, 0), (0, 0, 0, 5, 0)), (20, 0, 20)),
        (7, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), (7, 0, 7)),
    ],
    ids=["clicks alone", "ratings", "all that was shown", "a number"],
)
def test_auto_is_twenty_epochs_and_2000_steps_where_users_chose_what_they_met(
    epochs: int | str, train_actions: tuple[tuple[int, ...], ...], expected: tuple[int, int, int]
) -> None:
    sizes = replace(SIZES, train_actions=train_actions)
    stage = ItemStage(tiny(stage1={"epochs": epochs}), sizes, np.ones(9), None, None)  # type: ignore[arg-type]
    assert (stage.epochs, stage.min_steps, stage.patience) == expected
