"""What a comparison tells of its cells, and what is left of it when a study of finished rows fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import RayError

from hpgr.artifacts import Folder
from hpgr.data.preparation import Prepared
from hpgr.errors import ArtifactError, DataError
from hpgr.on_ray.cells import Cells, Done
from hpgr.on_ray.compare import Row, _Comparison
from hpgr.on_ray.pipeline import keep_log
from hpgr.search.matrix import Cell, Plan, parse_matrix, resolve

TOP_K, LR, SIGMA = "model.pgsa.top_k", "stage2.optimiser.lr", "model.pgsa.sigma"
ROWS = {"full": {}, "anchors alone": {SIGMA: 0.0}, "dense": {"model.pgsa.enabled": False}}


class Records:
    """Cells that have all been trained: AUC and seconds of training rise with the learning rate (10 s at 0.001)."""

    def __init__(self, home: Folder) -> None:
        self._home = home

    def record(self, cell: Cell) -> Done:
        lr = cell.config.stage2.optimiser.lr
        figures = {"auc": 0.7 + lr}
        return {"state": "finished", "tested": True, "validation": figures, "test": figures, "next_item": None,
                "seconds": {"stage1": 0.0, "stage2": 1e4 * lr}, "scoring_a_million": 1.0, "keys": 2.0,
                "parameters": 3}  # fmt: skip

    def home(self, cell: Cell) -> Folder:
        return self._home.sub(cell.key)


class Known(_Comparison):
    """A comparison whose rows are tuned and trained, without a cluster."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.said, self.left_out = plan, [], {}
        self.say = self.said.append
        self.cells = cast(Cells, Records(Folder(str(folder))))
        self.rows = [Row(name, plan.tuned(name)) for name in plan.matrix.rows]
        for row in self.rows:
            row.chosen = self._chosen(row)
            row.cells = [plan.cell(row.name, seed, row.chosen) for seed in plan.matrix.seeds]
        self.curves = plan.curves(self.rows[0].chosen or {})

    said: list[str]


def known(folder: Path, **more: Any) -> Known:
    return Known(resolve(parse_matrix({"rows": ROWS, "seeds": [0, 1], **more})), folder)


def test_a_curve_marks_its_own_rows_value_and_not_another_rows(tmp_path: Path) -> None:
    """The row `anchors alone` is a point of the curve, too."""
    (curve,) = known(tmp_path, sensitivity={"row": "full", "over": {SIGMA: [0.0, 1.0]}})._sensitivity()
    assert [(p["value"], p["own"]) for p in curve["points"]] == [(0.0, False), (1.0, False), (2.0, True)]


@pytest.mark.parametrize(
    ("other", "cost"), [(0.0005, 1 + 5), (0.1, 1 + 10)], ids=["its own is chosen", "another is chosen"]
)
def test_tuning_costs_the_cells_that_are_not_compared(tmp_path: Path, other: float, cost: float) -> None:
    """Three settings are tried; whichever is chosen, two trainings were for tuning alone."""
    job = known(tmp_path, tuning={"parameters": {LR: [0.0001, other]}, "draws": 3})
    model = job._model(job.rows[0])
    assert len(model["tuned"]["tried"]) == 3
    assert model["tuned"]["values"] == ({} if other < 0.001 else {LR: other})
    assert model["cost"]["tuning_seconds"] == pytest.approx(cost)


def test_rows_as_they_stand_cost_no_tuning(tmp_path: Path) -> None:
    job = known(tmp_path)
    assert job._model(job.rows[0])["cost"]["tuning_seconds"] == 0.0


@pytest.mark.parametrize("error", [DataError("no truth"), RayError("a worker died")])
def test_a_study_that_fails_is_left_out_and_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job, made = known(tmp_path), []

    def fail() -> None:
        raise error

    monkeypatch.setattr(job, "_measure_noise", fail)
    monkeypatch.setattr(job, "_show_learnt", lambda: made.append("learnt"))
    job.study()
    assert made == ["learnt"]
    assert job.left_out == {"noise": f"{type(error).__name__}: {error}"}
    assert "--resume" in job.said[0]


def test_a_job_goes_on_with_the_log_it_began_with_alone(prepare_log: Callable[..., Prepared], tmp_path: Path) -> None:
    """Its windows and figures are of that log: a row may be training in one, and test in another."""
    rows = [{"user_id": "a", "item_id": f"i{k % 3}", "timestamp": 10**9 + k, "clicked": k % 2} for k in range(20)]
    began, grown = prepare_log(rows, name="began"), prepare_log(rows * 2, name="grown")
    folder = Folder(str(tmp_path / "run"))
    keep_log(folder, began)
    keep_log(folder, began)
    with pytest.raises(ArtifactError, match=r"began with another log: got \w+, expected \w+ .*start anew"):
        keep_log(folder, grown)
    assert folder.read_json("prepared/manifest.json")["fingerprint"] == began.manifest["fingerprint"]
