"""Runs that agree on stage 1's key have the same stage 1, bit for bit; what changes it changes the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import CountingSource, FailingSource, Interrupted, log_config, make_run, worker

from hpgr.config import Config, dump, validate
from hpgr.errors import DeviceMemoryError, TrainingError
from hpgr.model.base import ItemModel
from hpgr.model.sem import Sem
from hpgr.search.space import placed
from hpgr.training.loop import fit
from hpgr.training.two_stage import Run, has_ended, item_stage, loop_context, stage_key, train

FREE = {
    "model.name": "mtgr",
    "model.mtgr.mlp_ratio": 3,
    "model.din.attention_units": 4,
    "model.hstu_form": "research",
    "model.layers": 1,
    "model.silu_on": "u",
    "model.match_features": False,
    "model.sem.in_stage2": False,
    "model.sem.user_vector": False,
    "model.pgsa.enabled": False,
    "model.pgsa.top_k": 2,
    "model.pgsa.sigma": 0.0,
    "model.pgsa.scope": "candidate",
    "model.pgsa.anchors": "live",
    "model.pgsa.summaries": 0,
    "model.asvd.factors": 3,
    "model.asvd.dropout": 0.1,
    "model.asvd.baselines": True,
    "model.lists.enabled": False,
    "model.lists.baselines": True,
    "stage2.shrinkage": 5.0,
    "stage2.item_lr_share": 0.5,
    "stage2.new_item_lr_share": 0.5,
    "stage2.action_weight": 0.5,
    "stage2.action_baselines": True,
    "stage2.action_share": 0.25,
    "stream.stride": 4,
    "stage2.epochs": 3,
    "stage2.optimiser.lr": 0.1,
}
BOUND = {
    "seed": 9,
    "stream.session_gap_minutes": 3.0,
    "stream.batch_tokens": 320,
    "model.width": 12,
    "model.heads": 1,
    "model.dropout": 0.4,
    "model.sem.dropout": 0.4,
    "stage1.mask_ratio": 0.5,
    "stage1.causal_share": 1.0,
    "stage1.optimiser.lr": 0.02,
    "stage1.action_weight": 0.0,
    "stage1.objective": "next_item",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return log_config(tmp_path_factory.mktemp("key"), stage1={"epochs": 1}, stage2={"epochs": 1})


def changed(config: Config, values: dict[str, Any]) -> Config:
    return validate(placed(dump(config), values))


def stage1_weights(run: Run) -> dict[str, torch.Tensor]:
    torch.manual_seed(run.config.seed)
    stage = item_stage(run, run.prepared.folder.read_parquet("vocabulary.parquet"))
    fit(stage, loop_context(run, worker(), run.folder.sub("stage1"), "stage1"))
    assert isinstance(stage.model, ItemModel)
    return stage.model.state_dict()


@pytest.fixture(scope="module")
def base(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, torch.Tensor]]:
    run = make_run(config, tmp_path_factory.mktemp("base"))
    return run, stage1_weights(run)


def test_settings_of_stage_2_leave_stage_1_as_it_is(
    config: Config, base: tuple[Run, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run, weights = base
    other = changed(config, FREE)
    assert stage_key(other, run.prepared, "stage1") == stage_key(config, run.prepared, "stage1")
    found = stage1_weights(make_run(other, tmp_path))
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    for path, value in FREE.items():
        assert stage_key(changed(config, {path: value}), run.prepared, "stage2") != stage_key(
            config, run.prepared, "stage2"
        ), path


@pytest.mark.parametrize("path", BOUND)
def test_what_changes_stage_1_changes_its_key(
    config: Config, base: tuple[Run, dict[str, torch.Tensor]], tmp_path: Path, path: str
) -> None:
    run, weights = base
    other = changed(config, {path: BOUND[path]})
    assert stage_key(other, run.prepared, "stage1") != stage_key(config, run.prepared, "stage1")
    found = stage1_weights(make_run(other, tmp_path))
    assert found.keys() != weights.keys() or any(
        found[name].shape != weights[name].shape or not torch.equal(found[name], weights[name]) for name in weights
    )


def test_the_next_item_objective_has_an_encoder_and_no_sem(config: Config, base: tuple[Run, Any]) -> None:
    run, _ = base
    flat = changed(config, {"stage1.objective": "next_item"})
    key = stage_key(flat, run.prepared, "stage1")
    assert stage_key(changed(flat, {"model.sem.intra_layers": 3}), run.prepared, "stage1") == key
    for path, value in {"model.layers": 1, "model.silu_on": "u", "model.hstu_form": "research"}.items():
        assert stage_key(changed(flat, {path: value}), run.prepared, "stage1") != key, path


def test_a_shared_stage_1_gives_the_run_it_would_have_had(config: Config, tmp_path: Path) -> None:
    alone = make_run(config, tmp_path / "alone")
    first = make_run(changed(config, {"model.pgsa.top_k": 1}), tmp_path / "first")
    shared = alone.folder.sub("shared")
    train(Run(first.config, first.folder, first.prepared, shared, first.index_folder), worker(), test=False)
    second = make_run(config, tmp_path / "second")
    found = train(Run(config, second.folder, second.prepared, shared, second.index_folder), worker(), test=False)
    assert not second.folder.exists("stage1")
    assert "test" not in found["stage2"]
    expected = train(alone, worker())
    assert found["stage2"]["validation"] == expected["stage2"]["validation"]
    assert found["stage2"]["cost"] == expected["stage2"]["cost"]


def test_a_shared_stage_1_that_fails_is_not_begun_again_by_those_who_share_it(config: Config, tmp_path: Path) -> None:
    diverging = changed(config, {"stage1.optimiser.lr": 1e30, "stage1.optimiser.warmup_steps": 0})
    first = make_run(diverging, tmp_path / "first")
    second = make_run(changed(diverging, {"model.pgsa.top_k": 1}), tmp_path / "second")
    shared = first.folder.sub("shared")
    errors = []
    for run, source in ((first, CountingSource()), (second, counted := CountingSource())):
        sharing = Run(run.config, run.folder, run.prepared, shared, run.index_folder)
        assert has_ended(shared) == (run is second)
        with pytest.raises(TrainingError, match=r"stage1: .* is (nan|inf)") as caught:
            train(sharing, worker(source), test=False)
        errors.append(str(caught.value))
    assert counted.given == []  # type: ignore[attr-defined]
    assert errors[0] == errors[1]
    assert not shared.exists("done.json")
    with pytest.raises(TrainingError):
        train(first, worker(), test=False)
    assert not first.folder.exists("stage1/failed.json"), "a stage of its own goes on from its checkpoint"


def test_a_gpu_without_room_says_what_to_lower_and_another_may_try(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(config, tmp_path)
    shared = run.folder.sub("shared")
    run = Run(config, run.folder, run.prepared, shared, run.index_folder)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with monkeypatch.context() as small:
        small.setattr(Sem, "forward", full)
        with pytest.raises(DeviceMemoryError) as error:
            train(run, worker(), test=False)
    assert str(error.value).startswith("stage1: CUDA out of memory. Tried to allocate 2.00 GiB.: ")
    assert all(key in str(error.value) for key in ("resources.recompute", "stream.batch_tokens", "stream.window"))
    assert not error.value.goes_on, "the same job on the same GPUs would only repeat it"
    assert not has_ended(shared)
    train(run, worker(), test=False)


def test_a_shared_stage_1_that_was_interrupted_goes_on(config: Config, tmp_path: Path) -> None:
    run = make_run(config, tmp_path)
    shared = run.folder.sub("shared")
    run = Run(config, run.folder, run.prepared, shared, run.index_folder)
    with pytest.raises(Interrupted):
        train(run, worker(FailingSource(1)), test=False)
    assert not has_ended(shared)
    train(run, worker(), test=False)
    assert has_ended(shared)


def test_the_test_split_is_read_when_it_is_asked_for(config: Config, tmp_path: Path) -> None:
    straight = train(make_run(config, tmp_path / "straight"), worker())
    late = make_run(config, tmp_path / "late")
    before = train(late, worker(), test=False)
    assert "test" not in before["stage1"]
    assert not late.folder.exists("stage2/test_scores.parquet")
    after = train(late, worker())
    assert after["stage2"]["test"] == straight["stage2"]["test"]
    assert after["stage1"]["test"] == straight["stage1"]["test"]
    assert after["baselines"] == straight["baselines"]
