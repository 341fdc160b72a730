"""The loop: stops on a loss or gradient that is not finite, stops early, resumes bit by bit, repeats itself."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import (
    CountingSource,
    FailingSource,
    Interrupted,
    context_of,
    log_config,
    make_run,
    merged,
    timeless,
    weights,
    worker,
)
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hpgr.artifacts import Folder
from hpgr.config import Checkpoints, Config, dump, validate
from hpgr.data.click_tables import PRIOR
from hpgr.errors import ArtifactError, DataError, TrainingError
from hpgr.model.inputs import pad
from hpgr.schema import NO_ACTION, TEST, TRAIN, Timelines
from hpgr.training.loop import Context, fit
from hpgr.training.stages import ClickStage
from hpgr.training.two_stage import Run, train

STAGES = ("stage1", "stage2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    stage2 = {"item_lr_share": 0.5}  # so few steps move little else
    stream, data = {"batch_tokens": 200}, {"columns": {"action": "device"}}  # several, so stage 2 asks about them
    return log_config(root, checkpoints={"every_steps": 2}, stream=stream, stage2=stage2, data=data)


def test_stage_2_asks_about_actions_here(run: Run) -> None:
    """The premise: what holds below holds with the question."""
    assert click_stage(run).model.answers is not None


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Run:
    return make_run(config, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(config: Config, root: Path) -> tuple[Run, dict[str, Any], list[tuple[str, int, int]]]:
    """An uninterrupted run, its figures and the batches it saw."""
    run, source = make_run(config, root / "straight"), CountingSource()
    return run, train(run, worker(source)), source.given


def click_stage(run: Run) -> ClickStage:
    torch.manual_seed(run.config.seed)
    return ClickStage(run.config, run.sizes(), run.spec("click-train"), run.spec("click-validation"))


def copied(stage: ClickStage) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in stage.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def poisoned(stage: ClickStage, at: int, how: str) -> None:
    """From the stage's `at`-th training step on (the rehearsal is none), the loss or only its gradient is spoilt."""
    forward, calls = stage.model.forward, [-1]

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if not stage.model.training:
            return output
        calls[0] += 1
        if calls[0] <= at:
            return output
        if how == "gradient":  # sqrt has an infinite slope at zero, and a finite value
            return output._replace(loss=output.loss + (output.scores.sum() * 0).sqrt())
        return output._replace(loss=output.loss * float(how))

    stage.model.forward = spoilt  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_optimiser(run: Run, how: str) -> None:
    stage = click_stage(run)
    poisoned(stage, 3, how)
    seen: list[dict[str, Tensor]] = []

    class Recorder(CountingSource):
        def steps(self, *args: Any) -> Any:
            for step in super().steps(*args):
                seen.append(copied(stage))
                yield step

    with pytest.raises(TrainingError) as error:
        fit(stage, context_of(run, "stage2", Recorder()))
    assert len(seen) == 4
    assert not same(seen[2], seen[3])
    assert same(copied(stage), seen[3])
    assert all(v.isfinite().all() for v in copied(stage).values())
    assert re.search(r"stage2: .*(nan|inf).* epoch 1, step 4", str(error.value))
    assert "optimiser.lr" in str(error.value)
    assert run.folder.sub("stage2").entries("checkpoints") == ["step-00000002"]


class Scripted(ClickStage):
    """Validation figures from a list."""

    def __init__(self, run: Run, values: list[float | None]) -> None:
        super().__init__(run.config, run.sizes(), run.spec("click-train"), run.spec("click-validation"))
        self.values, self.seen = values, list[dict[str, Tensor]]()

    def validate(self, source: Any, device: torch.device) -> dict[str, float | int | None]:
        self.seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return {"auc": self.values[len(self.seen) - 1]}


def scripted(run: Run, values: list[float | None], patience: int, epochs: int = 6) -> tuple[Scripted, Any, list[str]]:
    stage, lines = Scripted(run, values), list[str]()
    stage.patience, stage.epochs = patience, epochs
    return stage, fit(stage, context_of(run, "stage2", say=lines.append)), lines


def test_early_stopping_keeps_the_best_weights(run: Run) -> None:
    stage, progress, lines = scripted(run, [0.5, 0.7, 0.6, 0.7, 0.9], patience=2)
    assert len(stage.seen) == 4, "the third and fourth are no better (an equal figure is not)"
    assert same(copied(stage), stage.seen[1])
    assert progress.best == 0.7
    assert progress.best_figures == {"auc": 0.7}
    assert any("no better auc for 2 validations" in line for line in lines)
    assert [p["validation"]["auc"] for p in progress.curve] == [0.5, 0.7, 0.6, 0.7]
    bests = [n for n in run.folder.sub("stage2").entries() if n.startswith("best-")]
    assert progress.best_file in bests
    assert len(bests) <= 2


def test_an_early_stop_stays_stopped_after_a_restart(run: Run) -> None:
    first, progress, _ = scripted(run, [0.7, 0.6, 0.5], patience=2)
    again = Scripted(run, [])
    again.patience, again.epochs = 2, 6
    assert fit(again, context_of(run, "stage2")).global_step == progress.global_step
    assert again.seen == []
    assert same(copied(again), first.seen[0])


def test_improvement_resets_the_patience(run: Run) -> None:
    stage, _, _ = scripted(run, [0.5, 0.4, 0.6, 0.5, 0.7, 0.6], patience=2)
    assert len(stage.seen) == 6


@pytest.mark.parametrize("values", [[None] * 6, [0.0] * 6])
def test_what_cannot_be_measured_trains_on_and_leaves_the_newest_weights(run: Run, values: list[float | None]) -> None:
    stage, progress, lines = scripted(run, values, patience=2)
    assert progress.best == values[0]
    assert len(stage.seen) == 6
    assert same(copied(stage), stage.seen[-1])
    assert any("has nothing to measure" in line for line in lines) == (values[0] is None)


def test_the_first_figure_ends_that(run: Run) -> None:
    stage, progress, _ = scripted(run, [None, 0.0, None, 0.6, 0.5, None], patience=2)
    assert progress.best == 0.6
    assert same(copied(stage), stage.seen[3])


def test_a_stage_without_a_batch_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Scripted(run, [])
    monkeypatch.setattr(type(stage.stream), "plan", lambda _, epoch: [])
    with pytest.raises(DataError, match=r"stage2: nothing to train on"):
        fit(stage, context_of(run, "stage2"))


def test_a_validation_that_nobody_heard_of_is_told_again(run: Run) -> None:
    """The process dies once its checkpoint is sealed and before the report has arrived."""
    heard: list[dict[str, Any]] = []

    def dies(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    first = Scripted(run, [0.5])
    first.epochs = 2
    with pytest.raises(KeyboardInterrupt):
        fit(first, replace(context_of(run, "stage2"), report=dies))
    again = Scripted(run, [0.6])
    again.epochs = 2
    progress = fit(again, replace(context_of(run, "stage2"), report=heard.append))
    assert [(told["epoch"], told["progress"], told["auc"], told["best_auc"]) for told in heard] == [
        (1, 1.0, 0.5, 0.5), (2, 2.0, 0.6, 0.6),
    ]  # fmt: skip
    assert 0 < progress.earlier < progress.seconds


def test_validation_by_steps(run: Run) -> None:
    stage = Scripted(run, [0.1 * i for i in range(50)])
    stage.validate_every, stage.epochs = 3, 1
    progress = fit(stage, context_of(run, "stage2"))
    steps = progress.global_step
    assert steps > 4
    assert [p["step"] for p in progress.curve] == sorted({*range(3, steps + 1, 3), steps})


def test_checkpoints_are_pruned(straight: tuple[Run, dict[str, Any], Any]) -> None:
    run = straight[0]
    for stage in STAGES:
        assert len(run.folder.sub(stage).entries("checkpoints")) == run.config.checkpoints.keep


def test_the_curve_and_the_batches_of_a_run(straight: tuple[Run, dict[str, Any], Any]) -> None:
    """The premise of the tests of resuming: several batches an epoch, two epochs a stage, a loss that moves."""
    run, figures, given = straight
    for stage, kind in (("stage1", "masked"), ("stage2", "click")):
        points = [p for p in figures["curves"] if p["stage"] == stage]
        assert [p["epoch"] for p in points] == [1, 2]
        assert points[1]["train_loss"] < points[0]["train_loss"]
        own = [(epoch, step) for k, epoch, step in given if k == kind]
        assert figures[stage]["steps"] == len(own)
        per_epoch = len([1 for epoch, _ in own if epoch == 0])
        assert per_epoch >= 4
        assert own == [(e, s) for e in range(2) for s in range(len([1 for epoch, _ in own if epoch == e]))]
    assert run.folder.sub("stage2").exists("test_scores.parquet")


def test_clicks_alone_do_not_tell_how_much_a_user_clicks(straight: tuple[Run, dict[str, Any], Any]) -> None:
    assert straight[1]["baselines"].keys() == {"item popularity", "item click rate"}


def test_scorers_without_a_model_are_training_rates(config: Config, tmp_path: Path) -> None:
    """Of items, and of items and users where histories hold misses too, counted over the timelines one by one."""
    stage2 = {"epochs": 1, "action_weight": 0.0}
    pgsa = {"enabled": False, "summaries": 0}
    stream, data = {"window": 200}, {"history": None}
    over = {"stage1": {"enabled": False}, "stage2": stage2, "stream": stream, "model": {"pgsa": pgsa}, "data": data}
    run = make_run(validate(merged(dump(config), over)), tmp_path)
    figures = train(run, worker())
    shown, clicked = Counter[int](), Counter[int]()
    told: dict[int, list[int]] = {}
    timelines = [Timelines.from_table(run.prepared.timelines(b)) for b in range(run.prepared.buckets)]
    assert max(int(np.diff(t.h_offsets).max()) for t in timelines) < 200  # a window shows all of the past
    for t in timelines:
        for i in np.flatnonzero(t.t_split == TRAIN):
            shown[t.t_item[i]] += 1
            clicked[t.t_item[i]] += t.t_label[i]
            told.setdefault(t.t_action[i], []).append(t.t_label[i])
    base, first = sum(clicked.values()) / sum(shown.values()), run.sizes().first_item

    def rate(item: int) -> float:
        return (clicked[item] + PRIOR * base) / (shown[item] + PRIOR) if item >= first else base

    def value(action: int) -> float:
        known = told.get(action, []) if action != NO_ACTION else []
        return (sum(known) + PRIOR * base) / (len(known) + PRIOR)

    scores: list[tuple[float, float, int]] = []
    for t in timelines:
        for i in np.flatnonzero(t.t_split == TEST):
            start, n = t.h_offsets[np.searchsorted(t.t_offsets, i, side="right") - 1], int(t.t_visible[i])
            beyond = sum(value(t.h_action[j]) - rate(t.h_item[j]) for j in range(start, start + n))
            own = rate(t.t_item[i])
            scores.append((own, own + beyond / (n + PRIOR), t.t_label[i]))
    items, users, labels = (np.array(column) for column in zip(*scores, strict=True))
    assert figures["baselines"]["item click rate"] == pytest.approx(roc_auc_score(labels, items), abs=1e-6)
    assert figures["baselines"]["item and user click rates"] == pytest.approx(roc_auc_score(labels, users), abs=1e-4)
    assert roc_auc_score(labels, users) != pytest.approx(roc_auc_score(labels, items), abs=1e-2)


def finished(run: Run, lines: list[str] | None = None, source: Any = None) -> dict[str, Any]:
    return timeless(train(run, worker(source, (lines if lines is not None else []).append)))


def assert_same_run(ours: Run, figures: dict[str, Any], straight: tuple[Run, dict[str, Any], Any]) -> None:
    assert figures == timeless(straight[1])
    for stage in STAGES:
        assert weights(ours, stage) == weights(straight[0], stage)
    tables = [r.folder.read_parquet("stage2/test_scores.parquet") for r in (ours, straight[0])]
    assert tables[0].equals(tables[1])


def test_two_runs_with_one_seed_are_identical(run: Run, straight: tuple[Run, dict[str, Any], Any]) -> None:
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - a run must not depend on the process's generators
    assert_same_run(run, finished(run), straight)


def test_another_seed_is_another_run(config: Config, tmp_path: Path, straight: tuple[Run, dict[str, Any], Any]) -> None:
    other = make_run(config.model_copy(update={"seed": 4}), tmp_path / "other")
    figures = finished(other)
    for a, b in zip(figures["curves"], straight[1]["curves"], strict=True):
        assert a["train_loss"] != b["train_loss"]
    assert weights(other, "stage2") != weights(straight[0], "stage2")


def places(given: list[tuple[str, int, int]]) -> dict[str, int]:
    """Batches after which a run is cut: by name."""
    first = len([g for g in given if g[0] == "masked"])
    epoch = len([g for g in given if g[:2] == ("masked", 0)])
    return {
        "before any checkpoint": 1,
        "in the first epoch of stage 1": 3,
        "at the end of an epoch": epoch,
        "in the second epoch of stage 1": epoch + 3,
        "at the start of stage 2": first,
        "in stage 2": first + 5,
        "before the last batch": len(given) - 1,
    }


@pytest.mark.parametrize("place", places([("masked", 0, 0)]))
def test_a_run_cut_in_a_stage_and_resumed_equals_one_that_was_not(
    place: str, run: Run, straight: tuple[Run, dict[str, Any], list[tuple[str, int, int]]]
) -> None:
    given = straight[2]
    with pytest.raises(Interrupted):
        train(run, worker(FailingSource(places(given)[place])))
    lines, source = list[str](), CountingSource()
    assert_same_run(run, finished(run, lines, source), straight)
    assert source.given == given[-len(source.given) :]
    if place != "before any checkpoint":
        assert len(source.given) < len(given)
        assert any("continuing from" in line or "finished before" in line for line in lines)


def test_a_run_cut_in_evaluations_and_resumed_equals_one_that_was_not(
    run: Run, straight: tuple[Run, dict[str, Any], Any]
) -> None:
    """At the start of the first validation; then, again and again, after more evaluation batches."""
    for attempt in range(60):
        try:
            figures = finished(run, source=FailingSource(2 * attempt, ("evaluation",)))
        except Interrupted:
            continue
        assert attempt > 1
        return assert_same_run(run, figures, straight)
    raise AssertionError("never finished")


def test_a_run_cut_again_and_again_ends_alike(run: Run, straight: tuple[Run, dict[str, Any], Any]) -> None:
    cuts = 0
    while True:
        try:
            figures = finished(run, source=FailingSource(3))
        except Interrupted:
            cuts += 1
            assert cuts < 50
            continue
        assert cuts > 3
        return assert_same_run(run, figures, straight)


def test_a_torn_checkpoint_costs_only_its_steps(run: Run, straight: tuple[Run, dict[str, Any], Any]) -> None:
    with pytest.raises(Interrupted):
        train(run, worker(FailingSource(5)))
    folder = run.folder.sub("stage1/checkpoints")
    newest = folder.entries()[-1]
    folder.write(f"{newest}/model.safetensors", b"torn")
    lines = list[str]()
    assert_same_run(run, finished(run, lines), straight)
    assert any(f"checkpoint {newest} is not whole" in line for line in lines)


def test_without_checkpoints_by_steps_a_run_goes_on_from_its_validations(
    config: Config, tmp_path: Path, straight: tuple[Run, dict[str, Any], Any]
) -> None:
    """How often is saved changes nothing."""
    rare = config.model_copy(update={"checkpoints": Checkpoints(every_steps=0, keep=1)})
    run = make_run(rare, tmp_path / "run")
    with pytest.raises(Interrupted):
        train(run, worker(FailingSource(places(straight[2])["in the second epoch of stage 1"])))
    assert_same_run(run, finished(run), straight)


def test_a_finished_stage_is_not_done_again(run: Run, straight: tuple[Run, dict[str, Any], Any]) -> None:
    with pytest.raises(Interrupted):
        train(run, worker(FailingSource(places(straight[2])["in stage 2"])))
    written = weights(run, "stage1")
    source, lines = CountingSource(), list[str]()
    finished(run, lines, source)
    assert {kind for kind, _, _ in source.given} == {"click"}
    assert any(line.startswith("stage1: finished before") for line in lines)
    assert weights(run, "stage1") == written


def test_a_finished_run_trains_nothing_and_says_the_same(straight: tuple[Run, dict[str, Any], Any]) -> None:
    run, figures, _ = straight
    source = CountingSource()
    assert finished(run, source=source) == timeless(figures)
    assert source.given == []


@pytest.mark.parametrize("section", ["model", "stage1", "seed"])
def test_a_stage_trained_with_other_settings_is_refused(
    section: str, straight: tuple[Run, dict[str, Any], Any], root: Path
) -> None:
    run = straight[0]
    changes: dict[str, Any] = {
        "model": run.config.model.model_copy(update={"dropout": 0.4}),
        "stage1": run.config.stage1.model_copy(update={"mask_ratio": 0.3}),
        "seed": 8,
    }
    other = replace(run, config=run.config.model_copy(update={section: changes[section]}))
    with pytest.raises(ArtifactError, match="other settings"):
        train(other, worker())


def test_a_validation_without_an_auc_reports_no_best(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clicks of one class have none, and a search's scheduler calculates with what is there."""
    stage, reports = click_stage(run), list[dict[str, Any]]()
    monkeypatch.setattr(stage, "validate", lambda *_: {"auc": None, "n": 3.0})
    fit(stage, replace(context_of(run, "stage2"), report=reports.append))
    assert reports
    assert not any("auc" in report or "best_auc" in report for report in reports)


def test_reports_and_logs_come_at_each_validation(run: Run) -> None:
    context: Context = context_of(run, "stage2")
    reports, logs = list[dict[str, Any]](), list[tuple[str, dict[str, float], int]]()
    progress = fit(click_stage(run), replace(context, report=reports.append, log=lambda *a: logs.append(a)))
    assert [r["train_loss"] for r in reports] == [p["train_loss"] for p in progress.curve]
    logs = [one for one in logs if "train_loss" in one[1]]  # the others come by the clock
    assert [step for _, _, step in logs] == [p["step"] for p in progress.curve]
    assert {"auc", "stage", "epoch"} <= reports[0].keys()
    speed = {"tokens_per_second", "data_wait_share", "padding_share"}
    assert {"train_loss", "lr", "validation/auc", *speed} <= logs[0][1].keys()


@pytest.mark.parametrize("window", [2, 15, 16, 17, 200])
def test_noise_has_room_for_the_longest_padded_row(window: int, run: Run) -> None:
    """Histories are padded to more than the window, and a next-item query adds an event."""
    stream = run.config.stream.model_copy(update={"window": window, "stride": 1})
    other = replace(run, config=run.config.model_copy(update={"stream": stream}))
    context: Context = context_of(other, "stage2")
    longest = pad(context.mock())
    assert context.row_places >= max(longest.h_item.shape[1], longest.c_item.shape[1]) * run.config.model.width


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_rehearsed_batch_asks_what_the_stage_asks_and_fills_the_budget(stage: str, run: Run) -> None:
    batch, stream = context_of(run, stage).mock(), run.config.stream
    assert batch.h_item.min() >= run.sizes().first_item
    assert batch.h_masked.mean() == pytest.approx(run.config.stage1.mask_ratio, abs=1 / stream.window)
    assert (len(batch.t_item) > 0) == (stage == "stage2")
    each = stream.window * (2 if stage == "stage2" else 1)
    assert len(batch) == max(1, stream.batch_tokens // each)


@pytest.mark.parametrize("major", [7, 8])
def test_a_gpu_trains_in_bf16_that_it_does_not_emulate(major: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=major))
    on_gpu = replace(context_of(run, "stage2"), device=torch.device("cuda"))
    assert isinstance(on_gpu.autocast(), torch.autocast) == (major >= 8)


def test_the_run_folder_is_enough(straight: tuple[Run, dict[str, Any], Any]) -> None:
    """Only safetensors, JSON and Parquet are left behind."""
    root = Path(straight[0].folder.uri)
    assert {p.suffix for p in root.rglob("*") if p.is_file()} == {".safetensors", ".json", ".parquet"}
    assert Folder(str(root)).sub("stage1").exists("done.json")
