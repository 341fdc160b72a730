"""What all jobs share: arguments, messages, exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from hpgr.config import Config, load_config, to_yaml
from hpgr.errors import HpgrError
from hpgr.on_ray.watch import last_word

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
DEFAULT = CONFIGS / "synthetic.yaml"
_START = time.monotonic()


def parser(description: str, config: str = "YAML file (default: the generated log)") -> argparse.ArgumentParser:
    """Arguments of every job that takes a configuration; `config` says what its file is."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--config", metavar="FILE", help=config)
    out.add_argument(
        "--set",
        metavar="A.B=C",
        action="append",
        default=[],
        dest="overrides",
        help="override one key; repeatable",
    )
    out.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    return out


def configuration(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments describe."""
    return load_config(arguments.config or DEFAULT, arguments.overrides)


def new_run(name: str) -> str:
    """Folder of a run that was given none: runs/<name>-<time>."""
    return f"runs/{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def say(line: str) -> None:
    """One line of progress with the seconds since the job began."""
    print(f"[{time.monotonic() - _START:6.1f}s] {line}", flush=True)


def print_config(config: Config) -> None:
    sys.stdout.write(to_yaml(config))


@contextmanager
def resumable(argv: Sequence[str], run: str | None = None) -> Iterator[None]:
    """Work that the same command goes on with; with --resume and the folder `run`, if that is given.

    However it ends before its end, it says so and names the command: exceptions carry it as a note, and a process
    that is killed has its last word said for it.
    """
    words = ["python", sys.argv[0], *argv]
    if run is not None:
        given = {word.partition("=")[0] for word in argv}  # --run DIR, and --run=DIR
        words += [] if "--run" in given else ["--run", run]
        words += [] if "--resume" in given else ["--resume"]
    on = f"to go on: {shlex.join(words)}"
    submitted = " (submitted as before)" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else ""
    with last_word(f"error: the job has died: it was killed, or lost its Ray (raylet or GCS gone); {on}{submitted}"):
        try:
            yield
        except BaseException as error:
            if not isinstance(error, HpgrError) or error.goes_on:
                error.add_note(on + submitted)
            raise


def main(job: Callable[[Sequence[str]], None]) -> None:
    """Run a job: 0 on success, 2 with the message alone for an error a user can act on, 130 when interrupted."""
    if not os.environ.get("HPGR_WARNINGS"):
        warnings.simplefilter("ignore")
    try:
        job(sys.argv[1:])
    except HpgrError as error:
        _end(f"error: {error}", error, 2)
    except KeyboardInterrupt as error:
        _end("interrupted", error, 130)


def _end(line: str, error: BaseException, code: int) -> NoReturn:
    print("\n".join([line, *getattr(error, "__notes__", ())]), file=sys.stderr, flush=True)
    sys.exit(code)
