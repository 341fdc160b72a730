"""A job's lines as data, one JSON object each, in log.jsonl of its run folder: when, which run and trial, which stage.

{"time": "2026-11-25T17:30:00.123+00:00", "run": "first", "trial": "", "stage": "stage1", "text": "epoch 1/20 ..."}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hpgr.artifacts import SPACE, Folder, refusal
from hpgr.on_ray.metrics import ids_of

FILE = "log.jsonl"
Say = Callable[[str], None]


@contextmanager
def journal(folder: Folder, say: Say) -> Iterator[Say]:
    """A `say` that also writes down what it says. Lines of a resumed run follow those before.

    A store of objects can't be appended to: there the file is written when the block ends.
    """
    ids, kept = ids_of(folder), list[str]()

    def both(line: str) -> None:
        say(line)
        text = record(ids, line)
        if folder.is_local:
            _append(Path(folder.path()[1], FILE), text.encode())
        else:
            kept.append(text)

    if folder.is_local:
        Path(folder.path()[1]).mkdir(parents=True, exist_ok=True)
    try:
        yield both
    finally:
        if kept:
            before = folder.read(FILE) if folder.exists(FILE) else b""
            folder.write(FILE, before + "".join(kept).encode())


def _append(path: Path, content: bytes) -> None:
    """All of a line or nothing of it: what a full disk cut short would be glued to the next one."""
    with refusal("write", str(path), SPACE), path.open("ab", buffering=0) as file:
        end, left = file.tell(), memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def record(ids: dict[str, str], line: str) -> str:
    """A line of the file. What stands before the first colon is the stage, if it is one word."""
    stage, colon, text = line.partition(": ")
    if not colon or " " in stage:
        stage, text = "", line
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, **ids, "stage": stage, "text": text}, ensure_ascii=False) + "\n"
