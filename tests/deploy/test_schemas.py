"""The manifests against the schemas of their kinds, and the check itself against manifests that are wrong."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has Kubernetes' schemas, is missing")

from tests.support.manifests import DEPLOY, SCHEMAS, build, needs_kubectl, overlays, problems

DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "server", "namespace": "team"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "server"}},
        "template": {
            "metadata": {"labels": {"app": "server"}},
            "spec": {"containers": [{"name": "server", "image": "server", "resources": {"limits": {"cpu": "1"}}}]},
        },
    },
}
ROLLOUT = {**copy.deepcopy(DEPLOYMENT), "apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout"}
ROLLOUT["spec"] = {**ROLLOUT["spec"], "strategy": {"blueGreen": {"activeService": "server"}}}  # type: ignore[dict-item]
QUEUE = {
    "apiVersion": "kueue.x-k8s.io/v1beta1",
    "kind": "LocalQueue",
    "metadata": {"name": "training", "namespace": "team"},
    "spec": {"clusterQueue": "gpus"},
}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "worker", "namespace": "team"},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {"name": "node", "template": {"spec": {"template": DEPLOYMENT["spec"]["template"]}}}  # type: ignore[index]
                ]
            }
        },
    },
}
GOOD = {"core": DEPLOYMENT, "rollout": ROLLOUT, "queue": QUEUE, "runtime": RUNTIME}


def changed(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a manifest with another value at a path of names and indices."""
    whole = copy.deepcopy(manifest)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = whole
    for part in parents:
        place = place[part]
    place[last] = value
    return whole


@pytest.mark.parametrize("name", GOOD)
def test_a_right_manifest_has_no_problem(name: str) -> None:
    """Of Kubernetes' own kinds, and of those of operators."""
    assert problems(GOOD[name]) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("core", "spec/replica", 2),
        ("core", "spec/replicas", "two"),
        ("core", "spec/template/spec/containers/0/recources", {}),
        ("core", "kind", "Deploymnet"),
        ("core", "apiVersion", "apps/v1beta1"),
        ("core", "apiVersion", "apps.example.com/v1"),
        ("core", "metadata/lables", {}),
        ("queue", "spec/clusterqueue", "gpus"),
        ("queue", "spec/clusterQueue", 3),
        ("queue", "kind", "Queue"),
        ("queue", "apiVersion", "kueue.x-k8s.io/v1alpha1"),
        ("queue", "metadata/lables", {}),
        ("queue", "metadata/labels", {"a": 1}),
        ("rollout", "spec/strategy/blueGreen", {}),
        ("rollout", "spec/strategy/blueGreen/activeServices", "server"),
        ("rollout", "spec/template/spec/containers/0/recources", {}),
        ("runtime", "spec/mlPolicy/torch/procPerNode", 1),
        ("runtime", "spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/imag", "x"),
        ("runtime", "spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/command", "x"),
    ],
)
def test_a_wrong_manifest_is_told(name: str, path: str, value: Any) -> None:
    """A misspelt field at any depth, a wrong type, an unknown kind or version, a missing field."""
    assert problems(changed(GOOD[name], path, value)) != []


def test_every_schema_can_refuse() -> None:
    """Each that is kept: a field that its kind does not have is a problem, as is a specification that is no object."""
    files = sorted(SCHEMAS.rglob("*.json"))
    assert files
    for file in files:
        schema = json.loads(file.read_text())
        [api_version], [kind] = (schema["properties"][part]["enum"] for part in ("apiVersion", "kind"))
        manifest = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "a"}}
        told = problems({**manifest, "misspelt": {}})
        assert any("misspelt" in one for one in told), file
        if "spec" in schema["properties"]:
            assert any(one.startswith("spec:") for one in problems({**manifest, "spec": "text"})), file


@needs_kubectl
def test_an_overlay_is_built_and_checked(tmp_path: Path) -> None:
    """A folder of kustomize gives its objects; a misspelt field in a patch is found in what comes out."""
    (tmp_path / "kustomization.yaml").write_text(json.dumps({"namespace": "other", "resources": ["queue.yaml"]}))
    (tmp_path / "queue.yaml").write_text(json.dumps(changed(QUEUE, "spec/stopPolic", "None")))
    part = tmp_path / "part"
    part.mkdir()
    (part / "kustomization.yaml").write_text(json.dumps({"kind": "Component"}))
    assert overlays(tmp_path) == [tmp_path]
    [manifest] = build(tmp_path)
    assert manifest["metadata"]["namespace"] == "other"
    assert ["stopPolic" in one for one in problems(manifest)] == [True]


def _name(folder: Path) -> str:
    return str(folder.relative_to(DEPLOY))


@needs_kubectl
@pytest.mark.parametrize("folder", overlays(), ids=_name)
def test_every_manifest_is_valid(folder: Path) -> None:
    """What kustomize builds of each folder of deploy/kubernetes, without one problem."""
    told: Callable[[dict[str, Any]], str] = lambda one: f"{one.get('kind')} {one.get('metadata', {}).get('name')}"  # noqa: E731
    found = [f"{told(manifest)}: {problem}" for manifest in build(folder) for problem in problems(manifest)]
    assert found == []
