"""A last word for a job that dies without one: killed, or ended by Ray's core when the cluster is lost.

When raylet or GCS go, Ray ends the driver from C++ (`std::_Exit`, after a minute), past every Python handler. So a
second, tiny process holds the end of a pipe from the job. End of file without a byte means death, and it says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_WATCHER = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr, flush=True)"


@contextmanager
def last_word(line: str) -> Iterator[None]:
    """Have `line` written to stderr if this process ends inside the block; not if an exception leaves it.

    The watcher has a session of its own: Ctrl-C and signals to the job's process group pass it by. The job's own end
    of the pipe is closed on exec, so Ray's processes, which may live longer than the job, do not keep it open.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER, line],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            watcher.communicate(b".")
