"""The comparison as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from hpgr.metrics import auc

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data": {"synthetic": {"users": 160, "items": 60, "categories": 6}},
    "stream": {"window": 40, "stride": 20},
    "model": {"width": 16},
    "stage1": {"epochs": 2},
    "stage2": {"epochs": 2},
}
MATRIX = {
    "name": "tiny",
    "seeds": [0, 1],
    "rows": {
        "full": {"model.pgsa.top_k": 8},
        "dense": {"model.pgsa.enabled": False},
        "alone": {"stage1.enabled": False, "model.pgsa.anchors": "live"},
        "broken": {"model.pgsa.enabled": False, "stage2.optimiser.lr": 1e30, "stage2.optimiser.warmup_steps": 0},
    },
    "baseline": ["dense"],
    "tables": [["slot"]],
    "tuning": {"parameters": {"model.heads": [1, 2]}, "draws": 2},
    "sensitivity": {"row": "full", "over": {"model.pgsa.top_k": [4]}},
    "bootstrap": {"draws": 200},
    "noise": {"sparse": "full", "dense": "dense"},
    "learnt": {"row": "full", "projection": "pca"},
}


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = {k: merged(a[k], v) if isinstance(v, dict) and isinstance(a.get(k), dict) else v for k, v in b.items()}
    return a | both


def matrix_file(folder: Path, **more: Any) -> str:
    base = yaml.safe_load((ROOT / "jobs/configs/synthetic.yaml").read_text())
    base = merged(base, merged(SMALL, {"data": {"prepared": f"{folder}/prepared"}}))
    (folder / "matrix.yaml").write_text(yaml.safe_dump({**MATRIX, "base": base, **more}, sort_keys=False))
    return str(folder / "matrix.yaml")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/compare.py"), *arguments]


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished comparison's folder, and what its job printed."""
    folder = tmp_path_factory.mktemp("compare")
    done = run(command("--config", matrix_file(folder), "--run", "r"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "r", done.stdout


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def test_compare_json_keeps_its_promise(finished: tuple[Path, str]) -> None:
    found = result(finished[0])
    models = {m["model"]: m for m in found["models"]}
    assert list(models) == list(MATRIX["rows"])
    for name in ("full", "dense", "alone"):
        figure = models[name]["test"]["auc"]
        assert figure["mean"] == pytest.approx(np.mean(figure["values"]))
        assert figure["sd"] == pytest.approx(np.std(figure["values"], ddof=1))
        assert len(figure["values"]) == 2
        assert models[name]["seconds"] > 0
        assert models[name]["parameters"] > 1000
        assert models[name]["seeds"] == [0, 1]
        tried = models[name]["tuned"]["tried"]
        assert [t["values"] for t in tried] == [{}, {"model.heads": 1}]
        best = max(tried, key=lambda t: t["auc"])
        assert models[name]["tuned"]["values"] == best["values"]
        assert models[name]["validation"]["auc"]["values"][0] == best["auc"]
    gaps = {(d["model"], d["metric"]): d for d in found["differences"] if d["baseline"] == "dense"}
    assert {name for name, _ in gaps} == {"full", "alone"}
    table = [
        d for d in found["differences"] if d["baseline"] == "table of slot, engaged before" and d["metric"] == "auc"
    ]
    assert {d["model"] for d in table} == {"full", "dense", "alone"}
    simple = found["simple"]["table of slot, engaged before"]
    for d in table:
        assert d["mean"] == pytest.approx(models[d["model"]]["test"]["auc"]["mean"] - simple)
    gap = gaps["full", "auc"]
    assert gap["mean"] == pytest.approx(models["full"]["test"]["auc"]["mean"] - models["dense"]["test"]["auc"]["mean"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert (gap["baseline"], gap["seeds"]) == ("dense", 2)


def test_every_seed_was_tested_on_the_same_impressions_and_tuning_on_none(finished: tuple[Path, str]) -> None:
    models = {m["model"]: m for m in result(finished[0])["models"]}
    sizes = set()
    for name in ("full", "dense", "alone"):
        for seed, home in models[name]["cells"].items():
            scores = pq.read_table(f"{home}/stage2/test_scores.parquet")
            area = auc(scores["score"].to_numpy(), scores["label"].to_numpy())
            assert models[name]["test"]["auc"]["values"][int(seed)] == pytest.approx(area)
            sizes.add(len(scores))
    assert len(sizes) == 1
    tested = {p.parents[1].name for p in finished[0].glob("cells/*/stage2/test_scores.parquet")}
    assert tested == {Path(home).name for m in models.values() for home in m["cells"].values()}
    assert len(list(finished[0].glob("cells/*"))) > len(tested)


def test_a_stage_1_that_rows_agree_on_was_computed_once(finished: tuple[Path, str]) -> None:
    """Full, dense, broken and the curve share it; heads are a setting of stage 1 too, so at most four differ."""
    found = result(finished[0])
    assert 2 <= found["stage1_computed"] <= 4
    assert len(list(finished[0].glob("stage1/*/done.json"))) == found["stage1_computed"]
    assert not list(finished[0].glob("cells/*/stage1"))


def test_cells_that_have_ended_keep_their_best_weights_and_no_checkpoints(finished: tuple[Path, str]) -> None:
    stages = [stage for kind in ("cells/*/stage2", "stage1/*") for stage in finished[0].glob(kind)]
    done = [stage for stage in stages if (stage / "done.json").exists()]
    assert not list(finished[0].glob("**/checkpoints/*"))
    assert len(done) > 4
    for stage in stages:
        kept = [json.loads((stage / "done.json").read_text())["best_file"]] if stage in done else []
        assert [p.name for p in stage.glob("best-*")] == kept


def test_a_row_that_fails_by_numerics_is_marked_and_ends_nothing(finished: tuple[Path, str]) -> None:
    found = result(finished[0])
    broken = found["models"][-1]
    assert broken["model"] == "broken"
    assert broken["test"] == {}
    assert len(broken["failed"]) == 2  # both of what it tried
    assert all("nan" in f["error"] or "inf" in f["error"] for f in broken["failed"])
    assert found["cells"]["failed"] == 2
    assert "broken" in (finished[0] / "report.html").read_text()


def test_the_curve_has_its_points_and_the_rows_own(finished: tuple[Path, str]) -> None:
    (curve,) = result(finished[0])["sensitivity"]
    assert curve["path"] == "model.pgsa.top_k"
    assert [(p["value"], p["own"], len(p["auc"]["values"])) for p in curve["points"]] == [(4, False, 2), (8, True, 2)]
    full = result(finished[0])["models"][0]
    assert curve["points"][1]["auc"]["values"] == full["validation"]["auc"]["values"]


def test_attention_is_measured_and_what_was_learnt_is_shown(finished: tuple[Path, str]) -> None:
    found = result(finished[0])
    overlap = found["noise"]["overlap"]
    assert overlap["k"] == 8
    assert overlap["candidates"] > 50
    for name in ("overlap", "mass", "chance"):
        assert len(overlap[name]["values"]) == 2
        assert 0 < overlap[name]["mean"] < 1
    assert found["learnt"]["projection"] == "pca"
    assert all(n["kind"].startswith("category ") and len(n["near"]) == 5 for n in found["learnt"]["neighbours"])
    assert len({n["kind"] for n in found["learnt"]["neighbours"]}) == 6
    page = (finished[0] / "report.html").read_text()
    assert "Items after stage 1" in page
    assert "Anchors and dense attention" in page


def test_report_and_summary(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    summary = finished[1][finished[1].rindex("] cell ") :].splitlines()[1:]
    assert len(summary) <= 24
    assert any("--resume" in line for line in summary)


def test_a_finished_comparison_is_not_done_again_nor_changed_below_its_rows(finished: tuple[Path, str]) -> None:
    cwd = finished[0].parent
    refused = run(command("--config", "matrix.yaml", "--run", "r"), cwd)
    assert refused.returncode == 2
    assert "already holds a comparison" in refused.stderr
    changed = run(command("--run", "r", "--resume", "--set", "stage2.epochs=3"), cwd)
    assert changed.returncode == 2
    assert "stage2 differ" in changed.stderr


@pytest.mark.slow
def test_a_finished_comparison_takes_another_seed(finished: tuple[Path, str]) -> None:
    cwd, before = finished[0].parent, result(finished[0])
    again = run(command("--run", "r", "--resume", "--set", "compare.seeds=[0, 1, 2]"), cwd)
    assert again.returncode == 0, again.stderr
    after = result(finished[0])
    assert again.stdout.count("] cell ") == 3 + 1  # a seed for each of three rows, and one for the curve's point
    for old, new in zip(before["models"][:3], after["models"][:3], strict=True):
        assert new["test"]["auc"]["values"][:2] == old["test"]["auc"]["values"]
        assert len(new["test"]["auc"]["values"]) == 3
    assert after["seconds"] > before["seconds"]


def test_a_bad_matrix_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = {"a": {"model.pgsa.topk": 1}, "b": {}}
    path = matrix_file(tmp_path, rows=rows, baseline="a", sensitivity=None, noise=None, learnt=None)
    done = run(command("--config", path, "--run", "r"), tmp_path)
    assert done.returncode == 2
    assert "did you mean model.pgsa.top_k" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ray:" not in done.stdout
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_noise_is_planted_and_measured(tmp_path: Path) -> None:
    """More planted noise, more attention on it; sparse attention of one anchor has less of it than all alike."""
    planted = {"sparse": "full", "dense": "dense", "planted": [0.1, 0.7]}
    rows = {"full": {"model.pgsa.top_k": 1, "model.pgsa.sigma": 0.0}, "dense": {"model.pgsa.enabled": False}}
    more = {"rows": rows, "noise": planted, "tuning": {}, "sensitivity": None, "seeds": [0], "learnt": None}
    done = run(command("--config", matrix_file(tmp_path, **more), "--run", "r", "--set", "stage1.epochs=20"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    low, high = result(tmp_path / "r")["noise"]["planted"]
    assert (low["noise"], high["noise"]) == (0.1, 0.7)
    for level in (low, high):
        assert level["sparse"]["mean"] < level["uniform"]["mean"] - 0.05
        assert level["cut"]["values"][0] == pytest.approx(1 - level["sparse"]["mean"] / level["dense"]["mean"])
    assert high["uniform"]["mean"] > low["uniform"]["mean"] + 0.1
    assert "cuts the mass on irrelevant events" in (tmp_path / "r/report.html").read_text()


@pytest.mark.slow
def test_killed_twice_and_resumed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The driver and its processes die while cells run; the end is the undisturbed one, no cell is trained twice."""
    words = command("--config", matrix_file(tmp_path), "--run", "r")
    ended: list[str] = []
    for pause in (1.0, 3.0):
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "] cell " in line:
                ended.append(line.split("] ")[1].split(":")[0])
                break
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        words = command("--run", "r", "--resume")
    # Of the cells that had ended by now: one in the middle of its epochs may still find better weights.
    finished_cells = tmp_path.glob("r/cells/*/stage2/done.json")
    best = [done.parent / json.loads(done.read_text())["best_file"] for done in finished_cells]
    known = {path: path.stat().st_mtime_ns for path in best}
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(ended)) == len(ended) == 2
    assert len(known) >= 2
    assert {path: path.stat().st_mtime_ns for path in known} == known
    found = {m["model"]: m for m in result(tmp_path / "r")["models"]}
    undisturbed = {m["model"]: m for m in result(finished[0])["models"]}
    for name in ("full", "dense", "alone"):
        ours, theirs = found[name]["test"]["auc"]["values"], undisturbed[name]["test"]["auc"]["values"]
        assert ours == pytest.approx(theirs[:2], abs=1e-6)
