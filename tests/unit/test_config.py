"""The configuration: every fault at once, each with its path, what was got, what is allowed, the nearest key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hpgr.config import Config, Section, dump, load_config, to_yaml, validate
from hpgr.config.reading import inner_section
from hpgr.errors import ConfigError, HpgrError

FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("compare-"))


def faults(raw: Any = None, overrides: list[str] | None = None, path: Path | None = None) -> list[str]:
    """The fault lines of a configuration that must not be accepted."""
    with pytest.raises(ConfigError) as caught:
        validate(raw) if raw is not None else load_config(path, overrides or [])
    assert isinstance(caught.value, HpgrError | ValueError)
    head, *lines = str(caught.value).split("\n")
    assert head == f"{len(lines)} fault(s) in the configuration:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


def sections(kind: type[Section] = Config) -> Iterator[type[Section]]:
    """The section classes of the tree, the ones inside lists included."""
    yield kind
    for field in kind.model_fields.values():
        inner = inner_section(field.annotation)
        if inner:
            yield from sections(inner)


# Faults.


def test_all_faults_are_told_at_once() -> None:
    raw = {
        "model": {"widht": 64, "layers": 0, "pgsa": {"scope": "some"}},
        "stream": {"window": "wide"},
        "data": {"features": [{"name": "a", "column": "a", "role": "item"}, {"name": "b", "role": "item"}]},
        "stage3": {},
    }
    found = sorted(faults(raw))
    assert found == [
        "data.features.1.column: got {'name': 'b', 'role': 'item'}; field required",
        "model.layers: got 0; input should be greater than or equal to 1",
        "model.pgsa.scope: got 'some'; input should be 'candidate' or 'all'",
        "model.widht: unknown key; did you mean model.width?",
        "stage3: unknown key; did you mean stage2?",
        "stream.window: got 'wide'; input should be a valid integer, unable to parse string as an integer",
    ]


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"mode": {}}, "mode: unknown key; did you mean model?"),
        ({"zzz": 1}, "zzz: unknown key; allowed: checkpoints, data, evaluation, model, name, resources, seed, stage1, "
                     "stage2, stream, tracking"),
        ({"checkpoints": {"qqq": 1}}, "checkpoints.qqq: unknown key; allowed: every_steps, keep"),
        ({"stage1": {"optimiser": {"learning_rate": 1}}},
         "stage1.optimiser.learning_rate: unknown key; allowed: clip_norm, final_lr_share, lr, warmup_steps, "
         "weight_decay"),
        ({"data": {"features": [{"name": "a", "column": "a", "role": "item", "knd": "numeric"}]}},
         "data.features.0.knd: unknown key; did you mean data.features.0.kind?"),
        ({"data": {"history": [[{"column": "a", "value": 1, "opp": "=="}]]}},
         "data.history.0.0.opp: unknown key; did you mean data.history.0.0.op?"),
        ({"data": {"label_rule": {"value": 4, "o": ">="}}},
         "data.label_rule.o: unknown key; did you mean data.label_rule.op?"),
        ({"model": {"dropout": 1.0}}, "model.dropout: got 1.0; input should be less than 1"),
        ({"stage1": {"optimiser": {"lr": float("nan")}}},
         "stage1.optimiser.lr: got nan; input should be a finite number"),
        ({"stage1": {"optimiser": {"lr": float("inf")}}},
         "stage1.optimiser.lr: got inf; input should be a finite number"),
        ({"model": None}, "model: got None; input should be a valid dictionary or instance of Model"),
        ({"data": {"path": 3}}, "data.path.str: got 3; input should be a valid string"),
        ({"model": {"heads": 1.5}}, "model.heads: got 1.5; input should be a valid integer, got a number with a "
                                    "fractional part"),
    ],
)  # fmt: skip
def test_fault_names_path_got_and_allowed(raw: dict[str, Any], fault: str) -> None:
    assert fault in faults(raw)


def test_long_values_are_cut_in_the_message() -> None:
    (fault,) = faults({"model": {"width": "x" * 5000}})
    assert len(fault) < 250
    assert "...;" in fault


DATES = {"by": "date", "validation_from": "2020-01-01", "test_from": "2020-02-01"}


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"stream": {"window": 100, "stride": 100}}, "stream: stride 100 must be less than window 100"),
        ({"stream": {"window": 9000, "batch_tokens": 8192}},
         "stream.batch_tokens 8192 is less than stream.window 9000: a full window"),
        ({"model": {"width": 64, "heads": 3}}, "model: width 64 is not a multiple of heads 3"),
        ({"stage1": {"enabled": False}}, "model.pgsa.anchors frozen needs stage1.enabled"),
        ({"data": {"path": "x", "columns": {}}}, "data: columns.label is missing"),
        ({"data": {"label_rule": {"value": 4}}}, "data: label_rule needs columns.label"),
        ({"data": {"label_rule": {"value": "buy"}}}, "operator '>=' would compare 'buy' by the alphabet; give op: =="),
        ({"data": {"label_rule": {"op": "in", "value": "buy"}}}, "lists go with in and not_in only"),
        ({"data": {"split": {"validation": 0.5, "test": 0.5}}}, "data.split: validation + test is 1, must leave room"),
        ({"data": {"split": {"by": "date"}}}, "data.split: split by date needs validation_from and test_from"),
        ({"data": {"split": DATES | {"by": "leave_one_out"}}}, "belong to split by date, got by=leave_one_out"),
        ({"data": {"split": DATES | {"test_from": "2020-01-01"}}}, "must be before test_from"),
        ({"data": {"earliest": "2020-01-01", "latest": "2010-01-01"}}, "data: earliest 2020-01-01 00:00:00 must be"),
        ({"data": {"history": [[{"column": "a"}]]}}, "operator '==' and value None do not go together"),
        ({"data": {"history": [[{"column": "a", "op": "is_null", "value": 1}]]}}, "'is_null' and value 1 do not go"),
        ({"data": {"history": [[{"column": "a", "op": "in", "value": 1}]]}}, "lists go with in and not_in only"),
        ({"data": {"history": [[{"column": "a", "value": [1]}]]}}, "lists go with in and not_in only"),
        ({"data": {"features": [{"name": "a", "column": c, "role": "item"} for c in "xy"]}},
         "data: feature names must differ, got ['a', 'a']"),
        ({"data": {"columns": {"label": "y"}, "features": [{"name": "a", "column": "y", "role": "candidate"}]}},
         "data: features ['a'] read the label's own column and would tell it"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(raw: dict[str, Any], fault: str) -> None:
    (found,) = faults(raw)
    assert fault in found


@pytest.mark.parametrize(
    "raw",
    [
        {"stage1": {"enabled": False}, "model": {"pgsa": {"anchors": "live"}}},
        {"stage1": {"enabled": False}, "model": {"pgsa": {"enabled": False, "summaries": 0}}},
        {"stage1": {"enabled": False}, "model": {"name": "hstu"}},
        {"stream": {"window": 2, "stride": 1, "batch_tokens": 2}},
        {"data": {"split": DATES | {"validation_from": "2020-01-31T23:59:59Z"}}},
        {"data": {"split": DATES | {"validation_from": "2020-01-31T23:59:59-05:00", "test_from": "2020-02-01T06:00Z"}}},
    ],
)
def test_what_fits_together_is_accepted(raw: dict[str, Any]) -> None:
    assert validate(dump(validate(raw))) == validate(raw)


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_dates_without_a_zone_are_utc_on_any_machine(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        (fault,) = faults({"data": {"split": DATES | {"validation_from": "2020-02-01T01:00Z"}}})
        assert "must be before test_from" in fault
        validate({"data": {"split": DATES | {"validation_from": "2020-01-31T23:00Z"}}})
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "raw",
    [{"model": {"width": True}}, {"model": {"width": "sixty"}}, {"resources": {"gpu": 2}}, {"name": 3}],
)
def test_values_of_another_kind_are_not_guessed(raw: dict[str, Any]) -> None:
    assert len(faults(raw)) == 1


# Round trip.


def everything() -> dict[str, Any]:
    """A configuration with every optional part."""
    return {
        "name": "Łódź: 1e3 #x",
        "data": {
            "path": ["s3://b/a", "c/*.csv"],
            "columns": {"label": "stars", "action": "event", "request": ["session", "step"], "order": "step"},
            "label_rule": {"op": ">=", "value": 4},
            "impressions": [[{"column": "shown", "value": True}, {"column": "n", "op": "in", "value": [1, 2.5, "x"]}]],
            "history": [[{"column": "n", "op": "is_null"}], [{"column": "n", "op": "<", "value": 1}]],
            "features": [{"name": "p", "column": "price", "role": "item", "kind": "numeric", "transform": "log1p"}],
            "split": {"by": "date", "validation_from": "2020-01-01", "test_from": "2020-02-01T05:00:00+02:00"},
            "vocabulary": {"max_items": 10},
        },
        "stage1": {"optimiser": {"lr": 3e-4}},
        "resources": {"cpus_per_worker": 1.5},
    }


@pytest.mark.parametrize("raw", [{}, everything()], ids=["defaults", "everything"])
def test_tree_survives_dump_and_yaml(raw: dict[str, Any], tmp_path: Path) -> None:
    config = validate(raw)
    assert validate(dump(config)) == config
    assert dump(validate(dump(config))) == dump(config)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert to_yaml(load_config(path)) == to_yaml(config)


def test_windows_are_half_of_one_apart_unless_told() -> None:
    for stream, spacing in (({"window": 2}, 1), ({"window": 201}, 100), ({"window": 201, "stride": 7}, 7)):
        assert validate({"stream": stream}).stream.spacing == spacing


def test_rule_values_keep_their_type() -> None:
    rules = [{"column": "a", "value": v} for v in (True, 1, 1.5, "1", "true")]
    again = validate(dump(validate({"data": {"history": [rules]}})))
    assert again.data.history is not None
    assert [(type(r.value), r.value) for r in again.data.history[0]] == [
        (bool, True), (int, 1), (float, 1.5), (str, "1"), (str, "true"),
    ]  # fmt: skip


def test_exponents_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stage1: {optimiser: {lr: 1e-4}}")
    assert load_config(tmp_path / "c.yaml").stage1.optimiser.lr == 1e-4


def test_dates_of_yaml_are_dates(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {split: {by: date, validation_from: 2020-01-01, test_from: 2020-02-01 10:00:00}}")
    split = load_config(path).data.split
    assert (split.validation_from, split.test_from) == (datetime(2020, 1, 1), datetime(2020, 2, 1, 10))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_jobs_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert validate(dump(config)) == config


def test_there_are_job_configs() -> None:
    assert {"synthetic", "ml-100k"} <= {path.stem for path in CONFIGS}


# Overrides.


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.width=32", "model.width", 32),
        ("model.pgsa.sigma=0", "model.pgsa.sigma", 0.0),
        ("stage1.optimiser.lr=1e-4", "stage1.optimiser.lr", 1e-4),
        ("stage1.optimiser.lr=.5", "stage1.optimiser.lr", 0.5),
        ("stage1.optimiser.lr=1E-2", "stage1.optimiser.lr", 1e-2),
        ("resources.gpu=true", "resources.gpu", True),
        ("data.prepared=s3://b/p?x=1", "data.prepared", "s3://b/p?x=1"),
        ("name=run e2e", "name", "run e2e"),
        ("data.columns.label=null", "data.columns.label", None),
        ("data.columns.request=[a, b]", "data.columns.request", ["a", "b"]),
    ],
)
def test_override_sets_the_value(override: str, path: str, value: Any) -> None:
    got: Any = load_config(None, [override])
    for part in path.split("."):
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)


def test_overrides_come_after_the_file_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {width: 32, heads: 4}\nstream:\n")
    config = load_config(path, ["model.width=16", "stream.window=120", "model.width=8"])
    assert (config.model.width, config.model.heads, config.stream.window) == (8, 4, 120)
    again = load_config(path, ["stream={}"])
    assert again.model.width == 32, "overrides of one load do not reach the next"


def test_overrides_are_validated_with_the_rest() -> None:
    found = faults(overrides=["model.widht=3", "novalue", "=3", "a..b=1", "seed=-1", "name.first=x", "model.heads=[1"])
    assert sorted(found) == [
        "--set '=3': expected a.b=value",
        "--set 'a..b=1': expected a.b=value",
        "--set 'model.heads=[1': '[1' is not a YAML value",
        "--set 'novalue': expected a.b=value",
        "model.widht: unknown key; did you mean model.width?",
        "name: got {'first': 'x'}; input should be a valid string",
        "seed: got -1; input should be greater than or equal to 0",
    ]


def test_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3")
    assert faults(overrides=["seed.x=1"], path=path) == ["--set 'seed.x=1': seed holds a value, not a section"]


# Files.


@pytest.mark.parametrize(
    ("content", "wording"),
    [
        ("a: [1", "is not YAML"),
        ("- 1\n- 2", "got a list, expected a mapping of keys"),
        ("just text", "got a str, expected a mapping of keys"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("!!python/object:os.system {}", "is not YAML"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str | bytes, wording: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        load_config(path)
    assert wording in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*; give an existing YAML file"):
        load_config(tmp_path / name)


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config() == load_config(None) == validate({})


# The tree.


def test_tree_is_frozen() -> None:
    config = Config()
    for section, name in ((config, "seed"), (config.model, "width"), (config.data.columns, "user")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_every_section_is_closed_and_frozen() -> None:
    found = list(sections())
    assert len(found) > 15
    for section in found:
        assert section.model_config["extra"] == "forbid", section
        assert section.model_config["frozen"], section


def test_defaults_are_valid_and_small_enough_to_read() -> None:
    assert yaml.safe_load(to_yaml(Config())) == dump(Config())
    assert len(to_yaml(Config()).splitlines()) < 150
