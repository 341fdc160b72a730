"""Rules over a log's own columns, evaluated over whole columns. A comparison with null is false; NaN is null."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr.config import Rule
from hpgr.errors import DataError

Mask = npt.NDArray[np.bool_]
TRUE, FALSE = ["true", "1", "1.0", "yes"], ["false", "0", "0.0", "no"]
"""Words for true and false in text."""
_COMPARE = {
    "==": pc.equal, "!=": pc.not_equal, ">=": pc.greater_equal,
    ">": pc.greater, "<=": pc.less_equal, "<": pc.less,
}  # fmt: skip


def any_group(table: pa.Table, groups: Sequence[Sequence[Rule]] | None) -> Mask:
    """Rows for which all rules of at least one group hold: [rows] booleans. No groups (null): every row."""
    if groups is None:
        return np.ones(table.num_rows, bool)
    out = np.zeros(table.num_rows, bool)
    for group in groups:
        held = np.ones(table.num_rows, bool)
        for rule in group:
            held &= holds(table.column(rule.column), rule)
        out |= held
    return out


def columns_of(groups: Sequence[Sequence[Rule]] | None) -> list[str]:
    """Columns the rules read."""
    return [rule.column for group in groups or [] for rule in group]


def holds(column: pa.ChunkedArray, rule: Rule) -> Mask:
    """Whether the rule holds, row by row.

    Raises:
        DataError: the column cannot be compared with the rule's value.
    """
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if rule.op in ("is_null", "not_null"):
        mask = pc.is_null(column) if rule.op == "is_null" else pc.is_valid(column)
        return _to_numpy(mask)
    values = rule.value if isinstance(rule.value, list) else [rule.value]
    try:
        if rule.op in ("in", "not_in"):
            comparable, wanted = _comparable(column, values[0] if values else ""), pa.array(values)
            inside = pc.is_in(comparable, value_set=wanted.cast(comparable.type))
            found = inside if rule.op == "in" else pc.invert(inside)
            return _to_numpy(pc.and_(found, pc.is_valid(column)))
        return _to_numpy(_COMPARE[rule.op](_comparable(column, values[0]), pa.scalar(values[0])))
    except pa.ArrowException as error:
        raise DataError(
            f"rule on column {rule.column!r}: {column.type} cannot be compared with {rule.value!r}: {error}"
        ) from None


def _to_numpy(mask: pa.ChunkedArray) -> Mask:
    return np.asarray(pc.fill_null(mask, False), bool)


def _comparable(column: pa.ChunkedArray, value: object) -> pa.ChunkedArray:
    """Text columns (CSV) become what the rule's value is, null where they cannot; other columns are left alone."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.scalar(value).type)
    if pa.types.is_boolean(kind) and isinstance(value, int | float) and not isinstance(value, bool):
        return to_number(column)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or isinstance(value, str):
        return column
    if isinstance(value, bool):
        place = pc.index_in(pc.utf8_lower(column), value_set=pa.array(TRUE + FALSE))
        return pc.less(place, len(TRUE))
    return to_number(column)


def to_number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers of a text or numeric column as float64, true and false being 1 and 0; what is no number becomes null."""
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.float64(), safe=False)
    if pa.types.is_boolean(column.type):
        return column.cast(pa.int8()).cast(pa.float64())
    if pa.types.is_decimal(column.type):
        return column.cast(pa.float64())
    series = pd.Series(column.to_numpy(zero_copy_only=False), dtype=object)
    numbers = pd.to_numeric(series, errors="coerce").astype(float)
    words = numbers.isna() & series.notna()
    if words.any():
        numbers[words] = series[words].astype(str).str.lower().map({"true": 1.0, "false": 0.0})
    return pa.chunked_array([pa.array(numbers.to_numpy(), from_pandas=True)])
