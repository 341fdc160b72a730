"""Logs -> prepared timelines, as passes over fragments and buckets that any executor can run in parallel.

    scan    fragment -> validated rows by user hash into bucket files; bad rows to quarantine/
    sort    bucket   -> total order, exact duplicates dropped
    refine  bucket   -> impressions a second around a cut-off (splits by time fraction)
    count   bucket   -> values of training time
    merge            -> vocabulary
    encode  bucket   -> timelines

Each pass writes files with names made from its input, so a repeated task overwrites its own work, and the
manifest comes last: a folder without one is not a prepared log. Design: ours; the only shuffle is `scan`.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

import hpgr
from hpgr.artifacts import FORMAT, Folder, absolute, check_format, fingerprint
from hpgr.config import Config, Data, dump
from hpgr.data import split as splits
from hpgr.data import staging
from hpgr.data.hashing import hash_text
from hpgr.data.item_rates import WEAKER, item_prior, rate_losses
from hpgr.data.lists import LATE, list_columns
from hpgr.data.ordering import order_rows
from hpgr.data.sources import Fragment, find_files, fragments, inputs_fingerprint, is_absent, read
from hpgr.data.synthetic import LOG_COLUMNS, write_log
from hpgr.data.timelines import column_names, encode, training_rows, write_timelines
from hpgr.data.validation import empty_rows, needed_columns, validate
from hpgr.data.vocabulary import Vocabulary, count, merge
from hpgr.errors import ArtifactError, ConfigError, DataError
from hpgr.locks import held
from hpgr.schema import ITEM, LIST_PREFIX, SECOND, TRAIN, USER, Array, Ints, Timelines, offsets_of

T = TypeVar("T")
R = TypeVar("R")
Execute = Callable[[str, Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Runs a function over items, in any order or place, and yields the results in the items' order."""

BUCKET_ROWS = 400_000
VOCABULARY_FILES = ("vocabulary.parquet", "vocabulary.json")
SPLIT_NAMES = ("train", "validation", "test")
TELL_UNKNOWN = 0.01
"""A run is told of out-of-vocabulary items from this share of its test impressions on."""


@dataclass(frozen=True)
class Prepared:
    """A prepared log: where it is and what its manifest says."""

    folder: Folder
    manifest: dict[str, Any]

    def timelines(self, bucket: int) -> pa.Table:
        """Timelines of one bucket; schema as `hpgr.schema.timeline_schema`."""
        return self.folder.read_parquet(f"timelines/bucket-{bucket:05d}.parquet")

    @property
    def buckets(self) -> int:
        return int(self.manifest["buckets"])

    @property
    def lists(self) -> list[str]:
        """Names of the numbers that lists tell of its candidates; none where lists are not compared."""
        return [name for name in self.manifest["features"]["t_num"] if name.startswith(LIST_PREFIX)]

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_tables(
            self.folder.read_parquet("vocabulary.parquet"), self.folder.read_json("vocabulary.json")
        )

    def keep(self, folder: Folder) -> None:
        """Copy what a model needs of the log beside it: manifest, with where the log is, and vocabulary."""
        for name in VOCABULARY_FILES:
            folder.write(name, self.folder.read(name))
        folder.write_json("manifest.json", self.manifest | {"uri": self.folder.uri})

    @classmethod
    def open(cls, folder: Folder) -> Prepared:
        """Read a prepared log's manifest.

        Raises:
            ArtifactError: there is none, or it is of another version.
        """
        manifest = folder.read_json("manifest.json")
        check_format(manifest, f"prepared log {folder.uri}")
        return cls(folder, manifest)


def check_log(data: Data) -> None:
    """What can be told of a log before a Ray is started for it: a setting that is missing, and of a log on this
    machine that it is not there or has no such column.

    Raises:
        ConfigError: the log of these settings is nowhere, or has no clicks.
        DataError: it cannot be used.
    """
    _check_named(data)
    local = [path for path in _given(data) if "://" not in path]
    if local:
        fragments(find_files(local, data.format), needed_columns(data))


def _check_named(data: Data) -> None:
    if data.columns.label is None:
        raise ConfigError("data.columns.label: got null, expected the column of clicks; stage 2 learns from it")
    foreign = [name for name in needed_columns(data) if name not in LOG_COLUMNS]
    if data.path is None and foreign:
        raise ConfigError(f"data.path: got none, and the generated log has no column {', '.join(map(repr, foreign))}; "
                          "expected where the log of this configuration is: --set data.path=...")  # fmt: skip


def prepare(config: Config, execute: Execute, say: Callable[[str], None]) -> Prepared:
    """Prepare the log of a configuration, or reuse what an equal input and settings gave before.

    Raises:
        DataError: the log cannot be used; what is wrong and what to change.
    """
    data = config.data
    _check_named(data)
    files = find_files([_generated(data, say)] if data.path is None else _given(data), data.format)
    inputs = inputs_fingerprint(files)
    settings = {k: v for k, v in dump(config)["data"].items() if k not in ("prepared", "path", "synthetic")}
    told = inputs if data.path is not None else data.synthetic.model_dump(mode="json")  # written again, it is the same
    name = fingerprint({"format": FORMAT, "inputs": told, "settings": settings})
    folder = Folder(absolute(data.prepared)).sub(name)
    with sole(folder, say):
        if folder.exists("manifest.json"):
            say(f"prepare: inputs and settings unchanged, reusing {folder.uri}")
            return Prepared.open(folder)
        say(f"prepare: {len(files)} file(s), {sum(f.size for f in files) / 1e6:,.1f} MB -> {folder.uri}")
        folder.delete()
        pieces = fragments(files, needed_columns(data))
        job = Job(data, folder, bucket_count(pieces), execute, say)
        manifest = {
            "format": FORMAT,
            "fingerprint": name,
            "inputs": inputs,
            "settings": settings,
            **job.run(pieces),
        }
        folder.delete(staging.STAGING)
        folder.write_json("manifest.json", manifest)
    return Prepared(folder, manifest)


@contextmanager
def sole(folder: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """The right to write a prepared log, or leave to read it: of two that want the same one, the second waits."""
    if folder.exists("manifest.json"):
        yield
        return
    home, _, name = folder.uri.rpartition("/")
    with held(Folder(home), "preparation", say, prefix=f"{name}.lock", wait=True):
        yield


def _given(data: Data) -> list[str]:
    return [data.path] if isinstance(data.path, str) else list(data.path or ())


def _generated(data: Data, say: Callable[[str], None]) -> str:
    """The generated log, which is written unless it is there."""
    log = generated_log(data)
    filesystem, path = log.path()
    with staging.writing(path), sole(log, say):
        filesystem.create_dir(path, recursive=True)
        write_log(data.synthetic, path, filesystem)
    say(f"prepare: no data.path, using the generated log in {log.uri}")
    return log.sub("log").uri


def generated_log(data: Data) -> Folder:
    """Where the generated log of these settings is kept: `log` and `truth` inside."""
    return Folder(absolute(data.prepared)).sub(f"generated-{fingerprint(data.synthetic.model_dump())}")


def bucket_count(pieces: Sequence[Fragment]) -> int:
    """Buckets of about BUCKET_ROWS rows; from the log alone, so the layout does not depend on the cluster."""
    return min(1024, max(1, math.ceil(sum(piece.rows for piece in pieces) / BUCKET_ROWS)))


@dataclass(frozen=True)
class Job:
    """The passes over one log, and where their files go."""

    data: Data
    folder: Folder
    buckets: int
    execute: Execute
    say: Callable[[str], None]

    def run(self, pieces: Sequence[Fragment]) -> dict[str, Any]:
        """All passes in order; returns the manifest without its name."""
        account, sorts = self.order(pieces, self.data.split.by == "time_fraction", whole=True)
        every = range(self.buckets)
        cuts = self._cut_offs(sorts)
        counts = list(
            self.execute("count", partial(count_bucket, data=self.data, folder=self.folder, cuts=cuts), every)
        )
        account |= self._split_account(counts)
        train = account["splits"]["train"]
        base_rate = train["positives"] / train["impressions"]
        merging = partial(merge_counts, data=self.data, folder=self.folder, base_rate=base_rate)
        sizes, prior = next(iter(self.execute("merge", merging, [self.buckets])))
        lists, priors = self._lists(counts), np.multiply(prior, WEAKER)
        encoding = partial(encode_bucket, data=self.data, folder=self.folder, cuts=cuts, lists=lists,
                           base_rate=base_rate, priors=priors)  # fmt: skip
        encoded = list(self.execute("encode", encoding, every))
        account["timelines"] = sum(timelines for timelines, *_ in encoded)
        account["unknown_items"] = self._unknown(np.sum([unknown for _, _, unknown, _ in encoded], axis=0), account)
        prior = float(priors[np.argmin(np.sum([losses for *_, losses in encoded], axis=0))])
        return {
            "buckets": self.buckets,
            "account": account,
            "cut_offs": None if cuts is None else asdict(cuts),
            "vocabulary": sizes,
            "train_actions": np.sum([counts for _, counts, *_ in encoded], axis=0).tolist(),
            "item_prior": prior if math.isfinite(prior) else None,
            "features": {s + k: column_names(self.data, s, k, lists) for s in ("h_", "t_") for k in ("cat", "num")},
            "versions": versions(),
        }  # fmt: skip

    def _lists(self, counts: list[dict[str, Any]]) -> list[str]:
        """What lists are to tell of candidates: nothing if rows of a list are seconds apart, for such a time may be a
        click's own, and what was shown up to it would tell the click."""
        late, listed = (np.sum([c[key] for c in counts], axis=0) for key in ("late", "listed"))
        share = (late / np.maximum(listed, 1)).max()
        if share <= LATE:
            return list_columns(self.data)
        self.say(f"prepare: {share:.1%} of training's clicks or other impressions come seconds after the first row of "
                 "their list. Such a time may tell what was clicked, so candidates are not compared with their lists; "
                 "map data.columns.time to when the list was shown")  # fmt: skip
        return []

    def _unknown(self, unknown: Array, account: dict[str, Any]) -> dict[str, int]:
        """Impressions whose item the vocabulary lacks, by split; told where they are many."""
        counts = dict(zip(SPLIT_NAMES, unknown.tolist(), strict=True))
        share = counts["test"] / account["splits"]["test"]["impressions"]
        if share > TELL_UNKNOWN:
            self.say(f"prepare: the items of {share:.0%} of the test impressions are out of vocabulary and share "
                     f"{self.data.vocabulary.oov_buckets:,} vectors; if they are many more than that, raise "
                     "data.vocabulary.oov_buckets")  # fmt: skip
        return counts

    def order(
        self, pieces: Sequence[Fragment], hours: bool, whole: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scan and sort: every row is then in an ordered bucket, in quarantine or a duplicate.

        `whole` asks that each mapped column is somewhere in the log. Returns the account and what `sort` told of each
        bucket.
        """
        deal = partial(scan, data=self.data, folder=self.folder, buckets=self.buckets)
        scans = list(self.execute("scan", deal, pieces))
        account = self._scanned(scans)
        if whole and all(piece.file.format == "jsonl" for piece in pieces):
            self._check_columns(scans)
        ordering = partial(sort, data=self.data, folder=self.folder, hours=hours)
        sorts = list(self.execute("sort", ordering, range(self.buckets)))
        account["duplicates"] = sum(s["duplicates"] for s in sorts)
        account["kept"] = sum(s["rows"] for s in sorts)
        self._balance(account)
        return account, sorts

    def _check_columns(self, scans: list[dict[str, Any]]) -> None:
        """Lines may leave a key out, so a name that is mistyped shows only when all have been read."""
        missing = [name for name in needed_columns(self.data) if not any(name in s["columns"] for s in scans)]
        if missing:
            raise DataError(f"no line of data.path has {', '.join(map(repr, missing))}; correct the name in "
                            "data.columns, data.features or the rules, or leave it out")  # fmt: skip

    def _scanned(self, scans: list[dict[str, Any]]) -> dict[str, Any]:
        reasons: Counter[str] = Counter()
        for s in scans:
            reasons.update(s["reasons"])
        rows, bad = sum(s["rows"] for s in scans), sum(reasons.values())
        if rows == 0:
            raise DataError("the log is empty: no row in any file of data.path")
        worst = ", ".join(f"{n:,} {r}" for r, n in reasons.most_common(4))
        if bad == rows or bad > self.data.max_quarantined * rows:
            first = next(s["first_bad"] for s in scans if s["first_bad"])
            dates = " Dates as text are of ISO 8601 (2024-01-31T08:00:00Z)." if "unreadable time" in reasons else ""
            raise DataError(f"{bad:,} of {rows:,} rows cannot be used ({worst}); data.max_quarantined allows "
                            f"{self.data.max_quarantined:.0%}. Check data.columns and data.time_unit.{dates} The first "
                            f"is {first[:200]}; all are in {self.folder.uri}/quarantine")  # fmt: skip
        if bad:
            self.say(f"prepare: {bad:,} row(s) quarantined in {self.folder.uri}/quarantine: {worst}")
        return {"rows_in": rows, "quarantined": bad, "reasons": dict(sorted(reasons.items()))}

    def _balance(self, account: dict[str, Any]) -> None:
        if account["rows_in"] != account["kept"] + account["quarantined"] + account["duplicates"]:
            raise ArtifactError(f"rows are missing: {account}; a task's files were lost, run the same command again")

    def _cut_offs(self, sorts: list[dict[str, Any]]) -> splits.CutOffs | None:
        split = self.data.split
        if split.by == "date":
            return splits.date_cut_offs(split)
        if split.by != "time_fraction":
            return None
        hours: Counter[int] = Counter()
        for s in sorts:
            hours.update(s["hours"])
        if not hours:
            raise DataError("no impressions: no row matches data.impressions and has a label")
        found = [splits.locate(hours, share) for share in (1 - split.validation - split.test, 1 - split.test)]
        wanted = tuple(hour for hour, _ in found)
        seconds = list(self.execute("refine", partial(refine, folder=self.folder, hours=wanted), range(self.buckets)))
        exact = []
        for (_, left), parts in zip(found, zip(*seconds, strict=True), strict=True):
            total: Counter[int] = Counter()
            for part in parts:
                total.update(part)
            exact.append(splits.refine(total, left))
        return splits.CutOffs(*exact)

    def _split_account(self, counts: list[dict[str, Any]]) -> dict[str, Any]:
        def total(key: str) -> dict[str, int]:
            return {name: sum(c[key][i] for c in counts) for i, name in enumerate(SPLIT_NAMES)}

        rows, positives = total("rows"), total("positives")
        if not sum(rows.values()):
            raise DataError("no impressions: no row matches data.impressions and has a label")
        splits.check(rows, self.data.split)
        if positives["train"] in (0, rows["train"]):
            raise DataError(f"all {rows['train']:,} training impressions have label {int(positives['train'] > 0)}; "
                            "a click model needs both classes: check data.columns.label, data.label_rule")  # fmt: skip
        history = sum(c["history_events"] for c in counts)
        if self.data.history and not history:
            raise DataError("no history: no row matches data.history; check its columns and values")
        users, unused, unlabelled = (sum(c[key] for c in counts) for key in ("users", "unused", "unlabelled"))
        if unused:
            self.say(f"prepare: {unused:,} row(s) are used for nothing: they have no label or are no impressions, and "
                     "data.history leaves them out")  # fmt: skip
        if unlabelled and self.data.impressions is None:
            self.say(f"prepare: {unlabelled:,} row(s) of lists have no label and so do not count as shown; if they "
                     "were, say so by data.impressions, or whole lists will not score as in evaluation")  # fmt: skip
        return {
            "splits": {n: {"impressions": rows[n], "positives": positives[n]} for n in SPLIT_NAMES},
            "history_events": history,
            "users": users,
            "unused": unused,
            "first_time": min(c["first_time"] for c in counts),
            "last_time": max(c["last_time"] for c in counts),
        }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions that prepared files may depend on."""
    return {"hpgr": hpgr.__version__, "pyarrow": pa.__version__, "numpy": np.__version__,
            "python": platform.python_version()}  # fmt: skip


def scan(fragment: Fragment, data: Data, folder: Folder, buckets: int) -> dict[str, Any]:
    """Validate a fragment and deal its rows to bucket files by user hash; returns its account, and which columns are
    there."""
    rows, reasons, bad, there = 0, Counter[str](), [], set[str]()
    schema = empty_rows(data).schema
    with ExitStack() as stack:
        writers: dict[int, ipc.RecordBatchStreamWriter] = {}
        for raw, first in read(fragment, needed_columns(data)):
            checked = validate(raw, first, data)
            rows += raw.num_rows
            there |= {field.name for field in raw.schema if not is_absent(field)}
            if checked.quarantined.num_rows:
                reasons.update(checked.quarantined.column("reason").to_pylist())
                bad.append(checked.quarantined)
            good, starts = dealt(checked.rows, buckets)
            for bucket in np.flatnonzero(np.diff(starts)).tolist():
                if bucket not in writers:
                    writers[bucket] = stack.enter_context(
                        staging.writer(folder, staging.raw_file(bucket, fragment), schema)
                    )
                part = good.slice(starts[bucket], starts[bucket + 1] - starts[bucket])
                for i in map(schema.get_field_index, (USER, ITEM)):
                    part = part.set_column(i, schema.field(i), _own_words(part.column(i).combine_chunks()))
                writers[bucket].write_table(part)
    if bad:
        table = pa.concat_tables(bad).append_column(
            "file", pa.array([fragment.file.uri] * sum(b.num_rows for b in bad))
        )
        folder.write_parquet(f"quarantine/{fragment.index:06d}-{fragment.first:06d}.parquet", table)
    first_bad = bad[0].column("values")[0].as_py() if bad else ""
    return {"rows": rows, "reasons": dict(reasons), "columns": there, "first_bad": first_bad}


def dealt(rows: pa.Table, parts: int) -> tuple[pa.Table, Ints]:
    """Rows by part, the user's hash modulo `parts`, in their order inside one, and where each begins: [parts + 1]."""
    user = rows.column(USER).combine_chunks()
    kind = np.min_scalar_type(parts)  # few bits sort several times as fast
    part = (hash_text(user.dictionary) % np.uint64(parts)).astype(kind)[user.indices.to_numpy()]
    rows = rows.take(pa.array(np.argsort(part, kind="stable"))) if parts > 1 else rows
    return rows, offsets_of(np.bincount(part, minlength=parts))


def _own_words(values: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary of no others."""
    codes = values.indices.dictionary_encode()
    return pa.DictionaryArray.from_arrays(codes.indices, values.dictionary.take(codes.dictionary))


def ordered_rows(bucket: int, folder: Folder) -> pa.Table:
    """Canonical rows of a bucket as `sort` left them."""
    return staging.read(folder, staging.sorted_file(bucket)).combine_chunks()


def sort(bucket: int, data: Data, folder: Folder, hours: bool) -> dict[str, Any]:
    """Order one bucket and drop its duplicates; `hours` asks for the histogram of impressions by hour."""
    raw = staging.raw_folder(bucket)
    parts = [staging.read(folder, f"{raw}/{name}") for name in folder.entries(raw)]
    rows = pa.concat_tables([empty_rows(data), *parts]).unify_dictionaries().combine_chunks()
    table, duplicates = order_rows(rows)
    staging.write(folder, staging.sorted_file(bucket), table)
    histogram = splits.histogram(splits.target_times(table), splits.HOUR) if hours else {}
    return {"rows": table.num_rows, "duplicates": duplicates, "hours": histogram}


def refine(bucket: int, folder: Folder, hours: tuple[int, ...]) -> list[dict[int, int]]:
    """Impressions a second inside each of the given hours."""
    time = splits.target_times(staging.read(folder, staging.sorted_file(bucket)))
    inside = [time[time // splits.HOUR == hour] for hour in hours]
    return [splits.histogram(t, SECOND) for t in inside]


def count_bucket(bucket: int, data: Data, folder: Folder, cuts: splits.CutOffs | None) -> dict[str, Any]:
    """Count a bucket's training values into staging/counts; returns its split account."""
    table = ordered_rows(bucket, folder)
    training, account = training_rows(table, data, cuts)
    staging.write(folder, staging.counts_file(bucket), count(table, training, data))
    return account


def merge_counts(buckets: int, data: Data, folder: Folder, base_rate: float) -> tuple[dict[str, Any], float]:
    """Build and write the vocabulary from all buckets' counts; returns its sizes and the prior of its items' rates."""
    counts = merge(staging.read(folder, staging.counts_file(b)) for b in range(buckets))
    vocabulary = Vocabulary.from_counts(counts, data.vocabulary, data.features)
    if not vocabulary.items.num_rows:
        raise DataError(
            f"no item was seen {data.vocabulary.min_count} times in training; lower data.vocabulary.min_count"
        )
    folder.write_parquet("vocabulary.parquet", vocabulary.items)
    folder.write_json("vocabulary.json", vocabulary.to_tables())
    sizes = {
        "items": vocabulary.items.num_rows,
        "size": vocabulary.size,
        "oov_buckets": vocabulary.oov_buckets,
        "categories": {field: vocabulary.category_size(field) for field in vocabulary.categories},
    }
    return sizes, item_prior(vocabulary.items, base_rate)


def encode_bucket(
    bucket: int, data: Data, folder: Folder, cuts: splits.CutOffs | None, lists: Sequence[str], base_rate: float,
    priors: Array,
) -> tuple[int, list[list[int]], list[int], list[float]]:  # fmt: skip
    """Write a bucket's timelines; returns how many, its training impressions by label and action index, by split its
    impressions of unknown items, and by prior what its validation impressions lose by items' rates."""
    plain, items = folder.read_json("vocabulary.json"), folder.read_parquet("vocabulary.parquet")
    vocabulary = Vocabulary.from_tables(items, plain)
    timelines = encode(ordered_rows(bucket, folder), vocabulary, data, cuts, lists)
    write_timelines(folder, bucket, timelines)
    flat = Timelines.from_table(timelines)
    training, actions = flat.t_split == TRAIN, vocabulary.category_size("action")
    kinds = np.bincount((flat.t_label.astype(np.int64) * actions + flat.t_action)[training], minlength=2 * actions)
    unknown = np.bincount(flat.t_split[flat.t_item < vocabulary.first_item], minlength=len(SPLIT_NAMES))
    losses = rate_losses(flat, items, vocabulary.first_item, base_rate, priors)
    return len(flat), kinds.reshape(2, actions).tolist(), unknown.tolist(), losses.tolist()


def in_process(_: str, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """The plainest executor: one after the other, here."""
    return map(function, items)
