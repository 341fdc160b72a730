"""A finished run, opened to be used: its configuration, prepared log and best weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from hpgr.artifacts import Folder, absolute, check_format
from hpgr.config import Config, validate
from hpgr.data.preparation import Prepared
from hpgr.errors import ArtifactError
from hpgr.model.base import ClickModel, ItemModel
from hpgr.model.registry import click_model, item_model
from hpgr.training import checkpoint
from hpgr.training.two_stage import Run, stage_key


@dataclass(frozen=True)
class Finished:
    """A run whose stage 2 has finished. `id` tells its weights and data from all others."""

    run: Run
    id: str

    @property
    def config(self) -> Config:
        return self.run.config

    def click_model(self, device: torch.device) -> ClickModel:
        """Stage 2 with its best weights, ready to score; what GPU kernels trained scores without a GPU too."""
        model = click_model(self.config, self.run.sizes())
        if self.config.model.pgsa.impl == "triton" and device.type != "cuda":
            model.attend_by("auto")
        model.load_state_dict(checkpoint.from_bytes(_best(self.run, "stage2")))
        return model.to(device).eval()

    def need_stage1(self) -> None:
        """Raises ArtifactError if the run has no stage 1."""
        if not self.config.stage1.enabled:
            raise ArtifactError(f"run {self.run.folder.uri} has no stage 1 (stage1.enabled is false), which --top-n "
                                "and --embeddings retrieve by; give --candidates, or another run")  # fmt: skip

    def item_model(self, device: torch.device) -> ItemModel:
        """Stage 1 with its best weights, ready to retrieve."""
        self.need_stage1()
        model = item_model(self.config, self.run.sizes())
        model.load_state_dict(checkpoint.from_bytes(_best(self.run, "stage1")))
        return model.to(device).eval()


def open_finished(uri: str, prepared: str | None = None) -> Finished:
    """Open a run folder for use; `prepared` names the folder of its prepared log where it was moved.

    Raises:
        ArtifactError: there is no run, its stage 2 has not finished, or its prepared log is gone.
    """
    folder = Folder(absolute(uri))
    if not folder.exists("run.json"):
        raise ArtifactError(f"--run: there is no run in {folder.uri}; give the folder that two_stage.py wrote")
    stored = folder.read_json("run.json")
    check_format(stored, f"run folder {folder.uri}")
    if not stored["config"]["stage2"].get("enabled", True):
        raise ArtifactError(f"{folder.uri} has no stage 2 (stage2.enabled is false) and so nothing that scores clicks; "
                            "give a run of both stages")  # fmt: skip
    if not folder.exists("stage2/done.json"):
        raise ArtifactError(f"{folder.uri}: stage 2 has not finished; go on with python jobs/two_stage.py "
                            f"--run {folder.uri} --resume")  # fmt: skip
    config = validate(stored["config"])
    run = Run(config, folder, _prepared(config, folder, prepared))
    parts = [run.prepared.manifest["fingerprint"].encode()]
    parts += [_best(run, stage) for stage in ("stage1", "stage2") if folder.exists(f"{stage}/done.json")]
    return Finished(run, hashlib.sha256(b"".join(parts)).hexdigest()[:16])


def _best(run: Run, stage: str) -> bytes:
    folder = run.folder.sub(stage)
    return checkpoint.best_weights(folder, folder.read_json("done.json"))


def _prepared(config: Config, folder: Folder, given: str | None) -> Prepared:
    """The prepared log that the run was trained on: the one whose key the run's stage 2 bears.

    The run's own copy of its manifest and vocabulary comes last: it has no timelines.
    """
    key = folder.read_json("stage2/done.json")["settings"]
    own = folder.sub("prepared")
    places = [Folder(absolute(given))] if given else []
    places += [Folder(own.read_json("manifest.json")["uri"])] if own.exists("manifest.json") else []
    places += [home.sub(name) for home in (Folder(absolute(config.data.prepared)),) for name in home.entries()]
    places.append(own)  # without timelines, but enough for new users
    for place in places:
        found = _opened(place)
        if found is not None and stage_key(config, found, "stage2") == key:
            return found
    raise ArtifactError(f"the log that {folder.uri} was trained on is not in "
                        f"{absolute(given or config.data.prepared)}; run from the folder where the run was started, or "
                        "name the prepared log with --prepared")  # fmt: skip


def _opened(place: Folder) -> Prepared | None:
    if not place.exists("manifest.json"):
        return None
    manifest: Any = place.read_json("manifest.json")
    return Prepared(place, manifest) if "known" not in manifest else None
