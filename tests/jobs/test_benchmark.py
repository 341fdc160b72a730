"""Benchmarks run on tiny inputs and report what they promise; their baselines do the same work."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hpgr.config import load_config, validate
from hpgr.errors import ConfigError
from hpgr.model.hstu import HstuEncoder
from hpgr.on_ray.benchmarks import attention, prepare, search_overhead, step
from hpgr.on_ray.command import DEFAULT
from hpgr.on_ray.trials import demand, nested

Benchmark = Callable[[str], tuple[dict[str, Any], str]]


@pytest.fixture
def benchmark(root: Path, tmp_path: Path) -> Benchmark:
    """Runs jobs/benchmark.py with these words; its figures and what it printed."""

    def run(words: str) -> tuple[dict[str, Any], str]:
        out = tmp_path / "figures.json"
        done = subprocess.run(
            [sys.executable, "jobs/benchmark.py", *words.split(), "--json", str(out)],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text(encoding="utf-8")), done.stdout

    return run


def test_attention(benchmark: Benchmark) -> None:
    figures, printed = benchmark("attention --lengths 160 --tokens 320 --rounds 2 --top-k 4 --max-keys 8 --threads 1")
    assert next(iter(figures)) == "ratios"
    for name in (
        "ratios",
        "gather_ratios",
        "ratios_over_tiled_dense",
        "ratios_by_cpu_time",
        "memory_ratios",
        "seconds",
        "peak_mb",
    ):
        assert figures[name].keys() == {"160"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert figures["rows"] == {"160": 2}
    ways = figures["seconds"]["160"]
    assert all(
        ways[way]["least"] <= ways[way]["median"] <= ways[way]["greatest"] for way in ("dense", "auto", "gather")
    )
    assert figures["machine"]["versions"]["torch"]
    first = next(line for line in printed.splitlines() if "ratios" in line)
    assert first.split() == ["ratios", "160", f"{figures['ratios']['160']:.4g}"]
    assert len(printed.splitlines()) < 40


def test_the_baselines_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense in tiles equals dense, and PGSA that keeps all events equals both."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "TILE", 640)
    pgsa = {"top_k": 40, "sigma": 0.0}
    model = validate({"model": {"width": 8, "heads": 2, "dropout": 0.0, "pgsa": pgsa}}).model
    case, x = attention.Case(model, 40, 2, "cpu", 1), attention.histories(40, 2, "cpu")
    encoder, tokens = HstuEncoder(model, 40), torch.randn(2, 40, 8)
    table = torch.randn(attention.ITEMS, 8)
    dense, kept = (attention.encoded(encoder, tokens, case.relation(x, table, way)) for way in ("dense", "gather"))
    torch.testing.assert_close(attention.encoded_in_tiles(encoder, tokens, x, model), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", prepare.PEERS)
def test_peers_sort_and_sessionise(way: str, tmp_path: Path) -> None:
    """What a peer writes is in order and has the sessions that a plain loop finds."""
    pytest.importorskip(way)
    prepare.write_log(tmp_path / "log", 2000, print)
    seconds = prepare.measure(way, str(tmp_path / "log"), str(tmp_path / "out"), memory=False)
    out = pq.read_table(tmp_path / "out/out.parquet")
    user, moment, session = (out.column(c).to_numpy() for c in ("user_id", "timestamp", "session"))
    assert seconds > 0
    assert len(user) == 2000
    assert (np.lexsort((moment, user)) == np.arange(2000)).all()
    expected, last = [], {}
    for u, t in zip(user.tolist(), moment.tolist(), strict=True):
        before, number = last.get(u, (t, 0))
        last[u] = (t, number + int(t - before > prepare.GAP_SECONDS))
        expected.append(last[u][1])
    assert session.tolist() == expected


@pytest.mark.slow
def test_prepare_without_peers(benchmark: Benchmark) -> None:
    figures, _ = benchmark("prepare --rows 300000 --rounds 1 --peers=")
    assert figures["rows_per_second"]["300000"]["prepare"]["median"] > 0
    assert figures["peak_mb"]["300000"]["prepare"] > 0


@pytest.mark.parametrize("peer", ["", *step.PEERS])
def test_step(peer: str, tmp_path: Path) -> None:
    """Each way trains on every event that it says: all but a user's last two, which are held out."""
    if peer:
        pytest.importorskip(step.PEERS[peer])
    rng, users, each = np.random.default_rng(0), 12, 20
    log = pa.table({"user_id": np.repeat(np.arange(users), each), "item_id": rng.integers(0, 9, users * each),
                    "timestamp": 1_600_000_000 + np.arange(users * each) * 60,
                    "rating": rng.integers(1, 6, users * each)})  # fmt: skip
    pq.write_table(log, tmp_path / "log.parquet")
    parser = argparse.ArgumentParser()
    step.arguments(parser)
    words = f"--log {tmp_path}/log.parquet --users 10 --rounds 1 --peers={peer} --set model.width=8"
    figures = step.run(parser.parse_args(words.split()), print)
    assert figures["events"]["hpgr"] == 10 * (each - 2)
    assert figures["ratios"].keys() == ({f"over_{peer}"} if peer else set())
    assert figures["events"].get(peer, 10 * (each - 3)) == 10 * (each - 3)
    assert all(speed["median"] > 0 for speed in figures["events_per_second"].values())


def test_a_peer_that_is_not_there_is_named() -> None:
    for benchmark in (prepare, step):
        with pytest.raises(ConfigError, match="got spark"):
            benchmark.run(argparse.Namespace(peers="spark", rows="10", rounds=1, keep=None), print)


@pytest.mark.slow
def test_stream(benchmark: Benchmark) -> None:
    figures, _ = benchmark("stream --users 200 --epochs 1 --rounds 1")
    assert figures["ratios"].keys() == {"stream_over_training", "ray_over_local"}
    for stage in ("stage1", "stage2"):
        assert 0 < figures["data_wait_share"][stage] < 1
        assert 0 <= figures["padding_share"][stage] < 1
        assert figures["tokens_per_second"][stage]["training"] > 0


def test_trials_train_the_way_their_name_says_and_fill_the_cpus_that_are_counted() -> None:
    for way, (cpus, settings) in search_overhead.WAYS.items():
        config = load_config(DEFAULT, settings)
        assert nested(config) == (way == "nested")
        assert demand(config)["CPU"] == cpus


@pytest.mark.slow
def test_search_overhead(benchmark: Benchmark) -> None:
    figures, _ = benchmark("search-overhead --users 120 --epochs 1 --trials 2")
    assert figures["ratios"]["nested_over_in_trial"] > 0
    for way in ("in_trial", "nested"):
        assert 0 < figures["training_share"][way] < 1
        assert figures["seconds_a_trial"][way] > 0
