"""The ranker as a program of tensors alone (torch.export), for servers that have torch and not hpgr.

Batch, history and candidates may have any length from the exported program's least on. What looks at values to choose a
size has a form that does not: PGSA goes by its dense reference, the SEM keeps a place for as many sessions as events.
The numbers are the same, the work is not: a long history costs what dense attention would.

Shapes: B rows, N history events, M candidates, F and G categorical and numeric features.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpgr.artifacts import FORMAT, Folder, absolute
from hpgr.config import Model
from hpgr.errors import ConfigError
from hpgr.model.base import ClickModel
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.scoring.finished import Finished

_HISTORY = {"h_real": torch.bool, "h_item": torch.int64, "h_time": torch.int64, "h_action": torch.int64,
            "h_visible": torch.int64, "h_session": torch.int64, "h_cat": torch.int64,
            "h_num": torch.float32}  # fmt: skip
_CANDIDATES = {"c_item": torch.int64, "c_time": torch.int64, "c_visible": torch.int64, "c_cat": torch.int64,
               "c_num": torch.float32}  # fmt: skip
INPUTS = _HISTORY | _CANDIDATES
"""Inputs of an exported ranker, as `hpgr.model.inputs.pad` makes them, and their kinds."""


class Ranker(nn.Module):
    """A click model as a function of tensors: [B, M] probabilities of a click."""

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        """`given` by the names of INPUTS: [B, N] and [B, M], features [B, N, F] and the like; padding scores too."""
        x = Inputs(
            key=np.zeros(0, np.int64),  # noise alone reads it
            causal=torch.ones_like(given["h_real"][:, 0]),
            h_masked=torch.zeros_like(given["h_real"]),
            c_real=torch.ones_like(given["c_item"], dtype=torch.bool),
            c_label=torch.zeros_like(given["c_item"]),
            c_action=torch.zeros_like(given["c_item"]),
            **given,
        )
        return torch.sigmoid(self.model.read(self.model.past(x, None), x))


def inputs_of(x: Inputs) -> dict[str, Tensor]:
    """What an exported ranker takes of a padded batch."""
    return {name: getattr(x, name) for name in INPUTS}


def least_events(model: Model) -> int:
    """The shortest history an exported ranker takes; pad shorter ones with zeros (h_real False)."""
    pgsa, three = model.pgsa, 3  # of two, neighbours are one pair, which tracing takes for a constant size
    if not model.by_vectors:
        return three
    return max(three, 1 + max(pgsa.top_k, 1 + math.ceil(3 * pgsa.sigma), pgsa.sessions or 0))


def export_model(model: ClickModel, sizes: Sizes) -> torch.export.ExportedProgram:
    """A click model in evaluation mode as a program; the model itself stays as it is apart from its PGSA's form."""
    model.attend_by("reference")
    least = least_events(model.config)
    rows = torch.export.Dim("rows", min=1)
    lengths = {"h": torch.export.Dim("events", min=least), "c": torch.export.Dim("candidates", min=1)}
    shapes = {name: {0: rows, 1: lengths[name[0]]} for name in INPUTS}
    example = _example(sizes, rows=3, events=least + 5, candidates=4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own tracing; nothing in them is the caller's to change
        return torch.export.export(Ranker(model).eval(), (example,), dynamic_shapes=(shapes,), strict=False)


def _example(sizes: Sizes, rows: int, events: int, candidates: int) -> dict[str, Tensor]:
    """Inputs of the right kinds and widths; their values do not matter."""
    widths = {name: len(getattr(sizes, name.replace("c_", "t_"))) for name in ("h_cat", "h_num", "c_cat", "c_num")}
    length = {"h": events, "c": candidates}
    return {
        name: torch.zeros(rows, length[name[0]], *([widths[name]] if name in widths else []), dtype=kind)
        for name, kind in INPUTS.items()
    }


def export_run(finished: Finished, path: str) -> dict[str, Any]:
    """Write a run's ranker as `path` (.pt2, for `torch.export.load`), and its manifest as `path`.json.

    Returns:
        the manifest: inputs with their shapes and kinds, the least history, and which run it is.

    Raises:
        ConfigError: the path does not end in .pt2.
        ArtifactError: it cannot be written.
    """
    folder, _, name = absolute(path).rpartition("/")
    if not name.endswith(".pt2"):
        raise ConfigError(f"export: got the path {path!r}, expected one that ends in .pt2")
    sizes, sink = finished.run.sizes(), io.BytesIO()
    program = export_model(finished.click_model(torch.device("cpu")), sizes)
    torch.export.save(program, sink)
    manifest = _manifest(finished, sizes)
    Folder(folder).write(name, sink.getvalue())
    Folder(folder).write_json(f"{name}.json", manifest)
    return manifest


def _manifest(finished: Finished, sizes: Sizes) -> dict[str, Any]:
    features = {"h_cat": sizes.h_cat, "h_num": sizes.h_num, "c_cat": sizes.t_cat, "c_num": sizes.t_num}
    inputs = []
    for name, kind in INPUTS.items():
        shape: list[Any] = ["rows", "events" if name in _HISTORY else "candidates"]
        told: dict[str, Any] = {"name": name, "dtype": str(kind).removeprefix("torch.")}
        if name in features:
            told["features"] = list(features[name])
            shape.append(len(features[name]))
        inputs.append(told | {"shape": shape})
    return {
        "format": FORMAT,
        "run": finished.id,
        "prepared": finished.run.prepared.manifest["fingerprint"],
        "model": finished.config.model.name,
        "inputs": inputs,
        "output": {"dtype": "float32", "shape": ["rows", "candidates"], "is": "probability of a click"},
        "least_events": least_events(finished.config.model),
        "window": finished.config.stream.window,
        "stride": finished.config.stream.spacing,
        "torch": torch.__version__,
    }
