"""The next-item objective: each event is predicted from the events before it, and from nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_model import SIZES, changed, inputs, random_batch, shaken, tiny
from torch.nn import functional as F

from hpgr.model.base import Negatives
from hpgr.model.next_item import NextItemModel
from hpgr.model.registry import item_model

EVENTS = 10


@pytest.fixture
def model() -> NextItemModel:
    torch.manual_seed(0)
    config = tiny(stage1={"objective": "next_item"}, model={"layers": 3})
    built = shaken(item_model(config, SIZES))
    assert isinstance(built, NextItemModel)
    return built


def test_a_state_depends_on_the_events_before_it_alone(model: NextItemModel) -> None:
    batch = random_batch(2, EVENTS, 1, seed=2)
    with torch.no_grad():
        before = model.encode(inputs(batch))
    for place in range(EVENTS):
        later = np.arange(2 * EVENTS) % EVENTS >= place
        other = changed(batch, h_item=(later, 2 + (batch.h_item[later] + 3) % 20), h_action=(later, 0))
        with torch.no_grad():
            after = model.encode(inputs(other))
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        assert (after[:, place + 1 :] != before[:, place + 1 :]).any(-1).all()


def test_every_known_item_is_asked_for(model: NextItemModel) -> None:
    batch = random_batch(3, EVENTS, 1, seed=2)
    x = inputs(changed(batch, h_item=(np.array([3, 11]), 2)))
    with torch.no_grad():
        output = model(x)
        states = model.encode(x)
    known = x.h_item >= SIZES.first_item
    assert int((~known).sum()) > 0
    assert int(output.terms) == int(known.sum())
    logits = model.catalogue_logits(states[known])
    expected = F.cross_entropy(logits, x.h_item[known] - SIZES.first_item, reduction="sum")
    torch.testing.assert_close(output.loss, expected)


def test_many_negatives_come_near_the_full_softmax(model: NextItemModel) -> None:
    x = inputs(random_batch(3, EVENTS, 1, seed=2))
    n = SIZES.items - SIZES.first_item
    drawn = torch.randint(SIZES.first_item, SIZES.items, (50_000,), generator=torch.Generator().manual_seed(0))
    negatives = Negatives(drawn, torch.full((n,), -np.log(n)))
    with torch.no_grad():
        full, sampled = model(x).loss, model(x, None, negatives).loss
    # The positive is drawn too, but never counts: its share of the draws is missing from the sum.
    assert float(sampled) == pytest.approx(float(full), rel=0.02)


def test_padding_and_the_hidden_last_event_change_nothing(model: NextItemModel) -> None:
    batch = random_batch(2, EVENTS, 1, seed=2)
    hidden = replace(batch, h_masked=np.arange(2 * EVENTS) % EVENTS == EVENTS - 1)
    with torch.no_grad():
        before, after = model.encode(inputs(batch)), model.encode(inputs(hidden))
    assert torch.equal(before[:, -1], after[:, -1]), "the query at the end does not read the event it asks for"
