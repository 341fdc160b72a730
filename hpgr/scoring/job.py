"""A batch job from what was asked to `_SUCCESS`, whoever runs its passes and shards."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hpgr.artifacts import Folder, absolute, fingerprint
from hpgr.config import Config, utc_us
from hpgr.data.candidates import LIST, Candidates, candidates_in, deal, find_candidates, read_list
from hpgr.data.new_log import prepare_new
from hpgr.data.preparation import Execute, Prepared, versions
from hpgr.data.sources import Fragment
from hpgr.errors import ArtifactError, ConfigError, DataError
from hpgr.model.base import TokenClick
from hpgr.schema import SECOND
from hpgr.scoring import output
from hpgr.scoring.finished import Finished, open_finished
from hpgr.scoring.known_features import ItemFeatures, lacking_item_features, learn_item_features
from hpgr.scoring.pairs import Scorer
from hpgr.scoring.quality import top_n_quality
from hpgr.scoring.request import SHARD_PAIRS, Options, Request, record
from hpgr.scoring.retrieval import Retriever, item_vectors
from hpgr.scoring.shards import Shards, vector_column

Say = Callable[[str], None]
Score = Callable[[Request, list[int], output.Expected], int]
"""Scores and commits shards of a request (their numbers, what is expected of all); returns the pairs written now."""
UNIT_US = {"s": SECOND, "ms": 1000, "us": 1, "ns": 0.001}


@dataclass(frozen=True)
class Wish:
    """What a job was asked, as given on its command line. `candidates` or `top_n`, never both."""

    run: str
    output: str
    users: str | None = None
    candidates: str | None = None
    top_n: int = 0
    retrieve: int | None = None
    drop_seen: bool = False
    at: str | None = None
    explain: bool = False
    embeddings: bool = False
    prepared: str | None = None
    resume: bool = False
    measure: bool = False
    shard_pairs: int = SHARD_PAIRS


def batch_score(wish: Wish, execute: Execute, score: Score, say: Say, whole: bool = False) -> dict[str, Any]:
    """Score what is asked, or go on with it; returns what `_SUCCESS` says.

    `execute` runs the passes over logs and candidates, `score` the shards; neither is called if the job has finished.
    `whole` refuses candidates of which any cannot be used; otherwise at least one must be usable.

    Raises:
        HpgrError: what was got, what was expected and what to do.
    """
    finished = open_finished(wish.run, wish.prepared)
    folder = Folder(absolute(wish.output))
    if wish.resume and not folder.exists(output.REQUEST):
        raise ConfigError(f"--resume: there is no job in {folder.uri}; leave --resume out to start one there")
    _refuse(wish, finished)
    candidates = find_candidates([wish.candidates], finished.config.data) if wish.candidates else None
    if not (folder.exists(output.SUCCESS) or folder.exists(output.ITEMS)):  # a job that goes on has kept them
        _need_item_features(finished, candidates)
    users = _users(finished, wish, execute, say)
    options = _options(wish, finished, users)
    told = record(finished.id, users.manifest["fingerprint"], candidates.plain() if candidates else None, options)
    finished_before = output.claim(folder, told)
    if wish.measure and not folder.exists(output.QUALITY):
        known = _item_features(finished, candidates, execute)
        quality = top_n_quality(finished, options.retrieve, options.drop_seen, known, execute)
        folder.write_json(output.QUALITY, quality)
    if finished_before:
        say(f"{folder.uri}: this job has finished; nothing to do")
        output.clean(folder)
        return dict(folder.read_json(output.SUCCESS))
    request = Request(
        run=finished.run.folder.uri,
        prepared=finished.run.prepared.folder.uri,
        users=users.folder.uri,
        output=folder.uri,
        run_id=finished.id,
        id=fingerprint(told),
        shards=0,
        options=options,
        layout=candidates.layout if candidates else None,
    )
    return Job(request, finished, users, candidates, execute, score, say, whole).run()


def _refuse(wish: Wish, finished: Finished) -> None:
    """Raise for what cannot be done, before anything starts."""
    if bool(wish.candidates) == bool(wish.top_n):
        raise ConfigError("give either --candidates PATH or --top-n N (1 or more)")
    if wish.measure and not wish.top_n:
        raise ConfigError("--measure tells how good --top-n is; give --top-n N with it")
    if wish.candidates and (wish.drop_seen or wish.retrieve is not None):
        raise ConfigError("--drop-seen and --retrieve choose among the items of --top-n, and the candidates given are "
                          "all scored; leave them out, or give --top-n N in place of --candidates")  # fmt: skip
    if wish.retrieve is not None and wish.retrieve < wish.top_n:
        raise ConfigError(f"--retrieve {wish.retrieve} is less than --top-n {wish.top_n}; retrieve at least as many")
    if wish.explain and not finished.config.model.sparse:
        raise ConfigError("--explain shows the anchors of PGSA, and this run's model attends to everything "
                          "(another model than hpgr, or model.pgsa.enabled is false); leave --explain out")  # fmt: skip
    if wish.top_n or wish.embeddings:
        finished.need_stage1()
    moment(wish.at, finished.config, 0)


def _need_item_features(finished: Finished, candidates: Candidates | None) -> None:
    """Raise where item features would come from a log that is gone."""
    lacking = lacking_item_features(finished.config.data, candidates.layout.features if candidates else ())
    if lacking and not finished.run.prepared.folder.exists("timelines"):
        names = ", ".join(f.column for f in lacking)
        raise ArtifactError(f"the item features {names} are not among the candidates, and the prepared log of the run "
                            "that would tell them is gone; give --prepared DIR where the prepared log is, or "
                            f"--candidates with the columns {names}")  # fmt: skip


def _users(finished: Finished, wish: Wish, execute: Execute, say: Say) -> Prepared:
    if wish.users is None:
        if not finished.run.prepared.folder.exists("timelines"):
            raise ArtifactError("the timelines of the log that the run was trained on are gone; give --users PATH, a "
                                "log of the users to score, or --prepared DIR where the prepared log is")  # fmt: skip
        return finished.run.prepared
    return prepare_new(finished.config.data, finished.run.prepared, [wish.users], execute, say)


def _options(wish: Wish, finished: Finished, users: Prepared) -> Options:
    return Options(
        at=moment(wish.at, finished.config, users.manifest["account"]["last_time"]),
        top_n=wish.top_n,
        retrieve=(wish.retrieve or max(10 * wish.top_n, 200)) if wish.top_n else 0,
        drop_seen=wish.drop_seen,
        explain=wish.explain,
        embeddings=wish.embeddings,
        shard_pairs=wish.shard_pairs,
    )


def _item_features(finished: Finished, candidates: Candidates | None, execute: Execute) -> ItemFeatures | None:
    """What the run's log tells of items, where the model shows it and the candidates do not."""
    if not lacking_item_features(finished.config.data, candidates.layout.features if candidates else ()):
        return None
    sizes = finished.run.sizes()
    return learn_item_features(finished.run.prepared, finished.config.data, sizes.first_item, sizes.items, execute)


def moment(text: str | None, config: Config, last: int) -> int:
    """Moment in microseconds: an ISO 8601 date, a number in the log's unit, or one second after the last event.

    Raises:
        ConfigError: the text is neither, or outside `data.earliest` and `data.latest` as no event of a log may be.
    """
    if text is None:
        return last + SECOND
    data = config.data
    micros = _microseconds(text, data.time_unit)
    if not utc_us(data.earliest) <= micros < utc_us(data.latest):
        raise ConfigError(f"--at: got {text!r}, expected a date such as 2026-01-31T06:00:00 or a number in "
                          f"{data.time_unit}, the log's unit, from {data.earliest} on and before {data.latest} "
                          "(data.earliest, data.latest)")  # fmt: skip
    return round(micros)


def _microseconds(text: str, unit: str) -> float:
    """A number in a unit, or an ISO 8601 date, as microseconds; NaN if it is neither."""
    with suppress(ValueError):
        return float(text) * UNIT_US[unit]
    with suppress(ValueError):
        return utc_us(datetime.fromisoformat(text))
    return math.nan


@dataclass(frozen=True)
class Job:
    """One request, from its candidates to `_SUCCESS`."""

    request: Request
    finished: Finished
    users: Prepared
    candidates: Candidates | None
    execute: Execute
    score: Score
    say: Say
    whole: bool = False

    def run(self) -> dict[str, Any]:
        """Score the missing shards, check, publish; returns what `_SUCCESS` says."""
        start = time.monotonic()
        request, expected, notes = self._plan()
        self._keep_item_features()
        done = output.committed(request)
        missing = [s for s in range(request.shards) if s not in done]
        if len(missing) < request.shards:
            self.say(f"score: {len(done)} of {request.shards} shards are done; {len(missing)} to go")
        began = time.monotonic()
        fresh = self.score(request, missing, expected) if missing else 0
        seconds = time.monotonic() - began
        records = output.committed(request)
        output.check(request, records, expected)
        output.publish(request, records)
        if request.options.embeddings:
            self._item_vectors()
        summary = self._summary(request, notes | output.totals(records.values()), fresh, seconds)
        summary["seconds"] = round(time.monotonic() - start, 2)
        return output.succeed(request, records, summary)

    def _plan(self) -> tuple[Request, output.Expected, dict[str, Any]]:
        """The request with its shards, what must come out, and the account of the candidates."""
        users, request = int(self.users.manifest["account"]["timelines"]), self.request
        if self.candidates is None:
            shards = request.options.shards(self.users.buckets, users * request.options.retrieve)
            return replace(request, shards=shards), output.Expected(shards, None), {}
        pieces = self.candidates.pieces(self.finished.config.data)
        if self.candidates.layout.kind == "all":
            size, notes = self._common_list(pieces)
            shards = request.options.shards(self.users.buckets, users * size)
            expected = output.Expected(shards, None, users * size)
            return replace(request, shards=shards), expected, notes
        request, rows, notes = self._deal(pieces)
        self._check_usable(sum(rows), notes)
        return request, output.Expected(request.shards, rows, sum(rows)), notes

    def _common_list(self, pieces: list[Fragment]) -> tuple[int, dict[str, Any]]:
        """Keep the list for all where shards read it, unless it lies there from before: its size and account."""
        folder, account = Folder(self.request.output), f"{output.WORK}/list.json"
        assert self.candidates is not None
        if not folder.exists(account):
            rows, reasons = read_list(pieces, self.finished.config.data, self.candidates.layout, folder)
            repeated = sum(piece.rows for piece in pieces) - sum(reasons.values()) - rows.num_rows
            folder.write_parquet(LIST, rows)
            folder.write_json(account, {
                "list": rows.num_rows, "quarantined": dict(reasons), "repeated_in_list": repeated,
            })  # fmt: skip
        notes = folder.read_json(account)
        self._check_usable(notes["list"] + notes["repeated_in_list"], notes)
        return notes["list"], notes

    def _check_usable(self, usable: int, notes: dict[str, Any]) -> None:
        """Raise where no candidate is usable, or not each of those that are wanted whole."""
        bad = sum(notes["quarantined"].values())
        if not bad or (usable and not self.whole):
            return
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in notes["quarantined"].items())
        todo = "Correct them or leave them out"
        if not self.whole:
            todo = f"They are in {self.request.output}/_quarantine; correct them and give another --output"
        raise DataError(f"{bad:,} of {bad + usable:,} candidates cannot be scored ({reasons}); expected ids in each "
                        "row, times as dates or numbers in the log's unit "
                        f"({self.finished.config.data.time_unit}). {todo}")  # fmt: skip

    def _deal(self, pieces: list[Fragment]) -> tuple[Request, list[int], dict[str, Any]]:
        """Deal candidates to shards, unless they lie there from before."""
        folder, data = Folder(self.request.output), self.finished.config.data
        assert self.candidates is not None
        if not folder.exists(f"{output.WORK}/dealt.json"):
            asked = sum(candidates_in(piece, data) for piece in pieces)
            shards = self.request.options.shards(self.users.buckets, asked)
            self.say(f"deal: {asked:,} candidates in {len(pieces)} piece(s) to {shards} shard(s)")
            task = partial(deal, data=data, layout=self.candidates.layout, folder=folder, shards=shards)
            parts = list(self.execute("deal", task, pieces))
            reasons: Counter[str] = Counter()
            for part in parts:
                reasons.update(part["reasons"])
            rows = np.sum([np.zeros(shards, np.int64), *(part["rows"] for part in parts)], axis=0)
            folder.write_json(f"{output.WORK}/dealt.json", {
                "rows": rows.tolist(), "quarantined": dict(sorted(reasons.items())),
                "empty_lists": sum(part["empty_lists"] for part in parts),
            })  # fmt: skip
        told = folder.read_json(f"{output.WORK}/dealt.json")
        rows = told.pop("rows")
        return replace(self.request, shards=len(rows)), rows, told

    def _keep_item_features(self) -> None:
        folder = Folder(self.request.output)
        if not folder.exists(output.ITEMS):
            known = _item_features(self.finished, self.candidates, self.execute)
            if known is not None:
                folder.write_parquet(output.ITEMS, known.to_table())

    def _item_vectors(self) -> None:
        cpu, folder = torch.device("cpu"), Folder(self.request.output)
        items = self.finished.run.prepared.vocabulary().items.column("value")
        columns = {"item": items, "vector": vector_column(item_vectors(self.finished.item_model(cpu)))}
        click = self.finished.click_model(cpu)
        if isinstance(click, TokenClick):
            columns["click_vector"] = vector_column(click.events.item.weight.detach()[-len(items) :].numpy())
        table = pa.table(columns)
        folder.write_parquet(f"{output.EMBEDDINGS}/items.parquet", table)

    def _summary(self, request: Request, account: dict[str, Any], fresh: int, seconds: float) -> dict[str, Any]:
        return {
            "request": request.id,
            "run": request.run_id,
            "run_folder": request.run,
            "output": request.output,
            "at": datetime.fromtimestamp(request.options.at / SECOND, UTC).isoformat(),
            "account": account,
            "pairs_per_second": round(fresh / seconds, 1) if seconds > 0 and fresh else None,
            "versions": versions() | {"torch": torch.__version__},
        }


def open_shards(request: Request, device: torch.device) -> Shards:
    """What scores a request's shards on a device."""
    finished = open_finished(request.run, request.prepared)
    config, options = finished.config, request.options
    retriever, output_folder = None, Folder(request.output)
    if options.top_n or options.embeddings:
        retriever = Retriever(finished.item_model(device), config.stream, device)
    return Shards(
        request=request,
        config=config,
        vocabulary=finished.run.prepared.vocabulary(),
        scorer=Scorer(finished.click_model(device), config.stream, device),
        retriever=retriever,
        users=Prepared.open(Folder(request.users)),
        items=ItemFeatures.from_table(output_folder.read_parquet(output.ITEMS))
        if output_folder.exists(output.ITEMS)
        else None,
    )


def account_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The job's account, a screen at most."""
    account = summary["account"]
    without = account["users_without_history"]
    yield f"users      {account['users']:,} scored" + (
        f"; {without:,} without history, scored by item, features and training's click rate" if without else ""
    )
    yield f"pairs      {account['written']:,} written" + (
        f"; {account['duplicates']:,} asked for twice, written once" if account["duplicates"] else ""
    )
    if account["unknown_items"]:
        yield f"           {account['unknown_items']:,} of items the run does not know, scored by their hash's vector"
    if account.get("empty_lists"):
        yield f"           {account['empty_lists']:,} empty list(s): nothing to score"
    if account.get("quarantined"):
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in account["quarantined"].items())
        yield f"unusable   {reasons}; see {summary['output']}/_quarantine"
    rate = summary["pairs_per_second"]
    yield f"seconds    {summary['seconds']:,.1f}" + (f"; {rate:,.0f} pairs/s while scoring" if rate else "")
    quality = Folder(summary["output"]).sub(output.QUALITY).uri
    if Folder(summary["output"]).exists(output.QUALITY):
        told = Folder(summary["output"]).read_json(output.QUALITY)
        for name in ("retrieval", "retrieval and ranking"):
            figures = ", ".join(f"{k} {told[name][k]:.4f}" for k in ("hr@10", "ndcg@10"))
            yield f"held out   {name}: {figures} ({told[name]['n']:,} users); see {quality}"
    yield f"output     {summary['output']}"
