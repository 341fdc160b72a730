"""Raw rows -> canonical rows, and the rows that cannot be used with the reason why. Nothing is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr.config import Data, Feature, Rule, utc_us
from hpgr.data.hashing import U64, combine, hash_text
from hpgr.data.rules import Mask, any_group, columns_of, holds, to_number
from hpgr.data.sources import RAW_LINE
from hpgr.errors import DataError
from hpgr.schema import (
    ACTION,
    FEATURE_PREFIX,
    IN_HISTORY,
    IS_SHOWN,
    IS_TARGET,
    ITEM,
    LABEL,
    ORDER,
    ORDER_DIGITS,
    REQUEST,
    TIME,
    USER,
)  # fmt: skip

IDS = pa.dictionary(pa.int32(), pa.string())
LARGEST = 1e150
"""Numbers whose squares can still be summed."""
_UNIT_US = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}


@dataclass(frozen=True)
class Validated:
    """Canonical rows (schema: `empty_rows`), and quarantined ones as text with `reason` and `row` (position in the
    file)."""

    rows: pa.Table
    quarantined: pa.Table


def needed_columns(data: Data) -> list[str]:
    """Columns of the log that the configuration reads, each once."""
    c = data.columns
    names = [c.user, c.item, c.time, c.label, c.action, c.order, *(c.request or [])]
    names += [f.column for f in data.features]
    names += [*columns_of(data.impressions), *columns_of(data.history)]
    return list(dict.fromkeys(n for n in names if n is not None))


def validate(raw: pa.Table, first_row: int, data: Data) -> Validated:
    """Check and convert one block of raw rows.

    Raises:
        DataError: a column's type can never be what it is mapped to.
    """
    if raw.column_names == [RAW_LINE]:
        reasons = np.full(raw.num_rows, "unreadable line", object)
        return Validated(empty_rows(data), quarantine_table(raw, reasons, first_row))
    reasons = np.full(raw.num_rows, None, object)
    columns = {
        USER: read_ids(raw, data.columns.user, "user", reasons),
        ITEM: read_ids(raw, data.columns.item, "item", reasons),
        TIME: pa.array(read_times(raw.column(data.columns.time), data, reasons)),
        LABEL: _labels(raw, data, reasons),
    }
    if data.columns.action is not None:
        columns[ACTION] = text(raw, data.columns.action)
    if data.columns.request:
        columns[REQUEST] = pa.array(request_keys(raw, data.columns.request).view(np.int64))
    if data.columns.order is not None:
        columns[ORDER], columns[ORDER_DIGITS] = map(pa.array, _order(raw, data.columns.order, reasons))
    for feature in data.features:
        columns[FEATURE_PREFIX + feature.name] = read_feature(raw, feature, reasons)
    columns[IN_HISTORY] = pa.array(any_group(raw, data.history))
    labelled = pc.is_valid(columns[LABEL]).to_numpy(zero_copy_only=False)
    shown = any_group(raw, data.impressions)
    columns[IS_TARGET] = pa.array(shown & labelled)
    if data.columns.request:  # without rules only a label says that a row was shown
        columns[IS_SHOWN] = columns[IS_TARGET] if data.impressions is None else pa.array(shown)
    good, rows = unmarked(reasons), pa.table(columns)
    rows = (rows if good.all() else rows.filter(pa.array(good))).combine_chunks()
    return Validated(rows, quarantine_table(raw, reasons, first_row))


def empty_rows(data: Data) -> pa.Table:
    """No rows, with the canonical schema. Ids are spelled once each; what the log has no column of has none here."""
    kinds = {USER: IDS, ITEM: IDS, TIME: pa.int64(), LABEL: pa.int8()}
    kinds |= {ACTION: pa.string()} if data.columns.action is not None else {}
    kinds |= {REQUEST: pa.int64()} if data.columns.request else {}
    kinds |= {ORDER: pa.float64(), ORDER_DIGITS: pa.int64()} if data.columns.order is not None else {}
    for f in data.features:
        kinds[FEATURE_PREFIX + f.name] = pa.string() if f.kind == "categorical" else pa.float64()
    kinds |= {IN_HISTORY: pa.bool_(), IS_TARGET: pa.bool_()}
    kinds |= {IS_SHOWN: pa.bool_()} if data.columns.request else {}
    return pa.schema(list(kinds.items())).empty_table()


def quarantine_table(raw: pa.Table, reasons: npt.NDArray[np.object_], first_row: int) -> pa.Table:
    """Rows that have a reason, as text: row, reason, values."""
    bad = np.flatnonzero(~unmarked(reasons))
    values = _printable(raw.take(pa.array(bad)))
    printed = pa.array([str(row) for row in values.to_pylist()], pa.string())
    return pa.table({
        "row": pa.array(bad + first_row, pa.int64()),
        "reason": pa.array(reasons[bad], pa.string()),
        "values": printed,
    })  # fmt: skip


def _printable(rows: pa.Table) -> pa.Table:
    """Rows whose times are text: Python has no year beyond 9999."""
    for i, field in enumerate(rows.schema):
        if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
            plain = pa.timestamp(field.type.unit) if pa.types.is_timestamp(field.type) else pa.int64()
            whole = rows.column(i).cast(pa.int32()) if pa.types.is_date32(field.type) else rows.column(i)
            times = whole.cast(plain).cast(pa.string())
            rows = rows.set_column(i, field.name, times)
    return rows


def unmarked(reasons: npt.NDArray[np.object_]) -> Mask:
    """Rows without a reason to leave them out: [rows] booleans."""
    return np.asarray(pd.isna(reasons), bool)


def _mark(reasons: npt.NDArray[np.object_], bad: Mask, reason: str) -> None:
    if bad.any():
        reasons[bad & unmarked(reasons)] = reason


def _nulls(column: pa.ChunkedArray) -> Mask:
    return np.asarray(pc.is_null(column, nan_is_null=True), bool)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def read_ids(raw: pa.Table, name: str, role: str, reasons: npt.NDArray[np.object_]) -> pa.DictionaryArray:
    """Ids as text, each spelled once: whole numbers and strings of the same digits are the same id. [rows]."""
    column = _plain(raw.column(name))
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.to_numpy()
        _mark(reasons, _nulls(column), f"null {role} id")
        whole = np.isfinite(values) & (np.floor(values) == values) & (np.abs(values) < 2**53)
        _mark(reasons, ~whole, f"{role} id is not a whole number")
        return _spelled(pa.array(np.where(whole, values, 0).astype(np.int64)))
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(
            f"column {name!r} ({role} ids) is {kind}; expected integers or text: cast it, or map another column"
        )
    values = column.combine_chunks()
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    ids = _spelled(values if pa.types.is_integer(kind) else values.cast(pa.string()))
    _mark(reasons, np.asarray(pc.fill_null(pc.equal(ids.dictionary, "").take(ids.indices), True), bool),
          f"null {role} id")  # fmt: skip
    return ids


def _spelled(values: pa.Array) -> pa.DictionaryArray:
    encoded = values.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.string()))


def read_times(column: pa.ChunkedArray, data: Data, reasons: npt.NDArray[np.object_]) -> npt.NDArray[np.int64]:
    """Microseconds since 1970: [rows]; `reasons` gets why a row's time cannot be used."""
    column = _plain(column)
    _mark(reasons, _nulls(column), "null time")
    micros, readable = _microseconds(column, data)
    _mark(reasons, ~readable, "unreadable time")
    low, high = utc_us(data.earliest), utc_us(data.latest)
    _mark(reasons, (micros < low) | (micros >= high), "time outside data.earliest and data.latest")
    return np.where(readable, micros, 0)


def _microseconds(column: pa.ChunkedArray, data: Data) -> tuple[npt.NDArray[np.int64], Mask]:
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit != "us":  # clipped, where a cast of far times would wrap around
        exact = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
        return _scaled(exact, kind.unit), ~_nulls(column)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        whole = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pc.fill_null(whole, 0).to_numpy(), ~_nulls(column)
    if pa.types.is_integer(kind):
        exact = pc.fill_null(column, 0).cast(pa.int64(), safe=False).to_numpy()
        return _scaled(exact, data.time_unit), ~_nulls(column)
    if not (
        pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"column {data.columns.time!r} (time) is {kind}; expected a timestamp, a number or text")
    numbers = to_number(column).to_numpy(zero_copy_only=False).astype(float)
    readable = np.isfinite(numbers)
    limit = 2.0**62 / _UNIT_US[data.time_unit]
    micros = np.round(np.clip(np.where(readable, numbers, 0), -limit, limit) * _UNIT_US[data.time_unit])
    out = micros.astype(np.int64)
    if not (pa.types.is_floating(kind) or pa.types.is_null(kind)):
        _read_text_times(column, numbers, data.time_unit, out, readable)
    return out, readable


def _read_text_times(
    column: pa.ChunkedArray, numbers: npt.NDArray[np.float64], unit: str, out: npt.NDArray[np.int64], readable: Mask
) -> None:
    """Times from text, into `out`: whole numbers exactly, as from an integer column, and ISO 8601 dates."""
    whole = np.asarray(pc.fill_null(pc.match_substring_regex(column, r"^[+-]?\d{1,19}$"), False), bool)
    whole &= np.abs(np.nan_to_num(numbers)) < 2**63
    digits = column.filter(pa.array(whole)).to_numpy(zero_copy_only=False)
    out[whole] = _scaled(digits.astype(np.int64), unit)
    dates = pd.Series(np.where(np.isnan(numbers), column.to_numpy(zero_copy_only=False), None), dtype=object)
    dates = dates.str.removesuffix(" UTC")  # as BigQuery writes them
    parsed = pd.to_datetime(dates, errors="coerce", utc=True, format="ISO8601")
    known = parsed.notna().to_numpy()
    out[known] = parsed[known].dt.as_unit("us").astype(np.int64).to_numpy()
    readable |= known


def _scaled(values: npt.NDArray[np.int64], unit: str) -> npt.NDArray[np.int64]:
    if unit == "ns":
        return values // 1000
    factor = int(_UNIT_US[unit])
    limit = 2**62 // factor
    return np.clip(values, -limit, limit) * factor


def _labels(raw: pa.Table, data: Data, reasons: npt.NDArray[np.object_]) -> pa.Array:
    name = data.columns.label
    if name is None:
        return pa.nulls(raw.num_rows, pa.int8())
    column = _plain(raw.column(name))
    if data.label_rule is not None:
        values = data.label_rule.value if isinstance(data.label_rule.value, list) else [data.label_rule.value]
        if not any(isinstance(value, str) for value in values):
            unreadable = ~_nulls(column) & np.isnan(_numbers(column, name))
            _mark(reasons, unreadable, "label is not a number")
        rule = Rule(column=name, op=data.label_rule.op, value=data.label_rule.value)
        return pa.array(holds(column, rule).astype(np.int8), mask=_nulls(column))
    numbers = _numbers(column, name)
    empty = _nulls(column)
    _mark(reasons, ~empty & ~np.isin(numbers, (0.0, 1.0)), "label is not 0 or 1")
    return pa.array((numbers == 1.0).astype(np.int8), mask=empty)


def _numbers(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.float64]:
    """Numbers of a column, true and false being 1 and 0; NaN for null and for what is none: [rows]."""
    kind = column.type
    if _is_opaque(kind) or pa.types.is_temporal(kind):
        raise DataError(f"column {name!r} is {kind}; expected numbers, or text of numbers")
    return np.array(to_number(column).to_numpy(zero_copy_only=False), float)


def text(raw: pa.Table, name: str) -> pa.Array:
    """A column as text; NaN is null."""
    column = _plain(raw.column(name))
    if _is_opaque(column.type):
        raise DataError(f"column {name!r} is {column.type}; expected text or numbers")
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string()).combine_chunks()


def _is_opaque(kind: pa.DataType) -> bool:
    """Whether values are neither numbers, times nor text."""
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)


def request_keys(raw: pa.Table, names: Sequence[str]) -> U64:
    """Key of the list an impression was shown in; 0 where there is none, for a column is null or empty."""
    if not names:
        return np.zeros(raw.num_rows, np.uint64)
    texts = [text(raw, name) for name in names]
    keys = [hash_text(pc.if_else(pc.equal(t, ""), None, t)) for t in texts]
    return np.where(np.logical_and.reduce([k != 0 for k in keys]), combine(*keys), np.uint64(0))


def _order(
    raw: pa.Table, name: str, reasons: npt.NDArray[np.object_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Numbers to order by, and the digits of whole ones exactly, which tell apart those beyond 2**53: [rows]."""
    column = _plain(raw.column(name))
    numbers = _numbers(column, name)
    _mark(reasons, ~np.isfinite(numbers), "order is not a finite number")
    numbers = np.nan_to_num(numbers)
    digits = np.where(np.abs(numbers) < 2**53, numbers, 0).astype(np.int64)
    if pa.types.is_integer(column.type):
        digits = pc.fill_null(column, 0).cast(pa.int64(), safe=False).to_numpy()
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        whole = np.asarray(pc.fill_null(pc.match_substring_regex(column, r"^[+-]?\d{1,19}$"), False), bool)
        whole &= np.abs(numbers) < 2**63
        digits[whole] = column.filter(pa.array(whole)).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers, digits


def read_feature(raw: pa.Table, feature: Feature, reasons: npt.NDArray[np.object_]) -> pa.Array:
    """A side feature's canonical values: text, or numbers after their transform: [rows]."""
    if feature.kind == "categorical":
        return text(raw, feature.column)
    column = _plain(raw.column(feature.column))
    numbers = _numbers(column, feature.column)
    _mark(
        reasons,
        (np.abs(numbers) > LARGEST) | (np.isnan(numbers) & ~_nulls(column)),
        f"feature {feature.name} is not a finite number",
    )
    if feature.transform == "log1p":
        _mark(reasons, numbers <= -1, f"feature {feature.name} is too small for log1p")
        with np.errstate(invalid="ignore", divide="ignore"):
            numbers = np.log1p(numbers)
    return pa.array(numbers, from_pandas=True)
