"""What every worker does: stage 1, stage 2, test once. Finished stages are taken from the run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hpgr.artifacts import Folder, fingerprint
from hpgr.config import Config, dump
from hpgr.data.batches import mock_batch
from hpgr.data.click_tables import PRIOR, rate_users
from hpgr.data.preparation import Prepared
from hpgr.data.stream import Source, StreamSpec
from hpgr.errors import ArtifactError, DeviceMemoryError, TrainingError
from hpgr.evaluation import click_scores, score, scoring_cost
from hpgr.metrics import auc
from hpgr.model.attention import check_compiler
from hpgr.model.base import ClickModel
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import round_up
from hpgr.model.relation import check_triton, lacking
from hpgr.schema import FEATURE_PREFIX
from hpgr.training import checkpoint, distributed
from hpgr.training.loop import Context, Progress, fit
from hpgr.training.stage import Stage
from hpgr.training.stages import ClickStage, ItemStage

INDEXES = (
    "masked",
    "next_item-validation",
    "next_item-test",
    "click-train",
    "click-validation",
    "click-test",
)

ONLY_STAGE2 = ("name", "match_features", "pgsa", "asvd", "lists", "mtgr", "din")
"""Settings of the model that stage 1 does not have."""
OF_OBJECTIVE = {"masked_item": ("sem",), "next_item": ("layers", "silu_on", "hstu_form")}
"""Settings of the model that stage 1 has under one objective alone."""
OF_MASKING = ("mask_ratio", "causal_share", "action_weight")
"""Settings of stage 1 that the objective next_item does not have."""
_DONE, _FAILED = "done.json", "failed.json"
"""How a stage ended, in its folder: its figures, or of a shared stage 1 the numerical error that ended it."""
COST_STEPS = 4
"""Validation batches on which the cost of scoring is measured."""


@dataclass(frozen=True)
class Run:
    """A run: its configuration, folder and prepared log.

    Trials of a search share what they agree on: `stage1` and `index` name folders outside their own.
    """

    config: Config
    folder: Folder
    prepared: Prepared
    stage1: Folder | None = None
    index: Folder | None = None

    def stage_folder(self, stage: str) -> Folder:
        return self.stage1 if stage == "stage1" and self.stage1 else self.folder.sub(stage)

    @property
    def index_folder(self) -> Folder:
        return self.index or self.folder.sub("index")

    def spec(self, name: str) -> StreamSpec:
        """Stream of an index (one of INDEXES)."""
        config, training = self.config, name in ("masked", "click-train")
        kind = name.partition("-")[0]
        spec = StreamSpec(
            prepared=self.prepared.folder.uri,
            index=f"{self.index_folder.uri}/{name}.parquet",
            kind=kind,  # type: ignore[arg-type]
            gap_minutes=config.stream.session_gap_minutes,
            batch_tokens=config.stream.batch_tokens if training else config.evaluation.batch_tokens,
            group_tokens=config.stream.group_tokens,
            seed=config.seed,
        )
        if name == "masked" and config.stage1.objective == "masked_item":
            return replace(spec, mask_ratio=config.stage1.mask_ratio, causal_share=config.stage1.causal_share)
        return spec

    def sizes(self) -> Sizes:
        """What models must know of the prepared log."""
        manifest = self.prepared.manifest
        vocabulary, features = manifest["vocabulary"], manifest["features"]
        train = manifest["account"]["splits"]["train"]
        counted = dict(vocabulary["categories"])
        actions = counted.pop("action")  # a feature may be called that, too
        return Sizes(
            items=vocabulary["size"],
            first_item=vocabulary["size"] - vocabulary["items"],
            actions=actions,
            categories={k.removeprefix(FEATURE_PREFIX): n for k, n in counted.items()},
            h_cat=tuple(features["h_cat"]),
            h_num=tuple(features["h_num"]),
            t_cat=tuple(features["t_cat"]),
            t_num=tuple(features["t_num"]),
            base_rate=train["positives"] / train["impressions"],
            train_actions=tuple(map(tuple, manifest["train_actions"])),
            item_prior=math.inf if manifest["item_prior"] is None else manifest["item_prior"],
        )


@dataclass(frozen=True)
class Worker:
    """Where a worker runs and whom it tells. See `Context` for the callables."""

    source: Source
    device: torch.device
    say: Callable[[str], None]
    report: Callable[[dict[str, Any]], None]
    log: Callable[[str, dict[str, float], int], None]


def train(run: Run, worker: Worker, test: bool = True) -> dict[str, Any]:
    """Both stages and the test; returns the run's figures, the same on every worker.

    Without `test` the test split stays unread; a later call with it finds the stages finished and only tests.
    """
    be_deterministic(run.config.seed, worker.device)
    worker = replace(worker, say=worker.say if distributed.rank() == 0 else lambda _: None)
    items = run.prepared.folder.read_parquet("vocabulary.parquet")
    if run.config.stage2.enabled and run.config.model.sparse:
        tell_of_triton(run.config.model.pgsa.impl, worker)  # before stage 1 takes its time
    if run.config.resources.compile:
        check_compiler(worker.device)
    out: dict[str, Any] = {"curves": [], "seconds": {}}
    stage1: ItemStage | None = None
    if run.config.stage1.enabled:
        stage1 = item_stage(run, items)
        tested = partial(_test_items, run, worker, stage1) if test else None
        out["stage1"] = _finish(run, worker, stage1, out, tested)
    if run.config.stage2.enabled:
        out |= _clicks(run, worker, stage1, items, out, test)
    return out


def tell_of_triton(impl: str, worker: Worker) -> None:
    """Refuse what cannot be, and tell what `auto` goes without."""
    if impl == "triton":
        check_triton(worker.device)
    missing = lacking(worker.device) if worker.device.type == "cuda" and impl == "auto" else ""
    if missing:
        worker.say(f"stage2: no {missing}, so model.pgsa.impl auto attends on whole maps here, whose memory grows "
                   "with the square of histories; pip install -e '.[triton]' and a C compiler would help")  # fmt: skip


def be_deterministic(seed: int, device: torch.device) -> None:
    """From here on the same seed gives the same bits in this process, on a CPU."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _clicks(
    run: Run, worker: Worker, stage1: ItemStage | None, items: pa.Table, out: dict[str, Any], test: bool
) -> dict[str, Any]:
    """Figures of stage 2 and, with a test, of the simple scorers beside it; its curve and seconds go to `out`."""
    stage = ClickStage(run.config, run.sizes(), run.spec("click-train"), run.spec("click-validation"))
    stage.model.know_items(items)
    if stage1 is not None:
        weights = {k: v.cpu() for k, v in stage1.model.state_dict().items()}
        seen = torch.from_numpy(run.prepared.vocabulary().history)
        stage.inherit(weights, seen)
    tested = partial(_test_click, run, worker, stage.model, items) if test else None
    found = _finish(run, worker, stage, out, tested)
    found["cost"], out["seconds"]["scoring_a_million"] = _cost(run, worker, stage.model)
    return {"stage2": found} | ({"baselines": found["test"].pop("baselines_auc")} if test else {})


def item_stage(run: Run, items: pa.Table) -> ItemStage:
    """Stage 1 of a run, untrained; `items` is the prepared log's vocabulary."""
    counts = items.column("count").to_numpy().astype(np.float64)
    return ItemStage(run.config, run.sizes(), counts, run.spec("masked"), run.spec("next_item-validation"))


def _finish(
    run: Run, worker: Worker, stage: Stage, out: dict[str, Any], test: Callable[[], dict[str, Any]] | None
) -> dict[str, Any]:
    """A stage's figures: trained and tested now, or as its folder has them."""
    folder, first = run.stage_folder(stage.name), distributed.rank() == 0
    done = distributed.from_first(_known(folder, _DONE) if first else None)
    if done is None:
        start = time.monotonic()
        progress = _fit_once(run, worker, stage)
        done = _figures(progress) | {"settings": stage_key(run.config, run.prepared, stage.name)}
        done["seconds"] = progress.earlier + time.monotonic() - start
        if first:
            folder.write_json(_DONE, done)
    else:
        _check(done, run, stage.name)
        worker.say(f"{stage.name}: finished before, taking {folder.uri}/{done['best_file']}")
        stage.model.load_state_dict(checkpoint.from_bytes(checkpoint.best_weights(folder, done)))
        stage.model.to(worker.device)
    if test is not None and "test" not in done:
        done["test"] = test()
        if first:
            folder.write_json(_DONE, done)
    out["curves"] += done.pop("curve")
    out["seconds"] |= {stage.name: done.pop("seconds"), f"{stage.name}_waiting_for_data": done.pop("waited")}
    done.pop("settings")
    return done | {"parameters": sum(p.numel() for p in stage.model.parameters())}


def has_ended(folder: Folder) -> bool:
    """Whether nobody will train the stage of this folder any more: it is done, or it is shared and failed."""
    return folder.exists(_DONE) or folder.exists(_FAILED)


def clear(folder: Folder, keep_best: bool = True) -> None:
    """Delete what the folder of a stage that has ended holds for training alone; the best weights of one that is done
    stay if asked."""
    is_done = keep_best and folder.exists(_DONE)
    checkpoint.discard(folder, folder.read_json(_DONE)["best_file"] if is_done else "")


def _known(folder: Folder, name: str) -> dict[str, Any] | None:
    return folder.read_json(name) if folder.exists(name) else None


def _fit_once(run: Run, worker: Worker, stage: Stage) -> Progress:
    """Train a stage. A shared one that fails by numerics is not begun again: the same computation would only repeat it,
    for each run that shares it. A lack of memory is the GPU's, not the computation's.

    Raises:
        TrainingError: as `fit`, or what it raised when another run came here.
    """
    folder, first = run.stage_folder(stage.name), distributed.rank() == 0
    shared = folder == run.stage1
    failed = distributed.from_first(_known(folder, _FAILED) if first and shared else None)
    if failed is not None:
        raise TrainingError(failed["error"])
    try:
        return fit(stage, loop_context(run, worker, folder, stage.name))
    except TrainingError as error:
        if first and shared and not (error.goes_on or isinstance(error, DeviceMemoryError)):
            folder.write_json(_FAILED, {"error": str(error)})
        raise


def _check(done: dict[str, Any], run: Run, stage: str) -> None:
    if done["settings"] != stage_key(run.config, run.prepared, stage):
        raise ArtifactError(
            f"{run.stage_folder(stage).uri} was trained on other data or with other settings; use another --run folder"
        )


def stage_key(config: Config, prepared: Prepared, stage: str) -> str:
    """Fingerprint of the prepared log and of the settings that influence a stage: equal keys, equal weights."""
    settings = dump(config)
    names = ("seed", "stream", "model", "stage1", "evaluation", "stage2")
    chosen = {name: settings[name] for name in names}
    if stage == "stage1":
        del chosen["stage2"]
        chosen["stream"].pop("stride")
        objective = config.stage1.objective
        others = [name for kind, names in OF_OBJECTIVE.items() if kind != objective for name in names]
        for name in (*ONLY_STAGE2, *others):
            chosen["model"].pop(name)
        for name in ("in_stage2", "user_vector"):
            chosen["model"].get("sem", {}).pop(name, None)
        for name in OF_MASKING if objective == "next_item" else ():
            chosen["stage1"].pop(name)
    return fingerprint([prepared.manifest["fingerprint"], *chosen.values()])


def _figures(progress: Progress) -> dict[str, Any]:
    plain = asdict(progress)
    return {
        "validation": plain["best_figures"],
        **{name: plain[name] for name in ("best_file", "best_sum")},
        "steps": plain["global_step"],
        "seconds": plain["seconds"],
        "waited": plain["waited"],
        "curve": plain["curve"],
    }


def loop_context(run: Run, worker: Worker, folder: Folder, stage: str) -> Context:
    """What the training loop is told of a run, a worker, and a stage and its folder."""
    config, sizes = run.config, run.sizes()
    window, budget = config.stream.window, config.stream.batch_tokens
    widths = {
        "h_cat": len(sizes.h_cat),
        "h_num": len(sizes.h_num),
        "t_cat": len(sizes.t_cat),
        "t_num": len(sizes.t_num),
    }
    targets = window if stage == ClickStage.name else 0
    rows = -(-max(1, budget // (window + targets)) // distributed.world())
    return Context(
        folder=folder,
        source=worker.source,
        device=worker.device,
        seed=config.seed,
        checkpoints=config.checkpoints,
        recompute=config.resources.recompute,
        compile=config.resources.compile,
        row_places=round_up(window) * max(config.model.width, config.model.asvd.factors if targets else 0),
        mock=partial(mock_batch, rows, window, targets, widths, sizes.first_item, config.stage1.mask_ratio),
        say=worker.say,
        report=worker.report,
        log=worker.log,
    )


def _test_items(run: Run, worker: Worker, stage: ItemStage) -> dict[str, Any]:
    return stage.ranks(worker.source, run.spec("next_item-test"), worker.device)


def _test_click(run: Run, worker: Worker, model: ClickModel, items: pa.Table) -> dict[str, Any]:
    """Test figures; the first worker keeps every score, with what the report's plots need."""
    sizes = run.sizes()
    rates = sizes.item_rates(items, PRIOR)
    users = partial(rate_users, item_rates=rates, action_rates=sizes.action_rates(PRIOR))
    plain = users if sizes.misses_known else None
    own = score(model, worker.source.evaluation(run.spec("click-test")), worker.device, plain)
    scores = pa.concat_tables(distributed.gather(own))
    scores = scores.sort_by(
        [("user_hash", "ascending"), ("time", "ascending"), ("item", "ascending"), ("request", "ascending")]
    )
    item = scores.column("item").to_numpy()
    known = item >= sizes.first_item
    index = np.where(known, item - sizes.first_item, 0)
    popularity = np.where(known, items.column("count").to_numpy()[index], 0)
    names = pc.if_else(pa.array(known), items.column("value").combine_chunks().take(pa.array(index)), None)
    scores = scores.append_column("popularity", pa.array(popularity)).append_column("item_id", names)
    if distributed.rank() == 0:
        run.folder.sub("stage2").write_parquet("test_scores.parquet", scores)
    plainly = {"item popularity": popularity.astype(float), "item click rate": rates[item]}
    if sizes.misses_known:
        plainly["item and user click rates"] = scores.column("plain").to_numpy()
    label = scores.column("label").to_numpy()
    baselines = {name: auc(values, label) for name, values in plainly.items()}
    return click_scores(scores).compute() | {"baselines_auc": baselines}


def _cost(run: Run, worker: Worker, model: ClickModel) -> tuple[dict[str, float], float]:
    """Cost of scoring: history events a candidate attends to a layer, and seconds for a million candidates."""
    steps = list(islice(worker.source.evaluation(run.spec("click-validation")), COST_STEPS))
    parts = distributed.gather(scoring_cost(model, steps, worker.device))
    candidates, keys, seconds = (sum(part[i] for part in parts) for i in range(3))
    return {"keys": keys / max(candidates, 1)}, 1e6 * seconds / max(candidates, 1)
