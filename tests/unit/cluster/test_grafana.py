"""The dashboard draws what is exported, all of it and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from hpgr.on_ray.metrics import GAUGES, PREFIX, TAGS, ids_of
from hpgr.training.meter import Meter

ROOT = Path(__file__).resolve().parents[3]
BOARD: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_query_names_a_metric_and_every_metric_is_drawn() -> None:
    asked = {name for query in QUERIES for name in re.findall(r"\bray_\w+", query)}
    ours = {f"ray_{PREFIX}{name}" for name in GAUGES}
    assert {name for name in asked if PREFIX in name} == ours
    rays = {f"ray_{name}" for name in METRICS_GAUGES}
    assert asked - ours <= rays
    assert asked & rays


def test_queries_and_legends_use_tags_that_are_there() -> None:
    tags = {*TAGS, "instance"}
    for panel in PANELS:
        for target in panel["targets"]:
            by = re.search(r"by \(([^)]*)\)", target["expr"])
            assert by, target["expr"]
            assert set(by[1].split(", ")) <= tags
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(by[1].split(", "))


def test_panels_lie_beside_each_other_and_use_the_chosen_source() -> None:
    places = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= own
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${source}"}
    assert [v["name"] for v in BOARD["templating"]["list"]] == ["source", "run"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_what_the_loop_tells_is_exported() -> None:
    meter = Meter()
    meter.add(1.0, 1.0, [1, 1, 1, 1, 1])
    assert meter.figures().keys() <= GAUGES.keys()


def test_a_trial_is_known_by_its_search(tmp_path: Path) -> None:
    from hpgr.artifacts import Folder

    assert ids_of(Folder("s3://b/search/trials/0003")) == {"run": "search", "trial": "0003"}
    assert ids_of(Folder("s3://b/all/cells/full-0")) == {"run": "all", "trial": "full-0"}
    assert ids_of(Folder(str(tmp_path / "first"))) == {"run": "first", "trial": ""}
