"""What stage 2 takes over from stage 1, and its loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_model import MISSES_KNOWN, SIZES, candidates_of, inputs, random_batch, rows_of, shaken, tiny
from torch.nn import functional as F

from hpgr.errors import ConfigError
from hpgr.model.attention import check_compiler, train_attention
from hpgr.model.inputs import pad
from hpgr.model.masked_item import MaskedItemModel
from hpgr.model.noise import Noise
from hpgr.model.registry import click_model
from hpgr.schema import NO_ACTION

SEEN = torch.arange(SIZES.items - SIZES.first_item)


def stage1(**over: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return dict(shaken(MaskedItemModel(tiny(**over), SIZES)).state_dict())


def test_stage_2_takes_over_events_sem_and_the_frozen_table() -> None:
    torch.manual_seed(0)
    model = click_model(tiny(), SIZES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    taken = stage1()
    model.inherit(taken, SEEN, 0.0)
    after = model.state_dict()
    inherited = [k for k in after if k.startswith(("events.", "sem."))]
    assert len(inherited) > 20
    for name in inherited:
        assert torch.equal(after[name], taken[name]), name
        assert not torch.equal(after[name], before[name]), name
    torch.testing.assert_close(model.anchor_table, F.normalize(taken["events.item.weight"], dim=-1))
    for name in set(after) - set(inherited) - {"anchor_table"}:
        assert torch.equal(after[name], before[name]), name


def test_rare_items_start_from_the_mean_vector_and_are_of_short_anchor_vectors() -> None:
    """(n e + c m) / (n + c), in float64 and plain; rows without a count stay as they are. Anchors: n / (n + c) long."""
    model, taken = click_model(tiny(), SIZES), stage1()
    model.inherit(taken, SEEN, 6.0)
    table = taken["events.item.weight"].double()
    mean = sum(n * table[4 + n] for n in range(20)) / sum(range(20))
    for n in range(20):
        expected = (n * table[4 + n] + 6 * mean) / (n + 6)
        torch.testing.assert_close(model.events.item.weight[4 + n].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.events.item.weight[:4], taken["events.item.weight"][:4])
    length = torch.cat([torch.ones(4), SEEN / (SEEN + 6)])[:, None]
    torch.testing.assert_close(model.anchor_table, F.normalize(taken["events.item.weight"], dim=-1) * length)
    live = click_model(tiny(model={"pgsa": {"anchors": "live"}}), SIZES)
    live.inherit(taken, SEEN, 6.0)
    own = F.normalize(live.events.item.weight.detach(), dim=-1)
    torch.testing.assert_close(live.anchor_vectors(torch.arange(24)), own * length)


def test_a_catalogue_never_seen_is_all_zeros_not_nan() -> None:
    model = click_model(tiny(), SIZES)
    model.inherit(stage1(), torch.zeros_like(SEEN), 1.0)
    assert not model.events.item.weight[4:].any()


def test_the_frozen_table_stays_while_the_live_one_is_trained() -> None:
    model = click_model(tiny(), SIZES)
    model.inherit(stage1(), SEEN, 0.0)
    frozen, live = model.anchor_table.clone(), model.events.item.weight.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model(inputs(random_batch())).loss.backward()
    optimiser.step()
    assert torch.equal(model.anchor_table, frozen)
    assert not torch.equal(model.events.item.weight, live)
    assert "anchor_table" in model.state_dict()


def test_live_anchors_have_no_copy() -> None:
    model = click_model(tiny(model={"pgsa": {"anchors": "live"}}), SIZES)
    taken = stage1()
    model.inherit(taken, SEEN, 0.0)
    assert len(model.anchor_table) == 0
    item = torch.arange(4, 9)
    torch.testing.assert_close(model.anchor_vectors(item), F.normalize(taken["events.item.weight"][4:9], dim=-1))


def test_a_model_without_sem_takes_over_the_events_alone() -> None:
    model = click_model(tiny(model={"sem": {"in_stage2": False}}), SIZES)
    taken = stage1()
    model.inherit(taken, SEEN, 0.0)
    assert torch.equal(model.events.item.weight, taken["events.item.weight"])
    assert not [k for k in model.state_dict() if k.startswith("sem.")]


def test_the_inherited_model_starts_as_if_there_were_no_sem() -> None:
    """Both branches are gated from zero, and so is the user's vector."""
    x = inputs(random_batch())
    taken, scores = stage1(), []
    for in_stage2 in (True, False):
        torch.manual_seed(0)
        model = click_model(tiny(model={"sem": {"in_stage2": in_stage2}}), SIZES).eval()
        model.inherit(taken, SEEN, 0.0)
        tokens, users = model.history(x, None)
        scores.append(tokens)
        assert not in_stage2 or not users.any()
    assert torch.equal(*scores)


def test_the_loss_is_the_sum_over_labelled_real_candidates() -> None:
    batch = random_batch(3, 8, 4)
    labels = np.where(np.arange(12) % 5 == 0, -1, batch.t_label).astype(np.int8)
    model = shaken(click_model(tiny(), SIZES))
    x = inputs(replace(batch, t_label=labels))
    with torch.no_grad():
        output = model(x)
    click, none = (torch.sigmoid(sign * output.scores.double()).flatten() for sign in (1, -1))
    terms = [-torch.log(click[i] if y else none[i]) for i, y in enumerate(labels.tolist()) if y >= 0]
    assert int(output.terms) == len(terms) == 9
    assert float(output.loss) == pytest.approx(float(sum(terms)), rel=1e-5)


@pytest.mark.parametrize("name", ["hpgr", "hstu", "mtgr", "din"])
def test_while_training_the_loss_also_asks_what_was_done_with_candidates(name: str) -> None:
    """Weight times the cross-entropy of the actions of labelled real candidates; no action asks nothing."""
    batch = random_batch(3, 8, 4)
    labels = np.where(np.arange(12) % 5 == 0, -1, batch.t_label).astype(np.int8)
    x = inputs(replace(batch, t_label=labels))
    asked_too = {"action_weight": 2.5, "action_baselines": name != "hpgr"}
    model = shaken(click_model(tiny(model={"name": name}, stage2=asked_too), SIZES))
    encoded = model.encoded(model.past(x, None), x, None)[:, :4].flatten(0, 1)
    asked = (torch.from_numpy(labels) >= 0) & (x.c_action[:, :4].flatten() != NO_ACTION)
    assert 0 < asked.sum() < (labels >= 0).sum()
    logits = model.answers(encoded).double().log_softmax(-1)
    expected = -logits[asked].gather(1, x.c_action[:, :4].flatten()[asked][:, None]).sum()
    plain, asking = model.eval()(x), model.train()(x)
    torch.testing.assert_close((asking.loss - plain.loss).double(), 2.5 * expected, rtol=1e-4, atol=1e-4)
    assert asking.terms == plain.terms
    assert torch.equal(asking.scores, plain.scores)


def test_candidates_of_no_known_action_train_as_without_the_question() -> None:
    x = inputs(replace(random_batch(), t_action=np.zeros(15, np.int64)))
    model = shaken(click_model(tiny(), SIZES)).train()
    assert model(x).loss == model.eval()(x).loss
    model.train()(x).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("counts", "weight"),
    [(((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), 1.0), (((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), 0.3)],
    ids=["ratings", "clicks again"],
)
def test_by_default_ratings_weigh_as_much_as_clicks_and_clicks_asked_again_less(
    counts: tuple[tuple[int, ...], ...], weight: float
) -> None:
    x, model = inputs(random_batch()), shaken(click_model(tiny(), replace(SIZES, train_actions=counts)))
    model.answers.share.fill_(0.0)
    asked = model.answers.loss(model.encoded(model.past(x, None), x, None), x)
    asking, plain = model.train()(x), model.eval()(x)
    torch.testing.assert_close(asking.loss - plain.loss, weight * asked, rtol=1e-4, atol=1e-4)
    assert asked > 1


@pytest.mark.parametrize(
    ("weight", "counts", "name", "baselines", "asks"),
    [
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), "hpgr", False, True),
        (0.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), "hpgr", False, False),
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), "hstu", False, False),
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), "hstu", True, True),
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 1)), "logistic", True, False),
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), "hpgr", False, True),
        (0.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), "hpgr", False, False),
        (1.0, ((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), "hstu", False, False),
        (1.0, ((0, 0, 9, 0, 0), (0, 0, 0, 5, 0)), "hpgr", False, False),
    ],
    ids=[
        "clicks and purchases",
        "no weight",
        "another model",
        "another model too",
        "no tokens",
        "one action",
        "one action, no weight",
        "one action, another model",
        "all that was shown, an action a label",
    ],
)
def test_who_is_asked_what_is_done_with_an_impression(
    weight: float, counts: tuple[tuple[int, ...], ...], name: str, baselines: bool, asks: bool
) -> None:
    config = tiny(model={"name": name}, stage2={"action_weight": weight, "action_baselines": baselines})
    model = click_model(config, replace(SIZES, train_actions=counts))
    assert (getattr(model, "answers", None) is not None) == asks


@pytest.mark.parametrize("counts", [((9, 0, 0, 0, 0), (0, 0, 5, 0, 0)), ((9, 0, 3, 0, 0), (9, 0, 0, 0, 5))])
def test_whether_there_is_a_click_is_asked_twice_where_actions_say_no_more(counts: tuple[tuple[int, ...], ...]) -> None:
    """Of all labelled candidates, by a head that starts at the rates of labels and is told of clicks by its odds."""
    batch = random_batch(3, 8, 4)
    labels = np.where(np.arange(12) % 5 == 0, -1, batch.t_label).astype(np.int8)
    x = inputs(replace(batch, t_label=labels))
    model = click_model(tiny(stage2={"action_weight": 1.0}), replace(SIZES, train_actions=counts))
    shown = torch.tensor(counts).sum(1) + 1
    torch.testing.assert_close(model.answers.head[-1].bias.softmax(0), shown / shown.sum())
    model = shaken(model)
    past = model.past(x, None)
    encoded = model.encoded(past, x, None)
    miss, click = model.answers(encoded).double().unbind(-1)
    own, share = model.click(encoded, past, x, None), model.answers.share
    torch.testing.assert_close(model(x).scores.double(), own + share * (click - miss - own), rtol=1e-4, atol=1e-5)
    terms = torch.where(x.c_label == 1, F.softplus(miss - click), F.softplus(click - miss))
    expected = terms[x.c_real & (x.c_label >= 0)].sum()
    assert model.answers.share > 0
    model.answers.share.fill_(0.0)
    asking, plain = model.train()(x), model.eval()(x)
    torch.testing.assert_close((asking.loss - plain.loss).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", [0, 1])
def test_a_log_of_one_label_alone_has_a_finite_second_answer(label: int) -> None:
    counts = [(0, 0, 0, 0, 0), (0, 0, 0, 0, 0)]
    counts[label] = (0, 0, 7, 0, 0)
    model = shaken(click_model(tiny(), replace(SIZES, train_actions=tuple(counts))))
    scores = model(inputs(random_batch())).scores
    assert model.answers.share > 0
    assert scores.abs().max() < 100


def test_answers_about_actions_start_at_their_rates_in_training() -> None:
    rates = click_model(tiny(), SIZES).answers.head[-1].bias.softmax(0)
    torch.testing.assert_close(rates, torch.tensor([1.0, 11, 21, 31, 41]) / 105)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_clicks_are_told_by_actions_to_the_share_that_was_taken(share: float) -> None:
    """Log-odds of all actions that come with a click, here 3 and 4, against those that come without."""
    model, x = shaken(click_model(tiny(), MISSES_KNOWN)), inputs(random_batch())
    model.answers.share.fill_(share)
    past = model.past(x, None)
    encoded = model.encoded(past, x, None)
    chances = model.answers(encoded).double().softmax(-1)
    told = (chances[..., [3, 4]].sum(-1) / chances[..., [1, 2]].sum(-1)).log()
    expected = (1 - share) * model.click(encoded, past, x, None).double() + share * told
    torch.testing.assert_close(model(x).scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_actions_tell_nothing_of_clicks_where_those_of_misses_are_not_known() -> None:
    x = inputs(random_batch())
    model = shaken(click_model(tiny(), replace(SIZES, train_actions=((9, 1, 1, 0, 0), (0, 0, 0, 3, 4)))))
    without = model(x).scores
    model.answers.share.fill_(1.0)
    assert torch.equal(model(x).scores, without)


def test_what_actions_tell_plays_no_part_in_training() -> None:
    """Click and actions are learnt each for itself."""
    model, x = shaken(click_model(tiny(), MISSES_KNOWN)).train(), inputs(random_batch())
    without = model(x)
    model.answers.share.fill_(1.0)
    assert torch.equal(torch.stack(model(x)[:2]), torch.stack(without[:2]))


def test_an_untrained_model_predicts_the_base_rate_on_average() -> None:
    model = click_model(tiny(), SIZES).eval()
    with torch.no_grad():
        p = torch.sigmoid(model(inputs(random_batch(20, 12, 5))).scores)
    assert float(p.mean()) == pytest.approx(SIZES.base_rate, abs=0.1)


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("name", ["hpgr", "hstu", "mtgr", "stage 1"])
def test_maps_made_again_for_gradients_change_no_bit_and_are_not_held(name: str, impl: str) -> None:
    batch = random_batch(3, 40, 8)
    batch.h_masked[::3] = True

    def trained(recompute: bool) -> tuple[list[torch.Tensor], int]:
        settings = {"pgsa": {"impl": impl}, "sem": {"dropout": 0.2}, "dropout": 0.2}
        config = tiny(model=settings | ({} if name == "stage 1" else {"name": name}))
        torch.manual_seed(0)
        model = shaken(MaskedItemModel(config, SIZES) if name == "stage 1" else click_model(config, SIZES)).train()
        train_attention(model, recompute, compiled=False)
        held = 0

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = model(inputs(batch), Noise(3, batch.row_key, 100 * config.model.width)).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], held

    (plain, all_held), (again, few_held) = trained(False), trained(True)
    assert len(plain) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few_held < all_held


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, while it looks at what it is given
@pytest.mark.parametrize(("name", "recompute"), [("hpgr", False), ("mtgr", True)])
def test_compiled_attention_trains_as_the_reference_and_leaves_scores_alone(name: str, recompute: bool) -> None:
    check_compiler(torch.device("cpu"))
    from torch._dynamo.utils import counters  # brings triton, which other tests must import first

    def trained(compiled: bool, events: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        config, batch = tiny(model={"name": name, "pgsa": {"impl": "reference"}}), random_batch(3, events, 8)
        torch.manual_seed(0)
        model = shaken(click_model(config, SIZES)).train()
        train_attention(model, recompute, compiled)
        output = model(inputs(batch), Noise(3, batch.row_key, 100 * config.model.width))
        output.loss.backward()
        with torch.no_grad():
            scores = model.eval()(inputs(batch)).scores
        return scores, [output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.compiler.reset()
    counters.clear()
    for events in (40, 23):
        (scores, plain), (same, compiled) = trained(False, events), trained(True, events)
        assert torch.equal(scores, same)
        assert len(plain) == len(compiled) > 10
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Histories, candidates, for mtgr the live form over both, and one of equal sizes; torch gives up beyond 8.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4


def test_a_machine_that_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        ConfigError, match=r"resources.compile: .* on cpu here: No working C\+\+ compiler found; install"
    ):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("name", ["hpgr", "logistic"])
def test_padding_is_asked_nothing(name: str) -> None:
    """Rows of unlike numbers of candidates together cost what each costs alone, in training and in evaluation."""
    batch = candidates_of(random_batch(3, 8, 4), np.isin(np.arange(12), [1, 4, 5, 6, 8, 9, 10, 11]))
    assert sorted(batch.t_lengths) == [1, 3, 4]
    settings = {"stage2": {"action_weight": 2.5}, "model": {"name": name}}
    model = shaken(click_model(tiny(**settings), SIZES))
    alone = [inputs(rows_of(batch, np.array([r]))) for r in range(3)]
    for mode in (model.eval(), model.train()):
        whole, parts = mode(pad(batch)), [mode(x) for x in alone]
        assert int(whole.terms) == sum(int(p.terms) for p in parts) == 8
        torch.testing.assert_close(whole.loss, sum(p.loss for p in parts), rtol=1e-4, atol=1e-4)


def test_histories_go_from_their_tokens_to_the_sems_by_its_gates() -> None:
    model, x = shaken(click_model(tiny(), SIZES)), inputs(random_batch())
    tokens = model.events.history(x, None)
    session, context = model.sem(tokens, x, None, torch.ones_like(x.causal))
    intra, inter = torch.tanh(model.gate_intra), torch.tanh(model.gate_inter)
    torch.testing.assert_close(model.history(x, None)[0], (1 - intra) * tokens + intra * session + inter * context)


def test_live_anchors_choose_and_compare_without_a_gradient() -> None:
    """Else the table would learn from the choice, too: `frozen` and `live` then differ by more than age."""
    model, x = click_model(tiny(model={"pgsa": {"anchors": "live"}}), SIZES), inputs(random_batch())
    assert not model.anchor_vectors(x.h_item).requires_grad


@pytest.mark.parametrize("impl", ["auto", "gather", "reference"])
def test_the_scope_says_whose_attention_is_sparse(impl: str) -> None:
    """Of candidates alone: histories are encoded as densely as without PGSA; else they are not."""
    x = inputs(random_batch())

    def shown(pgsa: dict) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = shaken(
            click_model(tiny(model={"layers": 3, "pgsa": {"impl": impl, "top_k": 1, "sigma": 0.0, **pgsa}}), SIZES)
        )
        with torch.no_grad():
            return [key for key, _ in model.encode(x).shown]

    dense, of_candidates, of_all = (shown(p) for p in ({"enabled": False}, {"scope": "candidate"}, {"scope": "all"}))
    torch.testing.assert_close(of_candidates, dense)
    assert not torch.allclose(of_all[-1], dense[-1], atol=1e-3)
