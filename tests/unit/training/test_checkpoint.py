"""Checkpoints come back whole or not at all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpgr.artifacts import Folder
from hpgr.config import Optimiser
from hpgr.errors import ArtifactError, StoreError
from hpgr.training import checkpoint
from hpgr.training.optimiser import make_optimiser

FILES = {"model.safetensors", "optimiser.safetensors", "state.json", "checksums.json"}


def stepped(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after some steps of AdamW; one parameter never gets a gradient."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    optimiser = make_optimiser(model, Optimiser(), {"0.weight": 0.5})
    for _ in range(steps):
        step(model, optimiser)
    return model, optimiser


def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    embedding, linear, _ = model
    linear(embedding(torch.tensor([0, 3]))).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "checkpoints"))


def save(folder: Folder, number: int, steps: int = 3) -> None:
    model, optimiser = stepped(steps)
    checkpoint.save(folder, number, dict(model.state_dict()), optimiser, {"epoch": number, "best": 0.1 + 0.2})


def said(folder: Folder) -> tuple[str | None, list[str]]:
    lines: list[str] = []
    return checkpoint.latest(folder, lines.append), lines


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_round_trip_is_exact_and_training_goes_on_alike(folder: Folder) -> None:
    model, optimiser = stepped(3)
    optimiser.param_groups[0]["lr"] = 0.1 + 0.2
    state = {"epoch": 2, "best": 0.1 + 0.2, "curve": [{"a": 1e-300, "none": None}]}
    checkpoint.save(folder, 3, dict(model.state_dict()), optimiser, state)
    other, other_optimiser = stepped(0, seed=9)
    tensors, got = checkpoint.load(folder, "step-00000003", other_optimiser)
    assert got == state
    other.load_state_dict(tensors)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    for ours, theirs in zip(optimiser.param_groups, other_optimiser.param_groups, strict=True):
        names = ours.keys() - {"params", "betas"}
        assert {k: ours[k] for k in names} == {k: theirs[k] for k in names}
        assert tuple(ours["betas"]) == tuple(theirs["betas"])
    ours, theirs = optimiser.state_dict()["state"], other_optimiser.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(equal(ours[k], theirs[k]) for k in ours)
    step(model, optimiser)
    step(other, other_optimiser)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))


def test_an_optimiser_that_has_not_stepped_comes_back(folder: Folder) -> None:
    save(folder, 0, steps=0)
    _, optimiser = stepped(2)
    checkpoint.load(folder, "step-00000000", optimiser)
    assert optimiser.state_dict()["state"] == {}


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_unpickled(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 1)
    assert set(folder.entries("step-00000001")) == FILES
    for name in FILES:
        content = folder.read(f"step-00000001/{name}")
        assert b"pickle" not in content
        if name.endswith("json"):
            json.loads(content)
        else:
            assert checkpoint.from_bytes(content)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    _, optimiser = stepped(0)
    assert said(folder) == ("step-00000001", [])
    checkpoint.load(folder, "step-00000001", optimiser)


def test_a_pickle_in_place_of_weights_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        checkpoint.from_bytes(pickle.dumps({"a": 1}))


def test_without_a_checkpoint_there_is_none(folder: Folder) -> None:
    assert said(folder) == (None, [])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def emptied(path: Path) -> None:
    path.write_bytes(b"{}" if path.suffix == ".json" else b"")


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip, emptied])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_checkpoint_that_is_not_whole_is_passed_over_with_a_word(folder: Folder, name: str, harm: object) -> None:
    save(folder, 5)
    save(folder, 12)
    assert said(folder) == ("step-00000012", [])
    harm(Path(folder.uri) / "step-00000012" / name)  # type: ignore[operator]
    found, lines = said(folder)
    assert found == "step-00000005"
    assert len(lines) == 1
    assert "step-00000012" in lines[0]
    assert "not whole" in lines[0]
    with pytest.raises(ArtifactError):
        checkpoint.load(folder, "step-00000012", stepped(0)[1])


def test_all_torn_is_none(folder: Folder) -> None:
    for number in (1, 2):
        save(folder, number)
        flip(Path(folder.uri) / f"step-0000000{number}" / "model.safetensors")
    found, lines = said(folder)
    assert found is None
    assert len(lines) == 2


def test_a_crash_while_writing_leaves_no_seal(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal comes last, whichever file the crash falls on."""
    save(folder, 1)
    original = Folder.write
    for crash_at in range(4):
        left = [crash_at]

        def write(self: Folder, name: str, content: bytes, left: list[int] = left) -> None:
            if not left[0]:
                raise ArtifactError("no space")
            left[0] -= 1
            original(self, name, content)

        monkeypatch.setattr(Folder, "write", write)
        with pytest.raises(ArtifactError, match="no space"):
            save(folder, 2 + crash_at)
        monkeypatch.undo()
        assert said(folder)[0] == "step-00000001"


def test_the_newest_are_kept_in_order_of_steps(folder: Folder) -> None:
    for number in (5, 50, 400):
        save(folder, number)
        checkpoint.prune(folder, number, keep=2)
    assert folder.entries() == ["step-00000050", "step-00000400"]
    checkpoint.prune(folder, 400, keep=3)
    assert len(folder.entries()) == 2


def test_pruning_leaves_later_ones_alone(folder: Folder) -> None:
    """A process that was given up for dead wakes and goes on from 3, while another one has come to 9."""
    for number in (2, 3, 9):
        save(folder, number)
    checkpoint.prune(folder, 3, keep=1)
    assert folder.entries() == ["step-00000003", "step-00000009"]


@pytest.mark.parametrize(
    ("name", "best", "left"),
    [("step-00000003", "best-00000002", ["best-00000002", "step-00000003"]),
     ("step-00000009", "best-00000007", ["best-00000002", "best-00000007", "step-00000003", "step-00000009"]),
     (None, "", [])],
)  # fmt: skip
def test_what_came_after_the_checkpoint_to_go_on_from_is_dropped(
    tmp_path: Path, name: str | None, best: str, left: list[str]
) -> None:
    stage = Folder(str(tmp_path))
    for number in (3, 9):
        save(stage.sub("checkpoints"), number)
    for number in (2, 7):
        stage.write(f"best-{number:08d}", b"x")
    stage.write_json("done.json", {})
    checkpoint.drop_later(stage, name, best)
    assert sorted([*stage.entries("checkpoints"), *stage.entries()]) == sorted(["checkpoints", "done.json", *left])


def test_a_disk_that_refuses_to_read_is_no_torn_checkpoint(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """To begin anew for that would cost the work of hours."""
    save(folder, 3)

    def refuses(_: Folder, name: str) -> bytes:
        raise StoreError(f"cannot read {name}: input/output error")

    monkeypatch.setattr(Folder, "read", refuses)
    with pytest.raises(StoreError, match=r"cannot read checksums\.json"):
        said(folder)


def test_best_weights_that_are_not_those_of_their_sum_are_refused(tmp_path: Path) -> None:
    """Half a file may still read as weights; what a stage ended with may not have changed."""
    folder, content = Folder(str(tmp_path)), checkpoint.to_bytes({"w": torch.zeros(3)})
    state = {"best_file": "best-00000001.safetensors", "best_sum": checkpoint.digest(content)}
    folder.write(state["best_file"], content)
    assert checkpoint.best_weights(folder, state) == content
    folder.write(state["best_file"], checkpoint.to_bytes({"w": torch.ones(3)}))
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        checkpoint.best_weights(folder, state)


def test_what_training_alone_needs_goes_and_the_best_weights_stay(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for name in (
        "best-00000001.safetensors",
        "best-00000002.safetensors",
        "done.json",
        "checkpoints/step-00000002/state.json",
    ):
        folder.write(name, b"x")
    checkpoint.discard(folder, "best-00000002.safetensors")
    assert sorted(folder.entries()) == ["best-00000002.safetensors", "done.json"]
    checkpoint.discard(folder)
    assert folder.entries() == ["done.json"]
