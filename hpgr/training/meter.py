"""Counts of a stretch of training: how fast, how much of it waiting for data or padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpgr.model.inputs import Inputs
from hpgr.schema import Batch

COUNTS = 5


def counts_of(batch: Batch, inputs: Inputs) -> list[float]:
    """COUNTS numbers of a batch: rows, sessions, tokens (history events), these with the candidates, and the places
    that both are padded to."""
    rows = np.repeat(np.arange(len(batch)), batch.h_lengths)
    starts = (np.diff(rows) != 0) | (np.diff(batch.h_session) != 0)
    candidates = len(batch.t_item)
    filled, places = len(rows) + candidates, inputs.h_item.numel() + bool(candidates) * inputs.c_item.numel()
    return [len(batch), len(rows) and 1 + int(starts.sum()), len(rows), filled, places]


@dataclass
class Meter:
    """Sums over some steps. Counts and loss are of all workers, seconds this worker's."""

    rows: float = 0.0
    sessions: float = 0.0
    tokens: float = 0.0
    filled: float = 0.0
    places: float = 0.0
    loss: float = 0.0
    terms: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, loss: float, terms: float, counts: list[float]) -> None:
        """A step's summed loss over its terms, and its counts over all workers."""
        rows, sessions, tokens, filled, places = counts
        self.loss, self.terms = self.loss + loss, self.terms + terms
        self.rows, self.sessions = self.rows + rows, self.sessions + sessions
        self.tokens += tokens
        self.filled, self.places = self.filled + filled, self.places + places

    def time(self, seconds: float, waited: float) -> None:
        """A step's seconds, the wait for its batch among them."""
        self.seconds, self.waited = self.seconds + seconds, self.waited + waited

    def figures(self) -> dict[str, float]:
        """Figures of the steps; empty without a step."""
        if not self.places:
            return {}
        seconds = max(self.seconds, 1e-9)
        return {
            "loss": self.loss / max(1.0, self.terms),
            "rows_per_second": self.rows / seconds,
            "sessions_per_second": self.sessions / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "padding_share": 1 - self.filled / self.places,
        }
