"""Files that a pass of preparation leaves for the next: Arrow streams below `staging`, deleted when a log is prepared.

They are not flushed to the disk: a preparation that dies begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.ipc as ipc

from hpgr.artifacts import Folder
from hpgr.data.sources import Fragment
from hpgr.errors import StoreError

STAGING = "staging"


def raw_folder(bucket: int) -> str:
    """Where `scan` deals a bucket's rows."""
    return f"{STAGING}/raw/{bucket:05d}"


def raw_file(bucket: int, fragment: Fragment) -> str:
    """A fragment's rows of a bucket."""
    return f"{raw_folder(bucket)}/{fragment.index:06d}-{fragment.first:06d}.arrow"


def sorted_file(bucket: int) -> str:
    """A bucket's rows in their order."""
    return f"{STAGING}/sorted/{bucket:05d}.arrow"


def counts_file(bucket: int) -> str:
    """A bucket's values of training time."""
    return f"{STAGING}/counts/{bucket:05d}.arrow"


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Says what to do if the disk or store refuses."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; check space and permissions") from None


@contextmanager
def writer(folder: Folder, name: str, schema: pa.Schema) -> Iterator[ipc.RecordBatchStreamWriter]:
    """Writes tables of a schema, one after the other."""
    filesystem, path = folder.path(name)
    options = ipc.IpcWriteOptions(compression="lz4")
    with writing(path):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(path) as sink, ipc.new_stream(sink, schema, options=options) as stream:
            yield stream


def write(folder: Folder, name: str, table: pa.Table) -> None:
    """One whole table."""
    with writer(folder, name, table.schema) as stream:
        stream.write_table(table)


def read(folder: Folder, name: str) -> pa.Table:
    """The whole file at once: a store would be asked for each of its headers."""
    return ipc.open_stream(folder.read(name)).read_all()
