"""Folders on any pyarrow filesystem, atomic small files, fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hpgr.config.base import holds_key
from hpgr.errors import ArtifactError, StoreError

FORMAT = 19
"""Version of run folders and prepared logs; a folder of another version is refused, never guessed at."""
SPACE = "; check space and permissions"
"""What helps against most refusals to write."""
ASIDE = ".tmp"
"""End of the name that a file has on a disk until it is whole; a process that is killed then leaves one behind."""
PAUSES = (0.5, 2.0)
"""Seconds before a store that refused a read is asked again."""
T = TypeVar("T")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem and path of a local path or a URI such as s3://bucket/key.

    Raises:
        ArtifactError: the scheme is unknown, the store cannot be reached, or the URI holds a key to it.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    if holds_key(path):
        raise ArtifactError(f"{path.partition('://')[0]}://...: the address holds a key, which every record of the run "
                            "would repeat; leave it out and give it as the store's tools do (environment, profile or "
                            "role)")  # fmt: skip
    try:
        return pafs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"cannot open {path}: {error}; use a local path, s3:// or gs://") from None


def absolute(path: str) -> str:
    """The path from anywhere: workers do not share the driver's working directory."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


@contextmanager
def refusal(verb: str, path: str, remedy: str = "") -> Iterator[None]:
    """Turns what a disk or store refuses into a StoreError, or a plain ArtifactError if there is just no such file:
    cannot <verb> <path>, the reason, the remedy."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        kind = ArtifactError if isinstance(error, FileNotFoundError) else StoreError
        raise kind(f"cannot {verb} {path}: {error}{remedy}") from None


def asked_again(uri: str, read: Callable[[], T]) -> T:
    """What `read` gives, tried again after PAUSES where the address is a store's and it refuses.

    Its client does not do so where the refusal's words are longer than what was to be read, as of small files and
    headers: it takes them for a broken stream.
    """
    pauses = iter(PAUSES if "://" in uri else ())
    while True:
        try:
            return read()
        except OSError as error:
            pause = next(pauses, None)
            if pause is None or isinstance(error, FileNotFoundError):
                raise
            time.sleep(pause)


@dataclass(frozen=True)
class Folder:
    """A folder and its filesystem. Paths given to methods are relative to it."""

    uri: str

    @property
    def _where(self) -> tuple[pafs.FileSystem, str]:
        return resolve(self.uri)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def path(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        """Filesystem and full path of an entry."""
        filesystem, root = self._where
        return filesystem, f"{root}/{name}".rstrip("/")

    def sub(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def exists(self, name: str = "") -> bool:
        filesystem, path = self.path(name)
        with refusal("look for", path):
            return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)

    def entries(self, name: str = "") -> list[str]:
        """Names of files and folders directly inside, sorted; empty if there is no such folder."""
        return sorted(entry.base_name for entry in self._listed(name))

    def sizes(self, name: str = "") -> dict[str, int]:
        """Files directly inside and their bytes; empty if there is no such folder."""
        return {entry.base_name: entry.size for entry in self._listed(name) if entry.type == pafs.FileType.File}

    def times(self, name: str = "") -> dict[str, float]:
        """Files directly inside and when they were last written, in seconds of the store's clock."""
        return {e.base_name: e.mtime_ns / 1e9 for e in self._listed(name) if e.type == pafs.FileType.File}

    def _listed(self, name: str) -> list[pafs.FileInfo]:
        filesystem, path = self.path(name)
        with refusal("list", path):
            return list(filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)))

    def move(self, source: str, target: str) -> None:
        """Rename a file inside the folder (on an object store: copy, then delete). An existing target is replaced."""
        filesystem, path = self.path(target)
        with refusal(f"move {source} to", path, SPACE):
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            filesystem.move(self.path(source)[1], path)

    def reading(self, name: str, work: Callable[[pafs.FileSystem, str], T]) -> T:
        """What `work` reads of a file, given its filesystem and path; `asked_again` where a store refuses.

        Raises:
            ArtifactError: the file is missing or unreadable.
        """
        filesystem, path = self.path(name)
        with refusal("read", path):
            return asked_again(self.uri, lambda: work(filesystem, path))

    def read(self, name: str) -> bytes:
        """Whole file. Raises ArtifactError if it is missing or unreadable."""
        return self.reading(name, _read_whole)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: on a disk it is flushed, then renamed; on a store it is one upload."""
        filesystem, path = self.path(name)
        with refusal("write", path, SPACE):
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            if self.is_local:
                _write_local(path, content)
            else:
                with filesystem.open_output_stream(path) as file:
                    file.write(content)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise ArtifactError(f"{self.uri}/{name} is not JSON: {error}; it may be cut short") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode())

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.reading(
            name, lambda filesystem, path: pq.ParquetFile(path, filesystem=filesystem).read(columns=columns)
        )

    def write_parquet(self, name: str, table: pa.Table, **options: Any) -> None:
        """Options are pyarrow's, of which compression is zstd unless given."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **{"compression": "zstd"} | options)
        self.write(name, sink.getvalue())

    def delete(self, name: str = "") -> None:
        """Remove a folder and what is in it; nothing happens if there is none."""
        filesystem, path = self.path(name)
        if self.exists(name):
            with refusal("delete", path):
                filesystem.delete_dir(path)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        filesystem, path = self.path(name)
        with refusal("delete", path), suppress(FileNotFoundError):
            filesystem.delete_file(path)


def _read_whole(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_file(path) as file:
        return bytes(file.read())


def _write_local(path: str, content: bytes) -> None:
    aside = f"{path}.{uuid.uuid4().hex}{ASIDE}"
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses power could keep the name without the bytes
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            os.remove(aside)  # a full disk needs the room
        raise


def fingerprint(value: Any) -> str:
    """Short stable name of plain data: 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_format(found: Any, where: str) -> None:
    """Refuse a folder written by another version.

    Raises:
        ArtifactError: `found` is not this version's manifest.
    """
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{where} has format {version!r}, this version reads {FORMAT}; use another folder")
