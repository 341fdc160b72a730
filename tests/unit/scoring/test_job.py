"""Batch jobs in this process: what each kind of request gives, and that all of it is written exactly once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers_model import CPU, quiet
from helpers_scoring import Ask, batch, impressions, item_ids, raw_log, score_here, scores_in, write

from hpgr.artifacts import Folder
from hpgr.data.preparation import in_process
from hpgr.data.stream import LocalSource
from hpgr.errors import ArtifactError, ConfigError, DataError, HpgrError
from hpgr.evaluation import rank_next_items
from hpgr.scoring import job, output
from hpgr.scoring.finished import Finished
from hpgr.scoring.job import Wish, account_lines, batch_score, moment

# The forms of candidates


def test_pairs_lists_and_one_list_for_all_agree(ask: Ask, users: list[str], items: list[str]) -> None:
    some = items[:7]
    pairs = {"user_id": [u for u in users for _ in some], "item_id": some * len(users)}
    lists = {"user_id": users, "item_id": [some] * len(users)}
    account, expected = ask(pairs)
    assert account["written"] == 7 * len(users) == expected.num_rows
    assert ask(lists)[1].drop_columns(["run"]).equals(expected.drop_columns(["run"]))
    by_rank = ask({"item_id": some})[1]
    assert by_rank.equals(expected)
    assert expected.column_names == ["user", "item", "score", "rank", "run"]


def test_ranks_are_those_of_the_scores_within_each_request(finished: Finished, ask: Ask) -> None:
    _, table = ask(impressions(finished.run))
    assert {"time", "list_id"} <= set(table.column_names)
    frame = table.to_pandas()
    expected = frame.groupby(["user", "list_id"])["score"].rank(ascending=False, method="first")
    tied = frame.duplicated(["user", "list_id", "score"], keep=False)
    assert (frame["rank"] == expected)[~tied].all()
    assert (frame.groupby(["user", "list_id"])["rank"].max() == frame.groupby(["user", "list_id"]).size()).all()


def test_integer_ids_are_the_same_ids_as_text(finished: Finished, tmp_path: Path) -> None:
    """A user and an item of digits, given as numbers: found in neither form's way differently."""
    text = {"user_id": ["7", "7"], "item_id": ["1", "2"]}
    number = {"user_id": [7, 7], "item_id": [1, 2]}
    tables = [batch(finished, tmp_path / n, candidates=write(tmp_path / f"{n}.parquet", t))[1]
              for n, t in (("text", text), ("number", number))]  # fmt: skip
    assert tables[0].drop_columns(["run"]).equals(tables[1].drop_columns(["run"]))


# Every case has a defined result


def test_a_candidate_is_compared_with_its_own_list_alone(ask: Ask, users: list[str], items: list[str]) -> None:
    """Company changes a score where it is of the same request, not where it is of another, or of none."""

    def first(*lists: str | None) -> float:
        n = len(lists)
        asked = {"user_id": [users[0]] * n, "item_id": items[:n], "slot": range(n), "timestamp": [2 * 10**9] * n}
        _, table = ask(asked | ({} if None in lists else {"list_id": lists}))
        return float(next(row["score"] for row in table.to_pylist() if row["item"] == items[0]))

    alone = first("one")
    assert first("one", "other", "other") == pytest.approx(alone, abs=1e-6)
    assert first("one", "one", "one") != pytest.approx(alone, abs=1e-4)
    assert first(None, None, None) == pytest.approx(first(None), abs=1e-6)
    assert first(None) != pytest.approx(alone, abs=1e-4)


def test_a_user_without_history_is_scored_by_the_empty_history(ask: Ask, users: list[str], items: list[str]) -> None:
    """Unknown users, and known ones before their first event, get one and the same score for an item."""
    both = ["new"] * 3 + [users[0]] * 3
    account, _ = ask({"user_id": both, "item_id": items[:3] * 2, "timestamp": [10**9] * 6})
    assert account["users"] == account["users_without_history"] == 2
    assert account["pairs_without_history"] == 6
    # Each alone: rows of one matrix product may differ in their last bit by where they stand in it.
    alone = [ask({"user_id": [u] * 3, "item_id": items[:3], "timestamp": [10**9] * 3})[1] for u in ("new", users[0])]
    by_user = [table.sort_by("item")["score"] for table in alone]
    assert by_user[0].equals(by_user[1])
    assert 0 < by_user[0][0].as_py() < 1


def test_an_item_never_seen_is_scored_by_its_hash(ask: Ask, users: list[str]) -> None:
    account, table = ask({"user_id": [users[0]] * 3, "item_id": ["never", "seen", "items"]})
    assert account["unknown_items"] == 3
    assert np.isfinite(table["score"].to_numpy()).all()
    assert len(set(table["score"].to_pylist())) > 1


def test_an_empty_list_gives_no_row_and_is_counted(ask: Ask, users: list[str], items: list[str]) -> None:
    lists = pa.array([items[:2], [], None], pa.list_(pa.string()))
    account, table = ask({"user_id": users[:3], "item_id": lists})
    assert account["empty_lists"] == 2
    assert table["user"].to_pylist() == [users[0]] * 2


def test_a_pair_asked_for_twice_is_written_once_and_counted(ask: Ask, users: list[str], items: list[str]) -> None:
    """The same pair at another time is another request."""
    account, table = ask(
        {"user_id": [users[0]] * 4, "item_id": [items[0]] * 4, "timestamp": [10**9, 10**9, 2 * 10**9, 10**9]}
    )
    assert (account["pairs"], account["duplicates"], account["written"]) == (2, 2, 2)
    assert len(set(table["time"].to_pylist())) == 2


def test_a_row_without_a_time_has_the_earliest_of_its_request(
    ask: Ask, finished: Finished, users: list[str], items: list[str]
) -> None:
    """Of its own list alone; of no list, the job's moment. The output's times are as given."""
    at = finished.run.prepared.manifest["account"]["last_time"] // 10**6 + 1
    later = at + 10**7
    asked = {"user_id": [users[0]] * 5, "item_id": sorted(items)[:5], "list_id": ["a", "a", "a", "b", None]}

    def scored(*times: int | None) -> pa.Table:
        return ask(asked | {"timestamp": pa.array(times, pa.int64())})[1].sort_by("item")

    given = scored(None, later, later + 5, None, None)
    seconds = [t and int(t.timestamp()) for t in given["time"].to_pylist()]
    assert seconds == [None, later, later + 5, None, None]
    told, moved = scored(later, later, later + 5, at, at), scored(at, later, later + 5, at, at)
    np.testing.assert_allclose(given["score"].to_numpy(), told["score"].to_numpy(), rtol=0, atol=1e-6)
    assert np.abs(moved["score"].to_numpy() - told["score"].to_numpy())[:3].min() > 1e-6


def test_unusable_candidates_are_quarantined_with_the_reason(
    finished: Finished, tmp_path: Path, users: list[str], items: list[str]
) -> None:
    columns = {"user_id": [users[0], None, users[0], ""], "item_id": [items[0], items[1], None, items[2]],
               "timestamp": [10**9, 10**9, 10**9, 10**9]}  # fmt: skip
    summary, table = batch(finished, tmp_path / "out", candidates=write(tmp_path / "c.parquet", columns))
    assert table.num_rows == 1
    assert summary["account"]["quarantined"] == {"null item id": 1, "null user id": 2}
    kept = ds.dataset(str(tmp_path / "out/_quarantine")).to_table()
    assert sorted(kept["row"].to_pylist()) == [1, 2, 3]
    assert any("2 null user id" in line for line in account_lines(summary))


@pytest.mark.parametrize("columns", [{"user_id": ["u", "v"], "item_id": [None, ""]}, {"item_id": [None, ""]}])
def test_candidates_of_which_none_is_usable_are_no_success(
    finished: Finished, tmp_path: Path, columns: dict[str, Any]
) -> None:
    pairs = write(tmp_path / "c.parquet", columns)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 2 candidates cannot be scored \(2 null item id\).*_quarantine"):
            batch(finished, tmp_path / "out", candidates=pairs)
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert ds.dataset(str(tmp_path / "out/_quarantine")).count_rows() == 2


def test_a_long_list_in_small_micro_batches(
    ask: Ask, users: list[str], items: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 candidates for one user, mostly of unknown items, in micro-batches of 64 places."""
    many = items + [f"x{i}" for i in range(5000 - len(items))]
    columns = {"user_id": [users[0]], "item_id": [many]}
    account, usual = ask(columns)
    assert account["written"] == 5000
    made = job.Scorer
    monkeypatch.setattr(job, "Scorer", lambda *a: made(*a, history_tokens=16, cells=1 << 13))
    _, table = ask(columns)
    a, b = (t.sort_by("item") for t in (usual, table))
    np.testing.assert_allclose(a["score"].to_numpy(), b["score"].to_numpy(), rtol=0, atol=1e-6)
    assert usual["rank"].to_pylist() == list(range(1, 5001))


def test_no_candidates_at_all(ask: Ask) -> None:
    account, table = ask({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())})
    assert account["written"] == table.num_rows == 0
    assert table.column_names == ["user", "item", "score", "rank", "run"]


def test_features_of_the_user_come_from_the_last_visible_event(
    finished: Finished, ask: Ask, users: list[str], items: list[str]
) -> None:
    """`device` is left out, told as it last was, or told otherwise."""
    log = raw_log(finished.run).sort_by("timestamp").to_pandas()
    log = log[(log["event"] == "view") | (log["clicked"] == 1)]
    last = log.groupby("user_id").tail(1).set_index("user_id")["device"]
    known = [u for u in users if u in last.index]
    pairs = {"user_id": known, "item_id": items[:1] * len(known)}
    silent, told = ask(pairs)[1], ask(pairs | {"device": [last[u] for u in known]})[1]
    np.testing.assert_allclose(told["score"].to_numpy(), silent["score"].to_numpy(), atol=1e-6)
    other = ask(pairs | {"device": ["a telex"] * len(known)})[1]
    assert (np.abs(other["score"].to_numpy() - silent["score"].to_numpy()) > 1e-6).any()


# Top-n


@pytest.mark.parametrize("drop_seen", [False, True])
def test_top_n_is_the_best_of_what_is_retrieved(
    finished: Finished, ask: Ask, users: list[str], items: list[str], drop_seen: bool
) -> None:
    """With the whole catalogue retrieved: the first five of scoring everything, without the past where asked."""
    account, top = ask(None, top_n=5, retrieve=len(items), drop_seen=drop_seen)
    _, everything = ask({"item_id": items})
    frame = everything.to_pandas()
    if drop_seen:
        log = raw_log(finished.run).to_pandas()
        log = log[(log["event"] == "view") | (log["clicked"] == 1)]
        seen = set(zip(log["user_id"], log["item_id"], strict=True))
        frame = frame[[pair not in seen for pair in zip(frame["user"], frame["item"], strict=True)]]
    best = frame.sort_values(["user", "rank"]).groupby("user").head(5)
    assert account["written"] == len(best) == top.num_rows
    got = top.to_pandas().sort_values(["user", "rank"])
    np.testing.assert_allclose(got["score"], best["score"], atol=1e-6)
    assert (got["item"].to_numpy() == best["item"].to_numpy()).mean() > 0.99


def test_measured_retrieval_is_stage_ones_own_test(finished: Finished, tmp_path: Path, items: list[str]) -> None:
    """HR and NDCG of retrieval alone are the next-item test's, as long as the item is among those retrieved."""
    summary, _ = batch(finished, tmp_path / "out", top_n=5, retrieve=len(items), measure=True)
    told = json.loads((tmp_path / "out/_metrics.json").read_text())
    model = finished.item_model(CPU)
    spec = finished.run.spec("next_item-test")
    expected = rank_next_items(model, LocalSource().evaluation(spec), CPU, filter_seen=False).compute()
    for name in ("hr@1", "hr@10", "ndcg@10", "n", "hr@10_unseen"):
        assert told["retrieval"][name] == pytest.approx(expected[name]), name
    assert told["retrieval and ranking"]["n"] == expected["n"]
    assert told["retrieval and ranking"]["ndcg@10"] != told["retrieval"]["ndcg@10"]  # few users: HR is often the same
    assert any("held out" in line for line in account_lines(summary))


def test_embeddings_reproduce_retrieval(finished: Finished, tmp_path: Path, items: list[str]) -> None:
    """The dot product of a user's and an item's vector orders the catalogue as stage 1 does."""
    batch(finished, tmp_path / "out", top_n=3, retrieve=3, embeddings=True)
    item = pq.read_table(tmp_path / "out/_embeddings/items.parquet")
    user = pq.read_table(str(tmp_path / "out/_embeddings/users"))
    assert item["item"].to_pylist() == items
    matrix = [np.stack(t["vector"].to_numpy()) for t in (user, item)]
    best = np.argsort(-(matrix[0] @ matrix[1].T), axis=1)[:, :3]
    top = scores_in(tmp_path / "out").to_pandas().groupby("user")["item"].agg(set)
    for name, row in zip(user["user"].to_pylist(), best, strict=True):
        assert {items[i] for i in row} == top[name]
    click = finished.click_model(CPU).events.item.weight.detach().numpy()
    np.testing.assert_array_equal(np.stack(item["click_vector"].to_numpy()), click[-len(items) :])


# Exactly once


class Killed(BaseException):
    """What stands for a lost driver."""


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver dies at its so many-th writing, moving or deleting of a file: before it, or just after it."""
    left = [calls]

    def wrap(name: str) -> None:
        original = getattr(Folder, name)

        def dying(self: Folder, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and calls % 2:
                raise Killed
            result = original(self, *arguments)
            if left[0] == 0:
                raise Killed
            return result

        monkeypatch.setattr(Folder, name, dying)

    for name in ("write", "move", "delete"):
        wrap(name)


def test_a_driver_lost_at_any_write_goes_on_to_the_same_files(
    finished: Finished, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the protocol in turn; nothing looks finished before it is."""
    monkeypatch.setattr(output, "STORE_THREADS", 1)
    asked = {"candidates": pairs, "shard_pairs": 100}
    summary, expected = batch(finished, tmp_path / "usual", **asked)
    parts = {p.name: p.read_bytes() for p in (tmp_path / "usual").glob("*.parquet")}
    assert len(parts) >= 4
    for calls in range(1, 200):
        out = tmp_path / f"out-{calls}"
        with monkeypatch.context() as patch:
            killed_after(calls, patch)
            try:
                batch(finished, out, **asked)
                break
            except Killed:
                pass
        finished_early = (out / "_SUCCESS").exists()
        if finished_early or len(list(out.glob("*.parquet"))) == len(parts):
            assert {p.name: p.read_bytes() for p in out.glob("*.parquet")} == parts
        again, table = batch(finished, out, **asked)
        assert table.equals(expected)
        assert {p.name: p.read_bytes() for p in out.glob("*.parquet")} == parts
        assert again["account"] == summary["account"]
        assert sorted(p.name for p in out.iterdir() if p.name[0] == "_") == ["_SUCCESS", "_request.json"]
    assert calls > 3 * len(parts)


def test_a_finished_job_does_nothing_and_says_so(finished: Finished, pairs: str, tmp_path: Path) -> None:
    first, _ = batch(finished, tmp_path / "out", candidates=pairs)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    said: list[str] = []

    def never(*_: Any) -> Any:
        raise AssertionError("a finished job has no work")

    wish = Wish(run=finished.run.folder.uri, output=str(tmp_path / "out"), candidates=pairs)
    assert batch_score(wish, never, never, said.append) == first
    assert "nothing to do" in said[-1]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == files


def test_a_job_killed_as_it_took_its_folder_goes_on(finished: Finished, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_request.json.3f.tmp").write_bytes(b"{")
    summary, table = batch(finished, tmp_path / "out", candidates=pairs)
    assert summary["account"]["written"] == table.num_rows > 0


def test_success_tells_counts_and_checksums(finished: Finished, pairs: str, tmp_path: Path) -> None:
    summary, table = batch(finished, tmp_path / "out", candidates=pairs, shard_pairs=100)
    told = json.loads((tmp_path / "out/_SUCCESS").read_text())
    assert told == summary
    assert told["run"] == finished.id == table["run"][0].as_py()
    for name, file in told["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    assert sum(file["rows"] for file in told["files"].values()) == table.num_rows


@pytest.mark.parametrize("fault", ["record", "part", "cut"])
def test_a_shard_that_was_lost_is_scored_again(
    finished: Finished, pairs: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit record or its file is gone, or the file is cut short, before the job goes on."""
    asked = {"candidates": pairs, "shard_pairs": 100}
    _, expected = batch(finished, tmp_path / "usual", **asked)
    monkeypatch.setattr(output, "check", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        batch(finished, tmp_path / "out", **asked)
    monkeypatch.undo()
    record, part = (sorted((tmp_path / "out" / n).iterdir())[1] for n in ("_commits", "_pending"))
    if fault == "record":
        record.unlink()
    elif fault == "part":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-9])
    said: list[str] = []
    wish = Wish(run=finished.run.folder.uri, output=str(tmp_path / "out"), **asked)
    batch_score(wish, in_process, score_here, said.append)
    assert any("1 to go" in line for line in said)
    assert scores_in(tmp_path / "out").equals(expected)


def test_one_list_for_all_is_read_once(finished: Finished, tmp_path: Path, items: list[str]) -> None:
    """Another list takes its file while shards are scored: all of them have the first."""
    path = write(tmp_path / "items.parquet", {"item_id": items[:2]})

    def replaced(request: Any, missing: list[int], expected: Any) -> int:
        first = score_here(request, missing[:1], expected)
        write(Path(path), {"item_id": items[2:4]})
        return first + score_here(request, missing[1:], expected)

    wish = Wish(run=finished.run.folder.uri, output=str(tmp_path / "out"), candidates=path, shard_pairs=20)
    batch_score(wish, in_process, replaced, quiet)
    assert set(scores_in(tmp_path / "out")["item"].to_pylist()) == set(items[:2])


def test_pairs_that_do_not_add_up_are_no_success(
    finished: Finished, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = output.commit

    def losing(request: Any, shard: int, outcome: Any) -> Any:
        lost = outcome.scores.slice(1)
        return commit(
            request, shard, outcome._replace(scores=lost, account=outcome.account | {"written": lost.num_rows})
        )

    monkeypatch.setattr(output, "commit", losing)
    with pytest.raises(ArtifactError, match="differ"):
        batch(finished, tmp_path / "out", candidates=pairs)
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert not list((tmp_path / "out").glob("*.parquet"))


# Refusals


def test_another_requests_folder_is_refused_with_the_difference(finished: Finished, pairs: str, tmp_path: Path) -> None:
    batch(finished, tmp_path / "out", candidates=pairs)
    with pytest.raises(ArtifactError, match="explain is True and there False"):
        batch(finished, tmp_path / "out", candidates=pairs, explain=True)
    write(Path(pairs), {"user_id": ["u"], "item_id": ["i"]})
    with pytest.raises(ArtifactError, match="another request: candidates"):
        batch(finished, tmp_path / "out", candidates=pairs)


def test_a_folder_with_other_files_is_refused(finished: Finished, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        batch(finished, tmp_path / "mine", candidates=pairs)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("wish", "kind", "words"),
    [
        ({}, ConfigError, "--candidates PATH or --top-n"),
        ({"top_n": 5, "candidates": "c.parquet"}, ConfigError, "either"),
        ({"top_n": 5, "retrieve": 3}, ConfigError, "--retrieve 3 is less"),
        ({"candidates": "nowhere.parquet"}, DataError, "--candidates nowhere.parquet"),
        ({"candidates": "nowhere.parquet", "measure": True}, ConfigError, "--top-n"),
        ({"candidates": "nowhere.parquet", "drop_seen": True}, ConfigError, "--drop-seen and --retrieve choose"),
        ({"candidates": "nowhere.parquet", "retrieve": 9}, ConfigError, "--drop-seen and --retrieve choose"),
        ({"top_n": 5, "resume": True}, ConfigError, "there is no job"),
        ({"top_n": 5, "at": "yesterday"}, ConfigError, "expected a date"),
        ({"top_n": 5, "at": "20240201", "users": "nowhere"}, ConfigError, "20240201.*from 1990-01-01 00:00:00 on"),
        ({"top_n": 5, "at": "2100-01-01"}, ConfigError, "2100-01-01.*before 2100-01-01 00:00:00"),
        ({"top_n": 5, "at": "1e30"}, ConfigError, "1e30.*expected a date"),
        ({"top_n": 5, "at": "inf"}, ConfigError, "inf.*expected a date"),
        ({"top_n": 5, "at": "nan"}, ConfigError, "nan.*expected a date"),
        ({"top_n": 5, "run": "nowhere"}, ArtifactError, "there is no run"),
        ({"top_n": 5, "users": "nowhere"}, DataError, "--users nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused(
    finished: Finished, tmp_path: Path, wish: dict[str, Any], kind: type[HpgrError], words: str
) -> None:
    asked = Wish(**({"run": finished.run.folder.uri, "output": str(tmp_path / "out")} | wish))
    with pytest.raises(kind, match=words):
        batch_score(asked, in_process, score_here, quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, 8_000_000), ("1700000000", 1_700_000_000_000_000), ("2026-01-31T06:00:00", 1_769_839_200_000_000),
     ("2026-01-31T06:00:00+01:00", 1_769_835_600_000_000), ("1990-01-01", 631_152_000_000_000)],
)  # fmt: skip
def test_moments(finished: Finished, text: str | None, expected: int) -> None:
    assert moment(text, finished.config, 7_000_000) == expected


def test_ids_of_the_helper_are_the_vocabularys(finished: Finished, items: list[str]) -> None:
    first = finished.run.sizes().first_item
    assert item_ids(finished, [first, first + 1, 2]) == [items[0], items[1], None]
