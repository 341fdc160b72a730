"""Stage 1's loss: full and sampled softmax, and what counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny
from torch.nn import functional as F

from hpgr.model.base import Negatives
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.model.masked_item import MaskedItemModel
from hpgr.schema import NO_ACTION
from hpgr.training.stages import ItemStage

CATALOGUE = SIZES.items - SIZES.first_item


def built(action_weight: float, sizes: Sizes = SIZES) -> MaskedItemModel:
    torch.manual_seed(0)
    out = shaken(MaskedItemModel(tiny(stage1={"action_weight": action_weight}), sizes))
    assert isinstance(out, MaskedItemModel)
    return out


@pytest.fixture
def model() -> MaskedItemModel:
    return built(0.0)


@pytest.fixture
def x() -> Inputs:
    batch = random_batch(4, 12, 1, seed=3)
    return inputs(replace(batch, h_masked=np.arange(48) % 2 == 0))


def loss(model: MaskedItemModel, x: Inputs, negatives: Negatives | None = None) -> float:
    with torch.no_grad():
        return float(model(x, None, negatives).loss)


def test_the_full_loss_is_cross_entropy_over_known_hidden_items(model: MaskedItemModel, x: Inputs) -> None:
    output = model(x)
    hidden = x.h_masked & (x.h_item >= SIZES.first_item)
    assert (x.h_masked & ~hidden).any(), "the batch should hide an unknown item too"
    assert output.terms == hidden.sum()
    logits = model.encode(x)[hidden] @ model.events.item.weight[4:].T + model.item_bias[4:]
    expected = -F.log_softmax(logits, -1)[range(len(logits)), x.h_item[hidden] - 4].sum()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)


def test_what_was_done_with_hidden_items_is_asked_beside_them(model: MaskedItemModel, x: Inputs) -> None:
    """Weight times the cross-entropy of the actions, given each place's state and its item; no action asks nothing."""
    asking = built(2.5)
    asking.load_state_dict(model.state_dict(), strict=False)
    hidden = x.h_masked & (x.h_item >= SIZES.first_item)
    x = replace(x, h_action=x.h_action.masked_fill(torch.arange(x.h_item.shape[1]) % 4 == 0, NO_ACTION))
    done = x.h_action[hidden]
    assert 0 < (done == NO_ACTION).sum() < len(done)
    state, item = asking.encode(x)[hidden], asking.events.item(x.h_item[hidden])
    expected = -F.log_softmax(asking.action_head(state, item), -1)[range(len(done)), done][done != NO_ACTION].sum()
    torch.testing.assert_close(asking(x).loss - model(x).loss, 2.5 * expected, rtol=1e-4, atol=1e-4)
    assert asking(x).terms == model(x).terms


def test_the_state_does_not_know_what_was_done_with_a_hidden_item(x: Inputs) -> None:
    asking, other = built(1.0), replace(x, h_action=torch.where(x.h_masked, 1 + x.h_action % 4, x.h_action))
    assert torch.equal(asking.encode(x), asking.encode(other))
    assert asking(x).loss != asking(other).loss


def test_a_log_of_one_action_asks_nothing(x: Inputs) -> None:
    assert not hasattr(built(1.0, replace(SIZES, actions=3)), "action_head")
    assert hasattr(built(1.0, replace(SIZES, actions=4)), "action_head")


def test_nothing_hidden_is_a_loss_of_zero_from_no_terms(model: MaskedItemModel, x: Inputs) -> None:
    output = model(replace(x, h_masked=torch.zeros_like(x.h_masked)))
    assert (float(output.loss.detach()), int(output.terms)) == (0.0, 0)
    output.loss.backward()


def test_every_item_drawn_once_evenly_is_the_full_softmax(model: MaskedItemModel, x: Inputs) -> None:
    negatives = Negatives(torch.arange(4, SIZES.items), torch.full((CATALOGUE,), -np.log(CATALOGUE)))
    torch.testing.assert_close(model(x, None, negatives).loss, model(x).loss, rtol=1e-5, atol=1e-5)


def test_items_drawn_as_often_as_expected_are_the_full_softmax(model: MaskedItemModel, x: Inputs) -> None:
    """Draws in exact proportion to an uneven q: the corrected sum over negatives is the true one, without error."""
    times = torch.tensor(np.random.default_rng(0).integers(1, 9, CATALOGUE))
    items = torch.arange(4, SIZES.items).repeat_interleave(times)
    negatives = Negatives(items, (times / times.sum()).log())
    torch.testing.assert_close(model(x, None, negatives).loss, model(x).loss, rtol=1e-5, atol=1e-5)


def test_without_the_correction_uneven_draws_are_another_loss(model: MaskedItemModel, x: Inputs) -> None:
    """The control: the test above notices a wrong logQ."""
    times = torch.tensor(np.random.default_rng(0).integers(1, 9, CATALOGUE))
    items = torch.arange(4, SIZES.items).repeat_interleave(times)
    negatives = Negatives(items, torch.full((CATALOGUE,), -np.log(CATALOGUE)))
    assert loss(model, x, negatives) != pytest.approx(loss(model, x), rel=1e-3)


def test_many_random_draws_come_near_the_full_softmax(model: MaskedItemModel, x: Inputs) -> None:
    q = np.random.default_rng(1).dirichlet(np.full(CATALOGUE, 2.0))
    drawn = np.random.default_rng(2).choice(CATALOGUE, 40_000, p=q)
    negatives = Negatives(torch.from_numpy(drawn + 4), torch.from_numpy(np.log(q)).float())
    assert loss(model, x, negatives) == pytest.approx(loss(model, x), rel=0.02)


def test_a_positive_is_never_its_own_negative(model: MaskedItemModel, x: Inputs) -> None:
    """Only the positives drawn, again and again: nothing is left to push away, so the loss is zero."""
    item = int(x.h_item[x.h_masked & (x.h_item >= 4)][0])
    only = replace(x, h_masked=x.h_masked & (x.h_item == item))
    log_q = torch.full((CATALOGUE,), -np.log(CATALOGUE))
    assert loss(model, only, Negatives(torch.full((50,), item), log_q)) == 0.0
    assert loss(model, only, Negatives(torch.full((50,), 4 + (item - 3) % CATALOGUE), log_q)) > 0


def test_negatives_follow_popularity_and_the_step_alone() -> None:
    counts = np.array([0.0] * 10 + [100.0] * 10)
    config = tiny(stage1={"full_softmax_items": 5, "negatives": 4000})
    stage = ItemStage(config, SIZES, counts, None, None)  # type: ignore[arg-type]
    first, again, other = (stage.extras(step, torch.device("cpu"))["negatives"] for step in (1, 1, 2))
    assert torch.equal(first.items, again.items)
    assert not torch.equal(first.items, other.items)
    assert first.items.min() >= SIZES.first_item
    assert first.items.max() < SIZES.items
    assert float(first.log_q.exp().sum()) == pytest.approx(1)
    drawn = np.random.default_rng([config.seed, 1]).choice(20, 4000, p=(counts + 1) / (counts + 1).sum())
    assert (first.items - SIZES.first_item).tolist() == drawn.tolist(), "the plain way to draw"
    rare = float((first.items < 14).double().mean())
    assert rare == pytest.approx(10 / 1020, abs=0.01)


def test_a_small_catalogue_uses_the_full_softmax() -> None:
    stage = ItemStage(tiny(), SIZES, np.ones(CATALOGUE), None, None)  # type: ignore[arg-type]
    assert stage.extras(0, torch.device("cpu")) == {}
