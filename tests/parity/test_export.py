"""The exported ranker is the model: the same probabilities for shapes other than those it was exported with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import CPU, SIZES, inputs, random_batch, shaken, tiny, widened
from helpers_scoring import finished_run

import hpgr
from hpgr.data.stream import LocalSource
from hpgr.errors import ConfigError
from hpgr.model.inputs import pad
from hpgr.model.registry import click_model
from hpgr.scoring.export import INPUTS, export_model, inputs_of, least_events

SHAPES = ((1, 9, 1), (2, 31, 3), (5, 12, 17))
"""Rows, events and candidates; none is the example's."""
MODELS = [
    {},
    {"name": "logistic"},
    *(
        pytest.param(settings, marks=pytest.mark.slow)
        for settings in (
            {"pgsa": {"scope": "all", "max_keys": 5}},
            {"pgsa": {"max_keys": None}},
            {"pgsa": {"sigma": 0, "impl": "gather"}},
            {"pgsa": {"sessions": 1}},
            {"pgsa": {"enabled": False, "top_k": 7}},
            {"sem": {"in_stage2": False}, "hstu_form": "research"},
            {"name": "hstu"},
            {"name": "mtgr"},
            {"name": "din"},
        )
    ),
]


@pytest.fixture(autouse=True)
def few_log_lines() -> Iterator[None]:
    """Tracing writes thousands of debugging lines, which pytest would keep."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("settings", MODELS, ids=lambda s: json.dumps(s))
def test_the_program_equals_the_model(settings: dict[str, Any]) -> None:
    config = tiny(model=settings)
    model: Any = shaken(click_model(config, SIZES))
    batches = [inputs(random_batch(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    batches.append(widened(batches[1], 20, 2))
    with torch.no_grad():
        eager = [torch.sigmoid(model(x).scores) for x in batches]  # before export: by the configured form of PGSA
        program: Any = export_model(model, SIZES).module()
        for x, expected in zip(batches, eager, strict=True):
            np.testing.assert_allclose(program(inputs_of(x)).numpy(), expected.numpy(), rtol=0, atol=1e-5)
    assert float(torch.cat([e.flatten() for e in eager]).std()) > 1e-3


@pytest.mark.slow
def test_a_history_below_the_least_is_refused() -> None:
    config = tiny()
    program: Any = export_model(shaken(click_model(config, SIZES)), SIZES).module()  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, AssertionError)):
        program(inputs_of(inputs(random_batch(2, least_events(config.model) - 1, 3))))


def test_a_run_is_exported_and_loaded_again(tmp_path: Path) -> None:
    finished = finished_run(tmp_path)
    assert finished.click_model(CPU).asvd is not None  # all that the model can have goes through the program
    scorer = hpgr.Scorer(finished.run.folder.uri)
    manifest = scorer.export(tmp_path / "served" / "ranker.pt2")
    assert manifest == json.loads((tmp_path / "served" / "ranker.pt2.json").read_text())
    assert manifest["run"] == scorer.id
    assert [told["name"] for told in manifest["inputs"]] == list(INPUTS)
    program: Any = torch.export.load(tmp_path / "served" / "ranker.pt2").module()
    model = finished.click_model(torch.device("cpu"))
    step = next(iter(LocalSource().evaluation(finished.run.spec("click-test"))))
    x = pad(step.batch if hasattr(step, "batch") else step)
    for told in manifest["inputs"]:
        value = getattr(x, told["name"])
        assert str(value.dtype) == f"torch.{told['dtype']}"
        assert list(value.shape[2:]) == told["shape"][2:]
    with torch.no_grad():
        expected = torch.sigmoid(model(x).scores)
        np.testing.assert_allclose(program(inputs_of(x)).numpy(), expected.numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        scorer.export(tmp_path / "ranker.onnx")
