"""A matrix names its cells, gives every row the same budget, and tells all its faults before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hpgr.config import Config, dump, load_config
from hpgr.errors import ArtifactError, ConfigError
from hpgr.search.matrix import Plan, load_matrix, parse_matrix, resolve, stored_plan, to_yaml
from hpgr.search.space import value_at

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "jobs/configs").glob("compare-*.yaml"))
ROWS = {
    "full": {},
    "dense": {"model.pgsa.enabled": False},
    "alone": {"stage1.enabled": False, "model.pgsa.anchors": "live"},
}
BASELINES = {name: {"model.name": name, "stage1.enabled": False} for name in ("hstu", "mtgr", "din", "logistic")}
LR, LAYERS, TOP_K = "stage2.optimiser.lr", "model.layers", "model.pgsa.top_k"


def plan(**more: Any) -> Plan:
    return resolve(parse_matrix({"rows": ROWS, **more}))


def faults(**more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(**more)
    return str(caught.value)


def at(config: Config, path: str) -> Any:
    return value_at(dump(config), path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_matrix_is_valid(path: Path) -> None:
    loaded = load_matrix(path)
    assert loaded.matrix.name == path.stem
    assert len(loaded.matrix.rows) >= 2
    again = resolve(parse_matrix(yaml.safe_load(to_yaml(loaded.matrix))), folder=path.parent)
    assert again == loaded


@pytest.mark.parametrize("name", ["ml-100k-ablations", "ml-1m", "trivago"])
def test_the_ablations_have_a_row_without_the_sem_in_either_stage(name: str) -> None:
    cell = load_matrix(ROOT / f"jobs/configs/compare-{name}.yaml").cell("without SEM (flat stage 1)", 0)
    assert at(cell.config, "stream.session_gap_minutes") >= 1e7
    assert at(cell.config, "model.sem.in_stage2") is False


def test_a_cell_is_the_base_with_what_its_row_and_its_values_change() -> None:
    cell = plan(base={"model": {"width": 32}}).cell("dense", 7, {LAYERS: 3})
    assert (at(cell.config, "model.pgsa.enabled"), at(cell.config, LAYERS), at(cell.config, "model.width")) == (
        False,
        3,
        32,
    )
    assert cell.seed == 7
    assert cell.label == "dense layers=3 seed 7"


def test_equal_settings_are_one_cell_whatever_they_are_called() -> None:
    p = plan(rows={"a": {}, "b": {LAYERS: 2}, "c": {LAYERS: 3}})
    assert p.cell("a", 0).key == p.cell("b", 0).key == p.cell("c", 0, {LAYERS: 2}).key
    keys = {p.cell("a", 0).key, p.cell("a", 1).key, p.cell("c", 0).key}
    assert len(keys) == 3
    other = resolve(parse_matrix({"rows": {"a": {}}}), ["resources.workers=2", "name=other"])
    assert other.cell("a", 0).key == p.cell("a", 0).key


def test_every_row_tries_the_same_settings_beside_its_own() -> None:
    p = plan(tuning={"parameters": {LR: [0.001, 0.002, 0.004], LAYERS: [1, 2, 3]}, "draws": 4}, seeds=[5, 6])
    tried = {row: [c.values for c in p.tuned(row)] for row in ROWS}
    assert len(tried["full"]) == 4
    assert tried["full"][0] == {}
    assert tried["full"] == tried["dense"] == tried["alone"]
    assert len({str(v) for v in tried["full"]}) == 4
    assert {LR: 0.001, LAYERS: 2} not in tried["full"]  # that is its own
    assert {c.seed for row in ROWS for c in p.tuned(row)} == {5}
    other = plan(tuning={"parameters": {LR: [0.001, 0.002, 0.004], LAYERS: [1, 2, 3]}, "draws": 4, "seed": 1})
    assert [c.values for c in other.tuned("full")] != tried["full"]


def test_rows_alone_keep_the_studies_that_are_theirs() -> None:
    studies = {
        "baseline": ["dense", "alone"],
        "noise": {"sparse": "full", "dense": "dense"},
        "learnt": {"row": "full"},
        "sensitivity": {"row": "alone", "over": {TOP_K: [1, 2]}},
    }
    p = plan(**studies, seeds=[5]).only(["dense", "full"])
    m = p.matrix
    assert (list(m.rows), m.baselines, m.seeds) == (["dense", "full"], ["dense"], [5])
    assert (m.noise is not None, m.learnt is not None, m.sensitivity) == (True, True, None)
    alone = p.only(["full"]).matrix
    assert (alone.baselines, alone.noise, alone.learnt is not None) == (["full"], None, True)
    assert parse_matrix(yaml.safe_load(to_yaml(alone))) == alone
    with pytest.raises(ConfigError, match="--rows: there is no row 'ful'; did you mean full"):
        p.only(["full", "ful"])


def test_tuning_does_not_change_what_makes_the_row() -> None:
    drawn = {"parameters": {LR: [0.001, 0.002, 0.004], LAYERS: [1, 2, 3]}, "draws": 9}
    p = plan(rows={"full": {}, "one layer": {LAYERS: 1}}, tuning=drawn)
    assert {c.config.model.layers for c in p.tuned("full")} == {1, 2, 3}
    tried = p.tuned("one layer")
    assert [c.config.model.layers for c in tried] == [1] * len(tried)
    assert {c.config.stage2.optimiser.lr for c in tried} == {0.001, 0.002, 0.004}


def test_a_row_may_try_values_of_its_own_scale() -> None:
    own = {LR: [0.01, 0.03, 0.1]}
    rows = {"full": {}, "logistic": BASELINES["logistic"] | {LR: 0.03}}
    p = plan(rows=rows, tuning={"parameters": {LR: [0.001, 0.002], LAYERS: [1, 2]}, "rows": {"logistic": own}})
    assert [c.config.stage2.optimiser.lr for c in p.tuned("logistic")] == [0.03, 0.01, 0.1]
    assert {c.config.stage2.optimiser.lr for c in p.tuned("full")} == {0.001, 0.002}
    assert p.only(["full"]).matrix.tuning.rows == {}
    assert "tuning.rows: there is no row 'x'" in faults(tuning={"rows": {"x": own}})
    assert "tuning.rows.full.model.layerz: no such key" in faults(tuning={"rows": {"full": {"model.layerz": [1]}}})
    assert "rows.full with tuning" in faults(tuning={"rows": {"full": {LAYERS: [0]}}})


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "trivago"])
def test_the_floor_tries_no_fewer_learning_rates_than_hstu(name: str) -> None:
    loaded = load_matrix(ROOT / f"jobs/configs/compare-{name}.yaml")
    rates = {row: {c.config.stage2.optimiser.lr for c in loaded.tuned(row)} for row in ("hstu", "logistic")}
    assert len(rates["logistic"]) >= len(rates["hstu"]) > 1


def test_a_cell_is_the_same_wherever_it_is_tracked() -> None:
    tracked = plan(base={"tracking": {"mlflow": "sqlite:////tmp/x.db"}}).cell("full", 0)
    assert tracked.key == plan().cell("full", 0).key


def test_a_budget_beyond_the_grid_is_the_grid() -> None:
    p = plan(tuning={"parameters": {LR: [0.001, 0.002]}, "draws": 9})
    assert [c.values for c in p.tuned("full")] == [{}, {LR: 0.002}]
    assert [c.values for c in plan().tuned("full")] == [{}]


def test_a_curve_has_the_rows_own_value_in_order_and_all_else_as_chosen() -> None:
    curves = plan(
        seeds=[0, 1], sensitivity={"row": "full", "over": {TOP_K: [64, 4], "model.pgsa.max_keys": [8, None]}}
    ).curves({LR: 0.002})
    assert [value for value, _ in curves[TOP_K]] == [4, 32, 64]
    assert [value for value, _ in curves["model.pgsa.max_keys"]] == [8, 128, None]
    for value, cells in curves[TOP_K]:
        assert [c.seed for c in cells] == [0, 1]
        assert [(at(c.config, TOP_K), at(c.config, LR)) for c in cells] == [(value, 0.002)] * 2
    own = plan().cell("full", 1, {LR: 0.002})
    assert curves[TOP_K][1][1][1].key == own.key
    assert plan().curves({}) == {}


def test_baselines_are_the_first_row_one_or_several() -> None:
    assert plan().matrix.baselines == ["full"]
    assert plan(baseline="dense").matrix.baselines == ["dense"]
    assert plan(baseline=["alone", "dense"]).matrix.baselines == ["alone", "dense"]


def test_all_faults_are_told_at_once() -> None:
    text = faults(
        rows={"a": {"model.pgsa.topk": 3}, "b": {"seed": 1}, "c": {"data.path": "x"}},
        tuning={"parameters": {"model.layer": [1]}},
        sensitivity={"row": "a", "over": {"stage1.mask_ration": [0.1]}},
    )
    for part in (
        "5 fault(s)",
        "rows.a.model.pgsa.topk: no such key of the configuration; did you mean model.pgsa.top_k?",
        "rows.b.seed: all rows share",
        "rows.c.data.path: all rows share",
        "tuning.parameters.model.layer: no such key of the configuration; did you mean model.layers?",
        "sensitivity.over.stage1.mask_ration: no such key of the configuration; did you mean stage1.mask_ratio?",
    ):
        assert part in text


def test_values_that_no_cell_may_have_are_faults_of_their_place() -> None:
    text = faults(
        rows={"a": {"model.width": 63}, "b": {"stage1.enabled": False}, "c": {}},
        tuning={"parameters": {LR: [0.001, -1.0]}},
        sensitivity={"row": "c", "over": {"stage1.mask_ratio": [0.5, 1.5]}},
    )
    for part in (
        "rows.a: model: width 63 is not a multiple of heads 2",
        "rows.b: model.pgsa.anchors frozen needs stage1.enabled",
        "rows.c with tuning: stage2.optimiser.lr: got -1.0",
        "sensitivity.over.stage1.mask_ratio: stage1.mask_ratio: got 1.5",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": {}}, "rows: Dictionary should have at least 1 item"),
        ({"row": {}}, "row: unknown key; did you mean rows?"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], expected different ones"),
        ({"baseline": "dence"}, "baseline: there is no row 'dence'; did you mean dense?"),
        ({"sensitivity": {"row": "x", "over": {TOP_K: [1]}}}, "sensitivity.row: there is no row 'x'; rows: full,"),
        ({"noise": {"sparse": "full", "dense": "y"}}, "noise.dense: there is no row 'y'"),
        ({"noise": {"sparse": "full", "dense": "dense", "planted": [0.5]},
          "base": {"data": {"path": "x.parquet", "columns": {"label": "clicked"}}}},
         "noise.planted: noise can be planted in the generated log alone"),
        ({"tables": [["slot", "price"]]}, "tables: price is no categorical feature of impressions; there are: none"),
        ({"learnt": {"row": "z"}}, "learnt.row: there is no row 'z'"),
        ({"noise": {"sparse": "hstu", "dense": "dense"}}, "noise.sparse: row 'hstu' attends densely; name a row that"),
        ({"noise": {"sparse": "full", "dense": "alone"}}, "noise.dense: row 'alone' attends by PGSA; name a row that"),
        *(({study: {**names, key: model}}, f"{study}.{key}: row {model!r} is of model {model}, which has no attention")
          for model in ("mtgr", "din", "logistic")
          for study, names, key in (("noise", {"dense": "dense"}, "sparse"), ("noise", {"sparse": "full"}, "dense"),
                                    ("learnt", {}, "row"))),
        ({"tuning": {"draws": 0}}, "tuning.draws: Input should be greater than or equal to 1"),
        ({"bootstrap": {"draws": 5}}, "bootstrap.draws: Input should be greater than or equal to 100"),
    ],
)  # fmt: skip
def test_a_matrix_that_makes_no_sense_is_refused(more: dict[str, Any], message: str) -> None:
    assert message in faults(**{"rows": ROWS | BASELINES, **more})


def test_a_study_is_refused_for_what_tuning_may_make_of_its_row() -> None:
    text = faults(noise={"sparse": "full", "dense": "dense"}, tuning={"parameters": {"model.pgsa.enabled": [False]}})
    assert "noise.sparse: row 'full' attends densely" in text


@pytest.mark.parametrize("row", ["full", "dense", "hstu"])
def test_a_row_that_attends_can_be_shown(row: str) -> None:
    assert plan(rows=ROWS | BASELINES, learnt={"row": row}, noise={"sparse": "full", "dense": "hstu"}).matrix.learnt


def test_a_matrix_is_read_with_its_base_beside_it_and_overrides_of_both(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {width: 32}\n")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "rows": ROWS}))
    loaded = load_matrix(tmp_path / "m.yaml", ["model.layers=3"], ["seeds=[4]", "tuning.draws=2"])
    assert loaded.base == load_config(tmp_path / "base.yaml", ["model.layers=3"])
    assert (loaded.matrix.seeds, loaded.matrix.tuning.draws) == ([4], 2)
    with pytest.raises(ConfigError, match="got a configuration, expected a matrix"):
        load_matrix(ROOT / "jobs/configs/ml-100k.yaml")
    with pytest.raises(ConfigError, match="cannot read matrix"):
        load_matrix(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("rows: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_matrix(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="got a list, expected a mapping"):
        load_matrix(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"1 fault\(s\) in the configuration"):
        load_matrix(tmp_path / "m.yaml", ["model.layers=none"])


def test_a_stored_plan_may_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no comparison"):
        stored_plan(str(tmp_path), [], [])
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump({"base": "config.yaml", "rows": ROWS}))
    (tmp_path / "config.yaml").write_text("model: {width: 32}\n")
    changed = stored_plan(str(tmp_path), ["resources.workers=0"], ["seeds=[0, 9]"])
    assert (changed.matrix.seeds, changed.base.model.width, changed.base.resources.workers) == ([0, 9], 32, 0)


@pytest.mark.parametrize("seed", range(6))
def test_the_rows_own_settings_are_not_drawn_again(seed: int) -> None:
    """Else a row that happens to draw them tries fewer settings than the others."""
    p = plan(tuning={"parameters": {LR: [0.001, 0.002, 0.004], LAYERS: [1, 2, 3]}, "draws": 4, "seed": seed})
    assert len(p.tuned("full")) == 4


def test_cells_measured_otherwise_are_other_cells() -> None:
    """Ranks of what a user has seen, or not, choose the best weights: a folder's cells of one are none of the other."""
    other = resolve(parse_matrix({"rows": {"full": {}}}), ["evaluation.filter_seen=true"])
    assert plan().base.evaluation.filter_seen is False
    assert other.cell("full", 0).key != plan().cell("full", 0).key
