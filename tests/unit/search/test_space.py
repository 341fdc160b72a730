"""Spaces are checked whole against the configuration before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpgr.config import Config, dump, load_config, validate
from hpgr.errors import ConfigError
from hpgr.search.space import (
    Distribution,
    Space,
    check,
    draw,
    load_space,
    longest,
    parse_space,
    placed,
    starting_values,
    to_yaml,
)

ROOT = Path(__file__).resolve().parents[3]
TOP_K = "model.pgsa.top_k"
SIGMA = "model.pgsa.sigma"


def space(parameters: dict[str, Any], **more: Any) -> Space:
    return parse_space({"parameters": parameters, **more})


def faults(parameters: dict[str, Any], config: Config | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(space(parameters), config or Config())
    return str(caught.value)


@pytest.mark.parametrize("name", ["smoke", "two_stage", "sparsity", "sessions"])
@pytest.mark.parametrize("config", ["synthetic", "ml-100k", "ml-1m", "trivago"])
def test_every_shipped_space_fits_every_shipped_config(name: str, config: str) -> None:
    loaded = load_space(ROOT / f"tune_spaces/{name}.yaml")
    assert loaded.name == name
    check(loaded, load_config(ROOT / f"jobs/configs/{config}.yaml"))


def test_a_space_survives_its_own_yaml(tmp_path: Path) -> None:
    for path in (ROOT / "tune_spaces").glob("*.yaml"):
        loaded = load_space(path)
        (tmp_path / path.name).write_text(to_yaml(loaded))
        assert load_space(tmp_path / path.name) == loaded


def test_all_faults_come_at_once_with_their_paths() -> None:
    text = faults({
        "model.pgsa.topk": {"choice": [8, 32]},
        SIGMA: {"uniform": [-1.0, 2.0]},
        "data.split.test": {"uniform": [0.1, 0.2]},
        "model.heads": {"choice": [2, 3]},
    })  # fmt: skip
    assert "4 fault(s)" in text
    assert "model.pgsa.topk: no such key of the configuration; did you mean model.pgsa.top_k?" in text
    assert "model.pgsa.sigma: value -1.0 is not allowed" in text
    assert "greater than or equal to 0" in text
    assert "data.split.test: trials share the prepared log" in text
    assert "model.heads: value 3 is not allowed: model: width 64 is not a multiple of heads 3" in text


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({}, "got none, expected exactly one"),
        ({"choice": [1], "uniform": [0, 1]}, "got choice and uniform"),
        ({"uniform": [2, 1]}, "expected low < high"),
        ({"log_uniform": [0, 1]}, "more than 0"),
        ({"log_integer": [1, 4], "step": 1}, "step goes with uniform and integer"),
        ({"integer": [1, 4], "step": 0.5}, "expected a whole number"),
        ({"choice": [1, 1]}, "different values"),
        ({"choices": [1, 2]}, "choices: unknown key; did you mean parameters.model.pgsa.top_k.choice?"),
        ({"uniform": [1, 2, 3]}, "at most 2"),
    ],
)
def test_a_distribution_that_makes_no_sense_is_refused(distribution: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space({TOP_K: distribution})


def test_the_start_must_be_in_the_space() -> None:
    text = faults({TOP_K: {"choice": [4, 8]}})
    assert "starts from 32, which the space does not hold" in text
    assert "--set model.pgsa.top_k=" in text
    assert "does not hold" in faults({SIGMA: {"uniform": [0.0, 6.0], "step": 1.5}})
    check(space({SIGMA: {"uniform": [0.0, 6.0], "step": 0.5}}), Config())
    check(space({"stream.session_gap_minutes": {"choice": [15, 30]}}), Config())


def test_a_start_that_is_not_drawn_need_not_be_in_the_space() -> None:
    """Its condition does not hold at the start, so the configuration's own value is no draw."""
    ranges = {
        "model.pgsa.enabled": {"choice": [True, False]},
        TOP_K: {"choice": [4, 8], "when": {"model.pgsa.enabled": True}},
    }
    off = validate({"model": {"pgsa": {"enabled": False}}})
    check(space(ranges), off)
    assert starting_values(space(ranges), off) == {"model.pgsa.enabled": False}
    assert "starts from 32, which the space does not hold" in faults(ranges)
    # The key of a condition keeps its own value where it is not drawn itself.
    check(space({**ranges, SIGMA: {"uniform": [0.0, 4.0], "when": {TOP_K: 32}}}), off)


def test_who_records_a_search_is_no_setting_of_it() -> None:
    assert "tracking.mlflow: trials share" in faults({"tracking.mlflow": {"choice": [None, "sqlite:///x"]}})


def test_conditions_name_keys_that_are_drawn_before() -> None:
    late = {
        TOP_K: {"choice": [8, 32], "when": {"model.pgsa.enabled": True}},
        "model.pgsa.enabled": {"choice": [True, False]},
    }
    assert "when.model.pgsa.enabled must stand above it" in faults(late)
    assert "when.nothing: no such key" in faults({TOP_K: {"choice": [8, 32], "when": {"nothing": 1}}})


def test_values_of_conditions_are_values_of_their_keys() -> None:
    def told(when: dict[str, Any], **above: Any) -> str:
        return faults({**above, TOP_K: {"choice": [8, 32], "when": when}})

    assert "when.model.pgsa.scope: value 'al' is not allowed" in told({"model.pgsa.scope": ["all", "al"]})
    assert "when.model.pgsa.enabled: value 'yes' is read as True; write that" in told({"model.pgsa.enabled": "yes"})
    assert "when.model.pgsa.enabled: value 1 is read as True" in told({"model.pgsa.enabled": 1})
    widths = {"model.dropout": {"choice": [0.1, 0.2]}}
    assert "when.model.dropout: value 0.3 is never drawn" in told({"model.dropout": 0.3}, **widths)
    check(space({**widths, TOP_K: {"choice": [8, 32], "when": {"model.dropout": [0.2]}}}), Config())


def test_a_condition_that_never_holds_is_refused() -> None:
    text = faults({TOP_K: {"choice": [8, 32], "when": {"model.pgsa.enabled": False}}})
    assert "when.model.pgsa.enabled: is always True, never False, for the space does not vary it" in text
    assert "never ['candidate']" in faults({TOP_K: {"choice": [8, 32], "when": {"model.pgsa.scope": ["candidate"]}}})
    check(space({TOP_K: {"choice": [8, 32], "when": {"model.pgsa.scope": ["candidate", "all"]}}}), Config())


def test_whole_numbers_are_not_drawn_from_fractions() -> None:
    for kind in ("uniform", "log_uniform"):
        assert f"{TOP_K}: takes whole numbers; use integer" in faults({TOP_K: {kind: [4, 64]}})
    check(space({TOP_K: {"integer": [4, 64]}, SIGMA: {"integer": [0, 4]}}), Config())


def test_stage_2_cannot_be_left_out() -> None:
    for values in ([True, False], [True]):
        assert "judged by stage 2's validation AUC" in faults({"stage2.enabled": {"choice": values}})


def test_the_longest_trial_is_the_longest_that_can_be_drawn() -> None:
    config = Config.model_validate({"stage2": {"epochs": 3}})
    assert longest(space({TOP_K: {"choice": [8, 32]}}), config) == 3
    assert longest(space({"stage2.epochs": {"choice": [3, 8, 5]}}), config) == 8
    assert longest(space({"stage2.epochs": {"integer": [2, 6]}}), config) == 6


def test_draws_of_a_grid_are_written_as_people_write_them() -> None:
    grid = Distribution.model_validate({"uniform": [0.0, 0.4], "step": 0.1})
    assert grid.on_grid(0.1 + 0.2) == 0.3
    rng = np.random.default_rng(0)
    assert {grid.sample(rng) for _ in range(100)} == {0.0, 0.1, 0.2, 0.3, 0.4}
    assert Distribution.model_validate({"uniform": [0.0, 1.0], "step": 1 / 3}).on_grid(1 / 3) == 1 / 3


def test_a_condition_sees_what_was_drawn_and_what_the_configuration_says() -> None:
    wanted = space({
        "model.pgsa.enabled": {"choice": [True, False]},
        TOP_K: {"choice": [8, 32], "when": {"model.pgsa.enabled": True}},
        SIGMA: {"uniform": [0, 4], "when": {"model.pgsa.scope": ["all", "candidate"]}},
    })  # fmt: skip
    tree = dump(Config())
    on = draw(wanted, tree, lambda path, d: d.ends()[0])
    off = draw(wanted, tree, lambda path, d: d.ends()[-1])
    assert list(on) == ["model.pgsa.enabled", TOP_K, SIGMA]
    assert off == {"model.pgsa.enabled": False, SIGMA: 4}
    assert starting_values(wanted, Config()) == {"model.pgsa.enabled": True, TOP_K: 32, SIGMA: 2.0}


@pytest.mark.parametrize(
    "kind",
    [
        {"choice": ["a", 1, True]},
        {"uniform": [0.5, 2.0]},
        {"uniform": [0.0, 1.0], "step": 0.25},
        {"log_uniform": [0.001, 10.0]},
        {"integer": [2, 9], "step": 3},
        {"log_integer": [1, 64]},
    ],
)
def test_random_values_are_held_and_reach_both_ends(kind: dict[str, Any]) -> None:
    distribution, rng = Distribution.model_validate(kind), np.random.default_rng(0)
    drawn = [distribution.sample(rng) for _ in range(2000)]
    assert all(distribution.holds(value) for value in drawn)
    if "choice" in kind:
        assert set(map(str, drawn)) == {"a", "1", "True"}
    elif "uniform" in kind or "log_uniform" in kind:
        low, high = distribution.ends()
        assert min(drawn) <= low + 0.01 * (high - low)
        assert max(drawn) >= low + 0.98 * (high - low)
    else:
        assert {min(drawn), max(drawn)} == ({2, 8} if "integer" in kind else {1, 64})


def test_placing_values_leaves_the_tree_alone() -> None:
    tree = dump(Config())
    changed = placed(tree, {TOP_K: 5})
    assert validate(changed).model.pgsa.top_k == 5
    assert tree == dump(Config())


def test_a_pareto_front_is_not_pruned_by_auc_alone() -> None:
    with pytest.raises(ConfigError, match="starves the cheap end"):
        space({TOP_K: {"choice": [8, 32]}}, objectives=["auc", "keys"])
    with pytest.raises(ConfigError, match="expected auc, alone or with one other"):
        space({TOP_K: {"choice": [8, 32]}}, objectives=["keys", "auc"], scheduler={"kind": "none"})


def test_overrides_and_unreadable_spaces(tmp_path: Path) -> None:
    changed = load_space(ROOT / "tune_spaces/smoke.yaml", ["budget.trials=9", "sampler.kind=random"])
    assert (changed.budget.trials, changed.sampler.kind) == (9, "random")
    with pytest.raises(ConfigError, match="cannot read space"):
        load_space(tmp_path / "none.yaml")
    for text, message in (("a: [", "is not YAML"), ("- 1", "expected a mapping"), ("{}", "parameters")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_space(tmp_path / "bad.yaml")


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "integer", "log_integer"])
def test_a_distribution_of_one_value_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="expected low < high"):
        parse_space({"parameters": {"model.layers": {kind: [2, 2]}}})


def test_the_sampler_is_told_the_grid() -> None:
    whole, half = Distribution(integer=[2, 10], step=4).optuna(), Distribution(uniform=[0.0, 1.0], step=0.5).optuna()
    assert (whole.step, half.step, Distribution(integer=[2, 10]).optuna().step) == (4, 0.5, 1)


def test_a_value_may_not_depend_on_itself() -> None:
    space = parse_space({"parameters": {"model.layers": {"integer": [1, 4], "when": {"model.layers": 2}}}})
    with pytest.raises(ConfigError, match=r"when.model.layers must stand above it"):
        check(space, Config())
