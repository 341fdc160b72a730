"""The configuration: one closed, frozen tree. YAML and `--set a.b=c` meet before validation, never after.

No validator changes a value; a default of `auto` or null is resolved where it is used and logged there.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpgr.errors import ConfigError
from hpgr.schema import SECOND

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Operator = Literal["==", "!=", ">=", ">", "<=", "<", "in", "not_in", "is_null", "not_null"]


def utc_us(moment: datetime) -> int:
    """Microseconds since 1970; UTC where no zone is given, whatever the machine's zone."""
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * SECOND)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change. Text is read as a number where one
    is expected, for YAML takes 1e-3 for text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Rule(Section):
    column: str
    """Column of the log (its own name, not the mapped one)."""
    op: Operator = "=="
    value: str | bool | int | float | list[str | int | float] | None = None
    """What the column is compared with; a list for `in` and `not_in`, absent for `is_null` and `not_null`."""

    @model_validator(mode="after")
    def _value_fits(self) -> Rule:
        if (self.value is None) != (self.op in ("is_null", "not_null")):
            raise ValueError(f"operator {self.op!r} and value {self.value!r} do not go together")
        if isinstance(self.value, list) != (self.op in ("in", "not_in")):
            raise ValueError(f"operator {self.op!r} got {self.value!r}; lists go with in and not_in only")
        return self


class Columns(Section):
    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    label: str | None = None
    """0/1 column, null = not a target; or the column that `data.label_rule` turns into 0/1."""
    action: str | None = None
    """Kind of event (event type, rating). The label, where there is one, is always part of the action."""
    request: list[str] | None = None
    """Columns that together name the list an impression was shown in."""
    order: str | None = None
    """Numeric column that orders events of equal time; without it their order is by content."""


class LabelRule(Section):
    op: Literal["==", "!=", ">=", ">", "<=", "<"] = ">="
    value: float | str


class Feature(Section):
    name: str
    column: str
    role: Literal["item", "event", "user", "candidate"]
    """Who shows it: item and user features both streams, event features the history, candidate features
    (position, price, device) only the impression."""
    kind: Literal["categorical", "numeric"] = "categorical"
    transform: Literal["none", "log1p"] = "none"
    """Applied to numeric features before they are standardised by training-time statistics."""


class Split(Section):
    by: Literal["user_fraction", "time_fraction", "date", "leave_one_out"] = "time_fraction"
    validation: Share = 0.1
    test: Share = 0.1
    """Shares of the impressions: of each user's last (user_fraction) or of all in time order (time_fraction)."""
    validation_from: datetime | None = None
    test_from: datetime | None = None
    """First moment of each split, for `date`; UTC where no zone is given."""

    @model_validator(mode="after")
    def _possible(self) -> Split:
        dates = (self.validation_from, self.test_from)
        if self.by == "date":
            if None in dates:
                raise ValueError("split by date needs validation_from and test_from")
            if utc_us(dates[0]) >= utc_us(dates[1]):  # type: ignore[arg-type]
                raise ValueError(f"validation_from {dates[0]} must be before test_from {dates[1]}")
        elif dates != (None, None):
            raise ValueError(f"validation_from and test_from belong to split by date, got by={self.by}")
        if self.by.endswith("fraction") and self.validation + self.test >= 1:
            raise ValueError(f"validation + test is {self.validation + self.test:g}, must leave room for training")
        return self


class Vocabulary(Section):
    min_count: Count = 1
    """Items seen less often in training time are out of vocabulary."""
    max_items: Count | None = None
    """Keep only the most frequent; null keeps all."""
    oov_buckets: Count = 64
    """Unknown items are hashed into this many indices, so an unknown item still matches itself."""


class Synthetic(Section):
    users: Count = 1600
    items: Annotated[int, Field(ge=20)] = 600
    categories: Annotated[int, Field(ge=2)] = 24
    interests: Count = 3
    """Categories a user cares for."""
    sessions: Count = 8
    """Mean sessions a user."""
    session_events: Count = 7
    """Mean engagements a session."""
    impressions: Count = 5
    """Mean lists a user is shown."""
    list_size: Count = 4
    noise: Share = 0.3
    """Share of engagements with an item of no interest."""
    skew: Annotated[float, Field(ge=0)] = 0.8
    """Zipf exponent of item popularity inside a category."""
    memory_days: Positive = 5.0
    """Time in which an engagement's effect on later clicks falls to 1/e."""
    strength: Annotated[float, Field(ge=0)] = 3.0
    """Effect of relevant past engagements on the click's log-odds."""
    seed: Natural = 7


class Data(Section):
    path: str | list[str] | None = None
    """File, folder or glob, or several; local, s3:// or gs://. Null generates `synthetic` instead."""
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    synthetic: Synthetic = Synthetic()
    columns: Columns = Columns()
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of an integer or float time column; an Arrow timestamp carries its own."""
    earliest: datetime = datetime(1990, 1, 1)
    latest: datetime = datetime(2100, 1, 1)
    """Events outside [earliest, latest) are quarantined as absurd."""
    label_rule: LabelRule | None = None
    impressions: list[list[Rule]] | None = None
    """Rows that are stage 2 targets: any group whose rules all hold. Null: every row with a label."""
    history: list[list[Rule]] | None = None
    """Rows that enter the history, in the same form. Null: every row."""
    features: list[Feature] = []
    split: Split = Split()
    vocabulary: Vocabulary = Vocabulary()
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Stop if a larger share of the rows is bad: the mapping is probably wrong."""
    prepared: str = "runs/prepared"
    """Folder of prepared timelines, shared by runs and addressed by content."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        names = [f.name for f in self.features]
        if len(set(names)) < len(names):
            raise ValueError(f"feature names must differ, got {names}")
        if self.label_rule and not self.columns.label:
            raise ValueError("label_rule needs columns.label, the column it is applied to")
        if utc_us(self.earliest) >= utc_us(self.latest):
            raise ValueError(f"earliest {self.earliest} must be before latest {self.latest}")
        if self.path is not None and self.columns.label is None:
            raise ValueError("columns.label is missing: stage 2 learns from labelled impressions")
        return self


class Stream(Section):
    session_gap_minutes: Positive = 30.0
    """A session ends where the user's next event is further away than this."""
    window: Annotated[int, Field(ge=2)] = 200
    """Longest history the model sees at once, in events."""
    stride: Count = 100
    """Long timelines are cut into windows this far apart; an impression sees window - stride events or more."""
    batch_tokens: Count = 4096
    """Token budget of a global batch (padding counted, all workers together)."""
    group_tokens: Count = 4_000_000
    """Tokens shuffled together; bounds the memory of a data task."""

    @model_validator(mode="after")
    def _fits(self) -> Stream:
        if self.stride >= self.window:
            raise ValueError(f"stride {self.stride} must be less than window {self.window}")
        return self


class Pgsa(Section):
    enabled: bool = True
    """False is dense attention."""
    scope: Literal["candidate", "all"] = "all"
    """Who attends sparsely: candidates only, or history events too."""
    top_k: Count = 32
    """Anchors a query."""
    sigma: Annotated[float, Field(ge=0, le=1000)] = 2.0
    """Width of the Gaussian around an anchor, in events; 0 keeps the anchors alone."""
    max_keys: Annotated[int, Field(ge=1)] | None = None
    """Most events a query keeps: the largest weights, of equal ones the more recent. Without it a query keeps up to
    top_k * (2 * ceil(3 * sigma) + 1) events, all that its Gaussians cover."""
    anchors: Literal["frozen", "live"] = "frozen"
    """Item vectors that choose anchors: a frozen copy of stage 1's table, or the table being trained."""
    impl: Literal["reference", "gather", "auto"] = "auto"
    """How it is computed; scores agree to 1e-5. reference: weights over the whole history. gather: kept keys alone,
    time and memory linear in them. auto: keys chosen the fast way; on a CPU gather where a batch's padded histories
    are long (128 events, and twice the keys a query may keep), else the whole history with its weights."""


class Sem(Section):
    intra_layers: Count = 1
    inter_layers: Count = 1
    dropout: Share = 0.2
    in_stage2: bool = True
    """Carry the SEM into stage 2; both its branches are gated from zero there."""


class Model(Section):
    width: Annotated[int, Field(ge=4)] = 64
    heads: Count = 2
    layers: Count = 2
    dropout: Share = 0.2
    silu_on: Literal["u", "uvqk"] = "uvqk"
    """Activation after the input projection: U alone (ranking form) or all four (research form)."""
    time_buckets: Annotated[int, Field(ge=4, le=64)] = 40
    """Buckets of log2 time differences."""
    match_features: bool = True
    """Candidates carry how often and how recently the user engaged with them (visible past only)."""
    sem: Sem = Sem()
    pgsa: Pgsa = Pgsa()

    @model_validator(mode="after")
    def _divides(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Optimiser(Section):
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup_steps: Natural = 50
    final_lr_share: Share = 0.1
    """Cosine decay ends at this share of lr."""
    clip_norm: Positive = 1.0


class Stage1(Section):
    enabled: bool = True
    epochs: Count = 20
    patience: Count = 5
    """Validations without a better NDCG@10 before the stage stops."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    causal_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of rows encoded left to right, the form stage 2 uses; the rest see both sides."""
    full_softmax_items: Natural = 20_000
    """Catalogues up to this size use the full softmax, larger ones the logQ-corrected sampled one."""
    negatives: Count = 2048
    optimiser: Optimiser = Optimiser()


class Stage2(Section):
    epochs: Count = 10
    patience: Count = 3
    """Validations without a better AUC before the stage stops."""
    validate_every_steps: Natural = 0
    """0 validates at the end of each epoch."""
    optimiser: Optimiser = Optimiser()


class Evaluation(Section):
    batch_tokens: Count = 16384
    filter_seen: bool = False
    """Leave items of the user's history out of the next-item ranking."""
    next_item_users: Count = 20_000
    """Most users ranked over the whole catalogue in validation and test (first by user hash)."""


class Resources(Section):
    workers: Natural = 1
    """Ray Train workers; 0 trains inside the driver."""
    gpu: bool = False
    """One GPU a worker, nccl and bf16 autocast."""
    cpus_per_worker: Positive | None = None
    """Null shares the cluster's CPUs, less one for data where there are enough."""
    data_cpus: Positive = 0.25
    """CPUs a data task reserves."""
    max_failures: Natural = 2
    """Worker-group restarts, each from the last checkpoint."""


class Checkpoints(Section):
    every_steps: Natural = 0
    """0 writes at each validation only."""
    keep: Count = 2


class Config(Section):
    name: str = "run"
    seed: Natural = 0
    data: Data = Data()
    stream: Stream = Stream()
    model: Model = Model()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.stream.batch_tokens < self.stream.window:
            raise ValueError(
                f"stream.batch_tokens {self.stream.batch_tokens} is less than stream.window {self.stream.window}: "
                "a full window would not fit in a batch"
            )
        if not self.stage1.enabled and self.model.pgsa.enabled and self.model.pgsa.anchors == "frozen":
            raise ValueError(
                "model.pgsa.anchors frozen needs stage1.enabled: without it anchors would be chosen by random vectors; "
                "use model.pgsa.anchors=live or model.pgsa.enabled=false"
            )
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (null: all defaults), apply `a.b=c` overrides, validate everything at once.

    Raises:
        ConfigError: with one line a fault: dotted path, what was got, what is allowed, the nearest key for a typo.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(
                f"cannot read config {path}: {error.strerror or error}; give an existing YAML file"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}: got a {type(raw).__name__}, expected a mapping of keys")
    raw = copy.deepcopy(raw)
    faults = [fault for text in overrides if (fault := override(raw, text))]
    return validate(raw, faults)


def validate(raw: dict[str, Any], faults: Sequence[str] = ()) -> Config:
    """Build the tree from plain data; `faults` found before are reported together with the tree's own."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults = [*faults, *(_describe(e) for e in error.errors())]
    if faults:
        raise ConfigError(f"{len(faults)} fault(s) in the configuration:\n" + "\n".join(f"  - {f}" for f in faults))
    return config


def override(raw: dict[str, Any], text: str) -> str | None:
    """Apply one `a.b=c` in place; returns the fault's text if it has none of that form."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return f"--set {text!r}: expected a.b=value"
    try:
        parsed = _number(yaml.safe_load(value))
    except yaml.YAMLError:
        return f"--set {text!r}: {value!r} is not a YAML value"
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            return f"--set {text!r}: {part} holds a value, not a section"
        node = child
    node[last] = parsed
    return None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _describe(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    path, kind, got = ".".join(location), error["type"], error.get("input")
    if kind == "extra_forbidden":
        allowed = sorted(_section(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.6)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{path}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}" if path else message
    text = repr(got)
    return f"{path}: got {text if len(text) < 80 else text[:77] + '...'}; {message[:1].lower() + message[1:]}"


def _section(location: Sequence[str]) -> type[Section]:
    """The model class at a dotted path, looking through lists and optionals."""
    section: type[Section] = Config
    for part in location:
        field = section.model_fields.get(part)
        if field is not None:
            section = _inner_section(field.annotation) or section
    return section


def _inner_section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_inner_section(arg) for arg in get_args(annotation))
    return next((inner for inner in found if inner), None)


def dump(config: Config) -> dict[str, Any]:
    """Plain data of the resolved tree; `validate(dump(c)) == c`."""
    return json.loads(config.model_dump_json())


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)
