"""Folders on disk and on an S3 API served here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_store import Weather, gate

from hpgr import artifacts
from hpgr.artifacts import FORMAT, Folder, check_format, fingerprint, resolve
from hpgr.config import Config
from hpgr.data.preparation import Prepared, in_process, prepare
from hpgr.data.sources import find_files, fragments
from hpgr.errors import ArtifactError, StoreError


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    environment = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "ENDPOINT_URL": endpoint, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="logs")
    yield "s3://logs"
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("bucket") + "/run")


def test_files_round_trip(folder: Folder) -> None:
    folder.write("a/b.bin", b"one")
    folder.write("a/b.bin", b"two")
    folder.write_json("a/c.json", {"é": 1})
    folder.write_parquet("d.parquet", pa.table({"x": [1, 2]}))
    assert folder.read("a/b.bin") == b"two"
    assert folder.sub("a").read_json("c.json") == {"é": 1}
    assert folder.read_parquet("d.parquet").column("x").to_pylist() == [1, 2]
    assert folder.entries("a") == ["b.bin", "c.json"]
    folder.delete("a")
    assert not folder.exists("a/b.bin")
    assert folder.entries("a") == []


def test_a_missing_file_is_a_clear_error(folder: Folder) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*nothing\.json"):
        folder.read_json("nothing.json")


def test_prepare_from_and_to_a_store_equals_disk(
    bucket: str, write_log: Callable[..., str], config: Callable[..., Config]
) -> None:
    places = range(140)
    rows = {
        "user_id": [f"u{i % 7}" for i in places],
        "item_id": [i % 11 for i in places],
        "timestamp": [1_700_000_000 + 60 * i for i in places],
        "clicked": [i % 3 == 0 for i in places],
    }
    path = write_log(pa.table(rows))
    on_disk = prepare(config(data={"path": path}), in_process, print)
    Folder(bucket).write("in/log.parquet", Path(path).read_bytes())
    settings = config(data={"path": f"{bucket}/in", "prepared": f"{bucket}/prepared"})
    in_store = prepare(settings, in_process, print)
    assert in_store.timelines(0).equals(on_disk.timelines(0))
    reopened = Prepared.open(Folder(in_store.folder.uri))
    assert reopened.manifest["account"] == on_disk.manifest["account"]


def test_an_unknown_scheme_says_what_is_known() -> None:
    with pytest.raises(ArtifactError, match="s3:// or gs://"):
        resolve("carrier-pigeon://log")


def test_fingerprints_follow_content_not_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.mark.parametrize("found", [{}, {"format": FORMAT + 1}, [], None])
def test_another_format_is_refused(found: object) -> None:
    with pytest.raises(ArtifactError, match="use another folder"):
        check_format(found, "run folder x")


def test_a_store_that_refuses_a_short_read_is_asked_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client does not: a refusal longer than what is read is a broken stream to it."""
    folder, weather = Folder(f"{bucket}/run"), Weather()
    folder.write("small", b"a few bytes")
    with gate(os.environ["AWS_ENDPOINT_URL"], weather) as through:
        monkeypatch.setenv("AWS_ENDPOINT_URL", through)
        monkeypatch.setattr(artifacts, "PAUSES", (0.0, 0.0))
        for times in (1, 2):
            weather.next_reads = times
            assert folder.read("small") == b"a few bytes"
            assert weather.next_reads == 0
        weather.next_reads = 3
        with pytest.raises(StoreError, match=r"cannot read .*run/small"):
            folder.read("small")


def test_a_log_on_a_store_that_refuses_short_reads_is_opened(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder(bucket).write("log.csv", b"user_id,item_id\na,b\n")
    weather = Weather()
    with gate(os.environ["AWS_ENDPOINT_URL"], weather) as through:
        monkeypatch.setenv("AWS_ENDPOINT_URL", through)
        monkeypatch.setattr(artifacts, "PAUSES", (0.0, 0.0))
        weather.next_reads = 2
        files = find_files([f"{bucket}/log.csv"])
        weather.next_reads = 2
        assert [piece.file.uri for piece in fragments(files, ["user_id", "item_id"])] == [f"{bucket}/log.csv"]
