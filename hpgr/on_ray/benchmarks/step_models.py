"""Events a second of training steps: HPGR's two stages against the baselines, on the same windows of the same log.

The steps are those of the training loop (forward, loss, backward, clipping, optimiser) on batches made before, so
loading data is not counted, nor are validation and checkpoints; what these cost a job, `stream` tells. The ways take
turns, from new weights each time. An event is one of a batch's histories; padding and candidates are not counted.

Stage 1 is `hpgr` (masked items in sessions) against `hstu` (flat; it names every next item where hpgr names the masked
share, so its softmax is larger); MTGR is a click model and has no such stage. Stage 2 is hpgr in three ways, each
against `hstu` and `mtgr`: `hpgr_auto` as configured, `hpgr_gather` over at most 64 kept keys, and `hpgr_dense` without
sparse attention. In stage 2 hpgr begins from an untrained stage 1, so that it chooses among vectors that differ.
`ratios` are hpgr's events a second over a baseline's: below 1, hpgr costs more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from hpgr.artifacts import Folder
from hpgr.config import load_config
from hpgr.data.preparation import in_process, prepare
from hpgr.data.stream import LocalSource, Step, StreamSpec, build_index
from hpgr.on_ray.benchmarks import machine, spread
from hpgr.on_ray.command import DEFAULT
from hpgr.training.loop import fit
from hpgr.training.stage import Stage
from hpgr.training.stages import ClickStage
from hpgr.training.two_stage import Run, Worker, be_deterministic, item_stage, loop_context

Say = Callable[[str], None]
WAYS: dict[str, dict[str, list[str]]] = {
    "masked": {"hpgr": ["stage1.objective=masked_item"], "hstu": ["stage1.objective=next_item"]},
    "click-train": {
        "hpgr_auto": ["model.name=hpgr"],
        "hpgr_gather": ["model.name=hpgr", "model.pgsa.impl=gather", "model.pgsa.max_keys=64"],
        "hpgr_dense": ["model.name=hpgr", "model.pgsa.enabled=false"],
        "hstu": ["model.name=hstu"],
        "mtgr": ["model.name=mtgr"],
    },
}
"""By the windows they train on, those of stage 1 and of stage 2: ways, and what makes them."""
STAGES = {"masked": "stage1", "click-train": "stage2"}
"""What the figures call them."""
NO_BREAKS = ["stage2.validate_every_steps=0", "checkpoints.every_steps=0"]
"""Steps are not interrupted."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on, and how often."""
    parser.add_argument("--config", metavar="FILE", help="configuration with its log (default: a generated log)")
    parser.add_argument("--users", type=int, default=500, help="of the generated log (500)")
    parser.add_argument("--history", type=int, default=400, help="its events a user, and the model's window (400)")
    parser.add_argument("--steps", type=int, default=20, help="steps a turn, the first of an epoch (20)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way; one more warms up (5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides of the configuration")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Train the steps in each way, in turns; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="hpgr-benchmark-") as folder:
        settings = [*([] if options.config else generated(options)), *options.set, *NO_BREAKS,
                    f"data.prepared={folder}/prepared"]  # fmt: skip
        found = {stage: turns(name, settings, folder, options, say) for name, stage in STAGES.items()}
    speeds = {stage: {way: spread(values) for way, values in of.rates.items()} for stage, of in found.items()}
    config = load_config(options.config or DEFAULT, settings)
    return {
        "ratios": {stage: ratios(ways) for stage, ways in speeds.items()},
        "events_per_second": speeds,
        "milliseconds_a_step": {stage: {way: 1e3 * of.events / of.steps / speeds[stage][way]["median"]
                                        for way in of.rates} for stage, of in found.items()},
        "events_a_step": {stage: of.events / of.steps for stage, of in found.items()},
        "settings": {"config": options.config or "generated", "users": options.users, "rounds": options.rounds,
                     "steps": {stage: of.steps for stage, of in found.items()}, "device": options.device,
                     "width": config.model.width, "heads": config.model.heads, "layers": config.model.layers,
                     "window": config.stream.window, "batch_tokens": config.stream.batch_tokens,
                     "threads": torch.get_num_threads()},
        "machine": machine(),
    }  # fmt: skip


def generated(options: argparse.Namespace) -> list[str]:
    """Settings of a generated log whose histories fill the window: sessions of 7 events, a list of items in each."""
    sessions = -(-options.history // 6)
    return [f"data.synthetic.users={options.users}", f"data.synthetic.sessions={sessions}",
            f"data.synthetic.impressions={sessions}", f"stream.window={options.history}",
            f"stream.batch_tokens={max(4096, options.history)}"]  # fmt: skip


def ratios(speeds: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Events a second of each way of hpgr over those of a baseline, by baseline."""
    own = [way for way in speeds if way.startswith("hpgr")]
    return {f"over_{base}": {way: speeds[way]["median"] / speeds[base]["median"] for way in own}
            for base in speeds if base not in own}  # fmt: skip


class Made:
    """A source of the first steps of an epoch, made once. None is the epoch's last, so the loop does not validate."""

    def __init__(self, spec: StreamSpec, steps: int) -> None:
        first = islice(LocalSource().steps(spec, range(1), 0), steps)
        self.made = [step._replace(steps=step.steps + 1) for step in first]

    def steps(self, spec: StreamSpec, epochs: range, first_step: int) -> Iterator[Step]:
        """All of them."""
        yield from self.made

    def evaluation(self, spec: StreamSpec) -> Iterator[Step]:
        """Not asked for."""
        raise AssertionError(f"{spec.index} is not evaluated")


@dataclass
class Turns:
    """Events a second of each way in each turn, and the events and steps of a turn."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    events: int = 0
    steps: int = 0


def turns(windows: str, settings: list[str], folder: str, options: argparse.Namespace, say: Say) -> Turns:
    """Train the ways of a stage in turns; the first one warms up."""
    configs = {way: load_config(options.config or DEFAULT, [*settings, *own]) for way, own in WAYS[windows].items()}
    any_of = next(iter(configs.values()))
    prepared, index = prepare(any_of, in_process, _nothing), Folder(f"{folder}/index")
    build_index(prepared, any_of, index, windows, in_process)
    runs = {way: Run(config, Folder(f"{folder}/{way}"), prepared, index=index) for way, config in configs.items()}
    made = {way: Made(one.spec(windows), options.steps) for way, one in runs.items()}
    out = Turns({way: [] for way in runs}, sum(int(step.batch.h_lengths.sum()) for step in made["hstu"].made),
                len(made["hstu"].made))  # fmt: skip
    for turn in range(options.rounds + 1):
        for way, one in runs.items():
            seconds = trained(one, windows, made[way], torch.device(options.device))
            if turn:
                out.rates[way].append(out.events / seconds)
            say(f"step-models: {STAGES[windows]} {way}: {out.steps} steps in {seconds:.2f} s"
                f"{'' if turn else ', to warm up'}")  # fmt: skip
    return out


def trained(run: Run, windows: str, source: Made, device: torch.device) -> float:
    """Seconds that the steps take, from new weights."""
    be_deterministic(run.config.seed, device)
    stage = new_stage(run, windows)
    worker = Worker(source, device, _nothing, _nothing, _nothing)
    return fit(stage, loop_context(run, worker, run.folder, stage.name)).seconds


def new_stage(run: Run, windows: str) -> Stage:
    """A stage as a job begins it, hpgr's second one from an untrained first one."""
    items = run.prepared.folder.read_parquet("vocabulary.parquet")
    first = item_stage(run, items)
    if windows == "masked":
        return first
    stage = ClickStage(run.config, run.sizes(), run.spec(windows), run.spec("click-validation"))
    stage.model.know_items(items)
    if run.config.model.name == "hpgr":
        stage.inherit(first.model.state_dict(), torch.from_numpy(run.prepared.vocabulary().history))
    return stage


def _nothing(*_: Any) -> None:
    pass
