"""A finished run is only read, so that it may lie in a read-only archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpgr.artifacts import FORMAT, Folder
from hpgr.config import load_config
from hpgr.errors import ArtifactError, ConfigError, StoreError
from hpgr.on_ray.pipeline import Request, open_run, stored_config, two_stage


def test_a_finished_run_in_a_read_only_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(tmp_path / "run"), load_config(None, []), False)
    _, folder = open_run(request)
    folder.write_json("metrics.json", {"name": "run"})

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    for verb in ("write", "remove", "move", "delete"):
        monkeypatch.setattr(Folder, verb, refuse)
    metrics, where = two_stage(Request(folder.uri, stored_config(folder.uri, []), True), lambda _: None)
    assert (metrics, where) == ({"name": "run"}, folder.uri)
    with pytest.raises(ArtifactError):
        two_stage(request, lambda _: None)


def test_a_run_that_ended_before_its_log_was_prepared_may_be_begun_anew(tmp_path: Path) -> None:
    """A column's name was mistyped, say; what holds more than a run's first files is gone on with."""
    where = str(tmp_path / "run")
    _, folder = open_run(Request(where, load_config(None, ["data.columns.label=click"]), False))
    for name in ("log.jsonl", "lock-1.json"):
        folder.write(name, b"")
    right = load_config(None, ["data.columns.label=clicked"])
    assert open_run(Request(where, right, False))[0] == right
    assert open_run(Request(where, stored_config(where, []), True))[0] == right
    for section in ("resources.max_failures=7", "checkpoints.keep=5"):
        changed = stored_config(where, [section])
        assert changed != right
        assert open_run(Request(where, changed, True))[0] == changed
    with pytest.raises(ConfigError, match=r"but model differ.*--set resources, checkpoints, tracking alone"):
        open_run(Request(where, stored_config(where, ["model.width=32"]), True))
    folder.write("prepared/manifest.json", b"{}")
    with pytest.raises(ArtifactError, match="already holds a run; add --resume"):
        open_run(Request(where, right, False))


def test_the_folder_of_another_job_is_left_alone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    folder.write_json("run.json", {"format": FORMAT, "kind": "comparison"})
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="holds a comparison, not a run"):
            open_run(Request(folder.uri, load_config(None, []), resume))
