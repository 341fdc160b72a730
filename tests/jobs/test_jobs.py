"""The jobs as a user runs them: in a process of their own, by their command lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "data.synthetic.users=240", "data.synthetic.items=60", "data.synthetic.categories=6", "stream.window=40",
    "stream.stride=20", "model.width=16", "stage1.epochs=2", "stage2.epochs=2", "resources.workers=0",
]  # fmt: skip


def run(job: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)


def tiny(folder: Path, *more: str) -> list[str]:
    values = [*TINY, f"data.prepared={folder}/prepared", *more]
    return [word for value in values for word in ("--set", value)]


def assert_reads_well(job: subprocess.CompletedProcess[str], folder: Path) -> None:
    """What a job wrote into pipes, as `ray job logs` shows it, is its own story alone, on two screens."""
    assert job.stderr == ""
    lines = job.stdout.splitlines()
    assert len(lines) < 100
    assert [line for line in lines if len(line) > 120 and str(folder) not in line] == []
    for line in takewhile(lambda line: not line.startswith("data  "), filter(None, lines)):
        assert re.fullmatch(r"\[ *[\d.]+s\] [\w-]+: .+", line), line
    for noise in ("\r", "\x1b", "Warning", "WARNING", "INFO", "pid=", "Traceback", "it/s]"):
        assert noise not in job.stdout, noise


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder, and what its job printed."""
    folder = tmp_path_factory.mktemp("job")
    done = run("two_stage.py", *tiny(folder), "--run", "first", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_reads_well(done, folder)
    return folder / "first", done.stdout


def test_metrics_keep_their_promised_keys(finished: tuple[Path, str]) -> None:
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    data = metrics["data"]
    assert data["rows_in"] == data["kept"] + data["quarantined"] + data["duplicates"] > 0
    assert {"hr@10", "ndcg@10"} <= metrics["stage1"]["test"].keys()
    assert {"auc", "gauc", "log_loss", "calibration"} <= metrics["stage2"]["test"].keys()
    assert metrics["seconds"]["total"] > 0
    assert metrics["seed"] == 0
    assert {"torch", "ray", "hpgr"} <= metrics["versions"].keys()
    assert 0.5 < metrics["baselines"]["oracle"] < 1


def test_a_run_folder_is_enough(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    for name in (
        "config.yaml",
        "run.json",
        "metrics.json",
        "report.html",
        "stage1/done.json",
        "stage2/done.json",
        "prepared/manifest.json",
        "prepared/vocabulary.parquet",
    ):
        assert (folder / name).is_file(), name
    best = json.loads((folder / "stage2/done.json").read_text())["best_file"]
    assert (folder / "stage2" / best).suffix == ".safetensors"
    assert list((folder / "tensorboard").iterdir())
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_the_summary_fits_a_screen_and_names_the_results(finished: tuple[Path, str]) -> None:
    text = finished[1]
    summary = text[text.index("\ndata  ") + 1 :].splitlines()
    assert len(summary) <= 24
    assert str(finished[0] / "report.html") in text
    assert any("python jobs/two_stage.py" in line for line in summary)


@pytest.mark.slow
def test_a_run_on_ray_train_reads_well_and_is_written_down_too(tmp_path: Path) -> None:
    arguments = tiny(tmp_path, "resources.workers=auto", "resources.gpu=auto", "resources.cpus_per_worker=auto")
    done = run("two_stage.py", *arguments, "--run", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_reads_well(done, tmp_path)
    assert "resources: auto is 1 worker(s), no GPU" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert {"prepare", "train", "stage1", "stage2"} <= {row["stage"] for row in rows}
    assert {row["run"] for row in rows} == {"one"}
    said = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    assert [f"{row['stage']}: {row['text']}" for row in rows if row["stage"]] == [
        line for line in said if line.partition(": ")[0] in {row["stage"] for row in rows}
    ]


def test_an_impossible_wish_ends_at_once_with_the_key_to_lower(finished: tuple[Path, str]) -> None:
    folder = finished[0].parent
    start = time.monotonic()
    refused = run("two_stage.py", *tiny(folder, "resources.workers=999"), "--run", "never", cwd=folder)
    assert refused.returncode == 2
    assert "can never be had" in refused.stderr
    assert "lower resources.workers" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert time.monotonic() - start < 120


def test_same_seed_same_metrics_and_the_prepared_log_is_reused(finished: tuple[Path, str]) -> None:
    folder = finished[0].parent
    again = run("two_stage.py", *tiny(folder), "--run", "second", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "reusing" in again.stdout
    first, second = (json.loads((folder / name / "metrics.json").read_text()) for name in ("first", "second"))
    for part in ("data", "stage1", "stage2", "baselines"):
        assert first[part] == second[part]


def test_a_killed_run_goes_on_to_the_undisturbed_result(finished: tuple[Path, str]) -> None:
    folder = finished[0].parent
    command = [sys.executable, str(ROOT / "jobs/two_stage.py"), *tiny(folder), "--run", "killed"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "stage1: epoch 1 " in line:
                break
        os.killpg(job.pid, signal.SIGKILL)
    assert not (folder / "killed/metrics.json").exists()
    refused = run("two_stage.py", *tiny(folder), "--run", "killed", cwd=folder)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    resumed = run("two_stage.py", "--run", "killed", "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from step-" in resumed.stdout
    first, second = (json.loads((folder / name / "curves.json").read_text()) for name in ("first", "killed"))
    for a, b in zip(first, second, strict=True):
        assert (a["train_loss"], a["validation"]) == (b["train_loss"], b["validation"])


def test_a_finished_run_is_not_done_again(finished: tuple[Path, str]) -> None:
    start = time.monotonic()
    again = run("two_stage.py", "--run", str(finished[0]), "--resume", cwd=finished[0].parent)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert time.monotonic() - start < 60


def test_resume_refuses_other_settings(finished: tuple[Path, str]) -> None:
    arguments = ["--run", str(finished[0]), "--resume", "--set", "model.width=32"]
    refused = run("two_stage.py", *arguments, cwd=finished[0].parent)
    assert refused.returncode == 2
    assert "model" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/run.json").write_text('{"format": 99}')
    refused = run("two_stage.py", "--run", "old", "--resume", cwd=tmp_path)
    assert refused.returncode == 2
    assert "format 99" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "modell.width=3"], "did you mean model"),
        (["--config", "nowhere.yaml"], "cannot read config nowhere.yaml"),
        (["--set", "data.path=nowhere.parquet", "--set", "data.columns.label=clicked"], "nowhere.parquet"),
        (["--set", "data.path=log.csv", "--set", "data.columns.user=visitor"], "no column 'visitor'"),
        (["--resume", "--run", "nowhere"], "there is no run"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,clicked\nu,i,1700000000,1\n")
    failed = run("two_stage.py", *arguments, "--set", f"data.prepared={tmp_path}/p", cwd=tmp_path) if (
        "--resume" not in arguments
    ) else run("two_stage.py", *arguments, cwd=tmp_path)  # fmt: skip
    assert failed.returncode == 2, failed.stdout
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "ray:" not in failed.stdout  # told before one has waited for a Ray


def test_print_config_is_a_config(tmp_path: Path) -> None:
    from hpgr.config import load_config

    shown = run("prepare.py", "--set", "seed=5", "--print-config", cwd=tmp_path)
    assert shown.returncode == 0
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    assert load_config(tmp_path / "shown.yaml").seed == 5


def test_prepare_alone(finished: tuple[Path, str]) -> None:
    done = run("prepare.py", *tiny(finished[0].parent), cwd=finished[0].parent)
    assert done.returncode == 0, done.stderr
    assert "reusing" in done.stdout
    assert "train" in done.stdout


def test_commands_of_the_readme_parse() -> None:
    """Every job the README shows exists, and its arguments are ones the job knows."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?:python|--) (jobs/\w+\.py)((?: [^\n`#\\]*)?)", readme.replace("\\\n", " "))
    assert commands
    shared = (ROOT / "hpgr/on_ray/command.py").read_text()
    for job, rest in commands:
        assert (ROOT / job).is_file(), job
        words = shlex.split(rest)
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / job).read_text() + shared))
        assert {w for w in words if w.startswith("--")} <= known, rest
        for name in (w for w in words if w.startswith("jobs/configs/")):
            assert (ROOT / name).is_file(), name


def test_a_cluster_that_nobody_named_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` on this machine leaves its address behind; without RAY_ADDRESS a job has a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as home:
        left = Path(home, "ray/ray_current_cluster")
        left.parent.mkdir()
        left.write_text("127.0.0.1:6399")
        monkeypatch.setenv("RAY_TMPDIR", home)
        done = run("prepare.py", *tiny(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "starting a local Ray" in done.stdout


@pytest.mark.slow
def test_submission_as_typed(tmp_path: Path) -> None:
    """`ray start --head`, then the literal submission and the one for a remote cluster; exit codes tell success."""
    ray = str(Path(sys.executable).with_name("ray"))
    home = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short, for sockets; its own, so that no other job finds this Ray
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8365", "RAY_TMPDIR": home,
    }  # fmt: skip
    environment.pop("RAY_AUTH_TOKEN_PATH", None)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580, check=False
        )

    # Ports of its own, the agent's too: another Ray on this machine has the usual ones.
    ports = ["--port=6465", "--dashboard-port=8365", "--dashboard-agent-listen-port=8366"]
    head = call(ray, "start", "--head", "--num-cpus=2", *ports)
    assert head.returncode == 0, head.stderr
    try:
        # Jobs can be listed some seconds before the head's agent is there to start one ("No available agent").
        _wait(lambda: call(ray, "job", "submit", "--", "true").returncode == 0)
        before = set((ROOT / "runs").glob("synthetic-*"))
        literal = call(ray, "job", "submit", "jobs/two_stage.py")
        assert literal.returncode == 0, literal.stdout[-3000:]
        (new,) = set((ROOT / "runs").glob("synthetic-*")) - before
        assert (new / "metrics.json").is_file()
        remote = ["--working-dir", ".", "--", "python", "jobs/two_stage.py", "--run", str(tmp_path / "remote")]
        shipped = call(ray, "job", "submit", *remote, *tiny(tmp_path))
        assert shipped.returncode == 0, shipped.stdout[-3000:]
        assert (tmp_path / "remote/metrics.json").is_file()
        wrong = call(ray, "job", "submit", *remote, "--set", "modell=1")
        assert wrong.returncode != 0
        assert "did you mean model" in wrong.stdout
    finally:
        for process in psutil.process_iter():  # `ray stop` would end every Ray on this machine
            with suppress(psutil.Error):
                if any(word.endswith((":6465", "=6465")) for word in process.cmdline()):
                    process.kill()
        shutil.rmtree(home, ignore_errors=True)


def _wait(ready: object) -> None:
    for _ in range(30):
        if ready():  # type: ignore[operator]
            return
        time.sleep(2)
    raise AssertionError("the cluster did not come up")
