"""What a cell has learnt: neighbours by brute force, planes that keep what is near near, a reading that adds up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_model import CPU
from helpers_scoring import finished_run

from hpgr.data.stream import LocalSource
from hpgr.scoring import learnt
from hpgr.scoring.learnt import item_vectors, layout, neighbours, reading
from hpgr.training import checkpoint


def clusters() -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of 3 clusters of 20, and the cluster of each."""
    rng, kind = np.random.default_rng(0), np.repeat(np.arange(3), 20)
    vectors = np.eye(8, dtype=np.float32)[kind] + 0.1 * rng.normal(size=(60, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), kind


def test_neighbours_are_those_of_a_loop() -> None:
    vectors, _ = clusters()
    found, cosine = neighbours(vectors, np.array([3, 40]), 4)
    for row, item in enumerate((3, 40)):
        others = sorted((i for i in range(60) if i != item), key=lambda i: -float(vectors[item] @ vectors[i]))
        assert found[row].tolist() == others[:4]
        assert cosine[row] == pytest.approx([float(vectors[item] @ vectors[i]) for i in others[:4]], abs=1e-6)
    assert neighbours(vectors[:3], np.array([0]), 9)[0].shape == (1, 2)


@pytest.mark.parametrize("projection", ["pca", pytest.param("umap", marks=pytest.mark.slow)])
def test_a_plane_keeps_clusters_apart(projection: str) -> None:
    if projection == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed (extra `maps`)")
    vectors, kind = clusters()
    place, how = layout(vectors, projection, 0)
    assert how == projection
    assert place.shape == (60, 2)
    centre = np.stack([place[kind == k].mean(0) for k in range(3)])
    assert (np.linalg.norm(place[:, None] - centre, axis=-1).argmin(1) == kind).all()
    assert np.array_equal(place, layout(vectors, projection, 0)[0])


def test_without_the_package_auto_is_pca(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt.importlib.util, "find_spec", lambda _: None)
    assert layout(clusters()[0], "auto", 0)[1] == "pca"


@pytest.mark.parametrize("items", [1, 2, 15])
def test_few_items_are_laid_out_too(items: int) -> None:
    place, how = layout(clusters()[0][:items], "umap", 0)
    assert (place.shape, how) == ((items, 2), "pca")
    assert np.isfinite(place).all()


def test_vectors_are_stage_1s_and_a_reading_adds_up(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    monkeypatch.setattr(learnt, "EVENTS", (3, 40))
    root = tmp_path_factory.mktemp("learnt")
    done = finished_run(root, model={"pgsa": {"top_k": 2, "sigma": 0.0}})
    vectors = item_vectors(done.run)
    stage1 = checkpoint.from_bytes(done.run.folder.read("stage1/best.safetensors"))["events.item.weight"]
    sizes = done.run.sizes()
    expected = torch.nn.functional.normalize(stage1[sizes.first_item :], dim=-1).numpy()
    assert vectors == pytest.approx(expected)
    assert len(vectors) == sizes.items - sizes.first_item
    steps = LocalSource().evaluation(done.run.spec("click-validation"))
    found = reading(done.click_model(CPU), steps, CPU)
    assert found is not None
    m, n = found.shares.shape
    assert (len(found.c_item), len(found.h_item), found.anchors.shape) == (m, n, (m, n))
    assert found.c_label[0] == 1
    assert found.shares.sum(1) == pytest.approx(np.ones(m), abs=1e-5)
    assert (found.anchors.sum(1) == 2).all()
    assert (found.shares[~found.anchors] == 0).all()  # sigma 0: nothing beside the anchors
    assert (np.diff(found.h_time) >= 0).all()
    assert (np.diff(found.h_session) >= 0).all()
    assert ((found.c_score > 0) & (found.c_score < 1)).all()
    assert reading(done.click_model(CPU), iter([]), CPU) is None
