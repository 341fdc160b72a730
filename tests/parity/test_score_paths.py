"""One score, however it is computed: batch size, order and path do not matter; ranks equal a plain reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers_model import CPU, inputs, log_config, make_run, rows_of, shaken
from torch import Tensor
from torch.nn import functional as F

from hpgr.data.stream import LocalSource, Step
from hpgr.evaluation import click_scores, rank_next_items, score
from hpgr.metrics import EPSILON, RankSums
from hpgr.model.base import ClickModel
from hpgr.model.inputs import unpad
from hpgr.model.masked_item import MaskedItemModel
from hpgr.model.registry import click_model
from hpgr.training.two_stage import Run

SOURCE = LocalSource()
KEYS = ["user", "time", "item", "request", "label"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rare items are out of the vocabulary, so histories, candidates and targets hold unknown ones."""
    root: Path = tmp_path_factory.mktemp("paths")
    config = log_config(root, data={"vocabulary": {"min_count": 9, "oov_buckets": 8}})
    return make_run(config, root / "run")


@pytest.fixture(scope="module")
def model(run: Run) -> ClickModel:
    torch.manual_seed(0)
    built = shaken(click_model(run.config, run.sizes()))
    assert isinstance(built, ClickModel)
    return built


@pytest.fixture(scope="module")
def masked_model(run: Run) -> MaskedItemModel:
    torch.manual_seed(0)
    built = shaken(MaskedItemModel(run.config, run.sizes()))
    assert isinstance(built, MaskedItemModel)
    return built


def steps(run: Run, name: str, batch_tokens: int | None = None) -> list[Step]:
    spec = run.spec(name)
    return list(SOURCE.evaluation(replace(spec, batch_tokens=batch_tokens or spec.batch_tokens)))


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in KEYS])


def assert_same_scores(ours: pa.Table, theirs: pa.Table) -> None:
    ours, theirs = in_order(ours), in_order(theirs)
    assert ours.num_rows > 20
    assert ours.drop_columns(["score"]).equals(theirs.drop_columns(["score"]))
    np.testing.assert_allclose(theirs["score"].to_numpy(), ours["score"].to_numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [16, 60, 100_000])
def test_scores_do_not_depend_on_the_batch_size(run: Run, model: ClickModel, batch_tokens: int) -> None:
    usual, other = steps(run, "click-test", 200), steps(run, "click-test", batch_tokens)
    assert len(usual) != len(other)
    assert_same_scores(score(model, usual, CPU), score(model, other, CPU))


def test_scores_do_not_depend_on_the_order_of_users(run: Run, model: ClickModel) -> None:
    rng = np.random.default_rng(0)

    def shuffled() -> Iterator[Step]:
        for step in steps(run, "click-test")[::-1]:
            yield step._replace(batch=rows_of(step.batch, rng.permutation(len(step.batch))))

    assert_same_scores(score(model, steps(run, "click-test"), CPU), score(model, shuffled(), CPU))


def test_shares_of_workers_together_are_the_whole(run: Run, model: ClickModel) -> None:
    spec = run.spec("click-test")
    parts = [score(model, LocalSource(rank, 3).evaluation(spec), CPU) for rank in range(3)]
    assert all(p.num_rows for p in parts)
    assert_same_scores(score(model, steps(run, "click-test"), CPU), pa.concat_tables(parts))


def test_the_training_forward_gives_the_evaluations_scores(run: Run, model: ClickModel) -> None:
    """The batches of an epoch in their training order, through the forward that has the loss."""
    parts = []
    total = 0.0
    for step in SOURCE.steps(run.spec("click-train"), range(1), 0):
        x = inputs(step.batch)
        with torch.no_grad():
            output = model(x)
        logits, label = output.scores[x.c_real], x.c_label[x.c_real].double()
        loss = F.binary_cross_entropy_with_logits(logits.double(), label, reduction="sum")
        assert float(output.loss) == pytest.approx(float(loss), rel=1e-5)
        shown = torch.sigmoid(logits).double().clip(EPSILON, 1 - EPSILON)  # some logits are beyond what is told apart
        total += float(F.binary_cross_entropy(shown, label, reduction="sum"))
        row = np.repeat(np.arange(len(step.batch)), step.batch.t_lengths)
        columns = {"item": step.batch.t_item, "time": step.batch.t_time, "label": step.batch.t_label}
        plain = pa.table({"user": step.batch.user.take(pa.array(row)), **columns, "request": step.batch.t_request})
        parts.append(plain.append_column("score", pa.array(unpad(torch.sigmoid(output.scores), x.c_real))))
    evaluated = score(model, steps(run, "click-train"), CPU)
    trained = pa.concat_tables(parts).cast(evaluated.select([*parts[0].column_names]).schema)
    assert_same_scores(evaluated.select(trained.column_names), trained)
    figures = click_scores(evaluated).compute()
    assert figures["log_loss"] == pytest.approx(total / evaluated.num_rows, rel=1e-4)


def test_each_impression_of_the_split_is_scored_once(run: Run, model: ClickModel) -> None:
    account = run.prepared.manifest["account"]["splits"]
    for split in ("train", "validation", "test"):
        table = score(model, steps(run, f"click-{split}"), CPU)
        assert table.num_rows == account[split]["impressions"]
        assert int(np.sum(table["label"].to_numpy())) == account[split]["positives"]


def reference_ranks(model: MaskedItemModel, logits: Tensor, truth: int, past: list[int], filter_seen: bool) -> int:
    """Rank of `truth` among the catalogue by sorting; 1 is best."""
    size = len(logits)
    if truth < model.first_item:
        return size + 1
    left_out = {item for item in past if item != truth} if filter_seen else set()
    shown = [i for i in range(size) if i + model.first_item not in left_out]
    order = sorted(shown, key=lambda i: (-float(logits[i]), i))
    return 1 + order.index(truth - model.first_item)


@pytest.mark.parametrize("filter_seen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_equal_the_reference(run: Run, masked_model: MaskedItemModel, filter_seen: bool, tied: bool) -> None:
    expected, seen, unknown_past, unknown_truth = [], [], 0, 0
    original = masked_model.catalogue_logits
    if tied:  # few distinct logits, so that places decide
        masked_model.catalogue_logits = lambda state: original(state).round()  # type: ignore[method-assign]
    try:
        for step in steps(run, "next_item-test"):
            x = inputs(step.batch)
            with torch.no_grad():
                states = masked_model.encode(x)
            for row in range(len(step.batch)):
                last = int(x.h_real[row].sum()) - 1
                assert bool(x.h_masked[row, last])
                truth, past = int(x.h_item[row, last]), x.c_item[row][x.c_real[row]].tolist()
                with torch.no_grad():
                    logits = masked_model.catalogue_logits(states[[row], last])[0]
                expected.append(reference_ranks(masked_model, logits, truth, past, filter_seen))
                seen.append(truth in past and truth >= masked_model.first_item)
                unknown_past += any(item < masked_model.first_item for item in past)
                unknown_truth += truth < masked_model.first_item
        got = rank_next_items(masked_model, steps(run, "next_item-test"), CPU, filter_seen)
    finally:
        masked_model.catalogue_logits = original  # type: ignore[method-assign]
    assert unknown_past > 3, "some histories must hold unknown items"
    assert 0 < unknown_truth < len(expected)
    assert got == RankSums.from_ranks(np.array(expected), np.array(seen))


def test_ranks_do_not_depend_on_the_batch_size(run: Run, masked_model: MaskedItemModel) -> None:
    ranks = [rank_next_items(masked_model, steps(run, "next_item-test", n), CPU, True) for n in (16, 100_000)]
    assert ranks[0] == ranks[1]


def test_ranks_do_not_depend_on_how_many_users_face_the_catalogue_at_once(
    run: Run, masked_model: MaskedItemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rank_next_items(masked_model, steps(run, "next_item-test"), CPU, True)
    monkeypatch.setattr("hpgr.evaluation.LOGITS_AT_ONCE", 3 * len(masked_model.item_bias))
    assert rank_next_items(masked_model, steps(run, "next_item-test"), CPU, True) == whole


def test_a_model_of_no_numbers_finds_nothing(run: Run, masked_model: MaskedItemModel) -> None:
    """Nothing is greater than NaN, so that every rank would be the first."""
    broken = copy.deepcopy(masked_model)
    torch.nn.init.constant_(broken.item_bias, float("nan"))
    assert rank_next_items(broken, steps(run, "next_item-test"), CPU, True).compute()["hr@20"] == 0


def test_the_next_item_query_does_not_know_the_answer(run: Run, masked_model: MaskedItemModel) -> None:
    """Another truth, another time, action or label of the event to find: the same prediction."""

    def predicted(step: Step, **columns: Any) -> Tensor:
        x = inputs(replace(step.batch, **columns))
        with torch.no_grad():
            return masked_model.encode(x)

    for step in steps(run, "next_item-test"):
        asked = step.batch.h_masked
        assert asked.sum() == len(step.batch)
        other = np.where(asked, 2 + (step.batch.h_item * 7) % 30, step.batch.h_item)
        assert torch.equal(predicted(step), predicted(step, h_item=other))
