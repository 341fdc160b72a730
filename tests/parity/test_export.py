"""The exported ranker is the model: the same probabilities for shapes other than those it was exported with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers_model import CPU, MISSES_KNOWN, SIZES, inputs, random_batch, shaken, tiny, widened
from helpers_scoring import finished_run

import hpgr
from hpgr.data.hashing import hash_items
from hpgr.data.stream import LocalSource
from hpgr.errors import ConfigError
from hpgr.model.inputs import pad
from hpgr.model.registry import click_model
from hpgr.scoring.export import INPUTS, Ranker, export_model, inputs_of, least_events

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
    model: Any = shaken(click_model(config, MISSES_KNOWN))
    batches = [inputs(random_batch(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    batches.append(widened(batches[1], 20, 2))
    with torch.no_grad():
        eager = [torch.sigmoid(model(x).scores) for x in batches]  # before export: by the configured form of PGSA
        program: Any = export_model(model, MISSES_KNOWN).module()
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


def test_a_server_makes_the_inputs_as_the_page_says(tmp_path: Path) -> None:
    """By docs/scoring.md, "Serving an exported ranker", from rows of the log and the vocabulary alone."""
    finished = finished_run(tmp_path)
    config, prepared = finished.config, finished.run.prepared.folder
    rows = pd.concat(map(pd.read_parquet, sorted(tmp_path.glob("prepared/generated-*/log/*.parquet"))))
    user = rows["user_id"].value_counts().index[0]
    rows = rows[rows["user_id"] == user].assign(tie=lambda r: hash_items(pa.array(r["item_id"])))
    rows = rows.sort_values(["timestamp", "tie"])
    events = rows[(rows["event"] == "view") | (rows["clicked"] == 1)]
    moment = int(events["timestamp"].max()) + 90
    items = ["new", *rows["item_id"].unique()[:5]]
    pairs = pd.DataFrame({"user_id": user, "item_id": items, "timestamp": moment, "slot": [9, 0, 1, 2, 3, None]})
    device = rows["device"].iloc[0]

    words, row_of = prepared.read_json("vocabulary.json"), prepared.read_parquet("vocabulary.parquet")
    place = {value: i for i, value in enumerate(row_of.column("value").to_pylist())}
    buckets = len(words["oov_history"])

    def item(name: str) -> int:
        unknown = 2 + int(hash_items(pa.array([name]))[0]) % buckets
        return 2 + buckets + place[name] if name in place else unknown

    def category(name: str, value: Any) -> int:
        known = words["categories"][name]
        return 0 if value is None else 2 + known.index(value) if value in known else 1

    def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Any:
        return torch.tensor(np.asarray(values), dtype=dtype)[None]

    window, stride = config.stream.window, config.stream.spacing
    assert len(events) > window
    events = events.iloc[-(-(len(events) - window) // stride) * stride :]
    time, gap = events["timestamp"].to_numpy(), np.diff(events["timestamp"], prepend=events["timestamp"].iloc[0])
    label = [str(int(v)) if v == v and v is not None else "" for v in events["clicked"]]
    action = [f"{e}|{v}" for e, v in zip(events[config.data.columns.action or ""], label, strict=True)]
    mean, sd = words["moments"]["feature:place"]
    slot = pairs["slot"].to_numpy(float)
    listed = len([n for n in finished.run.sizes().t_num if n.startswith("list:")])
    given = {
        "h_real": tensor(np.ones(len(events)), torch.bool),
        "h_item": tensor([item(i) for i in events["item_id"]]),
        "h_time": tensor(time * 1_000_000),
        "h_action": tensor([category("action", a) for a in action]),
        "h_visible": tensor([(time < t).sum() for t in time]),
        "h_session": tensor(np.cumsum(gap > config.stream.session_gap_minutes * 60)),
        "h_cat": tensor([[category("feature:device", d)] for d in events["device"]]),
        "h_num": tensor(np.zeros((len(events), 0)), torch.float32),
        "c_item": tensor([item(i) for i in items]),
        "c_time": tensor([moment * 1_000_000] * len(items)),
        "c_visible": tensor([len(events)] * len(items)),
        "c_cat": tensor([[category("feature:slot", None if s != s else str(int(s))),
                          category("feature:device", device)] for s in slot]),
        "c_num": tensor(np.column_stack([np.clip((slot - mean) / sd, -5, 5),
                                         np.full((len(items), listed), np.nan)]), torch.float32),
    }  # fmt: skip
    with torch.no_grad():
        served = Ranker(finished.click_model(CPU).eval())(given)[0]  # what is exported, see above
    scores = hpgr.Scorer(finished.run.folder.uri).score(pairs).set_index("item")["score"]
    assert scores.std() > 1e-3
    np.testing.assert_allclose(served.numpy(), scores[items].to_numpy(), rtol=0, atol=1e-5)
