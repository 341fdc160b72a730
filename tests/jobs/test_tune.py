"""The search as a user runs it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from hpgr.config import load_config

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.synthetic.users=160", "data.synthetic.items=60", "data.synthetic.categories=6", "stream.window=40",
    "stream.stride=20", "model.width=16", "stage1.epochs=2", "stage2.epochs=2",
]  # fmt: skip
SPACE = {
    "name": "tiny",
    "parameters": {
        "stage1.mask_ratio": {"choice": [0.2, 0.4]},
        "model.pgsa.top_k": {"choice": [4, 32]},
        "model.pgsa.sigma": {"choice": [0.0, 2.0]},
    },
    "scheduler": {"kind": "none"},
    "budget": {"trials": 5},
}


def command(folder: Path, *arguments: str) -> list[str]:
    values = [*TINY, f"data.prepared={folder}/prepared"]
    settings = [word for value in values for word in ("--set", value)]
    return [sys.executable, str(ROOT / "jobs/tune.py"), *settings, *arguments]


def resume(run: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/tune.py"), "--run", run, "--resume", *arguments]


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)


def space_file(folder: Path, **more: Any) -> str:
    (folder / "space.yaml").write_text(yaml.safe_dump({**SPACE, **more}))
    return str(folder / "space.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished search's folder, and what its job printed."""
    folder = tmp_path_factory.mktemp("search")
    done = run(command(folder, "--space", space_file(folder), "--run", "first"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "first", done.stdout


def test_search_json_keeps_its_promise(finished: tuple[Path, str]) -> None:
    found = json.loads((finished[0] / "search.json").read_text())
    assert found["trials"] == found["trials_finished"] == 5
    assert found["trials_pruned"] == found["trials_failed"] == 0
    rows = [row for row in found["history"] if row["state"] == "finished"]
    assert found["stage1_computed"] == len({row["stage1"] for row in rows}) <= 2
    assert found["stage1_reused"] == 5 - found["stage1_computed"]
    assert found["stage1_seconds_saved"] > 0
    assert found["seconds"] > 0
    best = max(rows, key=lambda row: row["auc"])
    assert found["best"]["auc"] == best["auc"] >= found["default"]["auc"]
    assert found["best"]["values"] == best["values"]
    assert 0.3 < found["best"]["test"]["auc"] < 1
    assert Path(found["best"]["checkpoint"]).is_file()


def test_its_time_counts_from_before_ray_and_preparing(finished: tuple[Path, str]) -> None:
    found = json.loads((finished[0] / "search.json").read_text())
    ray, search = (float(at) for at in re.findall(r"\[ *([\d.]+)s\] (?:ray: starting|search: 5 trials)", finished[1]))
    first = min(row["started"] for row in found["history"] if row["started"] is not None)
    assert first > search - ray - 0.2
    assert found["nodes"][0][0] < found["seconds"]


def test_best_yaml_is_a_whole_configuration(finished: tuple[Path, str]) -> None:
    found = json.loads((finished[0] / "search.json").read_text())
    best = load_config(finished[0] / "best.yaml")
    assert best.model.pgsa.top_k == found["best"]["values"]["model.pgsa.top_k"]
    assert best.stage1.mask_ratio == found["best"]["values"]["stage1.mask_ratio"]
    assert best.data.synthetic.users == 160


def test_the_best_trial_is_a_run_and_was_tested_once_and_alone(finished: tuple[Path, str]) -> None:
    found = json.loads((finished[0] / "search.json").read_text())
    best = Path(found["best"]["run"])
    metrics = json.loads((best / "metrics.json").read_text())
    assert metrics["stage2"]["test"]["auc"] == found["best"]["test"]["auc"]
    assert metrics["stage2"]["validation"]["auc"] == found["best"]["auc"]
    tested = [f for f in finished[0].glob("trials/*/stage2/done.json") if "test" in json.loads(f.read_text())]
    assert [f.parents[1] for f in tested] == [best]


def test_no_configuration_was_trained_twice(finished: tuple[Path, str]) -> None:
    rows = json.loads((finished[0] / "search.json").read_text())["history"]
    tried = [json.dumps(row["values"], sort_keys=True) for row in rows if row["state"] == "finished"]
    assert len(set(tried)) == len(tried)
    assert len(list(finished[0].glob("trials/*/stage2/done.json"))) == 5


def test_only_what_may_be_asked_for_is_left(finished: tuple[Path, str]) -> None:
    """The best trial's weights, and those of each stage 1: another trial may share it."""
    best = Path(json.loads((finished[0] / "search.json").read_text())["best"]["run"])
    assert not list(finished[0].rglob("checkpoints"))
    assert [path.parent for path in finished[0].glob("trials/*/stage2/best-*")] == [best / "stage2"]
    for stage1 in finished[0].glob("stage1/*"):
        assert len(list(stage1.glob("best-*"))) == 1


def test_the_study_can_be_read_by_optuna(finished: tuple[Path, str]) -> None:
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{finished[0]}/study.db")
    best = json.loads((finished[0] / "search.json").read_text())["best"]
    assert study.best_value == best["auc"]


def test_report_and_summary(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    summary = finished[1][finished[1].index("search: testing") :].splitlines()[1:]
    assert len(summary) <= 24
    assert any("best.yaml" in line for line in summary)
    assert finished[1].count(": finished auc") == 5


@pytest.mark.slow
def test_a_finished_search_is_not_done_again_and_grows_with_its_budget(finished: tuple[Path, str]) -> None:
    cwd, before = finished[0].parent, json.loads((finished[0] / "search.json").read_text())
    refused = run(command(cwd, "--space", str(cwd / "space.yaml"), "--run", "first"), cwd)
    assert refused.returncode == 2
    assert "already holds a search" in refused.stderr
    changed = run(resume("first", "--set", "space.sampler.seed=3"), cwd)
    assert changed.returncode == 2
    assert "space.sampler" in changed.stderr
    again = run(resume("first", "--set", "space.budget.trials=6", "--set", "resources.max_failures=1"), cwd)
    assert again.returncode == 0, again.stderr
    after = json.loads((finished[0] / "search.json").read_text())
    assert after["trials_finished"] == 6
    assert after["best"]["auc"] >= before["best"]["auc"]
    assert again.stdout.count(": finished auc") == 1
    assert after["seconds"] > before["seconds"]
    kept = json.loads((finished[0] / "run.json").read_text())
    assert (kept["space"]["budget"]["trials"], kept["config"]["resources"]["max_failures"]) == (6, 1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model.pgsa.topk": {"choice": [1, 2]}}, "did you mean model.pgsa.top_k"),
        ({"model.pgsa.top_k": {"choice": [0, 32]}}, "value 0 is not allowed"),
    ],
)
def test_a_bad_space_is_refused_before_anything_starts(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    done = run(command(tmp_path, "--space", space_file(tmp_path, parameters=parameters), "--run", "r"), tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "ray:" not in done.stdout
    assert not (tmp_path / "r").exists()


def test_trials_that_fail_by_numerics_are_marked_and_not_fatal(tmp_path: Path) -> None:
    parameters = {"stage2.optimiser.lr": {"choice": [0.001, 1e30]}}
    done = run(command(tmp_path, "--space", space_file(tmp_path, parameters=parameters), "--run", "r",
                       "--set", "stage2.optimiser.warmup_steps=0"), tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r/search.json").read_text())
    assert (found["trials_finished"], found["trials_failed"]) == (1, 1)
    failed = next(row for row in found["history"] if row["state"] == "failed")
    assert "is nan" in failed["error"] or "is inf" in failed["error"]


def known_aucs(folder: Path) -> dict[str, float]:
    """Validation AUC of every finished trial by its values."""
    history = json.loads((folder / "search.json").read_text())["history"]
    return {json.dumps(r["values"], sort_keys=True): r["auc"] for r in history if r["state"] == "finished"}


@pytest.mark.slow
def test_killed_three_times_and_resumed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """The driver dies at random moments; every configuration is tried once, to its end, and to the same end."""
    space = space_file(tmp_path, budget={"trials": 6})
    rng, words = random.Random(5), command(tmp_path, "--space", space, "--run", "r")
    for kill in range(3):
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "at once" in line:
                break
        time.sleep(rng.uniform(4, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        words = resume("r")
        assert (tmp_path / "r/study.db").exists(), f"kill {kill}"
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r/search.json").read_text())
    assert found["trials"] == found["trials_finished"] == 6
    aucs, undisturbed = known_aucs(tmp_path / "r"), known_aucs(finished[0])
    assert len(aucs) == 6
    both = aucs.keys() & undisturbed.keys()
    assert len(both) > 2
    assert all(aucs[key] == pytest.approx(undisturbed[key], abs=1e-6) for key in both)


@pytest.mark.slow
def test_a_trial_may_use_several_workers(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One is stopped early by ASHA; the places of its workers are free for the test of the best."""
    space = space_file(tmp_path, budget={"trials": 2}, scheduler={"kind": "asha"})
    several = ["--set", "resources.workers=2", "--set", "resources.cpus_per_worker=0.5"]
    done = run(command(tmp_path, "--space", space, "--run", "r", *several), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r/search.json").read_text())
    assert found["trials"] == 2
    alone = json.loads((finished[0] / "search.json").read_text())
    assert found["default"]["auc"] == pytest.approx(alone["default"]["auc"], abs=2e-3)


@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on(tmp_path: Path) -> None:
    """Tune starts it anew; it continues from its own last checkpoint."""
    space = space_file(tmp_path, budget={"trials": 2})
    words = command(tmp_path, "--space", space, "--run", "r", "--set", "stage1.epochs=12")
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while not list(tmp_path.glob("r/stage1/*/checkpoints/step-*/checksums.json")):
        assert process.poll() is None
        time.sleep(0.2)
    trials = [p for p in psutil.Process(process.pid).children(recursive=True) if "ray::ImplicitFunc" in p.name()
              or any("ImplicitFunc" in part for part in p.cmdline())]  # fmt: skip
    assert trials
    for victim in trials:
        victim.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = json.loads((tmp_path / "r/search.json").read_text())
    assert (found["trials_finished"], found["trials_failed"]) == (2, 0)
    logs = json.loads(next(tmp_path.glob("r/stage1/*/done.json")).read_text())
    assert len(logs["curve"]) == len({point["step"] for point in logs["curve"]})
