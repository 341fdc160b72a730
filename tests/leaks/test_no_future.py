"""No event at or after an impression's second influences its score, and no candidate influences another, but by what
its list shows of items and features (`hpgr.data.lists`, whose own tests ask what those numbers know).

"Bit-identical" compares batches of equal shape: another shape may round differently, and then 1e-6 is asked.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from helpers_model import (
    CPU,
    MISSES_KNOWN,
    SIZES,
    candidates_of,
    changed,
    inputs,
    log_config,
    make_run,
    random_batch,
    scrambled_history,
    shaken,
    tiny,
    widened,
)

from hpgr.data.preparation import in_process, prepare
from hpgr.data.sessions import session_numbers
from hpgr.data.stream import LocalSource
from hpgr.evaluation import score
from hpgr.model.base import ClickModel
from hpgr.model.hpgr import HstuClick
from hpgr.model.inputs import Inputs
from hpgr.model.logistic import LogisticClick
from hpgr.model.masked_item import MaskedItemModel
from hpgr.model.registry import click_model
from hpgr.schema import MASK, SECOND, Batch
from hpgr.training.two_stage import Run

EVENTS, TARGETS = 12, 5
VARIANTS = {
    "pgsa": {},
    "pgsa on candidates": {"pgsa": {"scope": "candidate", "sigma": 2.0, "top_k": 2}},
    "pgsa by live vectors": {"pgsa": {"anchors": "live", "sigma": 0.0}},
    "pgsa by kept pairs": {"pgsa": {"impl": "gather"}},
    "pgsa by kept pairs, capped": {"pgsa": {"impl": "gather", "max_keys": 4, "sigma": 1.0}},
    "pgsa by the reference": {"pgsa": {"impl": "reference", "max_keys": 4}},
    "pgsa in near sessions": {"pgsa": {"sessions": 1, "top_k": 2}},
    "pgsa in near sessions, by kept pairs": {"pgsa": {"sessions": 1, "impl": "gather"}},
    "pgsa in near sessions, by the reference": {"pgsa": {"sessions": 2, "impl": "reference", "scope": "candidate"}},
    "dense": {"pgsa": {"enabled": False}},
    "no sem": {"sem": {"in_stage2": False}, "match_features": False, "silu_on": "u"},
    "hstu": {"name": "hstu"},
    "hstu, research form": {"name": "hstu", "hstu_form": "research", "layers": 3},
    "without asymmetric svd": {"asvd": {"factors": 0}},
    "dense, without vectors": {"pgsa": {"enabled": False, "summaries": 0}},
    "mtgr": {"name": "mtgr"},
    "mtgr with asymmetric svd": {"name": "mtgr", "asvd": {"baselines": True}},
    "mtgr, three blocks": {"name": "mtgr", "layers": 3, "match_features": False},
    "mtgr with lists": {"name": "mtgr", "lists": {"baselines": True}},
    "din": {"name": "din"},
    "logistic": {"name": "logistic"},
    "three layers": {"layers": 3, "sem": {"intra_layers": 2, "inter_layers": 2}},
}


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> ClickModel:
    torch.manual_seed(0)
    built = shaken(click_model(tiny(model=request.param), MISSES_KNOWN))
    assert isinstance(built, ClickModel)
    return built


@pytest.fixture
def batch() -> Batch:
    return random_batch(4, EVENTS, TARGETS, seed=5)


def scores(model: ClickModel, x: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(x).scores


def doubled(x: Inputs) -> Inputs:
    """With its numbers in float64."""
    return replace(x, h_num=x.h_num.double(), c_num=x.c_num.double())


def events_from(batch: Batch, candidate: int) -> np.ndarray:
    """History events at or after the second of each row's candidate of this number: [E] booleans."""
    moment = batch.t_time.reshape(len(batch), -1)[:, candidate]
    return (batch.h_time.reshape(len(batch), -1) >= moment[:, None]).ravel()


def test_the_batches_have_what_could_leak(batch: Batch) -> None:
    """Events in the very second of an impression, events after it and several candidates at one moment."""
    h, t = batch.h_time.reshape(4, -1), batch.t_time.reshape(4, -1)
    assert (h[:, None, :] == t[:, :, None]).any()
    assert (h[:, None, :] > t[:, :, None]).any()
    assert (np.diff(h, axis=1) == 0).any()
    assert batch.h_session.max() > 1


@pytest.mark.parametrize("candidate", range(TARGETS))
def test_the_future_of_an_impression_does_not_change_its_score(model: ClickModel, batch: Batch, candidate: int) -> None:
    before = scores(model, inputs(batch))[:, candidate]
    future = events_from(batch, candidate)
    assert future.any()
    for later in (False, True):
        other = scrambled_history(batch, future, seed=candidate, later=later)
        if later:
            assert (other.h_time[future] > batch.h_time[future]).all()
        assert torch.equal(scores(model, inputs(other))[:, candidate], before)


@pytest.mark.parametrize("candidate", range(TARGETS))
def test_the_past_of_an_impression_changes_its_score(model: ClickModel, batch: Batch, candidate: int) -> None:
    """The control: the test above sees a change where there is one."""
    before = scores(model, inputs(batch))[:, candidate]
    past = ~events_from(batch, candidate)
    other = scores(model, inputs(scrambled_history(batch, past, later=False)))[:, candidate]
    seen = torch.from_numpy(past.reshape(len(batch), -1).any(1))
    assert seen.any()
    if isinstance(model, LogisticClick):
        pytest.skip("reads exact matches alone, and other items of the past need not be one")
    assert (before != other)[seen].all()


def test_a_single_visible_event_changes_the_score_of_dense_attention(batch: Batch) -> None:
    model = shaken(click_model(tiny(model=VARIANTS["dense"]), SIZES))
    before = scores(model, inputs(batch))[:, 0]
    for event in range(int(batch.t_visible[0])):
        other = changed(batch, h_action=(event, 1 + batch.h_action[event] % (SIZES.actions - 1)))
        assert scores(model, inputs(other))[0, 0] != before[0]


def test_labels_and_actions_of_candidates_do_not_reach_the_scores(model: ClickModel, batch: Batch) -> None:
    before = scores(model, inputs(batch))
    other = replace(batch, t_label=(1 - batch.t_label).astype(np.int8), t_action=1 + batch.t_action)
    assert torch.equal(scores(model, inputs(other)), before)


def test_the_candidates_own_action_in_the_history_is_not_seen(model: ClickModel, batch: Batch) -> None:
    """A clicked impression is also an event of the history, in the impression's own second."""
    row, events = 1, slice(EVENTS, 2 * EVENTS)
    moment = batch.h_time[events][6]
    same_second = np.zeros(len(batch.h_item), bool)
    same_second[events] = batch.h_time[events] == moment
    visible = int((batch.h_time[events] < moment).sum())
    target = row * TARGETS + 2
    batch = changed(
        batch, t_time=(target, moment), t_visible=(target, visible), h_item=(same_second, batch.t_item[target])
    )
    before = scores(model, inputs(batch))[row, 2]
    for action in range(SIZES.actions):
        other = changed(batch, h_action=(same_second, action), h_item=(same_second, 2 + action))
        assert scores(model, inputs(other))[row, 2] == before


def test_candidates_do_not_influence_one_another(model: ClickModel, batch: Batch) -> None:
    before = scores(model, inputs(batch))
    others = np.arange(len(batch.t_item)) % TARGETS != 2
    rng = np.random.default_rng(0)
    n = int(others.sum())
    moved = np.where(others, batch.t_time + 3600 * SECOND, batch.t_time)
    moved_visible = (batch.h_time.reshape(4, 1, -1) < moved.reshape(4, -1, 1)).sum(-1).ravel()
    other = changed(
        batch,
        t_item=(others, rng.integers(2, SIZES.items, n)),
        t_num=(others, rng.normal(size=(n, 3))),
        t_cat=(others, rng.integers(0, 4, (n, 1))),
        t_time=(others, moved[others]),
        t_visible=(others, moved_visible[others]),
    )
    after = scores(model, inputs(other))
    assert torch.equal(after[:, 2], before[:, 2])
    assert (after != before)[:, [0, 1, 3, 4]].any()


def test_candidates_left_out_change_nothing(model: ClickModel, batch: Batch) -> None:
    """In float64: products of fewer candidates are rounded otherwise, which layer norms of shaken weights magnify."""
    model.double()
    alone = candidates_of(batch, np.arange(len(batch.t_item)) % TARGETS == 3)
    before, after = (scores(model, doubled(inputs(b))) for b in (batch, alone))
    torch.testing.assert_close(after[:, 0], before[:, 3], rtol=1e-6, atol=1e-6)


def test_padding_changes_nothing(model: ClickModel, batch: Batch) -> None:
    before = scores(model, inputs(batch))
    for events, targets in ((1, 0), (0, 1), (4, 7)):
        after = scores(model, widened(inputs(batch), events, targets))[:, :TARGETS]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def encoder_states(model: ClickModel, x: Inputs, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """History tokens that enter each layer, as the encoder makes them."""
    states: list[torch.Tensor] = []
    for layer in model.encoder.layers:
        original = type(layer).uvqk

        def spy(tokens: torch.Tensor, layer=layer, original=original) -> object:
            states.append(tokens)
            return original(layer, tokens)

        monkeypatch.setattr(layer, "uvqk", spy)
    scores(model, x)
    monkeypatch.undo()
    return states[::2]


def test_a_history_token_depends_on_its_past_and_itself_alone(
    model: ClickModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer: events of the token's own second, other than itself, and later ones are not seen."""
    if not isinstance(model, HstuClick):
        pytest.skip("has no HSTU encoder")
    before = encoder_states(model, inputs(batch), monkeypatch)
    assert len(before) == len(model.encoder.layers)
    time = batch.h_time.reshape(len(batch), -1)
    for token in range(EVENTS):
        unseen = time >= time[:, [token]]
        unseen[:, token] = False
        after = encoder_states(model, inputs(scrambled_history(batch, unseen.ravel(), later=False)), monkeypatch)
        for h0, h1 in zip(before, after, strict=True):
            assert torch.equal(h0[:, token], h1[:, token])
            changed_rows = torch.from_numpy(unseen.any(1))
            assert (h0 != h1).any(-1).any(-1)[changed_rows].all()


# Stage 1


@pytest.fixture
def masked_model() -> MaskedItemModel:
    torch.manual_seed(0)
    built = shaken(MaskedItemModel(tiny(model={"sem": {"intra_layers": 2, "inter_layers": 2}}), SIZES))
    assert isinstance(built, MaskedItemModel)
    return built


@pytest.fixture
def hidden(batch: Batch) -> Batch:
    """Every third event hidden; the odd rows causal."""
    return replace(batch, h_masked=np.arange(len(batch.h_item)) % 3 == 1)


def encoded(model: MaskedItemModel, x: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.encode(x)


def test_hidden_events_are_hidden(masked_model: MaskedItemModel, hidden: Batch) -> None:
    """Another item, action and features of the hidden events leave every place's prediction as it was."""
    before = encoded(masked_model, inputs(hidden))
    other = scrambled_history(hidden, hidden.h_masked, later=False)
    assert (other.h_item != hidden.h_item)[hidden.h_masked].all()
    assert torch.equal(encoded(masked_model, inputs(other)), before)
    assert torch.equal(
        masked_model.catalogue_logits(encoded(masked_model, inputs(other))), masked_model.catalogue_logits(before)
    )


def test_visible_events_are_seen(masked_model: MaskedItemModel, hidden: Batch) -> None:
    before = encoded(masked_model, inputs(hidden))
    after = encoded(masked_model, inputs(scrambled_history(hidden, ~hidden.h_masked, later=False)))
    both_sides = torch.from_numpy(hidden.h_masked.reshape(4, -1)) & ~torch.from_numpy(hidden.causal)[:, None]
    assert (before != after).any(-1)[both_sides].all()


def test_session_summaries_use_the_masked_view(
    masked_model: MaskedItemModel, hidden: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters the inter-session Transformer does not know the hidden items."""
    seen: list[torch.Tensor] = []
    block = masked_model.sem.inter[0]
    original = type(block).forward

    def spy(self: object, x: torch.Tensor, *rest: object) -> torch.Tensor:
        if self is block:
            seen.append(x)
        return original(self, x, *rest)

    monkeypatch.setattr(type(block), "forward", spy)
    first_hidden = scrambled_history(hidden, hidden.h_masked, later=False)
    for batch in (hidden, first_hidden, scrambled_history(hidden, ~hidden.h_masked, later=False)):
        encoded(masked_model, inputs(batch))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_hidden_event_shows_the_mask_item(masked_model: MaskedItemModel, hidden: Batch) -> None:
    tokens = masked_model.events.history(inputs(hidden), None)
    shown = replace(
        hidden,
        h_item=np.where(hidden.h_masked, MASK, hidden.h_item),
        h_action=np.where(hidden.h_masked, 0, hidden.h_action),
    )
    assert torch.equal(masked_model.events.history(inputs(shown), None), tokens)


def test_the_causal_sem_sees_the_past_alone(masked_model: MaskedItemModel, batch: Batch) -> None:
    causal = replace(batch, causal=np.ones(len(batch), bool))
    before = encoded(masked_model, inputs(causal))
    time = batch.h_time.reshape(len(batch), -1)
    for token in range(EVENTS):
        unseen = time >= time[:, [token]]
        unseen[:, token] = False
        other = scrambled_history(causal, unseen.ravel(), later=False)
        assert torch.equal(encoded(masked_model, inputs(other))[:, token], before[:, token])


def test_the_bidirectional_sem_sees_the_future(masked_model: MaskedItemModel, batch: Batch) -> None:
    """The control of the test above."""
    both = replace(batch, causal=np.zeros(len(batch), bool))
    last = np.arange(len(batch.h_item)) % EVENTS == EVENTS - 1
    before, after = (encoded(masked_model, inputs(b)) for b in (both, scrambled_history(both, last, later=False)))
    assert (before != after).any(-1)[:, 0].all()


# Logs


def date_split(at: tuple[int, int]) -> dict[str, object]:
    return {"by": "date", "validation_from": _iso(at[0]), "test_from": _iso(at[1])}


def _iso(second: int) -> str:
    return str(np.datetime64(second, "s")) + "+00:00"


@pytest.fixture(scope="module")
def two_logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int, int]:
    """Folder of the generated log and of two with other rows from a moment on; validation, test, the later moment."""
    root = tmp_path_factory.mktemp("logs")
    config = log_config(root)
    prepare(config, in_process, lambda _: None)
    parts = sorted(root.glob("prepared/generated-*/log/*.parquet"))
    table = pa.concat_tables([pq.read_table(p) for p in parts])
    time = np.sort(table.column("timestamp").to_numpy())
    validation, test, moment = (int(time[int(len(time) * share)]) for share in (0.6, 0.8, 0.9))
    (root / "original").mkdir()
    pq.write_table(table, root / "original" / "log.parquet")
    for name, change in (("after-test", test), ("inside-test", moment)):
        (root / name).mkdir()
        pq.write_table(rewritten(table, change), root / name / "log.parquet")
    return root, validation, test, moment


def rewritten(table: pa.Table, moment: int) -> pa.Table:
    """The log with other items, labels, devices and new users from `moment` on, and some rows gone."""
    late = table.filter(pc.greater_equal(table["timestamp"], moment))
    rng = np.random.default_rng(0)
    late = late.take(pa.array(np.sort(rng.permutation(late.num_rows)[: late.num_rows * 4 // 5])))
    items = pa.array([f"i{k:05d}" for k in rng.integers(0, 90, late.num_rows)])
    flipped = pc.subtract(1, late["clicked"]).cast(pa.int8())
    users = [u if rng.random() < 0.8 else f"new{k}" for k, u in enumerate(late["user_id"].to_pylist())]
    late = late.set_column(late.schema.get_field_index("item_id"), "item_id", items)
    late = late.set_column(late.schema.get_field_index("clicked"), "clicked", flipped)
    late = late.set_column(late.schema.get_field_index("device"), "device", pa.array(["other"] * late.num_rows))
    late = late.set_column(late.schema.get_field_index("user_id"), "user_id", pa.array(users))
    early = table.filter(pc.less(table["timestamp"], moment))
    return pa.concat_tables([early, late.cast(early.schema)])


def run_on(root: Path, log: str, at: tuple[int, int]) -> Run:
    config = log_config(root, data={"path": str(root / log / "log.parquet"), "split": date_split(at)})
    return make_run(config, root / f"run-{log}")


def scored(run: Run, model: ClickModel, split: str, before: int) -> pa.Table:
    table = score(model, LocalSource().evaluation(run.spec(f"click-{split}")), CPU)
    table = table.filter(pc.less(table["time"], before * SECOND))
    keys = [(name, "ascending") for name in ("user", "time", "item", "label")]
    table = table.sort_by(keys).select(["user", "item", "time", "label", "request", "past", "score"])
    _, first, number = np.unique(table["request"].to_numpy(), return_index=True, return_inverse=True)
    return table.set_column(4, "request", pa.array(first[number]))  # its name is free, who shares it is not


def model_of(run: Run) -> ClickModel:
    torch.manual_seed(0)
    built = shaken(click_model(run.config, run.sizes()))
    assert isinstance(built, ClickModel)
    return built


def test_two_logs_equal_until_the_test_split_prepare_alike(two_logs: tuple[Path, int, int, int]) -> None:
    """Vocabulary, statistics, timelines before the moment and validation scores do not know what follows."""
    root, validation, test, _ = two_logs
    one, two = (run_on(root, log, (validation, test)) for log in ("original", "after-test"))
    assert one.prepared.folder.uri != two.prepared.folder.uri
    assert one.sizes() == two.sizes()
    vocabularies = [r.prepared.folder.read_parquet("vocabulary.parquet") for r in (one, two)]
    assert vocabularies[0].equals(vocabularies[1])
    model = model_of(one)
    for split in ("train", "validation"):
        ours, theirs = (scored(run, model, split, test) for run in (one, two))
        assert ours.num_rows > 20
        assert [c for c in ours.column_names if not ours[c].equals(theirs[c])] == []
    ours, theirs = (scored(run, model, "test", 1 << 40) for run in (one, two))
    assert not ours.equals(theirs)


def test_two_logs_equal_until_a_moment_of_the_test_split_score_alike_before_it(
    two_logs: tuple[Path, int, int, int],
) -> None:
    """Windows differ in shape here, so scores may differ in rounding."""
    root, validation, test, moment = two_logs
    one, two = (run_on(root, log, (validation, test)) for log in ("original", "inside-test"))
    model = model_of(one)
    ours, theirs = (scored(run, model, "test", moment) for run in (one, two))
    assert ours.num_rows > 10
    assert ours.drop_columns(["score"]).equals(theirs.drop_columns(["score"]))
    np.testing.assert_allclose(ours["score"].to_numpy(), theirs["score"].to_numpy(), rtol=1e-5, atol=1e-6)


def test_a_session_that_the_candidates_second_may_yet_prolong_is_open(model: ClickModel) -> None:
    """The last visible event is a session gap and half a second back, and one that the candidate does not see comes in
    its own second within the gap: what follows that one must not be told by the session they all are in."""
    gap = tiny().stream.session_gap_minutes * 60 * SECOND
    start, moment = 10**6 * SECOND, 10**6 * SECOND + int(gap) + 300_000
    time = np.array([start - 3 * int(gap), start, start + int(gap), moment + 200_000, moment + 60 * SECOND])
    seen = (time[None] // SECOND < time[:, None] // SECOND).sum(1)
    batch = replace(
        random_batch(1, 5, 1, seed=1), h_time=time, h_session=session_numbers(time, np.array([0, 5]), gap / 6e7),
        h_visible=seen, t_time=np.array([moment]), t_visible=np.array([2]),
    )  # fmt: skip
    future = np.arange(5) > 2
    before = scores(model, inputs(batch))
    assert torch.equal(scores(model, inputs(scrambled_history(batch, future, later=False))), before)


def test_a_history_that_only_follows_is_no_history(model: ClickModel) -> None:
    """Events from the candidate's second on are in its row for others' sake: their being there tells nothing."""
    batch = random_batch(1, EVENTS, 1, seed=3)
    follows = changed(batch, t_time=(0, batch.h_time[0]), t_visible=(0, 0), t_past=(0, 0))
    gone = {f.name: getattr(batch, f.name)[:0] for f in fields(batch) if f.name[:2] == "h_" and f.name != "h_lengths"}
    alone = replace(follows, h_lengths=np.zeros(1, np.int64), **gone)
    torch.testing.assert_close(scores(model, inputs(follows)), scores(model, inputs(alone)), rtol=1e-6, atol=1e-6)
