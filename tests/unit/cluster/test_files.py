"""Every file of cluster/ is valid by its own tool's rules, names only what exists, and is closed to the network."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from helpers_kuberay import KINDS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.runtime_env import RuntimeEnv

from hpgr.config import load_config

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws.yaml", "gcp.yaml"]
KUBERAY = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))
IN_IMAGE = "/opt/hpgr/"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def launcher(name: str) -> dict[str, Any]:
    return prepare_config(documents(name)[0])


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_up_takes_the_file(name: str) -> None:
    config = launcher(name)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_wrkers": 3})


DEMANDS = [({"CPU": 4}, "data"), ({"CPU": 4, "GPU": 1}, "trainer")]


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.parametrize(("demand", "kind"), DEMANDS)
def test_work_starts_spot_nodes_of_its_kind_and_their_twins_where_there_are_none(
    name: str, demand: dict[str, int], kind: str
) -> None:
    """By the choice of the autoscaler that the file runs, among the file's node types."""
    config, spot, other = launcher(name), f"{kind}_spot", f"{kind}_on_demand"
    chosen = _by_scorer if name == "aws.yaml" else _by_priority
    assert chosen(config, demand, []) == {spot: 1}
    assert chosen(config, demand, [spot]) == {other: 1}
    assert chosen(config, demand, [spot, other]) == {spot: 1}, "asked again, and no GPU node in place of a data node"
    types = config["available_node_types"]
    assert types[spot]["resources"] == types[other]["resources"]
    assert types[spot]["node_config"] != types[other]["node_config"]
    assert types["head"]["resources"]["CPU"] == 0
    assert all(types[key]["min_workers"] == 0 for key in types if key != "head")


def _by_scorer(config: dict[str, Any], demand: dict[str, int], refused: list[str]) -> dict[str, int]:
    """Autoscaler v1 with the scorer that the file names, after the cloud refused some types."""
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "RAY_enable_autoscaler_v2=0" in start
    (named,) = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", start)
    tracker = NodeProviderAvailabilityTracker()
    for node_type in refused:
        error = NodeLaunchException("InsufficientInstanceCapacity", "none left", None)
        tracker.update_node_availability(node_type, int(time.time()), error)
    scorer = partial(load_function_or_class(named), node_availability_summary=tracker.summary())
    nodes, left = get_nodes_for(config["available_node_types"], {}, "head", 9, [demand], scorer)
    assert not left
    return dict(nodes)


def _by_priority(config: dict[str, Any], demand: dict[str, int], late: list[str]) -> dict[str, int]:
    """Autoscaler v2, after nodes of some types did not come in time."""
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs(),
            max_num_nodes=config["max_workers"] + 1,
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(demand)]),
            recoverable_resource_availabilities=dict.fromkeys(late, 0.0),
            cloud_resource_availabilities=dict.fromkeys(late, 0.0),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_clusters_listen_on_loopback_and_ask_for_a_token(name: str) -> None:
    config = launcher(name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [line for line in commands if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_USAGE_STATS_ENABLED=0" in start
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--disable-usage-stats" in head
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_workers_on_google_cloud_have_the_account_that_ray_gives_the_head() -> None:
    """Ray gives it to the head alone; a machine without one reads no bucket."""
    config = launcher("gcp.yaml")
    email = f"ray-autoscaler-sa-v1@{config['provider']['project_id']}.iam.gserviceaccount.com"
    for name, kind in config["available_node_types"].items():
        accounts = kind["node_config"].get("serviceAccounts", [])
        assert [a["email"] for a in accounts] == ([] if name == "head" else [email])


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_file(name: str) -> None:
    for document in documents(f"kuberay/{name}"):
        schema = KINDS[document["kind"]]
        jsonschema.validate(document, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | {"spek": {}}, schema)


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in KUBERAY:
        for document in documents(f"kuberay/{name}"):
            if document["kind"] == "RayCluster":
                yield name, document["spec"]
            elif "rayClusterSpec" in document.get("spec", {}):
                yield name, document["spec"]["rayClusterSpec"]


def test_kuberay_clusters_scale_from_nothing_ask_for_a_token_and_run_as_a_user() -> None:
    found = dict(clusters())
    assert set(found) == {"cluster.yaml", "two-stage.yaml"}
    for spec in found.values():
        head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
        assert spec["enableInTreeAutoscaling"]
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["authOptions"]["mode"] == "token"
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert head["rayStartParams"]["disable-usage-stats"] == "true"
        assert head["serviceType"] == "ClusterIP"
        assert {g["groupName"] for g in groups} == {"data", "trainer"}
        assert all(g["minReplicas"] == 0 < g["maxReplicas"] for g in groups)
        for group in (head, *groups):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                amounts = container["resources"]
                assert amounts["requests"] == amounts["limits"], "Ray reads a pod's size from its limits"
                assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
                mounts = {m["name"] for m in container.get("volumeMounts", [])}
                assert mounts == {v["name"] for v in pod.get("volumes", [])}
        (trainer,) = [g for g in groups if g["groupName"] == "trainer"]
        assert trainer["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_kuberay_files_fit_together() -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for name in KUBERAY:
        for document in documents(f"kuberay/{name}"):
            by_kind.setdefault(document["kind"], []).append(document)
    (cluster,), (claim,), (account,) = (
        by_kind[kind] for kind in ("RayCluster", "PersistentVolumeClaim", "ServiceAccount")
    )
    assert len(by_kind["RayJob"]) == 3
    for job in by_kind["RayJob"]:
        selected = job["spec"].get("clusterSelector")
        assert ("rayClusterSpec" in job["spec"]) != bool(selected)
        assert selected in (None, {"ray.io/cluster": cluster["metadata"]["name"]})
    for _, spec in clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert pod["serviceAccountName"] == account["metadata"]["name"]
            names = {v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes", [])}
            assert names <= {claim["metadata"]["name"]}


def test_one_version_of_ray_everywhere() -> None:
    (pin,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert {spec["rayVersion"] for _, spec in clusters()} == {pin}
    assert f"Ray {pin.rpartition('.')[0]} " in (CLUSTER / "runtime_env.yaml").read_text()


def test_the_runtime_environment_holds_the_project_s_requirements() -> None:
    raw = documents("runtime_env.yaml")[0]
    RuntimeEnv(**raw)
    pins, *names = raw["pip"]["packages"]
    assert pins == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert {canonicalize_name(name) for name in names} == wanted - {"ray"}


def test_the_image_is_pinned_runs_as_a_user_and_copies_what_exists() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    assert re.search(r"^USER (?!root)\w+", text, re.M)
    steps = text.replace("\\\n", " ").splitlines()
    installs = [part for line in steps if line.startswith("RUN") for part in line.split("pip install")[1:]]
    assert len(installs) == 3
    assert all("-c constraints.txt" in part for part in installs)
    for line in steps:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line
    for variant in ("cpu", "cuda"):
        assert f"{variant}) pip install" in text
        assert f"--build-arg VARIANT={variant}" in text


FILES = [
    "aws.yaml",
    "gcp.yaml",
    "runtime_env.yaml",
    "Containerfile",
    *(f"kuberay/{name}" for name in KUBERAY),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_the_three_commands_to_use_it(name: str) -> None:
    head = (CLUSTER / name).read_text().split("\n#\n")
    commands = [line for line in head[1].splitlines() if line.startswith("# ")]
    assert len(commands) == 3, commands
    for path in re.findall(
        r"(?:cluster/[\w./-]+\.(?:yaml|json|py)|cluster/Containerfile)", (CLUSTER / name).read_text()
    ):
        assert (ROOT / path).exists(), path


def job_commands() -> list[str]:
    out = []
    for name in FILES:
        text = re.sub(r"^# ", "", (CLUSTER / name).read_text(), flags=re.M)
        out += re.findall(r"python ((?:/opt/hpgr/)?jobs/\w+\.py[^\n#]*)", _unfolded(name, text))
    return out


def _unfolded(name: str, text: str) -> str:
    """Folded YAML scalars (entrypoints) on one line."""
    if name.startswith("kuberay/"):
        entries = [d["spec"]["entrypoint"] for d in documents(name) if "entrypoint" in d.get("spec", {})]
        text = re.sub(r"entrypoint: >-\n(?: {4}.*\n)+", "", text + "\n")
        return "\n".join([text, *entries])
    return text


def test_jobs_are_given_arguments_and_keys_that_they_know() -> None:
    commands = job_commands()
    assert len(commands) >= 7
    shared = (ROOT / "hpgr/on_ray/command.py").read_text()
    for text in commands:
        job, *words = shlex.split(text.replace(IN_IMAGE, ""))
        assert (ROOT / job).is_file(), job
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / job).read_text() + shared))
        assert {w for w in words if w.startswith("--")} <= known, text
        for word in words:
            if word.startswith(("jobs/", "tune_spaces/")):
                assert (ROOT / word).is_file(), word
        after = dict(pairwise(words))
        overrides = [value for word, value in pairwise(words) if word == "--set"]
        load_config(ROOT / after["--config"] if "--config" in after else None, [*overrides, *_labelled(after)])


def _labelled(after: dict[str, str]) -> list[str]:
    return [] if "--config" in after else ["data.columns.label=clicked"]


@pytest.fixture(scope="module")
def local() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("cluster_local", CLUSTER / "local.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_local"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cluster_local"]


def test_the_local_cluster_s_configuration_is_ray_s(local: ModuleType) -> None:
    validate_config(local.Shape(3, 1, 15).config("127.0.0.1:6379"))
