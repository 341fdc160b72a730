"""An object store that refuses or delays, and keys that must not be written; against a real S3 API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_faults import ROOT, Job, close, outcome, tune, two_stage, wait_for
from helpers_store import SECRETS, Weather, client, environment, gate, store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
BUCKET = "runs"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with store(BUCKET) as found:
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same run, all of it on the disk."""
    job = two_stage(tmp_path_factory.mktemp("alone"))
    job.finish()
    return job


def on_store(folder: Path, where: str, through: str) -> Job:
    """A run with its generated log, prepared log, checkpoints and report on the store."""
    job = two_stage(folder, f"data.prepared=s3://{BUCKET}/{where}/prepared", **environment(through))
    uri = f"s3://{BUCKET}/{where}/run"
    words, again = ([uri if word == "run" else word for word in w] for w in (job.first, job.again))
    return Job(job.name, folder / "run", folder, words, again, job.environment)


def fetch(endpoint: str, where: str, folder: Path) -> dict[str, bytes]:
    """All objects below a key, also as files."""
    s3, found = client(endpoint), {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{where}/"):
        for entry in page.get("Contents", ()):
            found[entry["Key"]] = s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
    for key, content in found.items():
        path = folder / key.removeprefix(f"{where}/")
        if not key.endswith("/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return found


@pytest.mark.slow
def test_a_store_that_stumbles_gives_the_result_of_a_disk_and_keeps_no_key(
    endpoint: str, alone: Job, tmp_path: Path
) -> None:
    weather = Weather(refuse=0.02, delay=0.01)
    with gate(endpoint, weather) as through:
        job = on_store(tmp_path, "stumbles", through)
        job.finish()
    assert weather.refused > 3
    found = fetch(endpoint, "stumbles", tmp_path)
    assert close(outcome(job), outcome(alone))
    written = found | {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(name.endswith("report.html") for name in written)
    assert any("/prepared/" in name for name in written)
    for name, content in written.items():
        assert [s for s in SECRETS.values() if s.encode() in content] == [], name


@pytest.mark.faults
def test_a_store_that_is_gone_ends_the_job_in_words_and_it_goes_on(endpoint: str, alone: Job, tmp_path: Path) -> None:
    weather = Weather(refuse=1.0)
    with gate(endpoint, weather) as through:
        job = on_store(tmp_path, "gone", through)
        with job.started() as process:
            assert process.wait(300) == 2, job.said()
        (error,) = (line for line in job.said().splitlines() if line.startswith("error: "))
        assert f"{BUCKET}/gone" in error
        assert "Traceback" not in job.said()
        assert "to go on: python " in job.said()
        assert weather.refused < 100
        weather.refuse = 0.0
        job.finish()
    fetch(endpoint, "gone", tmp_path)
    assert close(outcome(job), outcome(alone))


@pytest.mark.faults
def test_a_search_on_a_store_goes_on_after_its_driver_died(endpoint: str, tmp_path: Path) -> None:
    """Study, trials and results are all there; the disk has nothing that a resumed search needs."""
    alone = tune(tmp_path / "alone")
    alone.finish()
    disk = tune(tmp_path / "store", f"data.prepared=s3://{BUCKET}/search/prepared", **environment(endpoint))
    uri = f"s3://{BUCKET}/search/run"
    first, again = ([uri if word == "run" else word for word in words] for words in (disk.first, disk.again))
    with replace(disk, first=first).started() as process:
        wait_for(lambda: "trial 0: finished" in disk.said(), 200, process)
        process.kill()
    replace(disk, first=again).finish()
    fetch(endpoint, "search", disk.cwd)
    assert close(outcome(disk), outcome(alone))


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_real_log_on_a_store_trains_as_on_a_disk(
    endpoint: str, shared_data: Callable[[str], str], tmp_path: Path
) -> None:
    """ml-100k: log, prepared log, checkpoints and results; for the epochs that a test has time for."""
    log = Path(shared_data("ml-100k.parquet"))
    client(endpoint).upload_file(str(log), BUCKET, "real/ml-100k.parquet")
    few = ["stage1.epochs=1", "stage2.epochs=1", "checkpoints.every_steps=40"]
    places = {
        "disk": (str(log), f"{tmp_path}/disk", {}),
        "store": (f"s3://{BUCKET}/real/ml-100k.parquet", f"s3://{BUCKET}/real", environment(endpoint)),
    }
    jobs = {}
    for name, (path, home, variables) in places.items():
        values = [*few, f"data.path={path}", f"data.prepared={home}/prepared"]
        words = ["--config", str(ROOT / "jobs/configs/ml-100k.yaml"), "--run", f"{home}/run"]
        words += [word for value in values for word in ("--set", value)]
        (tmp_path / name).mkdir()
        jobs[name] = Job("two_stage", tmp_path / name / "run", tmp_path / name, words, words, variables)
        jobs[name].finish(700)
    fetch(endpoint, "real", tmp_path / "store")
    assert close(outcome(jobs["store"]), outcome(jobs["disk"]))
