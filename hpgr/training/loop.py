"""The training loop: steps, validation, checkpoints, early stop, resume. Knows nothing of losses or data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpgr.artifacts import Folder
from hpgr.config import Checkpoints
from hpgr.data.hashing import combine
from hpgr.data.stream import Source, Step
from hpgr.errors import DataError, DeviceMemoryError, TrainingError
from hpgr.model.attention import train_attention
from hpgr.model.inputs import LANES, Inputs, pad
from hpgr.model.noise import Noise
from hpgr.schema import Batch
from hpgr.training import checkpoint, distributed
from hpgr.training.meter import Meter, counts_of
from hpgr.training.optimiser import clip, make_optimiser, make_schedule, make_tables_sparse
from hpgr.training.stage import Stage

TELL_EVERY_SECONDS = 10.0
"""How often figures go to those who watch."""
SAY_SHARE, SAY_AT_LEAST_EVERY = 0.2, 600.0
"""A line comes when the stage has grown by this share since the last one, so that a log of hours still reads well; and
after so many seconds in any case."""


@dataclass(frozen=True)
class Context:
    """Where and how a stage runs. `say` prints progress, `report` hands validation figures to Ray Train,
    `log` writes scalars (TensorBoard); `row_places` bounds tokens * width of a row, `mock` makes the
    heaviest batch, `recompute` and `compile` say how attention's maps are made (see `Resources`)."""

    folder: Folder
    source: Source
    device: torch.device
    seed: int
    checkpoints: Checkpoints
    recompute: bool
    compile: bool
    row_places: int
    mock: Callable[[], Batch]
    say: Callable[[str], None]
    report: Callable[[dict[str, Any]], None]
    log: Callable[[str, dict[str, float], int], None]

    @property
    def lanes(self) -> int:
        """What lengths of a batch are rounded up to: GPU kernels want even ones, a CPU takes any. Scores are made in
        `LANES`, for their bits' sake; a step's sums may differ in their last ones."""
        return LANES if self.device.type == "cuda" else 1

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 on a GPU that computes in it; nothing on a CPU, and on GPUs before Ampere, which only emulate it."""
        own = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", torch.bfloat16) if own else nullcontext()


@dataclass
class Progress:
    """Everything but tensors that a checkpoint must hold. `epoch` and `step` are the next to train."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: float | None = None
    best_file: str = ""
    best_sum: str = ""
    """Checksum of the best weights; the first worker alone knows it."""
    best_figures: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    seconds: float = 0.0
    """Of steps, in all sessions."""
    earlier: float = 0.0
    """Of steps, in the sessions before this one."""
    waited: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def fit(stage: Stage, context: Context) -> Progress:
    """Train a stage, or finish it from its last whole checkpoint; leaves the best weights in the model.

    Raises:
        TrainingError: the loss or its gradient is not finite (before the optimiser could spread it).
        DeviceMemoryError: a GPU has no room for the heaviest batch.
    """
    return _Loop(stage, context).run()


class _Loop:
    def __init__(self, stage: Stage, context: Context) -> None:
        self.stage, self.context = stage, context
        self.model = stage.model.to(context.device)
        train_attention(self.model, context.recompute, context.compile)
        make_tables_sparse(self.model, stage.by_rows, context.device)
        self.optimiser = make_optimiser(self.model, stage.optimiser, stage.lr_shares)
        self.steps = sum(len(group.batches) for group in stage.stream.plan(0))
        if not self.steps:
            raise DataError(f"{stage.name}: nothing to train on: no user has what it learns from before the training "
                            "cut-off; check data.history and data.split, or leave the stage out")  # fmt: skip
        self.epochs_between = max(1, math.ceil(stage.min_steps / (stage.epochs * self.steps)))  # validations
        self.epochs = stage.epochs * self.epochs_between
        self.schedule = make_schedule(self.optimiser, stage.optimiser, self.epochs * self.steps)
        self.progress = Progress()
        self.checkpoints = context.folder.sub("checkpoints")
        self._restore()
        self.parallel = distributed.wrap(self.model, context.device)
        self.meter, self.trained = Meter(), 0
        self.began = self.told = self.spoken = time.monotonic()

    def run(self) -> Progress:
        """Train what is left, then load the best weights."""
        p = self.progress
        if p.curve:  # it may have died before it was heard; who knows of this validation passes over it
            self._report()
        if p.epoch < self.epochs and p.stale < self.stage.patience:
            self._rehearse()
            self._train()
        if p.best_file:
            own = None if distributed.rank() else checkpoint.best_weights(self.context.folder, asdict(p))
            weights = distributed.from_first(own)
            assert weights is not None
            self.model.load_state_dict(checkpoint.from_bytes(weights))
        return p

    def _restore(self) -> None:
        say = self.context.say if distributed.rank() == 0 else lambda _: None
        found = None if distributed.rank() else checkpoint.latest(self.checkpoints, say, self._check_best)
        name = distributed.from_first(found)
        if name is not None:
            tensors, state = checkpoint.load(self.checkpoints, name, self.optimiser)
            self.model.load_state_dict(tensors)
            self.progress = Progress(**state)
            self.progress.earlier = self.progress.seconds
            self.schedule.last_epoch = self.progress.global_step
        if distributed.rank() == 0:
            checkpoint.drop_later(self.context.folder, name, self.progress.best_file)
        if name is None:
            return
        say(
            f"{self.stage.name}: continuing from {name}, epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
        )

    def _check_best(self, state: dict[str, Any]) -> None:
        if state["best_file"]:
            checkpoint.best_weights(self.context.folder, state)

    def _rehearse(self) -> None:
        """One forward and backward of the heaviest batch, so that a lack of memory shows now, and to all workers: each
        rehearses by itself, for one that has no room would leave the others waiting for its gradients."""
        lack = ""
        try:
            output = self._forward(self.model, self._padded(self.context.mock()), 0)
            (output.loss * 0).backward()
        except torch.OutOfMemoryError as error:
            lack = str(error).split("\n")[0]
        self.optimiser.zero_grad(set_to_none=True)
        lack = next(filter(None, distributed.gather(lack)), "")
        if lack:
            raise DeviceMemoryError(
                f"{self.stage.name}: {lack}: a step on the heaviest batch does not fit; set resources.recompute "
                "to true (a run may go on with it by --resume), or lower stream.batch_tokens or stream.window"
            )

    def _train(self) -> None:
        p, stage = self.progress, self.stage
        mark = self.began = self.told = self.spoken = time.monotonic()
        for step in self.context.source.steps(stage.stream, range(p.epoch, self.epochs), p.step):
            inputs = self._padded(step.batch)  # making tensors is waiting for data, too
            waited = time.monotonic() - mark
            self._step(step, inputs)
            last = step.step + 1 == step.steps
            p.epoch, p.step = (step.epoch + 1, 0) if last else (step.epoch, step.step + 1)
            took = time.monotonic() - mark
            p.waited, p.seconds = p.waited + waited, p.seconds + took
            self.meter.time(took, waited)
            self._milestone(last and p.epoch % self.epochs_between == 0)
            if p.stale >= stage.patience:
                self.context.say(f"{stage.name}: no better {stage.metric} for {p.stale} validations, stopping")
                break
            self._speak(step)
            mark = time.monotonic()

    def _milestone(self, due: bool) -> None:
        """Validate, where that is `due` or after so many steps, or else save where it is due."""
        done, every = self.progress.global_step, self.stage.validate_every
        save_every = self.context.checkpoints.every_steps
        if due or (every and done % every == 0):
            self._validate()
        elif save_every and done % save_every == 0:
            self._save()

    def _speak(self, step: Step) -> None:
        """Now and then figures for those who watch, and more seldom a line for those who read the log later."""
        now = time.monotonic()
        if now - self.told <= TELL_EVERY_SECONDS:
            return
        self.told, figures = now, self._take()
        if not figures:
            return
        self.context.log(self.stage.name, figures, self.progress.global_step)
        since = now - self.began
        if now - self.spoken <= min(SAY_SHARE * since, SAY_AT_LEAST_EVERY):
            return
        self.spoken = now
        left = since / self.trained * (self.epochs * self.steps - self.progress.global_step)
        self.context.say(
            f"{self.stage.name}: epoch {step.epoch + 1}/{self.epochs} step {step.step + 1}/{step.steps} "
            f"loss {figures['loss']:.4f} {figures['tokens_per_second']:,.0f} tokens/s "
            f"data wait {figures['data_wait_share']:.1%} at most {_duration(left)} to go"
        )

    def _take(self) -> dict[str, float]:
        """Figures since the last time."""
        figures, self.meter = self.meter.figures(), Meter()
        return figures

    def _padded(self, batch: Batch) -> Inputs:
        return pad(batch, self.context.device, self.context.lanes)

    def _forward(self, model: nn.Module, inputs: Inputs, step: int) -> Any:
        model.train()
        seed = int(combine(self.context.seed, _stage_number(self.stage.name), step)[()])
        noise = Noise(seed, inputs.key, self.context.row_places, self.context.device)
        with self.context.autocast():
            return model(inputs, noise, **self.stage.extras(step, self.context.device))

    def _step(self, step: Step, inputs: Inputs) -> None:
        p = self.progress
        output = self._forward(self.parallel, inputs, p.global_step)
        real = float(step.real)
        sums = torch.stack([output.loss.detach().double() * real, output.terms.double() * real]).cpu()
        counts = torch.tensor(counts_of(step.batch, inputs), dtype=torch.float64) * real
        sums = torch.cat([sums, counts]).to(self.context.device)
        total, count, *counted = distributed.sum_over_workers(sums).tolist()
        self._check("loss", total, step)
        # DDP averages over workers, so a sum divided once by the global count needs their number as factor.
        (output.loss * (real * distributed.world() / max(count, 1.0))).backward()
        norm = clip(self.model, self.stage.optimiser.clip_norm)
        self._check("gradient's norm", float(norm), step)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        p.global_step += 1
        self.trained += 1
        self.meter.add(total, count, counted)
        p.loss_sum, p.loss_count = p.loss_sum + total, p.loss_count + count

    def _check(self, name: str, value: float, step: Step) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.stage.name}: the {name} is {value} at epoch {step.epoch + 1}, step {step.step + 1} "
                f"(learning rate {self._rate():.2e}); the weights before this step are kept. "
                "Lower the stage's optimiser.lr, or raise optimiser.warmup_steps"
            )

    def _rate(self) -> float:
        """The stage's learning rate, of which some parameters may take a share."""
        return float(max(self.schedule.get_last_lr()))

    def _validate(self) -> None:
        p, stage = self.progress, self.stage
        pace = self._take()
        self.model.eval()
        with torch.no_grad():  # in float32, as tests and scoring
            figures = stage.validate(self.context.source, self.context.device)
        value = figures.get(stage.metric)
        better = value is not None and (p.best is None or value > p.best)
        unmeasured = not value and not p.best  # no user to ask about, or no hit so far: then the newest weights stay
        p.stale = 0 if better or unmeasured else p.stale + 1
        known = {k: v for k, v in figures.items() if v is not None}
        sums = {
            "train_loss": p.loss_sum / max(1.0, p.loss_count),
            "lr": self._rate(),
            "data_wait": p.waited / max(p.seconds, 1e-9),
        }
        p.curve.append({"stage": stage.name, "step": p.global_step, "epoch": p.epoch, **sums, "validation": figures})
        p.loss_sum = p.loss_count = 0.0
        if better or unmeasured:
            p.best, p.best_figures = value, figures
            self._keep_best()
        self._save()
        shown = " ".join(f"{k} {known[k]:.4f}" for k in stage.shown if k in known) or "has nothing to measure"
        self.context.say(
            f"{stage.name}: epoch {p.epoch} step {p.global_step} loss {sums['train_loss']:.4f} | "
            f"validation {shown}{' *' if better else ''}"
        )
        scalars = sums | pace | {f"validation/{k}": float(v) for k, v in known.items()}
        self.context.log(stage.name, scalars, p.global_step)
        self._report()

    def _report(self) -> None:
        """Tell whoever watches of the last validation."""
        p, last = self.progress, self.progress.curve[-1]
        known = {k: v for k, v in last["validation"].items() if v is not None}
        told = {name: last[name] for name in ("stage", "epoch", "step", "train_loss")}
        best = {f"best_{self.stage.metric}": p.best}  # schedulers calculate with what is there
        self.context.report(
            told | {"progress": last["step"] / self.steps} | known | (best if p.best is not None else {})
        )

    def _keep_best(self) -> None:
        """Write the best weights; those that a kept checkpoint may name stay."""
        p, folder = self.progress, self.context.folder
        p.best_file = f"best-{p.global_step:08d}.safetensors"
        if distributed.rank() == 0:
            content = checkpoint.to_bytes(self._tensors())
            p.best_sum = checkpoint.digest(content)
            folder.write(p.best_file, content)
            names = [name for name in folder.entries() if name.startswith("best-") and name <= p.best_file]
            for name in names[: -self.context.checkpoints.keep - 1]:
                folder.remove(name)

    def _save(self) -> None:
        p = self.progress
        if distributed.rank() == 0:
            checkpoint.save(self.checkpoints, p.global_step, self._tensors(), self.optimiser, asdict(p))
            checkpoint.prune(self.checkpoints, p.global_step, self.context.checkpoints.keep)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


def _duration(seconds: float) -> str:
    """The largest two units: 45 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _stage_number(name: str) -> int:
    return {"stage1": 1, "stage2": 2}[name]
