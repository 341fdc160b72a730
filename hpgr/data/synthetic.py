"""The generated log: a world whose hidden rule is known, so that a model can be compared with the truth.

Legend: U users of a chunk, K interests of a user, S sessions, E engagements, L lists, C candidates of a list,
P pairs of an impression and an earlier engagement. Times are whole seconds; users (counted from the chunk's
first) and items are numbers until tables are made. Flat arrays are in order of user, then time.

Users come in chunks of fixed size, each with a random stream of its own, so memory is bounded and a user's
rows do not depend on how many users there are. The world and all constants below are our decision.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.random import Generator
from pyarrow import fs

from hpgr.config import Synthetic
from hpgr.errors import ConfigError, DataError
from hpgr.schema import Array, Ints, offsets_of, ranges

Doubles = npt.NDArray[np.float64]

GENERATOR = 1
"""Raise it when the same settings give other rows, so that logs of an older generator are written anew."""
LOG_COLUMNS = ("user_id", "item_id", "timestamp", "event", "clicked", "list_id", "slot", "device")
CHUNK_USERS = 512
BLOCK = 2048
"""Impressions paired with their past at once; bounds memory."""
START, DAYS, DAY, HOUR = 1_704_067_200, 30, 86_400, 3_600  # 2024-01-01 UTC
GAP, MEAN_GAP, MAX_GAP = 6, 60, 900
"""Seconds from an engagement to the next: at least, on average (about), at most."""
FOCUS = 0.85
"""Share of a session's engagements that stay in its category; the rest go to any of the interests."""
INTERESTING = 0.5
"""Share of candidates drawn from the user's interests; the rest come from any category."""
BASE, CENTRE, SATURATION, QUALITY = -1.2, 0.35, 2.0, 0.3
"""Log-odds of a click at interest CENTRE (0 none, 1 most), evidence at which interest reaches 1 - 1/e, and
the standard deviation of item quality in log-odds."""
DEVICES, DEVICE_SHARES = ("phone", "tablet", "desktop"), (0.6, 0.1, 0.3)


def write_log(settings: Synthetic, folder: str, filesystem: fs.FileSystem) -> list[str]:
    """Write `log/part-*.parquet` and `truth/part-*.parquet` under `folder`; return the log's paths.

    The truth holds user_id, item_id, timestamp and click probability of each impression, in the log's order.
    `_DONE` with the settings is written last; where it already holds the same settings nothing is done.
    Raises ConfigError for settings that no world can have.
    """
    names = [f"part-{index:05d}.parquet" for index in range(-(-settings.users // CHUNK_USERS))]
    done, marker = f"{folder}/_DONE", json.dumps({"generator": GENERATOR, **settings.model_dump()}).encode()
    if _read(done, filesystem) != marker:
        world = _world(settings)
        _clear(folder, filesystem)
        for index, name in enumerate(names):
            chunk = _chunk(settings, world, index)
            pq.write_table(_log_table(chunk), f"{folder}/log/{name}", filesystem=filesystem)
            pq.write_table(_truth_table(chunk), f"{folder}/truth/{name}", filesystem=filesystem)
        with filesystem.open_output_stream(done) as out:
            out.write(marker)
    return [f"{folder}/log/{name}" for name in names]


def relevance(settings: Synthetic, user_ids: Sequence[str]) -> pa.Table:
    """Every (impression, strictly past engagement) pair of these users, P rows in order of user and list.

    Columns user_id, item_id, timestamp (of the impression), past_item_id, past_timestamp, weight (what the
    engagement adds to the evidence for a click: exp(-age / memory), or 0 if irrelevant) and is_noise.
    Raises DataError for a user who is not in the log.
    """
    world, users = _world(settings), _numbers(settings, user_ids)
    tables = []
    for index in np.unique(users // CHUNK_USERS) if len(users) else [0]:
        chunk = _chunk(settings, world, int(index))
        wanted = np.isin(chunk.first + chunk.lists.user, users).repeat(settings.list_size)
        for pairs in _pairs(settings, world, chunk.events, chunk.lists, np.flatnonzero(wanted)):
            tables.append(_pair_table(chunk, *pairs))
    return pa.concat_tables(tables)


def planted(settings: Synthetic) -> tuple[pa.Table, pa.Table]:
    """What the world hides, in the compact form of `relevance`: an engagement matters to an impression if their items
    are of one category and it is not noise.

    Returns:
        every item's item_id and category; every engagement's user_id, timestamp (unique within a user) and is_noise.
    """
    world = _world(settings)
    items = pa.table({"item_id": _ids("i", np.arange(settings.items), 5), "category": world.category})
    tables = []
    for index in range(-(-settings.users // CHUNK_USERS)):
        chunk = _chunk(settings, world, index)
        events = chunk.events
        columns = [_ids("u", chunk.first + events.user, 6), events.time, events.noise]
        table = pa.table(columns, ["user_id", "timestamp", "is_noise"])
        tables.append(table.filter(pa.array(events.user < chunk.users)))
    return items, pa.concat_tables(tables)


@dataclass(frozen=True)
class World:
    """Items and their hidden traits, the same for all users."""

    category: Ints  # [items]
    quality: Doubles  # [items], log-odds
    by_category: Ints  # [items], item numbers in order of category, then popularity
    starts: Ints  # [categories + 1], where a category begins in by_category
    mass: Doubles  # [items + 1], popularity summed along by_category

    def draw(self, category: Ints, rng: Generator) -> Ints:
        """One item by popularity for each entry of `category`."""
        low, high = self.starts[category], self.starts[category + 1]
        at = self.mass[low] + rng.random(category.shape) * (self.mass[high] - self.mass[low])
        place = np.searchsorted(self.mass, at, side="right") - 1
        items: Ints = self.by_category[np.clip(place, low, high - 1)]
        return items


@dataclass(frozen=True)
class People:
    """Traits of the users of a chunk."""

    interests: Ints  # [U, K], distinct categories
    share: Doubles  # [U, K], cumulative weight of the interests
    device: Ints  # [U]

    def draw(self, user: Ints, rng: Generator) -> Ints:
        """One interest by weight for each entry of `user` [n]."""
        place = (rng.random(len(user))[:, None] >= self.share[user, :-1]).sum(axis=1)
        picked: Ints = self.interests[user, place]
        return picked


@dataclass(frozen=True)
class Events:
    """Engagements; times of a user are distinct."""

    user: Ints  # [E]
    item: Ints  # [E]
    time: Ints  # [E]
    noise: Array  # [E], bool
    last: Array  # [E], bool: the session's last


@dataclass(frozen=True)
class Lists:
    """Lists shown; times of a user are distinct and never those of an engagement."""

    user: Ints  # [L]
    time: Ints  # [L]
    items: Ints  # [L, C], distinct in a list

    def flat(self) -> tuple[Ints, Ints, Ints]:
        """User, item and time of each impression, [L * C] each."""
        size = self.items.shape[1]
        return self.user.repeat(size), self.items.ravel(), self.time.repeat(size)


@dataclass(frozen=True)
class Chunk:
    """All that happens to a chunk's users; users from `users` on are not part of the log."""

    first: int
    users: int
    device: Ints  # [U]
    events: Events
    lists: Lists
    probability: Doubles  # [L, C]
    clicked: Array  # [L, C], bool


def _world(settings: Synthetic) -> World:
    n, items = settings.categories, settings.items
    for name, most in (("categories", items), ("interests", n), ("list_size", items // 2)):
        if getattr(settings, name) > most:
            got = f"got {getattr(settings, name)}, expected at most {most}"
            raise ConfigError(f"data.synthetic.{name}: {got} (items {items}, categories {n})")
    rng = np.random.default_rng((settings.seed, 0))
    sizes = items // n + (np.arange(n) < items % n)
    by_category = rng.permutation(items)
    category = np.empty(items, np.int64)
    category[by_category] = np.repeat(np.arange(n), sizes)
    popularity = ranges(np.ones(n), sizes) ** -settings.skew
    mass = np.concatenate([[0.0], np.cumsum(popularity)])
    return World(category, rng.normal(0, QUALITY, items), by_category, offsets_of(sizes), mass)


def _chunk(settings: Synthetic, world: World, index: int) -> Chunk:
    """Draw a chunk; the draws do not depend on the number of users, so a chunk is always drawn whole."""
    rng = np.random.default_rng((settings.seed, 1 + index))
    people = _people(settings, rng)
    events = _events(settings, world, people, rng)
    lists = _lists(settings, world, people, events, rng)
    probability = _probability(settings, world, events, lists)
    clicked = rng.random(probability.shape) < probability
    first = index * CHUNK_USERS
    return Chunk(first, settings.users - first, people.device, events, lists, probability, clicked)


def _people(settings: Synthetic, rng: Generator) -> People:
    scores = rng.random((CHUNK_USERS, settings.categories))
    interests = np.argsort(scores, axis=1)[:, : settings.interests]
    share = np.cumsum(rng.dirichlet(np.full(settings.interests, 2.0), CHUNK_USERS), axis=1)
    return People(interests, share, rng.choice(len(DEVICES), CHUNK_USERS, p=DEVICE_SHARES))


def _events(settings: Synthetic, world: World, people: People, rng: Generator) -> Events:
    sessions = np.maximum(2, rng.poisson(settings.sessions, CHUNK_USERS))
    sizes = 1 + rng.poisson(settings.session_events - 1, sessions.sum())
    s_user, n = np.repeat(np.arange(CHUNK_USERS), sessions), int(sizes.sum())
    user, topic = np.repeat(s_user, sizes), np.repeat(people.draw(s_user, rng), sizes)
    gaps = GAP + np.minimum(rng.exponential(MEAN_GAP, n), MAX_GAP - GAP).astype(np.int64)
    time = np.repeat(_starts(sessions, sizes, gaps, rng), sizes) + _before(gaps, sizes)
    category = np.where(rng.random(n) < FOCUS, topic, people.draw(user, rng))
    noise = rng.random(n) < settings.noise
    category = np.where(noise, rng.integers(0, settings.categories, n), category)
    last = np.zeros(n, bool)
    last[np.cumsum(sizes) - 1] = True
    return Events(user, world.draw(category, rng), time, noise, last)


def _starts(sessions: Ints, sizes: Ints, gaps: Ints, rng: Generator) -> Ints:
    """Start of each session [S]: uniform over the days, pushed on by earlier ones and an hour after each."""
    user = np.repeat(np.arange(len(sessions)), sessions)
    moment = rng.integers(0, DAYS * DAY, len(user))
    busy = np.add.reduceat(gaps, offsets_of(sizes)[:-1]) + HOUR
    return START + moment[np.lexsort((moment, user))] + _before(busy, sessions)


def _before(values: Ints, lengths: Ints) -> Ints:
    """Sum of the values before each one in its run; runs of the given lengths (all positive) lie in a row."""
    total = np.cumsum(values) - values
    return total - np.repeat(total[offsets_of(lengths)[:-1]], lengths)


def _lists(settings: Synthetic, world: World, people: People, events: Events, rng: Generator) -> Lists:
    """A list comes seconds after an engagement, no two after the same (so no more than those);
    about half of them end a session."""
    wanted = np.maximum(1, rng.poisson(settings.impressions, CHUNK_USERS))
    ease = np.where(events.last, max(settings.session_events - 1, 1), 1)
    order = np.lexsort((rng.exponential(size=len(ease)) / ease, events.user))
    after = np.sort(order[_rank(events.user) < wanted[events.user]])
    user, time = events.user[after], events.time[after] + rng.integers(1, GAP, len(after))
    return Lists(user, time, _candidates(settings, world, people, user, rng))


def _rank(user: Ints) -> Ints:
    """Place of each entry among its user's, from 0; `user` is sorted."""
    return np.arange(len(user)) - np.searchsorted(user, user)


def _candidates(settings: Synthetic, world: World, people: People, user: Ints, rng: Generator) -> Ints:
    """Distinct items [L, C]. Repeats are drawn again, after ten rounds from all items alike, so it ends."""
    items = np.empty((len(user), settings.list_size), np.int64)
    again, rounds = np.ones(items.shape, bool), 0
    while again.any():
        who = user[np.nonzero(again)[0]]
        anywhere = rng.integers(0, settings.categories, len(who))
        category = np.where(rng.random(len(who)) < INTERESTING, people.draw(who, rng), anywhere)
        alike = rounds >= 10
        items[again] = rng.integers(0, settings.items, len(who)) if alike else world.draw(category, rng)
        again, rounds = _repeats(items), rounds + 1
    return items


def _repeats(items: Ints) -> Array:
    """True where an entry of a row [L, C] equals an earlier one of that row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    same = np.zeros(items.shape, bool)
    np.put_along_axis(same, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return same


def _probability(settings: Synthetic, world: World, events: Events, lists: Lists) -> Doubles:
    """Click probability [L, C]: log-odds of the saturated sum of past weights and of the item's quality."""
    evidence = np.zeros(lists.items.size)
    for impression, _, weight in _pairs(settings, world, events, lists, np.arange(lists.items.size)):
        evidence += np.bincount(impression, weight, lists.items.size)
    interest = 1 - np.exp(-evidence.reshape(lists.items.shape) / SATURATION)
    odds = BASE + settings.strength * (interest - CENTRE) + world.quality[lists.items]
    return 1 / (1 + np.exp(-odds))


def _pairs(
    settings: Synthetic, world: World, events: Events, lists: Lists, impressions: Ints
) -> Iterator[tuple[Ints, Ints, Doubles]]:
    """The given impressions (list * C + slot) with each strictly earlier engagement of the user, in blocks.

    Yields impression, engagement and weight (exp(-age / memory) where relevant, else 0), [P] each.
    """
    users, items, times = lists.flat()
    span = int(max(events.time.max(), lists.time.max())) + 1
    key = events.user * span + events.time
    for block in np.split(impressions, range(BLOCK, len(impressions), BLOCK)):
        low = np.searchsorted(events.user, users[block])
        count = np.searchsorted(key, users[block] * span + times[block]) - low
        impression, event = np.repeat(block, count), ranges(low, count)
        decayed = np.exp((events.time[event] - times[impression]) / (settings.memory_days * DAY))
        same = world.category[items[impression]] == world.category[events.item[event]]
        yield impression, event, np.where(same & ~events.noise[event], decayed, 0.0)


def _log_table(chunk: Chunk) -> pa.Table:
    """Engagements, then impressions; list_id is the user and the number of the user's list."""
    events, lists = chunk.events, chunk.lists
    n, (m, size) = len(events.user), lists.items.shape
    keys = zip((events.user, events.item, events.time), lists.flat(), strict=True)
    user, item, time = (np.concatenate(pair) for pair in keys)
    owner, number = _ids("u", chunk.first + lists.user, 6), _ids("", _rank(lists.user), 3)
    list_id = pc.binary_join_element_wise(owner, number, "-")
    columns = {
        "user_id": _ids("u", chunk.first + user, 6),
        "item_id": _ids("i", item, 5),
        "timestamp": pa.array(time),
        "event": pa.array(["view", "impression"]).take(pa.array(np.repeat([0, 1], [n, m * size]))),
        "clicked": _after_nulls(n, pa.array(chunk.clicked.ravel().astype(np.int8))),
        "list_id": _after_nulls(n, list_id.take(pa.array(np.repeat(np.arange(m), size)))),
        "slot": _after_nulls(n, pa.array(np.tile(np.arange(size, dtype=np.int32), m))),
        "device": pa.array(DEVICES).take(pa.array(chunk.device[user])),
    }
    return pa.table(columns).filter(pa.array(user < chunk.users))


def _truth_table(chunk: Chunk) -> pa.Table:
    user, item, time = chunk.lists.flat()
    columns = [_ids("u", chunk.first + user, 6), _ids("i", item, 5), time, chunk.probability.ravel()]
    table = pa.table(columns, ["user_id", "item_id", "timestamp", "probability"])
    return table.filter(pa.array(user < chunk.users))


def _pair_table(chunk: Chunk, impression: Ints, event: Ints, weight: Doubles) -> pa.Table:
    user, item, time = (values[impression] for values in chunk.lists.flat())
    columns = {
        "user_id": _ids("u", chunk.first + user, 6),
        "item_id": _ids("i", item, 5),
        "timestamp": time,
        "past_item_id": _ids("i", chunk.events.item[event], 5),
        "past_timestamp": chunk.events.time[event],
        "weight": weight,
        "is_noise": chunk.events.noise[event],
    }
    return pa.table(columns)


def _ids(prefix: str, numbers: Ints, width: int) -> pa.Array:
    """Numbers as text of at least `width` digits after the prefix: u000123."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(prefix, digits, "")


def _numbers(settings: Synthetic, user_ids: Sequence[str]) -> Ints:
    """Distinct user numbers in order; the reverse of `_ids`."""
    for user_id in user_ids:
        if not re.fullmatch(r"u[0-9]{6,}", user_id) or int(user_id[1:]) >= settings.users:
            raise DataError(f"user_ids: got {user_id!r}, expected u000000 to u{settings.users - 1:06d}")
    return np.unique(np.array([int(user_id[1:]) for user_id in user_ids], np.int64))


def _after_nulls(n: int, values: pa.Array) -> pa.Array:
    return pa.concat_arrays([pa.nulls(n, values.type), values])


def _read(path: str, filesystem: fs.FileSystem) -> bytes | None:
    """Content of a small file, or None where there is none."""
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_file(path) as source:
        return bytes(source.read())


def _clear(folder: str, filesystem: fs.FileSystem) -> None:
    """Make the folders; remove the marker, then old parts: a log cut short is never taken for whole."""
    old = [filesystem.get_file_info(f"{folder}/_DONE")]
    for part in ("log", "truth"):
        filesystem.create_dir(f"{folder}/{part}", recursive=True)
        old += filesystem.get_file_info(fs.FileSelector(f"{folder}/{part}"))
    for info in old:
        if info.type == fs.FileType.File and re.fullmatch(r"_DONE|part-\d+\.parquet", info.base_name):
            filesystem.delete_file(info.path)
