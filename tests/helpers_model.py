"""Small logs, models and batches for the tests of models, training, parity and leaks. No Ray."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hpgr.artifacts import Folder
from hpgr.config import Config, validate
from hpgr.data.hashing import hash_text
from hpgr.data.preparation import in_process, prepare
from hpgr.data.stream import LocalSource, build_index
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs, pad
from hpgr.schema import SECOND, Batch, offsets_of
from hpgr.training.two_stage import INDEXES, Run, Worker

CPU = torch.device("cpu")

SIZES = Sizes(
    items=24,
    first_item=4,
    actions=5,
    categories={"colour": 6, "device": 4},
    h_cat=("colour", "device"),
    h_num=("price",),
    t_cat=("device",),
    t_num=("price", "list:engaged", "list:price:preferred"),
    base_rate=0.3,
    train_actions=((20, 10, 20, 0, 0), (0, 0, 0, 30, 40)),
    item_prior=6.0,
)
"""Tables of the hand-made batches below: 2 out-of-vocabulary indices, 20 items."""
MISSES_KNOWN = replace(SIZES, train_actions=((2, 10, 20, 0, 0), (0, 0, 0, 30, 40)))
"""The same of a log whose histories hold nearly all misses: actions tell of clicks."""


def quiet(*_: Any) -> None:
    """Says, reports and logs nothing."""


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second winning."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def tiny(**over: Any) -> Config:
    """A configuration small enough for a test; sections are given as nested mappings."""
    base = {
        "seed": 3,
        "stream": {"window": 16, "stride": 8, "batch_tokens": 400},
        "model": {"width": 8, "heads": 2, "pgsa": {"top_k": 3, "sigma": 0.7}},
        "stage1": {"epochs": 2, "optimiser": {"lr": 0.01, "warmup_steps": 3}},
        "stage2": {"epochs": 2, "optimiser": {"lr": 0.01, "warmup_steps": 3}},
        "evaluation": {"batch_tokens": 600},
        "resources": {"workers": 0},
    }
    return validate(merged(base, over))


# Hand-made batches


def random_batch(rows: int = 3, events: int = 12, targets: int = 5, seed: int = 0, ties: bool = True) -> Batch:
    """Rows of `events` history events and `targets` impressions (one length for all), few items, many equal seconds.

    `visible` follows from the times alone, as the data layer computes it. Sessions are cut at 30 minutes.
    """
    rng = np.random.default_rng(seed)
    steps = rng.choice([0, 1, 40, 3600 * 5] if ties else [1, 40, 3600 * 5], (rows, events)) * SECOND
    h_time = 1_700_000_000 * SECOND + np.cumsum(steps, 1)
    session = np.cumsum(steps > 1800 * SECOND, 1)
    session -= session[:, :1]
    t_time = np.take_along_axis(h_time, rng.integers(1, events, (rows, targets)), 1) + rng.choice(
        [0, SECOND], (rows, targets)
    )
    n, m = rows * events, rows * targets
    return Batch(
        user=pa.array([f"u{i}" for i in range(rows)]),
        row_key=rng.integers(-(2**62), 2**62, rows),
        causal=np.arange(rows) % 2 == 1,
        h_lengths=np.full(rows, events),
        t_lengths=np.full(rows, targets),
        h_item=rng.integers(2, SIZES.items, n),
        h_time=h_time.ravel(),
        h_action=rng.integers(1, SIZES.actions, n),
        h_visible=counts_before(h_time, h_time).ravel(),
        h_session=session.ravel(),
        h_masked=np.zeros(n, bool),
        h_cat=np.stack([rng.integers(0, SIZES.categories[c], n) for c in SIZES.h_cat], 1),
        h_num=np.where(rng.random((n, 1)) < 0.2, np.nan, rng.normal(size=(n, 1))).astype(np.float32),
        t_item=rng.integers(2, SIZES.items, m),
        t_time=t_time.ravel(),
        t_visible=counts_before(h_time, t_time).ravel(),
        t_label=rng.integers(0, 2, m).astype(np.int8),
        t_action=np.arange(1, m + 1) % SIZES.actions,
        t_request=np.full(m, -1),
        t_past=counts_before(h_time, t_time).ravel(),
        t_cat=rng.integers(0, SIZES.categories["device"], (m, 1)),
        t_num=rng.normal(size=(m, 3)).astype(np.float32),
    )


def counts_before(h_time: np.ndarray, t_time: np.ndarray) -> np.ndarray:
    """How many history events of the row are strictly before each time: [B, N], [B, M] -> [B, M]."""
    return (h_time[:, None, :] < t_time[:, :, None]).sum(-1)


def changed(batch: Batch, **columns: tuple[Any, Any]) -> Batch:
    """The batch with `column[where] = value` for each column=(where, value); its own arrays stay as they are."""
    out = {}
    for name, (where, value) in columns.items():
        out[name] = np.array(getattr(batch, name))
        out[name][where] = value
    return replace(batch, **out)


def scrambled_history(batch: Batch, where: np.ndarray, seed: int = 9, later: bool = True) -> Batch:
    """The batch with other items, actions, features (and times later still) of the events marked in `where` [E].

    Times only grow, and sessions and visible counts are recomputed, so the rest of the batch stays consistent.
    """
    rng = np.random.default_rng(seed)
    n = int(where.sum())
    item = 2 + (batch.h_item[where] - 2 + rng.integers(1, SIZES.items - 2, n)) % (SIZES.items - 2)
    out = changed(
        batch,
        h_item=(where, item),
        h_action=(where, rng.integers(0, SIZES.actions, n)),
        h_cat=(where, np.stack([rng.integers(0, SIZES.categories[c], n) for c in SIZES.h_cat], 1)),
        h_num=(where, rng.normal(size=(n, 1)) * 5),
    )
    return delayed(out, where) if later else out


def delayed(batch: Batch, where: np.ndarray, seconds: int = 7200) -> Batch:
    """Events marked in `where` (each row's last ones) moved on by `seconds`, with all that follows from it."""
    rows = len(batch)
    h_time = np.where(where, batch.h_time + seconds * SECOND, batch.h_time).reshape(rows, -1)
    t_time = batch.t_time.reshape(rows, -1)
    assert (np.diff(h_time, axis=1) >= 0).all()
    session = np.cumsum(np.diff(h_time, axis=1, prepend=h_time[:, :1]) > 1800 * SECOND, 1)
    return replace(
        batch,
        h_time=h_time.ravel(),
        h_session=session.ravel(),
        h_visible=counts_before(h_time, h_time).ravel(),
        t_visible=counts_before(h_time, t_time).ravel(),
    )


def candidates_of(batch: Batch, keep: np.ndarray) -> Batch:
    """The batch without the impressions that are False in `keep` [I]."""
    row = np.repeat(np.arange(len(batch)), batch.t_lengths)
    columns = {
        f.name: getattr(batch, f.name)[keep] for f in fields(batch) if f.name.startswith("t_") and f.name != "t_lengths"
    }
    return replace(batch, t_lengths=np.bincount(row[keep], minlength=len(batch)), **columns)


def rows_of(batch: Batch, rows: np.ndarray) -> Batch:
    """These rows of a batch, in this order."""
    out: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if f.name == "user":
            out[f.name] = value.take(pa.array(rows))
        elif f.name in ("row_key", "causal") or f.name.endswith("lengths"):
            out[f.name] = value[rows]
        else:
            offsets = offsets_of(batch.h_lengths if f.name.startswith("h_") else batch.t_lengths)
            out[f.name] = np.concatenate([value[offsets[r] : offsets[r + 1]] for r in rows])
    return Batch(**out)


def widened(x: Inputs, events: int, targets: int) -> Inputs:
    """The same batch with more padding."""

    def grow(value: Tensor, by: int) -> Tensor:
        return torch.cat([value, value.new_zeros(value.shape[0], by, *value.shape[2:])], 1)

    extra = {"h_": events, "c_": targets}
    new = {f.name: grow(getattr(x, f.name), extra[f.name[:2]]) for f in fields(x) if f.name[:2] in extra}
    return replace(x, **new)


def shaken(model: nn.Module, seed: int = 1, scale: float = 0.3) -> nn.Module:
    """The model in eval mode with all weights (gates, zero tables and shares too) moved off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
        table = getattr(model, "anchor_table", None)
        if table is not None and len(table):
            table.copy_(nn.functional.normalize(torch.randn(table.shape, generator=generator), dim=-1))
        if getattr(model, "answers", None) is not None:
            model.answers.share.fill_(0.4)
    return model.eval()


def inputs(batch: Batch) -> Inputs:
    return pad(batch, lanes=1)


# Small logs


LOG = {
    "columns": {
        "user": "user_id", "item": "item_id", "time": "timestamp",
        "label": "clicked", "action": "event", "request": ["list_id"],
    },
    "history": [[{"column": "event", "value": "view"}], [{"column": "clicked", "value": 1}]],
    "features": [
        {"name": "slot", "column": "slot", "role": "candidate"},
        {"name": "place", "column": "slot", "role": "candidate", "kind": "numeric"},
        {"name": "device", "column": "device", "role": "user"},
    ],
    "split": {"by": "time_fraction", "validation": 0.15, "test": 0.15},
    "synthetic": {"users": 40, "items": 60, "categories": 6, "sessions": 4, "session_events": 4, "impressions": 3},
}  # fmt: skip
"""`data` of a generated log of some 40 users; timelines are longer than the window of `tiny`."""


def log_config(root: Path, **over: Any) -> Config:
    """`tiny` over the generated log, prepared under `root`."""
    return tiny(**merged({"data": LOG | {"prepared": str(root / "prepared")}}, over))


def make_run(config: Config, folder: Path) -> Run:
    """A run folder with its prepared log and indexes, not trained."""
    run = Run(config, Folder(str(folder)), prepare(config, in_process, quiet))
    for name in INDEXES:
        build_index(run.prepared, config, run.folder.sub("index"), name, in_process)
    return run


def worker(source: Any = None, say: Callable[[str], None] = quiet) -> Worker:
    return Worker(source or LocalSource(), CPU, say, quiet, quiet)


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    """A run's figures without what depends on the clock."""
    out = {k: v for k, v in figures.items() if k not in ("seconds", "curves")}
    out["curves"] = [{k: v for k, v in point.items() if k != "data_wait"} for point in figures["curves"]]
    for name in ("stage1", "stage2"):
        if name in out:
            out[name] = {k: v for k, v in out[name].items() if k != "data_wait"}
    return out


def read_log(path: str) -> pa.Table:
    return pq.read_table(path)


def user_hash(names: list[str]) -> np.ndarray:
    return hash_text(pa.array(names))


logging.getLogger("torch.distributed").setLevel(logging.ERROR)


class Interrupted(Exception):
    """What a test raises in the middle of training."""


class FailingSource(LocalSource):
    """Gives so many batches, of whatever stream, and then fails.

    A plain subclass would be frozen; the counter is therefore a list.
    """

    def __init__(self, batches: int, kinds: tuple[str, ...] = ("steps",)) -> None:
        super().__init__()
        object.__setattr__(self, "left", [batches])
        object.__setattr__(self, "kinds", kinds)

    def steps(self, spec: Any, epochs: range, first_step: int) -> Any:
        return self._counted(super().steps(spec, epochs, first_step), "steps")

    def evaluation(self, spec: Any) -> Any:
        return self._counted(super().evaluation(spec), "evaluation")

    def _counted(self, steps: Any, kind: str) -> Any:
        for step in steps:
            if kind in self.kinds:  # type: ignore[attr-defined]
                if not self.left[0]:  # type: ignore[attr-defined]
                    raise Interrupted
                self.left[0] -= 1  # type: ignore[attr-defined]
            yield step


class CountingSource(LocalSource):
    """Remembers (kind of stream, epoch, step) of each training batch it gave."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "given", [])

    def steps(self, spec: Any, epochs: range, first_step: int) -> Any:
        for step in super().steps(spec, epochs, first_step):
            self.given.append((spec.kind, step.epoch, step.step))  # type: ignore[attr-defined]
            yield step


def weights(run: Run, stage: str) -> bytes:
    """The best weights' file of a finished stage."""
    folder = run.folder.sub(stage)
    return folder.read(folder.read_json("done.json")["best_file"])


def context_of(run: Run, stage: str, source: Any = None, say: Callable[[str], None] = quiet) -> Any:
    from hpgr.training.two_stage import loop_context

    return loop_context(run, worker(source, say), run.folder.sub(stage), stage)


def gloo_worker(rank: int, world: int, runs: list[tuple[dict[str, Any], str, int]], meeting: str) -> None:
    """What one of several processes does: join the others, train each (config, folder, rows from which tables are
    sparse), write its figures there."""
    import torch.distributed as dist

    from hpgr.training import optimiser
    from hpgr.training.two_stage import train

    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # a process of its own: pytest's filters are not known here
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        for config, folder, optimiser.SPARSE_ROWS in runs:
            checked = validate(config)
            run = Run(checked, Folder(folder), prepare(checked, in_process, quiet))
            figures = train(run, worker(LocalSource(rank, world)))
            run.folder.write_json(f"figures-{rank}.json", figures)
    finally:
        dist.destroy_process_group()
