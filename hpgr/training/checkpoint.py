"""Checkpoints in the run folder: tensors as safetensors, the rest as JSON, a checksum file last.

A checkpoint without its checksum file, or whose files do not match it, does not count; the one before does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hpgr.artifacts import Folder
from hpgr.errors import ArtifactError, StoreError

SEAL = "checksums.json"
_MODEL, _OPTIMISER, _STATE = "model.safetensors", "optimiser.safetensors", "state.json"


def save(
    folder: Folder,
    step: int,
    model: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write checkpoint `step-<step>`; it counts once its seal is written."""
    tensors, plain = _flatten(optimiser)
    contents = {
        _MODEL: to_bytes(model),
        _OPTIMISER: to_bytes(tensors),
        _STATE: json.dumps(state | {"optimiser": plain}, allow_nan=False).encode(),
    }
    target = folder.sub(f"step-{step:08d}")
    for name, content in contents.items():
        target.write(name, content)
    target.write_json(SEAL, {name: digest(content) for name, content in contents.items()})


def prune(folder: Folder, step: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to the one just written. Later ones are not this process's: it may
    have been given up for dead, and another one have gone on."""
    for name in [name for name in folder.entries() if name <= f"step-{step:08d}"][:-keep]:
        folder.delete(name)


def drop_later(folder: Folder, name: str | None, best: str) -> None:
    """Delete, from a stage's folder, what training wrote after the checkpoint that it goes on from (None: all) and the
    best weights that this names."""
    checkpoints = folder.sub("checkpoints")
    for later in checkpoints.entries():
        if name is None or later > name:
            checkpoints.delete(later)
    for later in folder.entries():
        if later.startswith("best-") and later > best:
            folder.remove(later)


def discard(folder: Folder, kept: str = "") -> None:
    """Delete what a stage's folder holds for training alone: checkpoints, and weights but the file `kept`."""
    folder.delete("checkpoints")
    for name in folder.entries():
        if name.startswith("best-") and name != kept:
            folder.remove(name)


def latest(
    folder: Folder, say: Callable[[str], None], check: Callable[[dict[str, Any]], None] = lambda _: None
) -> str | None:
    """Name of the newest whole checkpoint, or None; torn and corrupt ones are named and passed over.

    `check` gets a checkpoint's state and raises ArtifactError if what that refers to is not whole.

    Raises:
        StoreError: the disk or store refuses to read.
    """
    for name in reversed(folder.entries()):
        try:
            check(json.loads(_verified(folder.sub(name))[_STATE]))
        except StoreError:  # a disk or store that refuses says nothing of the file: to begin anew would cost the work
            raise
        except ArtifactError as error:
            say(f"checkpoint {name} is not whole, using the one before: {error}")
        else:
            return name
    return None


def load(folder: Folder, name: str, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Model tensors and state of a checkpoint; the optimiser is restored in place."""
    contents = _verified(folder.sub(name))
    state = json.loads(contents[_STATE])
    _unflatten(optimiser, from_bytes(contents[_OPTIMISER]), state.pop("optimiser"))
    return from_bytes(contents[_MODEL]), state


def _verified(folder: Folder) -> dict[str, bytes]:
    sums = folder.read_json(SEAL)
    if not isinstance(sums, dict) or sums.keys() != {_MODEL, _OPTIMISER, _STATE}:
        raise ArtifactError(f"{folder.uri}/{SEAL} does not name the checkpoint's files")
    contents = {name: folder.read(name) for name in sums}
    for name, content in contents.items():
        if digest(content) != sums[name]:
            raise ArtifactError(f"{folder.uri}/{name} does not match its checksum")
    return contents


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def best_weights(folder: Folder, state: dict[str, Any]) -> bytes:
    """The best weights of a stage, which its checkpoints and its done.json name by `best_file` and `best_sum`.

    Raises:
        ArtifactError: they are gone or damaged.
    """
    content = folder.read(state["best_file"])
    if digest(content) != state.get("best_sum", digest(content)):  # older folders have no sum
        raise ArtifactError(f"{folder.uri}/{state['best_file']} does not match its checksum; restore it, or delete "
                            f"{folder.uri} to train the stage again")  # fmt: skip
    return content


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors, contiguous and on the CPU."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})


def from_bytes(content: bytes) -> dict[str, Tensor]:
    """Inverse of `to_bytes`. Raises ArtifactError on anything else."""
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ArtifactError(f"weights cannot be read: {error}") from None


def _flatten(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimiser.state_dict()
    tensors = {f"{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _unflatten(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
