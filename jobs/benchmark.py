#!/usr/bin/env python
"""Measure speed and memory, each way against its baseline in the same run; ratios come first.

python jobs/benchmark.py attention                                 # 5 minutes on 2 cores, 9 GB for dense at 8192
python jobs/benchmark.py attention --device cuda                   # 2 minutes on one GPU of 80 GB
python jobs/benchmark.py prepare                                   # 10 million rows; pip install -e '.[peers]' first
python jobs/benchmark.py step                                      # pip install '.[step-peers]' elsewhere first
python jobs/benchmark.py step-models                               # minutes on 2 cores
python jobs/benchmark.py stream                                    # minutes on 2 cores
python jobs/benchmark.py search-overhead                           # minutes on 2 cores
python jobs/benchmark.py score                                     # a million pairs: minutes on 2 cores
python jobs/benchmark.py score --users 500 --rounds 2 --json score.json

Each one's --help says what it compares and how.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpgr.on_ray import command

BENCHMARKS = {
    "attention": "PGSA over kept keys against dense HSTU attention, forward and backward, by history length",
    "prepare": "preparing a log against DuckDB and Polars that sort and sessionise the same files",
    "step": "next-item training against RecTools' and torch-rechub's HSTU, events a second",
    "step-models": "training steps of hpgr's two stages against HSTU and MTGR, events a second",
    "stream": "batches for the trainers against what training takes, and against no Ray",
    "search-overhead": "trials that train in their own process against trials that train by Ray Train",
    "score": "cached batch scoring against encoding the history anew for each candidate",
}
"""Modules of hpgr.on_ray.benchmarks, with what they compare."""


def job(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name, text in BENCHMARKS.items():
        raw = argparse.RawDescriptionHelpFormatter
        one = names.add_parser(name, help=text, description=_module(name).__doc__, formatter_class=raw)
        one.add_argument("--json", metavar="FILE", help="write the figures here")
        _module(name).arguments(one)
    arguments = parser.parse_args(argv)
    figures = _module(arguments.name).run(arguments, command.say)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print("\n".join(["", *lines(figures)]), flush=True)


def _module(name: str) -> Any:
    return import_module(f"hpgr.on_ray.benchmarks.{name.replace('-', '_')}")


def lines(figures: dict[str, Any], before: str = "") -> list[str]:
    """The figures as a small table, ratios first: a line for what belongs together. Settings are in the JSON alone."""
    out = []
    for key, value in figures.items():
        name, inner = before + key, value.values() if isinstance(value, dict) else ()
        if any(isinstance(v, dict) for v in inner) and key != "settings":
            out += lines(value, f"{name}.")
        elif isinstance(value, dict) and value.keys() == {"median", "least", "greatest"}:
            median, least, greatest = (_shown(value[k]) for k in ("median", "least", "greatest"))
            out.append(f"{name:<40}{median} ({least} to {greatest})")
        elif key != "settings" and value != {}:
            values = [f"{k} {_shown(v)}" for k, v in value.items()] if isinstance(value, dict) else [_shown(value)]
            out.append(f"{name:<40}{', '.join(values)}")
    return out


def _shown(value: Any) -> str:
    return (f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    command.main(job)
