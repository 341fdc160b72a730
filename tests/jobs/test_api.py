"""The jobs as functions: what they take. That they run is for the notebook's test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpgr
from hpgr.config import dump, load_config
from hpgr.errors import ConfigError
from hpgr.on_ray import command
from hpgr.on_ray.api import Trained, configuration


def test_settings_come_in_four_forms(tmp_path: Path) -> None:
    default = load_config(command.DEFAULT, ["seed=5"])
    assert configuration(None, ["seed=5"]) == default
    assert configuration(command.DEFAULT, ["seed=5"]) == default
    assert configuration(str(command.DEFAULT), ["seed=5"]) == default
    assert configuration(dump(default)) == default
    assert configuration(load_config(command.DEFAULT), ["seed=5"]) == default
    assert configuration({"stage2": {"epochs": 2}}, ["model.width=8"]).model.width == 8


def test_faults_of_settings_and_overrides_are_told_together() -> None:
    with pytest.raises(ConfigError) as told:
        configuration({"seed": 1}, ["stage3.epochs=2", "model.width"])
    assert "stage3: unknown key" in str(told.value)
    assert "expected a.b=value" in str(told.value)


def test_a_run_that_goes_on_is_named() -> None:
    with pytest.raises(ConfigError, match="give its folder as run"):
        hpgr.train(resume=True)


def test_the_report_lies_in_the_run() -> None:
    assert Trained("s3://bucket/run", {}).report == "s3://bucket/run/report.html"


@pytest.mark.ray
def test_ray_may_be_imported_first(tmp_path: Path) -> None:
    """A notebook may: what Ray reads when it is imported cannot be set any more, and must not be."""
    code = "import ray; from hpgr.on_ray.session import session\nwith session(print): print('up', len(ray.nodes()))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "up 1" in done.stdout, done.stderr
