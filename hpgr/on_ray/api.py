"""The jobs as functions, for notebooks and other programs: `hpgr.prepare` and `hpgr.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpgr.config import Config, dump, load_config, override, validate
from hpgr.errors import ConfigError
from hpgr.on_ray import command, pipeline

Settings = Config | Mapping[str, Any] | str | Path | None
"""A configuration, the same as plain data, a YAML file, or None for the generated log."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedLog:
    """A prepared log: its folder, addressed by content, and the account of its rows and users."""

    folder: str
    account: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, and what its metrics.json says."""

    run: str
    metrics: dict[str, Any]

    @property
    def report(self) -> str:
        """Where the run's report lies, one HTML file."""
        return f"{self.run.rstrip('/')}/report.html"


def configuration(settings: Settings = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration that settings and `a.b=c` overrides describe.

    Raises:
        ConfigError: every fault with its path.
    """
    if settings is None or isinstance(settings, str | Path):
        return load_config(settings or command.DEFAULT, overrides)
    raw = dump(settings if isinstance(settings, Config) else validate(dict(settings)))
    return validate(raw, [fault for text in overrides if (fault := override(raw, text))])


def prepare(settings: Settings = None, overrides: Sequence[str] = (), say: Say = command.say) -> PreparedLog:
    """Prepare a log as `jobs/prepare.py` does, on the Ray that is connected, that of RAY_ADDRESS or a local one.

    Raises:
        HpgrError: what was got, what was expected and what to do.
    """
    prepared = pipeline.prepare_only(configuration(settings, overrides), say)
    return PreparedLog(prepared.folder.uri, prepared.manifest["account"])


def train(
    settings: Settings = None,
    overrides: Sequence[str] = (),
    run: str | None = None,
    resume: bool = False,
    say: Say = command.say,
) -> Trained:
    """Train and test as `jobs/two_stage.py` does, on the Ray that `prepare` would use.

    Args:
        settings, overrides: see `configuration`.
        run: run folder, local or s3://, gs:// (default: runs/<name>-<time>).
        resume: go on with the run in `run`; without settings by its own, of which overrides may change the resources.
        say: gets the job's lines of progress.

    Raises:
        HpgrError: what was got, what was expected and what to do.
    """
    if resume and run is None:
        raise ConfigError("resume goes on with a run: give its folder as run")
    own = run if resume and settings is None else None
    config = pipeline.stored_config(own, overrides) if own else configuration(settings, overrides)
    folder = run or command.new_run(config.name)
    metrics, folder = pipeline.two_stage(pipeline.Request(folder, config, resume), say)
    return Trained(folder, metrics)
