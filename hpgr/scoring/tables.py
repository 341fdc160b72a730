"""A finished run in a notebook: a table of candidates in, a table of scores out, in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from hpgr.data.preparation import Prepared, in_process
from hpgr.errors import ConfigError
from hpgr.scoring import job, output
from hpgr.scoring.export import export_run
from hpgr.scoring.finished import open_finished
from hpgr.scoring.request import Request

Table = TypeVar("Table", pd.DataFrame, pa.Table)


def _silent(_: str) -> None:
    """A notebook wants the table, not the job's progress."""


@dataclass(frozen=True)
class _Some(Prepared):
    """A prepared log as if it held these users alone."""

    users: tuple[str, ...] = ()

    def timelines(self, bucket: int) -> pa.Table:
        table = super().timelines(bucket)
        return table.filter(pc.is_in(table.column("user"), value_set=pa.array(self.users, pa.string())))


class Scorer:
    """Scores of a finished run, for as many candidates as fit in memory; `jobs/batch_score.py` is for more.

    A call is a batch job in a temporary folder, so its scores are those of a batch job, and of evaluation.

    Args:
        run: run folder, local or s3://, gs://.
        prepared: folder of the run's prepared log, where it was moved.
        device: where the model runs, such as `cuda`.
        say: gets the job's lines of progress.

    Raises:
        ArtifactError: there is no finished run, or its prepared log is gone.
    """

    def __init__(
        self,
        run: str | Path,
        prepared: str | Path | None = None,
        device: str | torch.device = "cpu",
        say: Callable[[str], None] = _silent,
    ) -> None:
        self._run, self._prepared = str(run), None if prepared is None else str(prepared)
        self._device, self._say = torch.device(device), say
        finished = open_finished(self._run, self._prepared)
        self.id, self.config = finished.id, finished.config

    def score(self, candidates: Table, at: str | datetime | None = None, explain: bool = False) -> Table:
        """Probabilities of a click.

        Args:
            candidates: pairs, lists or one list for all users, with the column names of the run's log.
            at: moment of candidates without a time (default: one second after the log's last event).
            explain: with the past events behind each score, column `anchors`.

        Returns:
            columns user, item, (time, request columns,) score, rank and run, of the kind that was given. A user's
            rows are together, by request and rank, not in the order of `candidates`: join by user, item, time and
            request. Rows alike in these and in features are scored once; an empty list has no rows.

        Raises:
            DataError: the columns are not those of candidates, or a row cannot be used.
            HpgrError: `at` is no moment of the log, or the log's timelines are gone.
        """
        arrow = isinstance(candidates, pa.Table)
        with tempfile.TemporaryDirectory(prefix="hpgr-candidates-") as folder:
            path = f"{folder}/candidates.parquet"
            pq.write_table(candidates if arrow else pa.Table.from_pandas(candidates, preserve_index=False), path)
            scores = self._scored(self._shards, candidates=path, at=at, explain=explain)
        return scores if arrow else scores.to_pandas()

    def top_n(
        self, n: int, users: Sequence[str] | None = None, at: str | datetime | None = None, drop_seen: bool = False
    ) -> pd.DataFrame:
        """The n items of most probable clicks, of those that stage 1 retrieves, for users of the run's log.

        Args:
            n: items a user.
            users: ids; those that the log does not know are left out (default: all of the log).
            at: moment of the recommendation (default: one second after the log's last event).
            drop_seen: leave out items of the user's past.

        Returns:
            columns user, item, score, rank and run.

        Raises:
            HpgrError: the run has no stage 1, or the log's timelines are gone.
        """
        if n < 1:
            raise ConfigError(f"n: got {n}, expected 1 or more")
        some = None if users is None else tuple(str(user) for user in users)
        return self._scored(partial(self._shards, users=some), top_n=n, at=at, drop_seen=drop_seen).to_pandas()

    def export(self, path: str | Path) -> dict[str, Any]:
        """Write the ranker for `torch.export.load`, with a manifest of its inputs; see `hpgr.scoring.export`."""
        return export_run(open_finished(self._run, self._prepared), str(path))

    def _scored(self, score: job.Score, at: str | datetime | None, **wish: Any) -> pa.Table:
        """The scores of a batch job in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="hpgr-scores-") as folder:
            moment = None if at is None else str(at)
            asked = job.Wish(run=self._run, output=folder, prepared=self._prepared, at=moment, **wish)
            job.batch_score(asked, in_process, score, self._say, whole=True)  # a table is its owner's to correct
            return ds.dataset(folder).to_table()

    def _shards(
        self, request: Request, missing: list[int], _: output.Expected, users: tuple[str, ...] | None = None
    ) -> int:
        """Score and commit shards, for these users or all."""
        shards = job.open_shards(request, self._device)
        if users is not None:
            shards = replace(shards, users=_Some(shards.users.folder, shards.users.manifest, users))
        return sum(int(output.commit(request, shard, shards.run(shard))["account"]["pairs"]) for shard in missing)
