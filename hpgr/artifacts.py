"""Folders on any pyarrow filesystem, atomic small files, fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hpgr.errors import ArtifactError

FORMAT = 1
"""Version of run folders and prepared logs; a folder of another version is refused, never guessed at."""


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem and path of a local path or a URI such as s3://bucket/key.

    Raises:
        ArtifactError: the scheme is unknown or the store cannot be reached.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    try:
        return pafs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"cannot open {path}: {error}; use a local path, s3:// or gs://") from None


def absolute(path: str) -> str:
    """The path from anywhere: workers do not share the driver's working directory."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


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
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)

    def entries(self, name: str = "") -> list[str]:
        """Names of files and folders directly inside, sorted; empty if there is no such folder."""
        filesystem, path = self.path(name)
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(entry.base_name for entry in found)

    def sizes(self, name: str = "") -> dict[str, int]:
        """Files directly inside and their bytes; empty if there is no such folder."""
        filesystem, path = self.path(name)
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {entry.base_name: entry.size for entry in found if entry.type == pafs.FileType.File}

    def move(self, source: str, target: str) -> None:
        """Rename a file inside the folder (on an object store: copy, then delete). An existing target is replaced."""
        filesystem, path = self.path(target)
        try:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            filesystem.move(self.path(source)[1], path)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"cannot move {source} to {path}: {error}; check space and permissions") from None

    def read(self, name: str) -> bytes:
        """Whole file. Raises ArtifactError if it is missing or unreadable."""
        filesystem, path = self.path(name)
        try:
            with filesystem.open_input_file(path) as file:
                return bytes(file.read())
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"cannot read {path}: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all (rename on disk, one upload on an object store)."""
        filesystem, path = self.path(name)
        try:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            target = f"{path}.{uuid.uuid4().hex}.tmp" if self.is_local else path
            with filesystem.open_output_stream(target) as file:
                file.write(content)
            if target != path:
                filesystem.move(target, path)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"cannot write {path}: {error}; check space and permissions") from None

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise ArtifactError(f"{self.uri}/{name} is not JSON: {error}; it may be cut short") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode())

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        filesystem, path = self.path(name)
        try:
            return pq.ParquetFile(path, filesystem=filesystem).read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"cannot read {path}: {error}") from None

    def write_parquet(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue())

    def delete(self, name: str = "") -> None:
        """Remove a folder and what is in it; nothing happens if there is none."""
        filesystem, path = self.path(name)
        if self.exists(name):
            filesystem.delete_dir(path)


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
