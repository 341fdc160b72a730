"""One shard of a batch job, from its candidates to a table of scores. Nothing is written here.

Legend: U timelines of the shard, P candidates (pairs) of it, L items of a list for all, F and G features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hpgr.artifacts import Folder
from hpgr.config import Config
from hpgr.data.batches import Assembler
from hpgr.data.candidates import LIST, REQUEST_PREFIX, Layout, dealt_rows, distinct
from hpgr.data.lists import number_lists
from hpgr.data.ordering import rank_users, run_starts
from hpgr.data.preparation import Prepared
from hpgr.data.timelines import events_before, feature_arrays, features_of
from hpgr.data.vocabulary import MISSING, Vocabulary
from hpgr.schema import ITEM, REQUEST, SECOND, TIME, USER, Array, Floats, Ints, Timelines
from hpgr.scoring.known_features import ItemFeatures, with_known_features
from hpgr.scoring.pairs import Anchors, Pairs, Scorer
from hpgr.scoring.request import Options, Request
from hpgr.scoring.retrieval import NONE, Retriever

NO_LAYOUT = Layout("all", False, (), ())
TIMESTAMP = pa.timestamp("us", "UTC")
ANCHOR = pa.struct([
    ("item", pa.string()), ("time", TIMESTAMP), ("weight", pa.float32()), ("share", pa.float32()),
])  # fmt: skip
COLUMNS = {"user": pa.string(), "item": pa.string(), "time": TIMESTAMP, "score": pa.float32(), "rank": pa.int32(),
           "run": pa.string(), "anchors": pa.list_(ANCHOR)}  # fmt: skip
"""Columns of the scores, without those of requests."""
NO_TIME = np.iinfo(np.int64).max
"""Stands for a time that is not given: later than all that are."""


class Wanted(NamedTuple):
    """Candidates of a shard, ordered by (user, request). `row` [P] is the timeline, `group` [P] the list ranked by
    itself; `names` has the output's columns of what was asked; `duplicates` were asked for again."""

    names: pa.Table
    pairs: Pairs
    group: Ints
    duplicates: int


class Outcome(NamedTuple):
    """A shard's scores (schema as `output_schema`), its user vectors where asked for, and its account."""

    scores: pa.Table
    users: pa.Table | None
    account: dict[str, int]


def request_column(name: str) -> str:
    """What a request column is called among the scores: as in the log, unless another column has that name."""
    return REQUEST_PREFIX + name if name in COLUMNS else name


def output_schema(layout: Layout, options: Options) -> pa.Schema:
    """Columns of the scores that a request asks for."""
    names = ["user", "item", *(["time"] if layout.time else []), *map(request_column, layout.request)]
    names += ["score", "rank", "run", *(["anchors"] if options.explain else [])]
    return pa.schema([(name, COLUMNS.get(name, pa.string())) for name in names])


@dataclass(frozen=True)
class Shards:
    """Scores shards of a request.

    Args:
        config, vocabulary: the run's.
        scorer: stage 2; `retriever` stage 1 (None where it is not asked for).
        users: the prepared timelines.
        items: what is known of items, where candidates do not tell it.
    """

    request: Request
    config: Config
    vocabulary: Vocabulary
    scorer: Scorer
    retriever: Retriever | None
    users: Prepared
    items: ItemFeatures | None = None

    def run(self, shard: int) -> Outcome:
        """Score one shard."""
        options = self.request.options
        known = self._timelines(shard)
        assembler = Assembler({0: known}, self.config.stream.session_gap_minutes)
        wanted = self._wanted(shard, assembler.timelines, assembler)
        if options.explain:
            score, anchors = self.scorer.explain(assembler, wanted.pairs)
        else:
            score, anchors = self.scorer.score(assembler, wanted.pairs), None
        scores, account = self._table(wanted, score, anchors), _account(wanted, self.vocabulary.first_item)
        if options.top_n:
            scores = scores.filter(pc.less_equal(scores.column("rank"), options.top_n))
            account["pairs"] = int(np.minimum(np.bincount(wanted.group), options.top_n).sum())
        users = self._user_vectors(assembler) if options.embeddings else None
        return Outcome(scores, users, account | {"written": scores.num_rows})

    def _timelines(self, shard: int) -> pa.Table:
        """Timelines of the shard's users and, last, an empty one for users who have none."""
        table = self.users.timelines(shard % self.users.buckets)
        mine = table.column("user_hash").to_numpy() % np.uint64(self.request.shards) == shard
        nobody: dict[str, list[Any]] = {
            f.name: [[]] if pa.types.is_list(f.type) else ["" if f.name == "user" else 0] for f in table.schema
        }
        return pa.concat_tables([table.filter(pa.array(mine)), pa.table(nobody, table.schema)]).combine_chunks()

    def _wanted(self, shard: int, timelines: Timelines, assembler: Assembler) -> Wanted:
        if self.request.layout is None:
            return self._retrieved(assembler)
        if self.request.layout.kind == "all":
            return self._crossed(timelines)
        return self._dealt(shard, timelines)

    def _dealt(self, shard: int, timelines: Timelines) -> Wanted:
        """Pairs or lists of the shard's users."""
        request, layout = self.request, self.request.layout
        assert layout is not None
        rows = dealt_rows(shard, request.shards, Folder(request.output), self.config.data, layout)
        rows, user, duplicates = distinct(rows, rank_users(rows.column(USER).combine_chunks()))
        found = pc.index_in(rows.column(USER), value_set=timelines.user.slice(0, len(timelines) - 1))
        row = pc.fill_null(found, len(timelines) - 1).to_numpy().astype(np.int64)
        asked = rows.column(REQUEST).to_numpy()
        group = run_starts(user, asked)
        own, time = _moments(rows.column(TIME), asked, group, request.options.at)
        encoded = self._encoded(rows)
        names = {"user": rows.column(USER), "item": rows.column(ITEM)}
        names |= {"time": rows.column(TIME).cast(TIMESTAMP)} if layout.time else {}
        names |= {request_column(name): rows.column(REQUEST_PREFIX + name) for name in layout.request}
        listed = np.where(asked != 0, number_lists(user, asked, own // SECOND), -1)
        return Wanted(pa.table(names), self._pairs(timelines, row, time, *encoded, listed), group, duplicates)

    def _crossed(self, timelines: Timelines) -> Wanted:
        """Each of the shard's users with the whole of one list."""
        rows, item, cat, num = self.common_list()
        u, n = len(timelines) - 1, rows.num_rows
        row, place = np.repeat(np.arange(u), n), np.tile(np.arange(n), u)
        time = np.full(len(row), self.request.options.at)
        names = pa.table({
            "user": timelines.user.take(pa.array(row)), "item": rows.column(ITEM).take(pa.array(place)),
        })  # fmt: skip
        return Wanted(names, self._pairs(timelines, row, time, item[place], cat[place], num[place]), row, 0)

    def common_list(self) -> tuple[pa.Table, Array, Array, Array]:
        """The list for all users, each item once, with its encoded items and features."""
        rows = Folder(self.request.output).read_parquet(LIST).combine_chunks()
        return rows, *self._encoded(rows)

    def _retrieved(self, assembler: Assembler) -> Wanted:
        """What stage 1 finds for each of the shard's users."""
        options, timelines = self.request.options, assembler.timelines
        assert self.retriever is not None
        row = np.arange(len(timelines) - 1)
        seen = _visible(timelines, row, np.full(len(row), options.at))
        best = self.retriever.top(assembler, row, seen, options.at, options.retrieve, options.drop_seen)
        row, item = np.repeat(row, best.shape[1])[best.ravel() != NONE], best[best != NONE]
        names = pa.table({
            "user": timelines.user.take(pa.array(row)), "item": self._item_names(item),
        })  # fmt: skip
        widths = [len(features_of(self.config.data.features, "t_", kind)) for kind in ("cat", "num")]
        cat, num = np.full((len(row), widths[0]), MISSING), np.full((len(row), widths[1]), np.nan, np.float32)
        time = np.full(len(row), options.at)
        return Wanted(names, self._pairs(timelines, row, time, item, cat, num), row, 0)

    def _encoded(self, rows: pa.Table) -> tuple[Array, Array, Array]:
        """Item indices and target features of canonical candidates: [P], [P, F], [P, G]."""
        item = self.vocabulary.item_indices(rows.column(ITEM).combine_chunks())
        every = np.arange(rows.num_rows)
        return item, *feature_arrays(rows, every, "t_", self.vocabulary, self.config.data)

    def _pairs(
        self,
        timelines: Timelines,
        row: Ints,
        time: Ints,
        item: Array,
        cat: Array,
        num: Array,
        listed: Ints | None = None,
    ) -> Pairs:
        """Encoded candidates; `listed` as of `list_features`, None where none is shown in a list."""
        data, given = self.config.data, self.request.layout.features if self.request.layout else ()
        pairs = Pairs(row, item, time, _visible(timelines, row, time), cat, num)
        return with_known_features(pairs, timelines, self.items, data, given, bool(self.users.lists), listed)

    def _item_names(self, item: Ints) -> pa.Array:
        """Ids of item indices; null for an unknown item, of which only a hash is kept."""
        known = item >= self.vocabulary.first_item
        index = pa.array(np.where(known, item - self.vocabulary.first_item, 0), mask=~known)
        return self.vocabulary.items.column("value").combine_chunks().take(index)

    def _table(self, wanted: Wanted, score: Floats, anchors: Anchors | None) -> pa.Table:
        """The output's rows, by user, request and rank. Equal scores keep the order of (item, content) hashes."""
        group = wanted.group
        order = np.lexsort((np.arange(len(group)), -score, group))
        rank = np.arange(len(group)) - run_starts(group[order]) + 1
        table = wanted.names.append_column("score", pa.array(score))
        if anchors is not None:
            table = table.append_column("anchors", self._anchor_lists(anchors))
        table = table.take(pa.array(order)).append_column("rank", pa.array(rank, pa.int32()))
        table = table.append_column("run", pa.array([self.request.run_id] * len(rank), pa.string()))
        schema = output_schema(self.request.layout or NO_LAYOUT, self.request.options)
        return table.select(schema.names).cast(schema)

    def _anchor_lists(self, anchors: Anchors) -> pa.Array:
        columns = [self._item_names(anchors.item), pa.array(anchors.time, TIMESTAMP),
                   pa.array(anchors.weight, pa.float32()), pa.array(anchors.share, pa.float32())]  # fmt: skip
        structs = pa.StructArray.from_arrays(columns, fields=list(ANCHOR))
        offsets = np.concatenate([[0], np.cumsum(anchors.lengths)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)

    def _user_vectors(self, assembler: Assembler) -> pa.Table:
        """Vectors of the shard's timelines as they are at `at`."""
        assert self.retriever is not None
        timelines, at = assembler.timelines, self.request.options.at
        row = np.arange(len(timelines) - 1)
        vectors = self.retriever.user_vectors(assembler, row, _visible(timelines, row, np.full(len(row), at)), at)
        return pa.table({"user": timelines.user.slice(0, len(row)), "vector": vector_column(vectors)})


def vector_column(values: Array) -> pa.Array:
    """[n, D] -> a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values), pa.float32()), values.shape[1])


def _moments(given: pa.ChunkedArray, request: Ints, group: Ints, at: int) -> tuple[Ints, Ints]:
    """Each candidate's own time, and the moment that it is scored at: of a request, its earliest row's, as in
    preparation. A row of a request that gives no time has its request's earliest; where there is none either, `at`."""
    own = pc.fill_null(given, NO_TIME).to_numpy().astype(np.int64)
    first = np.flatnonzero(group == np.arange(len(group)))
    earliest = own
    if len(first):
        earliest = np.repeat(np.minimum.reduceat(own, first), np.diff(np.append(first, len(group))))
    moment = np.where(request != 0, earliest, own)
    moment = np.where(moment == NO_TIME, at, moment)
    return np.where(own == NO_TIME, moment, own), moment


def _visible(timelines: Timelines, row: Ints, time: Ints) -> Ints:
    """Events of each timeline strictly before a moment: [P]."""
    user = np.repeat(np.arange(len(timelines)), np.diff(timelines.h_offsets))
    return events_before(user, timelines.h_time, row, time)


def _account(wanted: Wanted, first_item: int) -> dict[str, int]:
    """Counts of a shard; a user has no history where no candidate of theirs sees an event."""
    names, pairs = wanted.names, wanted.pairs
    user = names.column("user").combine_chunks().dictionary_encode().indices.to_numpy()
    users = int(user.max(initial=-1)) + 1
    some = np.zeros(users, bool)
    some[user[pairs.visible > 0]] = True
    return {
        "pairs": len(pairs),
        "duplicates": wanted.duplicates,
        "users": users,
        "users_without_history": int((~some).sum()),
        "pairs_without_history": int((pairs.visible == 0).sum()),
        "unknown_items": int((pairs.item < first_item).sum()),
    }
