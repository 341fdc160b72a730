"""What a search keeps over kills and resumes: its time, its nodes, its settings. No cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import ray.tune
from ray.exceptions import RayError
from ray.tune.error import TuneError

from hpgr.artifacts import Folder
from hpgr.config import Config, dump, validate
from hpgr.errors import ArtifactError, ConfigError, DataError, HpgrError, StoreError, TrainingError, WorkersLostError
from hpgr.on_ray import beside, cells, compare, pipeline, trials, tune
from hpgr.on_ray.cluster import settle
from hpgr.on_ray.pipeline import stored_config
from hpgr.on_ray.searcher import Clock, StudySearcher
from hpgr.on_ray.trials import Place
from hpgr.on_ray.tune import SearchRequest, open_search, stored_space
from hpgr.search.matrix import Plan, parse_matrix
from hpgr.search.space import Space, load_space, parse_space
from hpgr.search.study import Study
from hpgr.sizing import Cluster, Node

PLACE = Place("prepared", "stage1", "index")


def space(**more: Any) -> Space:
    return parse_space({"parameters": {"model.pgsa.top_k": {"choice": [8, 32]}}, **more})


def job_of(folder: Path, start: float | None = None) -> tune._Search:
    home = Folder(str(folder))
    study = Study(home, space(), Config(), lambda _: "stage1")
    clock = Clock(study.memory("seconds", 0.0), time.monotonic() if start is None else start)
    return tune._Search(Config(), space(), home, study, clock, PLACE, lambda _: None)


def node(cpus: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus}}


def test_a_killed_search_knows_its_time_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = [node(2.0)]
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    killed = job_of(tmp_path, start=time.monotonic() - 100)
    watch = beside.Watch(killed.study, killed.clock)
    watch._note()
    cluster.append(node(4.0))
    watch._note()  # the last look before SIGKILL: nothing is written down after it
    resumed = job_of(tmp_path)
    assert 100 <= resumed.clock() < 200
    cluster.pop()
    beside.Watch(resumed.study, resumed.clock)._note()
    nodes = resumed.study.memory("nodes", [])
    assert [alive for _, alive, _ in nodes] == [1, 2, 1]
    assert [at for at, _, _ in nodes] == sorted(at for at, _, _ in nodes)
    assert resumed.data(None, {}).account["node_hours"] >= 0


def test_the_watch_outlives_a_look_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(beside, "BOARD_EVERY_SECONDS", 0.0)
    looks = list[str]()

    def nodes() -> list[dict[str, Any]]:
        looks.append("nodes")
        if len(looks) % 2:
            raise RayError("GCS is away")
        return [node(2.0)]

    def board() -> str:
        looks.append("board")
        raise StoreError("the store is away")

    monkeypatch.setattr(ray, "nodes", nodes)
    job = job_of(tmp_path, start=time.monotonic() - 50)
    with beside.watched(job.study, job.clock) as watch:
        watch.board = board
        while len(looks) < 6:
            assert watch.is_alive()
            time.sleep(0.01)
    assert {"nodes", "board"} <= set(looks)
    assert job_of(tmp_path).clock() >= 50
    assert len(job.study.memory("nodes", [])) == 1


def test_a_store_has_the_time_that_passes_during_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(beside, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: [node(2.0)])
    saved = list[float]()
    job = job_of(tmp_path, start=time.monotonic() - 50)
    monkeypatch.setattr(Study, "save", lambda study: saved.append(study.memory("seconds", 0.0)))
    with beside.watched(job.study, job.clock):
        until = time.monotonic() + 20
        while len(saved) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(saved) > 1
    assert 50 <= saved[0] <= saved[1]


def test_a_cluster_that_was_never_seen_has_no_node_hours(tmp_path: Path) -> None:
    assert job_of(tmp_path).data(None, {}).account["node_hours"] == 0


@pytest.mark.parametrize("raised", [TuneError("a traceback"), None])
def test_the_folders_own_error_ends_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception | None
) -> None:
    def fit() -> None:
        if raised is not None:
            raise raised

    job = job_of(tmp_path)
    monkeypatch.setattr(tune._Search, "_tuner", lambda *_: SimpleNamespace(fit=fit))
    searcher = SimpleNamespace(failure=StoreError("cannot write study.db: the store is away"))
    with pytest.raises(StoreError, match="the store is away"):
        job.run(cast("StudySearcher", searcher), 1)
    searcher.failure = None
    if raised is not None:
        with pytest.raises(TuneError, match="a traceback"):
            job.run(cast("StudySearcher", searcher), 1)


def test_a_search_that_accidents_ended_can_go_on(tmp_path: Path) -> None:
    """Whether the job names the command to go on with depends on the error's kind."""
    job = job_of(tmp_path)
    lost, failed = job.study.ask(), job.study.ask()
    assert lost is not None
    assert failed is not None
    job.study.finish(failed.number, "failed", error="the loss is nan")
    job.study.suspend(lost.number, error="StoreError: the store is away")
    with pytest.raises(HpgrError, match="2 failed, the first with: StoreError") as caught:
        job.promote()
    assert caught.value.goes_on
    job.study.finish(lost.number, "failed", error="the loss is nan")
    with pytest.raises(TrainingError, match="no trial finished"):
        job.promote()


def test_a_search_whose_hours_ended_before_any_trial_says_what_to_raise(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.space = space(budget={"hours": 0.5})
    with pytest.raises(HpgrError, match=r"raise space\.budget\.hours and --resume") as caught:
        job.promote()
    assert caught.value.goes_on


def test_no_auc_is_told_of_a_default_that_did_not_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "stored_config", lambda *_: Config())
    job = job_of(tmp_path)
    start, best = job.study.ask(), job.study.ask()
    assert start is not None
    assert best is not None
    job.study.suspend(start.number, auc=0.55, error="its process died")
    job.study.finish(best.number, "finished", auc=0.7)
    metrics = {"stage2": {"test": {"auc": 0.6}}, "files": {"report": "best/report.html"}}
    result, data = job.conclude((best.number, metrics))
    assert result["default"] == {"trial": start.number, "auc": None}
    assert "--resume tries it again" in data.gain()


def request(folder: Path, config: Config | None, wanted: Space | None, resume: bool = True) -> SearchRequest:
    return SearchRequest(str(folder), config, wanted, resume)


def test_a_budget_changed_by_a_resume_is_kept(tmp_path: Path) -> None:
    open_search(request(tmp_path, Config(), space(), resume=False))
    begun = json.loads((tmp_path / "run.json").read_text())["versions"]
    changed = stored_space(str(tmp_path), ["budget.trials=64"])
    open_search(request(tmp_path, None, changed))
    _, later, _ = open_search(request(tmp_path, None, None))
    assert later.budget.trials == 64
    assert load_space(tmp_path / "space.yaml").budget.trials == 64
    assert json.loads((tmp_path / "run.json").read_text())["versions"] == begun


def test_overrides_of_a_resume_change_the_searchs_own_configuration(tmp_path: Path) -> None:
    own = validate({"model": {"width": 32}})
    open_search(request(tmp_path, own, space(), resume=False))
    changed = stored_config(str(tmp_path), ["resources.max_failures=7"], "search")
    assert (changed.model.width, changed.resources.max_failures) == (32, 7)
    assert open_search(request(tmp_path, changed, None))[0] == changed
    assert open_search(request(tmp_path, None, None))[0] == changed
    with pytest.raises(ConfigError, match="model"):
        open_search(request(tmp_path, stored_config(str(tmp_path), ["model.width=64"], "search"), None))
    with pytest.raises(ConfigError, match="widht"):
        stored_config(str(tmp_path), ["model.widht=64"], "search")
    with pytest.raises(ArtifactError, match="there is no search"):
        stored_config(str(tmp_path / "none"), [], "search")


@pytest.mark.parametrize("step", ["run_of", "_trained"])
@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (TrainingError("the loss is nan"), True),
        (DataError("no clicks"), True),
        (StoreError("the store is away"), False),
        (WorkersLostError("lost"), False),
        (HpgrError("Ray lost a part of the job"), False),
        (RuntimeError("anything"), False),
    ],
)
def test_accidents_are_tried_again_and_faults_are_told(
    step: str, error: Exception, is_final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    told = list[dict[str, Any]]()
    monkeypatch.setattr(trials, "run_of", lambda *_: None)
    monkeypatch.setattr(trials, step, fail)
    monkeypatch.setattr(ray.tune, "report", told.append)
    settings = {"config": {}, "folder": str(tmp_path), "stage1": ""}
    (tmp_path / "error.txt").write_text("of an attempt before")
    if is_final:
        trials.trial(settings, PLACE)
        assert [(one["stage"], one["error"]) for one in told] == [("failed", str(error))]
        assert not (tmp_path / "error.txt").exists()
        return
    with pytest.raises(type(error), match=str(error)):
        trials.trial(settings, PLACE)
    assert told == []
    assert str(error) in (tmp_path / "error.txt").read_text()


@pytest.mark.parametrize("job", ["search", "comparison", "run"])
def test_a_folder_that_goes_with_the_submitted_job_is_told(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened(Exception):
        """What ends the job: it has told what it had to."""

    @contextmanager
    def session(_: Any) -> Iterator[None]:
        raise Opened
        yield

    said, run = list[str](), str(tmp_path / "runtime_resources/working_dir_files/runs/r")
    for module in (tune, compare, pipeline):
        monkeypatch.setattr(module, "session", session)
    config = Config.model_validate({"data": {"columns": {"label": "clicked"}}})
    plan = Plan(parse_matrix({"rows": {"hpgr": {}}}), config)
    starts: dict[str, Callable[[], Any]] = {
        "search": lambda: tune.search(SearchRequest(run, config, space(), False), said.append),
        "comparison": lambda: compare.compare(compare.CompareRequest(run, plan, False), said.append),
        "run": lambda: pipeline.two_stage(pipeline.Request(run, config, False), said.append),
    }
    with pytest.raises(Opened):
        starts[job]()
    assert f"note: {run} is in the job's copy of its working directory" in said[0]


def test_a_cell_that_lost_its_workers_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a TrainingError, too, but not a numerical one: the comparison tries it again when it goes on."""

    def fail(*_: Any) -> None:
        raise WorkersLostError("lost")

    monkeypatch.setattr(cells, "run_of", lambda *_: SimpleNamespace(prepared=SimpleNamespace(keep=lambda _: None)))
    monkeypatch.setattr(cells, "_trained", fail)
    settings = {"config": dump(Config()), "stage1": "", "test": False}
    with pytest.raises(WorkersLostError):
        cells._train_cell(settings, str(tmp_path), PLACE, None, "key")
    assert not (tmp_path / cells.RECORD).exists()


def test_no_cell_waits_for_a_stage_1_that_has_ended(tmp_path: Path) -> None:
    shared, job = Folder(str(tmp_path)), cells.Cells.__new__(cells.Cells)
    work = cast("cells.Work", SimpleNamespace(stage1="key", place=Place("", shared.uri, "")))
    job._running = {}
    assert not job._is_computed_elsewhere(work)
    job._running = {"reference": work}
    assert job._is_computed_elsewhere(work)
    shared.write_json("key/failed.json", {"error": "the loss is nan"})
    assert not job._is_computed_elsewhere(work)


def test_room_is_left_for_the_trial_beside_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune waits for it without a word."""
    config = validate({"resources": {"workers": 2, "cpus_per_worker": 0.875, "data_workers": 1}})
    monkeypatch.setattr(trials, "here", lambda: Cluster((Node(2),)))
    with pytest.raises(ConfigError, match=r"0\.875 CPU, and 0\.26 CPU beside them can never be had"):
        trials.places(config, "trial", None)
    for nodes, most in (((Node(2.01),), 1), ((Node(2), Node(2)), 1), ((Node(4.5),), 1), ((Node(4.52),), 2)):
        monkeypatch.setattr(trials, "here", lambda nodes=nodes: Cluster(nodes))
        assert trials.places(config, "trial", None) == most
    assert trials.demand(config)["CPU"] == pytest.approx(2.25 + trials.reserved(config)["CPU"])


@pytest.mark.parametrize(("of", "workers", "told"), [("", 2, "2 worker(s), a"), ("trial", 1, "1 worker(s) of each t")])
def test_auto_workers_are_settled_for_a_job_or_for_each_of_many(of: str, workers: int, told: str) -> None:
    said = list[str]()
    auto = validate({"resources": {"workers": "auto", "gpu": "auto"}})
    settled = settle(auto, Cluster((Node(8, 2),)), said.append, of).resources
    assert (settled.count, settled.on_gpu) == (workers, True)
    assert told in said[0]


def test_a_trial_that_tune_starts_anew_is_told_in_a_line(tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback ...\nhpgr.errors.StoreError: the store is away\n")
    trial = SimpleNamespace(error_file=str(tmp_path / "error.txt"), config={"number": 3})
    tune._Starts(cast("StudySearcher", None), said.append).on_trial_recover(1, [], trial)
    assert said == [
        "trial 3: interrupted (hpgr.errors.StoreError: the store is away), going on from its last checkpoint"
    ]
