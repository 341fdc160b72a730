"""Benchmarks run on tiny inputs and report what they promise; their baselines do the same work."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
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
from hpgr.on_ray.benchmarks import attention, machine, peers_of, prepare, search_overhead, step, step_models
from hpgr.on_ray.command import DEFAULT
from hpgr.on_ray.trials import WAITING_CPUS, demand, nested

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
    assert figures["machine"]["command"].startswith("python jobs/benchmark.py attention --lengths 160")
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


def figures_of(benchmark: Any, words: str) -> dict[str, Any]:
    """What a benchmark finds, in this process."""
    parser = argparse.ArgumentParser()
    benchmark.arguments(parser)
    figures: dict[str, Any] = benchmark.run(parser.parse_args(words.split()), print)
    return figures


@pytest.mark.parametrize("peer", ["", *step.PEERS])
def test_step(peer: str, tmp_path: Path) -> None:
    """Each way trains on every event that it says: all but a user's last two, which are held out. A peer is held
    against sampled negatives, and against our way with its kind of loss."""
    for module in step.PEERS.get(peer, ()):
        pytest.importorskip(module)
    rng, users, each = np.random.default_rng(0), 12, 20
    log = pa.table({"user_id": np.repeat(np.arange(users), each), "item_id": rng.integers(0, 9, users * each),
                    "timestamp": 1_600_000_000 + np.arange(users * each) * 60,
                    "rating": rng.integers(1, 6, users * each)})  # fmt: skip
    pq.write_table(log, tmp_path / "log.parquet")
    figures = figures_of(step, f"--log {tmp_path}/log.parquet --users 10 --rounds 1 --peers={peer} --set model.width=8")
    speeds = figures["events_per_second"]
    assert next(iter(figures)) == "ratios"
    assert figures["events"]["hpgr"] == figures["events"]["hpgr_full_softmax"] == 10 * (each - 2)
    assert figures["events"].get(peer, 10 * (each - 3)) == 10 * (each - 3)
    assert all(speed["median"] > 0 for speed in speeds.values())
    assert figures["ratios"].keys() == ({f"over_{peer}"} if peer else set())
    if peer:
        like = {"rectools": "hpgr", "rechub": "hpgr_full_softmax"}[peer]
        assert figures["ratios"][f"over_{peer}"] == speeds["hpgr"]["median"] / speeds[peer]["median"]
        assert figures["ratios_like_for_like"] == {
            f"{like}_over_{peer}": speeds[like]["median"] / speeds[peer]["median"]
        }


def test_step_takes_the_generated_log_and_trains_by_two_losses(tmp_path: Path) -> None:
    options = argparse.Namespace(log=None, users=6, set=[])
    settings, log = step.small_log(options, tmp_path)
    assert log["user_id"].nunique() == 6
    assert 120 < len(log) / 6 < 200
    sampled, full = (load_config(step.CONFIG, [*settings, loss]).stage1 for loss in step.OWN.values())
    assert sampled.full_softmax_items < log["item_id"].nunique() < full.full_softmax_items
    assert (sampled.negatives, sampled.objective) == (128, "next_item")


def test_step_models() -> None:
    """All ways of a stage take as many steps, and each baseline has its ratio to each of ours."""
    figures = figures_of(step_models, "--users 20 --history 48 --steps 2 --rounds 1 --set stream.batch_tokens=512 "
                                      "--set model.width=8")  # fmt: skip
    assert next(iter(figures)) == "ratios"
    assert figures["ratios"]["stage1"].keys() == {"over_hstu"}
    assert figures["ratios"]["stage2"].keys() == {"over_hstu", "over_mtgr"}
    assert figures["ratios"]["stage2"]["over_mtgr"].keys() == {"hpgr_auto", "hpgr_gather", "hpgr_dense"}
    assert figures["settings"]["steps"] == {"stage1": 2, "stage2": 2}
    for stage, ways in figures["events_per_second"].items():
        for way, speed in ways.items():
            took = 2 * figures["milliseconds_a_step"][stage][way] / 1e3
            assert speed["median"] * took == pytest.approx(2 * figures["events_a_step"][stage])


def test_the_ways_of_step_models_are_what_they_say() -> None:
    ways = {way: load_config(DEFAULT, own).model for way, own in step_models.WAYS["click-train"].items()}
    assert [ways[way].sparse for way in ("hpgr_auto", "hpgr_gather", "hpgr_dense")] == [True, True, False]
    assert (ways["hpgr_gather"].pgsa.impl, ways["hpgr_gather"].pgsa.max_keys) == ("gather", 64)
    assert [ways[way].name for way in ("hstu", "mtgr")] == ["hstu", "mtgr"]


def test_every_benchmark_has_its_command_on_the_page(root: Path) -> None:
    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name in runpy.run_path(str(root / "jobs/benchmark.py"))["BENCHMARKS"]:
        assert re.search(rf"`python jobs/benchmark.py {name}[ `]", page), name


def test_an_unknown_peer_is_refused() -> None:
    for benchmark in (prepare, step):
        with pytest.raises(ConfigError, match="got spark"):
            benchmark.run(argparse.Namespace(peers="spark", rows="10", rounds=1, keep=None), print)


def test_a_peer_that_is_not_installed_is_left_out() -> None:
    said: list[str] = []
    modules = {"here": ("json",), "half": ("json", "no_such_module"), "unasked": ("no_such_module",)}
    peers, left_out = peers_of("here,half", modules, "some-extra", said.append)
    assert peers == ["here"]
    assert left_out.keys() == {"half"}
    assert "pip install '.[some-extra]'" in left_out["half"]
    assert len(said) == 1


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/benchmark.py", "step", "--log", "my log"])
    found = machine("duckdb") if find_spec("duckdb") else machine()
    assert found["command"] == "python jobs/benchmark.py step --log 'my log'"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0.1
    assert {"torch", "ray", "numpy", "hpgr"} <= found["versions"].keys()


def test_a_peak_before_the_measured_step_is_forgotten() -> None:
    held = bytearray(80_000_000)
    held[:] = b"x" * len(held)
    before = attention.resident("VmHWM")
    del held
    attention.forget_peak()
    assert attention.resident("VmHWM") < before - 40_000_000


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
        assert demand(config)["CPU"] == cpus + nested(config) * WAITING_CPUS


def test_overhead_is_the_wall_clock_in_which_trials_do_not_train() -> None:
    account = {"seconds": 100.0, "training_seconds": 120.0}
    assert search_overhead.overhead(account, 2) == pytest.approx(0.4)


@pytest.mark.slow
def test_search_overhead(benchmark: Benchmark) -> None:
    figures, _ = benchmark("search-overhead --users 60 --epochs 1 --trials 1")
    assert figures["ratios"]["nested_over_in_trial"] > 0
    for way in ("in_trial", "nested"):
        assert 0 < figures["ratios"]["platform_overhead"][way] < 1
        assert figures["platform_overhead"][way]["least"] <= figures["platform_overhead"][way]["greatest"]
        assert figures["seconds_a_trial"][way]["median"] > 0
