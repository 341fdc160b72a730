"""A finished run is only read, so that it may lie in a read-only archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpgr.artifacts import Folder
from hpgr.config import load_config
from hpgr.errors import ArtifactError, StoreError
from hpgr.on_ray.pipeline import Request, open_run, two_stage


def test_a_finished_run_in_a_read_only_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(tmp_path / "run"), load_config(None, []), False)
    _, folder = open_run(request)
    folder.write_json("metrics.json", {"name": "run"})

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    for verb in ("write", "remove", "move", "delete"):
        monkeypatch.setattr(Folder, verb, refuse)
    metrics, where = two_stage(Request(folder.uri, None, True), lambda _: None)
    assert (metrics, where) == ({"name": "run"}, folder.uri)
    with pytest.raises(ArtifactError):
        two_stage(request, lambda _: None)
