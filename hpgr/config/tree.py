"""The whole tree: sections, and what must agree between them."""

from __future__ import annotations

from pydantic import model_validator

from hpgr.config.base import Natural, Section
from hpgr.config.data import Data, Stream
from hpgr.config.model import Model
from hpgr.config.training import Checkpoints, Evaluation, Resources, Stage1, Stage2, Tracking


class Config(Section):
    name: str = "run"
    """Begins the name of a run folder that was given none."""
    seed: Natural = 0
    """Of weights, batches, masks and dropout; not of the generated log."""
    data: Data = Data()
    stream: Stream = Stream()
    model: Model = Model()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.stream.batch_tokens < self.stream.window:
            raise ValueError(
                f"stream.batch_tokens {self.stream.batch_tokens} is less than stream.window {self.stream.window}: "
                "a full window would not fit in a batch"
            )
        if not (self.stage1.enabled or self.stage2.enabled):
            raise ValueError("stage1.enabled and stage2.enabled are both false: nothing to train")
        if not self.stage1.enabled and self.model.by_vectors and self.model.pgsa.anchors == "frozen":
            raise ValueError(
                "model.pgsa.anchors frozen needs stage1.enabled: without it anchors would be chosen by random vectors; "
                "use model.pgsa.anchors=live, or model.pgsa.enabled=false with model.pgsa.summaries=0"
            )
        return self
