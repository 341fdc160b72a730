"""Resources by shape, on planned clusters."""

from __future__ import annotations

import pytest

from hpgr.config import Resources, validate
from hpgr.errors import ConfigError
from hpgr.sizing import (
    Ask,
    Cluster,
    Node,
    cpus_per_worker,
    fits,
    refuse_impossible,
    room,
    scoring_pool,
    settled,
    training_ask,
)

LAPTOP = Cluster((Node(2),))
EIGHT_GPUS = Cluster((Node(96, 8),))
MIXED = Cluster((Node(8), Node(4, 1), Node(16, 2)))
ASLEEP = Cluster((Node(0),), (Node(8, 0, 10), Node(8, 1, 4), Node(0)))
SILENT = Cluster((Node(0),), ())
CLUSTERS = {"laptop": LAPTOP, "8 GPUs": EIGHT_GPUS, "mixed": MIXED, "asleep": ASLEEP}


def resources(**values: object) -> Resources:
    return validate({"resources": values}).resources


def auto(**values: object) -> Resources:
    return resources(workers="auto", gpu="auto", cpus_per_worker="auto", **values)


def test_the_driver_trains_on_no_gpu() -> None:
    with pytest.raises(ConfigError, match=r"resources: .*got workers 0, set workers to 1"):
        resources(workers=0, gpu=True)


@pytest.mark.parametrize(
    ("name", "workers", "gpu", "cpus"),
    [("laptop", 1, False, 1.0), ("8 GPUs", 8, True, 11.0), ("mixed", 3, True, 4.0), ("asleep", 4, True, 7.0)],
)
def test_auto_takes_every_gpu_and_leaves_the_data_room(name: str, workers: int, gpu: bool, cpus: float) -> None:
    cluster = CLUSTERS[name]
    found = settled(auto(), cluster)
    ask = training_ask(found, cluster)
    assert (found.count, found.on_gpu, ask.cpus) == (workers, gpu, cpus)
    assert fits(cluster.reach, ask)
    refuse_impossible(cluster, ask)


def test_auto_without_gpus_is_one_worker_a_node_and_as_configured_otherwise() -> None:
    plain = Cluster((Node(0), Node(8), Node(4)))
    assert settled(auto(), plain).count == 2
    assert settled(auto(), Cluster((Node(0),), (Node(8, 0, 10), Node(0)))).count == 1, "nodes that may never come"
    assert settled(resources(workers=3, gpu=False), EIGHT_GPUS) == resources(workers=3, gpu=False)
    assert settled(resources(workers=0, gpu="auto"), EIGHT_GPUS).on_gpu is False, "the driver trains on its CPU"


@pytest.mark.parametrize(("name", "gpu"), [("laptop", False), ("8 GPUs", True), ("mixed", True), ("asleep", True)])
def test_auto_is_one_worker_of_a_trial_or_cell(name: str, gpu: bool) -> None:
    found = settled(auto(), CLUSTERS[name], alone=False)
    assert (found.count, found.on_gpu) == (1, gpu)
    assert settled(resources(workers=3), CLUSTERS[name], alone=False).count == 3


def test_the_former_keys_mean_what_they_meant() -> None:
    assert cpus_per_worker(resources(workers=2, cpus_per_worker=1.5), LAPTOP) == 1.5
    assert cpus_per_worker(resources(workers=1), LAPTOP) == 1.0
    assert cpus_per_worker(resources(workers=2), LAPTOP) == 0.5
    assert cpus_per_worker(resources(workers=1), SILENT) == 1.0


@pytest.mark.parametrize(
    ("cluster", "asked", "words"),
    [
        (LAPTOP, {"gpu": True}, "1 worker(s) of 1 CPU and 1 GPU"),
        (LAPTOP, {"workers": 4, "cpus_per_worker": 1}, "4 worker(s) of 1 CPU, and 0.25 CPU beside them can never"),
        (LAPTOP, {"cpus_per_worker": 2}, "the largest with 2 CPU and 0 GPU"),
        (EIGHT_GPUS, {"workers": 9, "gpu": True}, "cpus_per_worker, or set resources.gpu to false"),
        (MIXED, {"workers": 2, "cpus_per_worker": 12}, "3 node(s), the largest with 16 CPU and 2 GPU, 28 CPU"),
        (ASLEEP, {"workers": 5, "gpu": True, "cpus_per_worker": 4}, "may grow to 14 node(s), the largest with 8 CPU"),
        (ASLEEP, {"workers": 1, "cpus_per_worker": 16}, "1 worker(s) of 16 CPU"),
    ],
)  # fmt: skip
def test_what_can_never_be_had_is_refused_with_the_keys_to_lower(
    cluster: Cluster, asked: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match="can never be had") as told:
        refuse_impossible(cluster, training_ask(resources(**asked), cluster))
    assert words in str(told.value)


def test_a_total_that_no_node_has_in_one_piece_does_not_fit() -> None:
    two = (Node(4, 1, 2),)
    assert room(two, Ask("w", "k", 1, 3.0)) == 2
    assert not fits(two, Ask("w", "k", 1, 6.0))
    assert fits(two, Ask("w", "k", 2, 4.0))
    assert not fits(two, Ask("w", "k", 2, 4.0, beside=0.25)), "data tasks would wait for ever"
    assert fits((*two, Node(1)), Ask("w", "k", 2, 4.0, 1.0, beside=0.25))
    assert fits((Node(4),), Ask("w", "k", 3, 1.0, beside=1.0))
    assert not fits((Node(4),), Ask("w", "k", 4, 1.0, beside=1.0))


def test_an_autoscaler_that_says_nothing_gets_the_benefit_of_the_doubt() -> None:
    refuse_impossible(SILENT, Ask("worker", "k", 100, 64.0, 8.0))


@pytest.mark.parametrize(
    ("cluster", "scoring", "shards", "pool"),
    [
        (LAPTOP, {}, 50, (1, 2)),
        (EIGHT_GPUS, {}, 500, (1, 96)),
        (EIGHT_GPUS, {}, 5, (1, 5)),
        (ASLEEP, {"min": 3, "max": 20}, 500, (3, 20)),
        (ASLEEP, {}, 500, (1, 112)),
        (SILENT, {"min": 4}, 500, (4, 500)),
        (LAPTOP, {"min": 4, "max": 8}, 1, (1, 1)),
    ],
)
def test_the_scoring_pool(cluster: Cluster, scoring: dict[str, int], shards: int, pool: tuple[int, int]) -> None:
    assert scoring_pool(resources(scoring=scoring), cluster, shards) == pool


def test_a_pool_whose_least_is_more_than_its_most_is_refused() -> None:
    with pytest.raises(ConfigError, match="min 3 is more than max 2"):
        resources(scoring={"min": 3, "max": 2})
