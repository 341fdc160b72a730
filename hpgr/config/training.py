"""Settings of training, evaluation and resources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hpgr.config.base import Count, Natural, Positive, Section, Share, holds_key

Auto = Literal["auto"]


class Optimiser(Section):
    lr: Positive = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Decoupled weight decay."""
    warmup_steps: Natural = 50
    """Steps of linear warm-up."""
    final_lr_share: Share = 0.1
    """Cosine decay ends at this share of lr."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient; longer ones are scaled to it."""


class ItemOptimiser(Optimiser):
    lr: Positive = 3e-3
    """Peak learning rate of AdamW; vectors from nothing need a larger one than stage 2's, which start from them."""


class Stage1(Section):
    enabled: bool = True
    """False trains stage 2 from random vectors."""
    objective: Literal["masked_item", "next_item"] = "masked_item"
    """masked_item: HPGR's session-based masked item modelling. next_item: a flat, dense HSTU that predicts each event
    from those before it, the field's standard retrieval model."""
    epochs: Count | Auto = "auto"
    """Most epochs. auto: 20, or of a small log as many as make 2,000 steps, with at most 20 validations; masked item
    modelling needs many steps before vectors tell what goes with what (as BERT4Rec does, arXiv 2207.07483). Where
    histories hold all that a site showed, clicked or not and without ratings, it is 20: more would learn its lists."""
    patience: Count | None = None
    """Validations without a better NDCG@10 before the stage stops; null trains all epochs, and takes the best. A stage
    that stops by a few hundred users' figures often does so in its first epochs, before vectors have learnt."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a session's events to hide."""
    action_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of predicting, of each hidden event, what was done with its item beside which item it was; 0, or a log
    of fewer than two actions, leaves it out. The objective masked_item alone. Ratings bear 1 and gain by it; where
    actions say little of taste, such as views and clicks, a large weight keeps items from being learnt at all."""
    causal_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of rows encoded left to right, the form stage 2 uses; the rest see both sides."""
    full_softmax_items: Natural = 20_000
    """Catalogues up to this size use the full softmax, larger ones the logQ-corrected sampled one."""
    negatives: Count = 2048
    """Items drawn a step for the sampled softmax."""
    optimiser: ItemOptimiser = ItemOptimiser()


class Stage2(Section):
    enabled: bool = True
    """False trains stage 1 alone: a retrieval model."""
    shrinkage: Annotated[float, Field(ge=0)] = 20.0
    """Inherited item vectors shrink to their mean, which counts as this many events beside each item's own, and rare
    items are less relevant; 0 takes vectors as they are. Those of rare items would tell which training impressions were
    clicked."""
    item_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of inherited item vectors, as a share of the stage's: clicks tell less of most items than stage 1
    knows; 0 leaves them as they are. Without stage 1 there are none."""
    new_item_lr_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The same of item vectors that begin at random: without stage 1, and those of `model.asvd`. Less than 1 keeps a
    model from learning the training clicks of rare items by heart."""
    action_weight: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Weight of predicting, of each impression that is itself in the history, what was done with its item beside
    whether it was clicked, such as the rating. On a log whose training impressions of one label are all of one action
    it is whether it was clicked, of all of them, asked a second time, unless histories hold what was not clicked. auto:
    1 for ratings, .3 for clicks asked again. 0 leaves it out. hpgr alone, unless `action_baselines`."""
    action_baselines: bool = False
    """Ask hstu, mtgr and din too, to see how much of HPGR's distance to them it is."""
    action_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a click's logit that this second answer may have, such as the log-odds of four stars or more: two
    answers to one question err less than one. Each validation takes it or leaves it, whichever has the better AUC.
    0 goes without, and so does a log of ratings whose histories do not hold what was not clicked."""
    epochs: Count = 10
    """Most epochs."""
    patience: Count = 3
    """Validations without a better AUC before the stage stops."""
    validate_every_steps: Natural = 0
    """0 validates at the end of each epoch."""
    optimiser: Optimiser = Optimiser()


class Evaluation(Section):
    batch_tokens: Count = 16384
    """Token budget of a batch in evaluation."""
    filter_seen: bool = False
    """Leave items of the user's history out of the next-item ranking."""
    next_item_users: Count = 20_000
    """Most users ranked over the whole catalogue in validation and test (first by user hash)."""


class Scoring(Section):
    """Workers of a batch job, a CPU each."""

    min: Count = 1
    """Workers that the job waits for before it starts."""
    max: Count | Auto = "auto"
    """auto: as many as the cluster has, or its autoscaler may start."""

    @model_validator(mode="after")
    def _ordered(self) -> Scoring:
        if self.max != "auto" and self.max < self.min:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(Section):
    """What a run takes of the cluster. The number of workers changes no result beyond rounding: they add up in another
    order. A GPU trains in bf16 and draws other dropout, so its figures differ as another seed's do. `auto` is settled
    when Ray is there, see hpgr.sizing."""

    workers: Natural | Auto = 1
    """Ray Train workers; 0 trains inside the driver, on CPUs. auto: one a GPU, without GPUs one a node; a trial or a
    cell has one."""
    gpu: bool | Auto = False
    """One GPU a worker, nccl and bf16 autocast (float32 on GPUs before Ampere, which only emulate it). auto: where the
    cluster has some."""
    cpus_per_worker: Positive | Auto | None = None
    """auto or null shares the cluster's CPUs, less some for data; a trial or a cell takes one."""
    data_workers: Count = 2
    """Data tasks at work at once for each worker."""
    data_cpus: Positive = 0.25
    """CPUs a data task reserves."""
    scoring: Scoring = Scoring()
    """Pool of jobs/batch_score.py."""
    recompute: bool = False
    """Let attention's maps go and make them again for gradients, for long histories that do not fit in memory
    otherwise. Training takes longer."""
    compile: bool = False
    """Train with attention over whole maps compiled (torch.compile), which takes up to a minute when a stage begins.
    Needs a C++ compiler on a CPU, triton and a C compiler on a GPU. There is nothing to compile in stage 1 of masked
    items, over kept keys (impl gather, triton), in din and logistic."""
    wait_minutes: Annotated[float, Field(ge=0)] = 30
    """How long to wait for what the cluster may give but has not free, before giving up."""
    max_failures: Natural = 2
    """Worker-group restarts, each from the last checkpoint."""

    @model_validator(mode="after")
    def _has_a_worker_for_its_gpu(self) -> Resources:
        if self.workers == 0 and self.gpu is True:
            raise ValueError("gpu true needs a worker, for the driver trains on CPUs: got workers 0, set workers to 1")
        return self

    @property
    def count(self) -> int:
        """Workers, once settled."""
        assert self.workers != "auto", "resources are not settled"
        return self.workers

    @property
    def on_gpu(self) -> bool:
        """Whether workers have a GPU, once settled."""
        assert self.gpu != "auto", "resources are not settled"
        return self.gpu


class Checkpoints(Section):
    every_steps: Natural = 0
    """0 writes at each validation only."""
    keep: Count = 2
    """Newest checkpoints to keep of each stage."""


class Tracking(Section):
    mlflow: str | None = None
    """Address of an MLflow tracking server or database (http://, https://, sqlite:///) at which finished runs, searches
    and comparisons are recorded; needs the extra `mlflow`. Keys to it come from MLflow's own environment variables."""

    @field_validator("mlflow")
    @classmethod
    def _holds_no_key(cls, value: str | None) -> str | None:
        if value is not None and holds_key(value):
            raise ValueError(
                "the address holds a key, which every record of the run would repeat; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return value
