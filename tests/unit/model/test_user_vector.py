"""The user's vector beside the encoder."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny

from hpgr.config import Model
from hpgr.model.hpgr import HpgrClick
from hpgr.model.noise import Noise
from hpgr.model.registry import click_model
from hpgr.model.user_vector import UserVector, matched


def test_a_candidate_meets_the_vector_after_the_last_event_that_it_sees() -> None:
    """The loop; nothing where it sees no event."""
    torch.manual_seed(0)
    candidate, users, visible = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.randint(0, 7, (3, 5))
    visible[0, :2] = torch.tensor([0, 6])
    got = matched(candidate, users, visible)
    for b in range(3):
        for m in range(5):
            seen = int(visible[b, m])
            expected = float(candidate[b, m] @ users[b, seen - 1]) if seen else 0.0
            assert float(got[b, m]) == pytest.approx(expected, abs=1e-5)


def test_the_logit_is_the_encoders_and_the_product_with_the_vector_that_chooses_anchors() -> None:
    model, x = cast(HpgrClick, shaken(click_model(tiny(), SIZES)).eval()), inputs(random_batch())
    past = model.encode(x)
    assert past.users is not None
    product = matched(model.anchor_table[x.c_item], past.users, x.c_visible)
    assert product[x.c_real].abs().max() > 0.01
    with_it = model.read(past, x)
    model.user = None
    torch.testing.assert_close(with_it - model.read(model.encode(x), x), product, rtol=1e-4, atol=1e-5)


def test_it_starts_at_zero_and_learns_from_the_first_step() -> None:
    model = click_model(tiny(), SIZES)
    x = inputs(random_batch())
    torch.nn.init.normal_(cast(HpgrClick, model).anchor_table)
    assert not cast(torch.Tensor, model.encode(x).users).any()
    model(x).loss.backward()
    user = cast(UserVector, cast(HpgrClick, model).user)
    assert user.out.weight.grad is not None
    assert user.out.weight.grad.abs().max() > 0


def test_its_inputs_are_dropped_apart_while_training() -> None:
    made, ones = UserVector(Model(width=8, heads=1)), torch.ones(2, 3, 8)
    made.drop_intra.site, made.drop_context.site = 0, 1
    torch.nn.init.normal_(made.out.weight)
    key = torch.arange(2).numpy()
    once, again, other = (made(ones, -ones, Noise(seed, key, 64)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    made.eval()
    assert torch.equal(made(ones, -ones, Noise(1, key, 64)), made(ones, -ones, None))


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({}, True),
        ({"pgsa": {"enabled": False}}, True),
        ({"pgsa": {"enabled": False, "summaries": 0}}, False),  # no vectors to compare with
        ({"sem": {"in_stage2": False}}, False),
        ({"sem": {"user_vector": False}}, False),
        ({"name": "hstu"}, False),
    ],
)
def test_who_has_it(settings: dict[str, object], has: bool) -> None:
    model = click_model(tiny(model=settings), SIZES)
    assert any(isinstance(m, UserVector) for m in model.modules()) == has
    assert (model.encode(inputs(random_batch())).users is not None) == has
