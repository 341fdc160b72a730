"""Settings of the log: columns, rules, features, split, vocabulary, and how timelines are streamed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpgr.config.base import Count, Natural, Positive, Section, Share
from hpgr.schema import LIST_PREFIX, SECOND

Operator = Literal["==", "!=", ">=", ">", "<=", "<", "in", "not_in", "is_null", "not_null"]


def utc_us(moment: datetime) -> int:
    """Microseconds since 1970; UTC where no zone is given, whatever the machine's zone."""
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * SECOND)


class Rule(Section):
    column: str
    """Column of the log (its own name, not the mapped one)."""
    op: Operator = "=="
    """How the column is compared with `value`."""
    value: str | bool | int | float | list[str | int | float] | None = None
    """What the column is compared with; a list for `in` and `not_in`, absent for `is_null` and `not_null`."""

    @model_validator(mode="after")
    def _value_fits(self) -> Rule:
        if (self.value is None) != (self.op in ("is_null", "not_null")):
            raise ValueError(f"operator {self.op!r} and value {self.value!r} do not go together")
        check_value(self.op, self.value)
        return self


def check_value(op: Operator, value: object) -> None:
    """Refuse a list where one value is compared, and the reverse."""
    if isinstance(value, list) != (op in ("in", "not_in")):
        raise ValueError(f"operator {op!r} got {value!r}; lists go with in and not_in only")


class Columns(Section):
    user: str = "user_id"
    """Who acted; read as text."""
    item: str = "item_id"
    """What was acted on; read as text."""
    time: str = "timestamp"
    """When: an Arrow timestamp, a number in `data.time_unit`, or text of ISO 8601 (UTC where no zone is given)."""
    label: str | None = None
    """0/1 column, null = not a target; or the column that `data.label_rule` turns into 0/1."""
    action: str | None = None
    """Kind of event (event type, rating), one of few. The label, where there is one, is always part of the action."""
    request: list[str] | None = None
    """Columns that together name the list an impression was shown in."""
    order: str | None = None
    """Numeric column that orders events of equal time; without it their order is by content."""


class LabelRule(Section):
    op: Literal["==", "!=", ">=", ">", "<=", "<", "in", "not_in"] = ">="
    """How the label column is compared with `value`: a click where it holds. Text goes with ==, !=, in and not_in."""
    value: float | str | list[float | str]
    """What it is compared with; a list for `in` and `not_in`."""

    @model_validator(mode="after")
    def _value_fits(self) -> LabelRule:
        check_value(self.op, self.value)
        if isinstance(self.value, str) and self.op not in ("==", "!="):
            raise ValueError(
                f"operator {self.op!r} would compare {self.value!r} by the alphabet; give op: ==, or a number"
            )
        return self


class Feature(Section):
    name: str
    """Its name in candidates and reports; no two alike."""
    column: str
    """Column of the log (its own name)."""
    role: Literal["item", "event", "user", "candidate"]
    """Who shows it: item and user features both streams, event features the history, candidate features
    (position, price, device) only the impression."""
    kind: Literal["categorical", "numeric"] = "categorical"
    """Categorical values get vectors, numeric ones a slope."""
    transform: Literal["none", "log1p"] = "none"
    """Applied to numeric features before they are standardised by training-time statistics."""


class Split(Section):
    by: Literal["user_fraction", "time_fraction", "date", "leave_one_out"] = "time_fraction"
    """How impressions are divided; see the guide of logs."""
    validation: Share = 0.1
    """Share of the impressions for validation, in the same manner as `test`."""
    test: Share = 0.1
    """Shares of the impressions: of each user's last (user_fraction) or of all in time order (time_fraction)."""
    validation_from: datetime | None = None
    """First moment of validation, for `date`; UTC where no zone is given."""
    test_from: datetime | None = None
    """First moment of the test, for `date`; UTC where no zone is given."""

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
    """Unknown items are hashed into this many indices, so an unknown item still matches itself; raise it where new ones
    are many, or they match one another (preparing tells their share)."""


class Synthetic(Section):
    users: Count = 1600
    """Users of the generated log."""
    items: Annotated[int, Field(ge=20)] = 600
    """Its items."""
    categories: Annotated[int, Field(ge=2)] = 24
    """Kinds of items."""
    interests: Count = 3
    """Categories a user cares for."""
    sessions: Count = 8
    """Mean sessions a user."""
    session_events: Count = 7
    """Mean engagements a session."""
    impressions: Count = 5
    """Mean lists a user is shown."""
    list_size: Count = 4
    """Items a list."""
    noise: Share = 0.3
    """Share of engagements with an item of no interest."""
    skew: Annotated[float, Field(ge=0)] = 0.8
    """Zipf exponent of item popularity inside a category."""
    memory_days: Positive = 5.0
    """Time in which an engagement's effect on later clicks falls to 1/e."""
    strength: Annotated[float, Field(ge=0)] = 3.0
    """Effect of relevant past engagements on the click's log-odds."""
    seed: Natural = 7
    """Of the generated log alone."""


class Data(Section):
    path: str | list[str] | None = None
    """File, folder or glob, or several; local, s3:// or gs://. Null generates `synthetic` instead."""
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    """Format of the files; auto goes by their names."""
    synthetic: Synthetic = Synthetic()
    columns: Columns = Columns()
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of an integer or float time column; an Arrow timestamp carries its own."""
    earliest: datetime = datetime(1990, 1, 1)
    """Events before this are quarantined as absurd."""
    latest: datetime = datetime(2100, 1, 1)
    """Events outside [earliest, latest) are quarantined as absurd."""
    label_rule: LabelRule | None = None
    """Turns `columns.label` into 0/1; null: it is 0/1 already."""
    impressions: list[list[Rule]] | None = None
    """Rows that are stage 2 targets: any group whose rules all hold. Null: every row with a label."""
    history: list[list[Rule]] | None = None
    """Rows that enter the history, in the same form. Null: every row."""
    features: list[Feature] = Field(default=[])
    """Further columns the model reads."""
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
        told = [f.name for f in self.features if f.column == self.columns.label and f.role != "event"]
        if told:
            raise ValueError(f"features {told} read the label's own column and would tell it; give them the role "
                             "event, which histories alone show, or another column")  # fmt: skip
        taken = [n for n in names if n.startswith(LIST_PREFIX)]
        if taken:
            raise ValueError(f"feature names may not begin with {LIST_PREFIX!r}, got {taken}")
        if self.label_rule and not self.columns.label:
            raise ValueError("label_rule needs columns.label, the column it is applied to")
        if utc_us(self.earliest) >= utc_us(self.latest):
            raise ValueError(f"earliest {self.earliest} must be before latest {self.latest}")
        if self.path is not None and self.columns.label is None:
            raise ValueError(
                "columns.label is missing: name the column of clicks, 0 or 1, or one that label_rule turns into them; "
                "stage 2 learns from it"
            )
        return self


class Stream(Section):
    session_gap_minutes: Positive = 30.0
    """A session ends where the user's next event is further away than this."""
    window: Annotated[int, Field(ge=2)] = 400
    """Longest history the model sees at once, in events."""
    stride: Count | None = None
    """Long timelines are cut into windows this far apart; an impression sees window - stride events or more. null: half
    the window."""
    batch_tokens: Count = 4096
    """Token budget of a global batch (padding counted, all workers together)."""
    group_tokens: Count = 4_000_000
    """Tokens shuffled together; bounds the memory of a data task."""

    @model_validator(mode="after")
    def _fits(self) -> Stream:
        if self.spacing >= self.window:
            raise ValueError(f"stride {self.stride} must be less than window {self.window}")
        return self

    @property
    def spacing(self) -> int:
        """Events from one window to the next."""
        return self.window // 2 if self.stride is None else self.stride
