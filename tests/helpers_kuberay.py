"""A strict schema of what the files of cluster/kuberay use, written by hand from the Go types of KubeRay (ray.io/v1)
and the Kubernetes core API: no package ships the custom resource definitions, and those take unknown fields.

It is a subset. A field that is new to the files is refused until it is looked up in the API reference and added here.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME: Schema = {"type": "string", "pattern": r"^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$"}


def closed(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def many(of: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": of, "minItems": least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


AMOUNTS: Schema = {
    "type": "object",
    "properties": {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY},
    "additionalProperties": False,
}
CONTAINER = closed(
    {
        "name": NAME,
        "image": TEXT,
        "resources": closed({"requests": AMOUNTS, "limits": AMOUNTS}),
        "securityContext": closed({"allowPrivilegeEscalation": FLAG}, capabilities=closed({"drop": many(TEXT)})),
    },
    ports=many(closed({"containerPort": COUNT}, name=NAME)),
    env=many(closed({"name": TEXT, "value": TEXT})),
    volumeMounts=many(closed({"name": NAME, "mountPath": TEXT})),
)
AFFINITY = closed({
    "nodeAffinity": closed({
        "preferredDuringSchedulingIgnoredDuringExecution": many(closed({
            "weight": {"type": "integer", "minimum": 1, "maximum": 100},
            "preference": closed({"matchExpressions": many(closed({
                "key": TEXT, "operator": one_of("In", "NotIn", "Exists", "DoesNotExist"),
            }, values=many(TEXT)))}),
        })),
    }),
})  # fmt: skip
POD = closed({
    "spec": closed(
        {
            "containers": many(CONTAINER, 1),
            "securityContext": closed({"runAsNonRoot": FLAG, "runAsUser": COUNT}, fsGroup=COUNT),
            "restartPolicy": one_of("Never", "OnFailure", "Always"),
        },
        serviceAccountName=NAME,
        affinity=AFFINITY,
        tolerations=many(closed({"key": TEXT, "operator": one_of("Exists", "Equal")}, effect=TEXT, value=TEXT)),
        volumes=many(closed({"name": NAME, "persistentVolumeClaim": closed({"claimName": NAME})})),
    )
})  # fmt: skip
HEAD = closed({"rayStartParams": TEXTS, "template": POD}, serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"))
WORKERS = closed(
    {"groupName": NAME, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": TEXTS, "template": POD},
    replicas=COUNT,
)
CLUSTER = closed(
    {"headGroupSpec": HEAD},
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        {}, version=one_of("v1", "v2"), idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    ),
    authOptions=closed({"mode": one_of("token", "disabled")}),
    workerGroupSpecs=many(WORKERS),
)  # fmt: skip
JOB = closed(
    {"entrypoint": TEXT, "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode")},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    clusterSelector=TEXTS,
    rayClusterSpec=CLUSTER,
)
CLAIM = closed({
    "accessModes": many(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"), 1),
    "resources": closed({"requests": closed({"storage": QUANTITY})}),
})  # fmt: skip


def resource(version: str, spec: Schema | None) -> Schema:
    """A whole object of a kind."""
    parts = {"apiVersion": one_of(version), "kind": TEXT, "metadata": closed({"name": NAME})}
    return closed(parts | ({"spec": spec} if spec is not None else {}))


KINDS = {
    "RayCluster": resource("ray.io/v1", CLUSTER),
    "RayJob": resource("ray.io/v1", JOB),
    "PersistentVolumeClaim": resource("v1", CLAIM),
    "ServiceAccount": resource("v1", None),
}
