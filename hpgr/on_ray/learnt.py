"""The part of a comparison that shows what a row has learnt, for its first tested seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from hpgr.artifacts import resolve
from hpgr.config import Config
from hpgr.data.stream import LocalSource
from hpgr.data.synthetic import planted
from hpgr.errors import ConfigError
from hpgr.on_ray.session import quieten
from hpgr.report.learnt import Attention, ItemMap, Near, Shown
from hpgr.schema import Ints
from hpgr.scoring.finished import Finished
from hpgr.scoring.learnt import Reading, item_vectors, layout, neighbours, reading
from hpgr.search.matrix import Learnt
from hpgr.training.two_stage import Run

PICKED = 8
"""Items whose neighbours are listed: the most frequent of as many kinds, or simply the most frequent."""


@dataclass(frozen=True)
class Names:
    """Title and kind of items by their id in the log. An item without a title goes by its id."""

    titles: dict[str, str]
    kinds: dict[str, str]


def names_of(settings: Learnt, config: Config) -> Names:
    """What is known about items: from the file that the matrix names, or of the generated log.

    Raises:
        ConfigError: the file cannot be read, or has no such column.
    """
    if settings.items is None:
        if config.data.path is not None:
            return Names({}, {})
        items, _ = planted(config.data.synthetic)
        ids, category = (items.column(name).to_pylist() for name in ("item_id", "category"))
        return Names({}, {i: f"category {c}" for i, c in zip(ids, category, strict=True)})
    told = _told(settings.items, {"id": settings.id, "title": settings.title, "group": settings.group})
    titles = dict(zip(told["id"], told["title"], strict=True)) if "title" in told else {}
    kinds = dict(zip(told["id"], told["group"], strict=True)) if "group" in told else {}
    return Names(titles, {i: kind.partition("|")[0] for i, kind in kinds.items()})


def _told(path: str, wanted: dict[str, str | None]) -> dict[str, list[str]]:
    """Columns of a Parquet file as text, "" for null."""
    columns = {key: name for key, name in wanted.items() if name is not None}
    try:
        filesystem, place = resolve(path)
        table = pq.ParquetFile(place, filesystem=filesystem).read()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"learnt.items: cannot read {path}: {error}; give a Parquet file") from None
    missing = [name for name in columns.values() if name not in table.column_names]
    if missing:
        raise ConfigError(f"learnt: {path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return {k: ["" if v is None else str(v) for v in table.column(n).to_pylist()] for k, n in columns.items()}


def learn(settings: Learnt, names: Names, run: Run) -> Shown:
    """What the row's cell has learnt, made in a task of the cluster."""
    made: Shown = ray.get(ray.remote(num_cpus=1)(show).remote(settings, names, run))
    return made


def show(settings: Learnt, names: Names, run: Run) -> Shown:
    """The task: open the cell, and put into words what its arrays say."""
    quieten()
    torch.set_num_threads(1)
    vocabulary, device = run.prepared.vocabulary(), torch.device("cpu")
    ids = vocabulary.items.column("value").to_pylist()
    titles, kinds = [names.titles.get(i) or str(i) for i in ids], [names.kinds.get(i, "") for i in ids]
    seen = vocabulary.items.column("count").to_numpy().astype(np.int64)
    stage = 1 if run.config.stage1.enabled else 2
    known = np.flatnonzero(vocabulary.items.column("history").to_numpy() if stage == 1 else seen)  # others never moved
    vectors = item_vectors(run)[known]
    place, how = layout(vectors, settings.projection, run.config.seed)
    picked = _picked(known, seen, kinds)
    near, cosine = neighbours(vectors, np.searchsorted(known, picked), settings.neighbours)
    lists = [
        Near(titles[i], kinds[i], [titles[j] for j in known[js]], [kinds[j] for j in known[js]], cs.tolist())
        for i, js, cs in zip(picked, near, cosine, strict=True)
    ]
    model = Finished(run, "").click_model(device)
    found = reading(model, LocalSource().evaluation(run.spec("click-validation")), device)
    attention = _attention(found, titles, vocabulary.first_item) if found else None
    return Shown(
        settings.row,
        run.config.seed,
        stage,
        ItemMap(how, place, [kinds[i] for i in known], seen[known]),
        lists,
        attention,
    )


def _picked(known: Ints, seen: Ints, kinds: list[str]) -> Ints:
    """The most frequent item of each of the most frequent kinds; without kinds, the most frequent items."""
    order = known[np.argsort(-seen[known], kind="stable")]
    first = {kinds[i] or str(i): i for i in reversed(order.tolist())}
    return np.array(sorted(first.values(), key=lambda i: -seen[i])[:PICKED], np.int64)


def _attention(found: Reading, titles: list[str], first_item: int) -> Attention:
    def named(items: Ints) -> list[str]:
        return [titles[i - first_item] if i >= first_item else "(unknown)" for i in items]

    return Attention(
        user=found.user,
        events=named(found.h_item),
        hours=((found.h_time - found.h_time[-1]) / 3.6e9).tolist(),
        sessions=found.h_session.tolist(),
        candidates=named(found.c_item),
        clicked=(found.c_label == 1).tolist(),
        scores=found.c_score.tolist(),
        shares=found.shares,
        anchors=found.anchors,
    )
