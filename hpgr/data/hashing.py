"""Counter-based hashing: the same numbers for the same keys on any machine, worker and block layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

U64 = npt.NDArray[np.uint64]


def mix(value: Any) -> U64:
    """SplitMix64's finaliser, elementwise over integers (Steele et al. 2014)."""
    x = np.asarray(value).astype(np.uint64, copy=True)
    with np.errstate(over="ignore"):
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def combine(*keys: Any) -> U64:
    """Hash of several integer keys in order, broadcast against one another."""
    out: U64 = mix(keys[0])
    for key in keys[1:]:
        out = mix(out ^ mix(np.asarray(key)))
    return out


def uniform(*keys: Any) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) drawn by the keys alone."""
    return np.asarray((combine(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def spelled_once(values: pa.Array) -> pa.DictionaryArray:
    """Values as numbers of distinct ones."""
    return values if pa.types.is_dictionary(values.type) else values.dictionary_encode()


def hash_items(values: pa.Array | pa.ChunkedArray) -> U64:
    """Hash of each item id; it orders rows of one second and deals unknown items to buckets: [rows]."""
    return mix(hash_text(values))


def hash_text(values: pa.Array | pa.ChunkedArray) -> U64:
    """64-bit SipHash of a text column, null = 0; computed once a distinct value: [rows]."""
    encoded = spelled_once(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)
    words = encoded.dictionary.cast(pa.string()).to_numpy(zero_copy_only=False)
    table = np.append(pd.util.hash_array(words.astype(object), categorize=False), np.uint64(0))
    codes = encoded.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)
    return np.asarray(table[codes], np.uint64)


def value_keys(column: pa.ChunkedArray) -> U64:
    """Numbers to combine that are equal where values of a column, text, numbers or booleans, are: [rows]."""
    if pa.types.is_string(column.type):
        return hash_text(column)
    if pa.types.is_floating(column.type):
        return np.asarray(pc.fill_null(column, -1e300).to_numpy().view(np.uint64))
    whole = pc.fill_null(column.cast(pa.int64()), np.iinfo(np.int64).min)
    return np.asarray(whole.to_numpy().view(np.uint64))
