"""The attention benchmark runs on tiny histories and reports what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpgr.config import validate
from hpgr.model.hstu import HstuEncoder
from hpgr.on_ray.benchmarks import attention


def test_attention(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done = subprocess.run(
        [sys.executable, "jobs/benchmark.py", "attention", "--lengths", "160", "--tokens", "320", "--rounds", "2",
         "--top-k", "4", "--max-keys", "8", "--threads", "1", "--json", str(out)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
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
    assert "ratios.160" in done.stdout


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
