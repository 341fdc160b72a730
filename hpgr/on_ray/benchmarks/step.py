"""Events a second of next-item training, against RecTools' and torch-rechub's HSTU of the same size on the same log.

All train the flat HSTU, left to right, whole epochs with their own data loading, in turns on the same threads; width,
heads, layers, dropout, history length and events a step are one configuration's. An event is one predicted item:
hpgr predicts every event of the training history, the peers those of a user's last `window`. Padding is not counted.

Losses differ as the libraries do, so hpgr trains in two ways. `hpgr` draws `stage1.negatives` items a step by
popularity (logQ corrected); RecTools draws as many for every event, uniformly. `hpgr_full_softmax` takes the softmax
over the whole catalogue, as torch-rechub does, which has no sampled loss. `ratios` are those of `hpgr`, by peer: each
library as it is meant for large catalogues. `ratios_like_for_like` hold each peer against the way of its kind of loss.

Without --log all train on views of the generated log, about as many a user and of as many items as ml-1m has.
RecTools needs numpy below 2, so peers want an environment of their own: `pip install '.[step-peers]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from hpgr.artifacts import Folder
from hpgr.config import Config, Synthetic, load_config
from hpgr.data.preparation import in_process, prepare
from hpgr.data.stream import LocalSource, build_index
from hpgr.data.synthetic import write_log
from hpgr.on_ray.benchmarks import machine, peers_of, spread
from hpgr.on_ray.session import ROOT
from hpgr.training.loop import fit
from hpgr.training.two_stage import Run, Worker, be_deterministic, item_stage, loop_context

Say = Callable[[str], None]
Epoch = Callable[[], tuple[int, float]]
"""Trains one epoch; its events and seconds."""
CONFIG = ROOT / "jobs/configs/ml-1m-next-item.yaml"
SIZE = ["stage1.epochs=1", "stage1.negatives=128", "model.layers=2", "evaluation.next_item_users=64"]
OWN = {"hpgr": "stage1.full_softmax_items=0", "hpgr_full_softmax": "stage1.full_softmax_items=1000000000"}
"""Our ways, with what makes the loss theirs."""
PEERS = {"rectools": ("rectools", "pytorch_lightning"), "rechub": ("torch_rechub",)}
"""Modules by name; the first is the package."""
LIKE = {"rectools": "hpgr", "rechub": "hpgr_full_softmax"}
"""Our way whose loss is of a peer's kind."""
AS_ML_1M = {"items": 3700, "sessions": 23, "impressions": 1}
"""Of the generated log: 161 views a user."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on, and how often."""
    parser.add_argument("--log", help="with the columns of jobs/configs/ml-1m-next-item.yaml (generated)")
    parser.add_argument("--users", type=int, default=1500, help="taken from it, the first by id (1500: some 6 minutes)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way; one more warms up (3)")
    parser.add_argument("--peers", default=",".join(PEERS),
                        help="which of rectools and rechub; one that is not installed is left out")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides of the configuration")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Train epochs of each way in turns; returns the figures.

    Raises:
        ConfigError: a peer is unknown.
    """
    peers, left_out = peers_of(options.peers, PEERS, "step-peers", say)
    rates: dict[str, list[float]] = {way: [] for way in (*OWN, *peers)}
    events = {}
    with tempfile.TemporaryDirectory(prefix="hpgr-benchmark-") as name:
        folder = Path(name)
        settings, log = small_log(options, folder)
        configs = {way: load_config(CONFIG, [*settings, loss]) for way, loss in OWN.items()}
        config = configs["hpgr"]
        epochs = {way: hpgr(own, folder, way, options.device) for way, own in configs.items()}
        epochs |= {name: {"rectools": rectools, "rechub": rechub}[name](config, log, options.device) for name in peers}
        for turn in range(options.rounds + 1):
            for way, epoch in epochs.items():
                events[way], seconds = epoch()
                if turn:
                    rates[way].append(events[way] / seconds)
                say(f"step: {way}: {events[way]:,} events in {seconds:.1f} s{'' if turn else ', to warm up'}")
    speeds = {way: spread(values) for way, values in rates.items()}
    return {
        "ratios": {f"over_{peer}": over(speeds, "hpgr", peer) for peer in peers},
        "ratios_like_for_like": {f"{LIKE[peer]}_over_{peer}": over(speeds, LIKE[peer], peer) for peer in peers},
        "events_per_second": speeds,
        "events": events,
        "losses": {way: text for way, text in losses(config.stage1.negatives).items() if way in speeds},
        "left_out": left_out,
        "settings": {"log": options.log or "generated", "users": options.users, "rounds": options.rounds,
                     "device": options.device, "width": config.model.width, "heads": config.model.heads,
                     "layers": config.model.layers, "window": config.stream.window,
                     "batch_tokens": config.stream.batch_tokens, "threads": torch.get_num_threads()},
        "machine": machine(*(PEERS[peer][0] for peer in peers)),
    }  # fmt: skip


def over(speeds: dict[str, dict[str, float]], way: str, baseline: str) -> float:
    """How many times the baseline's events a way trains in a second."""
    return speeds[way]["median"] / speeds[baseline]["median"]


def losses(negatives: int) -> dict[str, str]:
    """What each way trains by."""
    whole = "softmax over the catalogue"
    return {"hpgr": f"{negatives} negatives a step", "hpgr_full_softmax": whole,
            "rectools": f"{negatives} negatives an event", "rechub": whole}  # fmt: skip


def small_log(options: argparse.Namespace, folder: Path) -> tuple[list[str], pd.DataFrame]:
    """Overrides of the configuration by which it reads the first users' events, and those that all ways train on, in
    time order by user: without each user's last two, which hpgr's split leaves out of training."""
    settings = [*SIZE, *options.set, f"data.path={folder}/log.parquet", f"data.prepared={folder}/prepared"]
    names = load_config(CONFIG, settings).data.columns
    table = pq.read_table(options.log) if options.log else generated(options.users, folder)
    users = pc.unique(table.column(names.user)).sort()[: options.users]
    table = table.filter(pc.is_in(table.column(names.user), users))
    pq.write_table(table, folder / "log.parquet")
    log = table.select([names.user, names.item, names.time]).rename_columns(["user_id", "item_id", "time"]).to_pandas()
    log = log.sort_values(["user_id", "time"], kind="stable", ignore_index=True)
    from_end = log.groupby("user_id").cumcount(ascending=False)
    return settings, log[from_end >= 2]


def generated(users: int, folder: Path) -> pa.Table:
    """Views of the generated log, rated 1 to 5 in turn, which next-item training does not ask about."""
    files = write_log(Synthetic(users=users, **AS_ML_1M), str(folder / "generated"), fs.LocalFileSystem())
    table = pa.concat_tables(map(pq.read_table, files))
    table = table.filter(pc.equal(table.column("event"), "view")).select(["user_id", "item_id", "timestamp"])
    return table.append_column("rating", pa.array(1 + np.arange(table.num_rows) % 5))


def hpgr(config: Config, folder: Path, way: str, device: str) -> Epoch:
    """Stage 1 as a job trains it, without Ray: steps with their data, not validation."""
    prepared, index = prepare(config, in_process, _nothing), Folder(str(folder / "index"))
    for name in ("masked", "next_item-validation"):
        build_index(prepared, config, index, name, in_process)
    turns = count()

    def epoch() -> tuple[int, float]:
        """From new weights, in a folder of its own."""
        place = Run(config, Folder(str(folder / f"{way}-{next(turns)}")), prepared, index=index)
        silent = Worker(LocalSource(), torch.device(device), _nothing, _nothing, _nothing)
        be_deterministic(config.seed, silent.device)
        stage = item_stage(place, prepared.folder.read_parquet("vocabulary.parquet"))
        progress = fit(stage, loop_context(place, silent, place.folder, stage.name))
        torch.use_deterministic_algorithms(False)  # the peers do not
        return int(stage.stream.windows().tokens.sum()), progress.seconds

    return epoch


def rectools(config: Config, log: pd.DataFrame, device: str) -> Epoch:
    """RecTools' HSTUModel by its own trainer; the clock runs from the first batch asked for to the last step."""
    from pytorch_lightning import Callback, Trainer
    from rectools.dataset import Dataset
    from rectools.models import HSTUModel

    class Clock(Callback):  # type: ignore[misc]
        seconds = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    window, model = config.stream.window, config.model
    trainer = partial(Trainer, max_epochs=1, accelerator="gpu" if device == "cuda" else "cpu", devices=1, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      precision="bf16-mixed" if device == "cuda" else "32-true")  # fmt: skip
    peer = HSTUModel(
        n_blocks=model.layers, n_heads=model.heads, n_factors=model.width, dropout_rate=model.dropout,
        session_max_len=window, loss="sampled_softmax", n_negatives=config.stage1.negatives,
        lr=config.stage1.optimiser.lr, batch_size=rows_a_step(config, log),
        get_trainer_func=lambda: trainer(callbacks=[Clock()]),
    )  # fmt: skip
    frame = log.rename(columns={"time": "datetime"}).assign(datetime=pd.to_datetime(log["time"], unit="s"), weight=1.0)
    dataset = Dataset.construct(frame)
    events = int(np.minimum(log.groupby("user_id").size() - 1, window).sum())

    def epoch() -> tuple[int, float]:
        """One more epoch of the same model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer.fit_partial(dataset, min_epochs=1, max_epochs=1)
        return events, next(c for c in peer.fit_trainer.callbacks if isinstance(c, Clock)).seconds

    return epoch


def rechub(config: Config, log: pd.DataFrame, device: str) -> Epoch:
    """torch-rechub's HSTUModel by its SeqTrainer, on left-padded rows of a user's last events."""
    from torch_rechub.models.generative.hstu import HSTUModel
    from torch_rechub.trainers import SeqTrainer
    from torch_rechub.utils.data import SequenceDataGenerator

    window, model = config.stream.window, config.model
    codes, items = pd.factorize(log["item_id"])
    user = pd.factorize(log["user_id"])[0]
    place = log.groupby("user_id").cumcount(ascending=False).to_numpy()
    users, near = user[-1] + 1, place <= window
    token = np.zeros((users, window + 1), np.int64)
    token[user[near], window - place[near]] = codes[near] + 1
    moment = np.zeros((users, window + 1), np.int64)
    moment[user[near], window - place[near]] = log["time"].to_numpy()[near]
    ago = np.where(token > 0, moment[:, -1:] - moment, 0)[:, :-1]
    positions = np.tile(np.arange(window), (users, 1))
    data = SequenceDataGenerator(token[:, :-1], positions, token[:, -1], ago)
    (loader,) = data.generate_dataloader(batch_size=rows_a_step(config, log))
    torch.manual_seed(config.seed)
    head = model.width // model.heads
    peer = HSTUModel(len(items) + 1, d_model=model.width, n_heads=model.heads, n_layers=model.layers, dqk=head, dv=head,
                     max_seq_len=window, dropout=model.dropout, time_bucket_unit="seconds")  # fmt: skip
    trainer = SeqTrainer(peer, torch.optim.AdamW, {"lr": config.stage1.optimiser.lr}, device=device)
    events = int((token[:, :-1] > 0).sum())

    def epoch() -> tuple[int, float]:
        """One more epoch of the same model."""
        start = time.perf_counter()
        with (
            contextlib.redirect_stderr(io.StringIO()),
            torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
        ):
            trainer.train_one_epoch(loader)
        return events, time.perf_counter() - start

    return epoch


def rows_a_step(config: Config, log: pd.DataFrame) -> int:
    """Users a step of the peers, so that a step has about as many events as one of hpgr's."""
    each = np.minimum(log.groupby("user_id").size(), config.stream.window).mean()
    return max(1, round(config.stream.batch_tokens / each))


def _nothing(*_: Any) -> None:
    pass
