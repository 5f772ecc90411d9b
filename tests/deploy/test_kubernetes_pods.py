"""Pods of every installation: what they may do, what they are given, and what they name is there."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has Kubernetes' schemas, is missing")

from tests.support.cluster import INSTALLATIONS, NAME, Pods, installation, of_kind, pods, selects
from tests.support.manifests import needs_kubectl

pytestmark = [needs_kubectl, pytest.mark.parametrize("name", INSTALLATIONS)]

# What docs/kubernetes.md says has to be brought: keys of Secrets, by namespace and name.
BROUGHT = {
    ("cognate", "cognate-database"),
    ("cognate", "cognate-objects"),
    ("agent-forge", "agent-database"),
    ("agent-forge", "agent-objects"),
}


def told(found: Pods, what: object) -> str:
    return f"{found.owner}: {what}"


def test_no_container_has_more_rights_than_it_needs(name: str) -> None:
    """As the restricted pod security standard asks, and with a root that nobody can write to."""
    wrong = []
    for found in pods(installation(name)):
        pod = found.spec["securityContext"]
        if not (pod["runAsNonRoot"] and pod["runAsUser"] == pod["runAsGroup"] == pod["fsGroup"] == 10001):
            wrong.append(told(found, pod))
        if pod["seccompProfile"] != {"type": "RuntimeDefault"}:
            wrong.append(told(found, "seccompProfile"))
        wrong += [told(found, part) for part in ("hostNetwork", "hostPID", "hostIPC") if part in found.spec]
        wrong += [told(found, one["name"]) for one in found.spec["volumes"] if "hostPath" in one]
        for container in found.containers:
            if container["securityContext"] != {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }:
                wrong.append(told(found, container["securityContext"]))
    assert wrong == []


def test_what_a_container_uses_is_bounded(name: str) -> None:
    """Requests and limits of cores and memory, limits no lower; scratch folders have sizes."""
    wrong = []
    for found in pods(installation(name)):
        for container in found.containers:
            resources = container["resources"]
            requests, limits = resources["requests"], resources["limits"]
            if (
                {"cpu", "memory"} - requests.keys()
                or {"cpu", "memory"} - limits.keys()
                or any(amount(requests[kind]) > amount(limits[kind]) for kind in ("cpu", "memory"))
            ):
                wrong.append(told(found, resources))
        wrong += [
            told(found, one["name"])
            for one in found.spec["volumes"]
            if "emptyDir" in one and "sizeLimit" not in one["emptyDir"]
        ]
    assert wrong == []


def amount(quantity: str) -> float:
    """Return a quantity of Kubernetes as a number."""
    units = {"": 1, "m": 1e-3, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * units[unit]


def test_images_are_of_a_release(name: str) -> None:
    """A tag, never `latest`; no registry, which kustomize's `images` brings; of one release within a colour."""
    images = {container["image"] for found in pods(installation(name)) for container in found.containers}
    pattern = r"cognateforge/((cognate|agent)-(server|worker)|forge):\d+\.\d+\.\d+(-ray)?"
    assert [image for image in images if not re.fullmatch(pattern, image)] == []
    runtimes = of_kind(installation(name), "ClusterTrainingRuntime")
    for found in pods(installation(name)):
        wanted = environment(found).get("COGNATE_SERVER_WORKERS__KUBERNETES__RUNTIME")
        for runtime in runtimes:
            if runtime["metadata"]["name"] == wanted:
                [worker] = pods([runtime])
                tags = {one.containers[0]["image"].partition(":")[2] for one in (found, worker)}
                assert len(tags) == 1, (found.owner, tags)


def environment(found: Pods) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in found.containers[0].get("env", ())}


def test_only_servers_that_create_trainjobs_have_a_token(name: str) -> None:
    """No worker, no backup and no smoke test can talk to the cluster; accounts give no token by themselves."""
    objects = installation(name)
    holders = {found.owner for found in pods(objects) if found.spec["automountServiceAccountToken"]}
    bound = {
        (subject["namespace"], subject["name"])
        for binding in of_kind(objects, "RoleBinding")
        for subject in binding["subjects"]
    }
    with_rights = {
        found.owner
        for found in pods(objects)
        if found.is_server and (found.namespace, found.spec["serviceAccountName"]) in bound
    }
    assert holders == with_rights
    accounts = of_kind(objects, "ServiceAccount")
    assert [one["metadata"]["name"] for one in accounts if one["automountServiceAccountToken"]] == []
    known = {(one["metadata"]["namespace"], one["metadata"]["name"]) for one in accounts}
    assert {(found.namespace, found.spec["serviceAccountName"]) for found in pods(objects)} <= known


def test_servers_are_probed_for_what_a_probe_can_mend(name: str) -> None:
    """A store that is away is no reason for a restart, and workers that do not start none to be sent no calls."""
    servers = [found for found in pods(installation(name)) if found.is_server]
    assert servers
    for found in servers:
        [container] = found.containers
        pages = {part: container[f"{part}Probe"]["httpGet"] for part in ("startup", "readiness", "liveness")}
        assert pages == {
            "startup": {"path": "/livez", "port": "admin"},
            "readiness": {"path": "/readyz", "port": "admin"},
            "liveness": {"path": "/livez", "port": "admin"},
        }
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300  # migrations


def test_what_is_mounted_is_there(name: str) -> None:
    """Each ConfigMap, Secret and claim that a pod names is an object, is made by cert-manager, or is to be brought."""
    objects = installation(name)
    there = {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in of_kind(objects, "ConfigMap", "PersistentVolumeClaim")
    }
    there |= {("Secret", *one) for one in BROUGHT}
    there |= {
        ("Secret", one["metadata"]["namespace"], one["spec"]["secretName"]) for one in of_kind(objects, "Certificate")
    }
    named = {(kind, found.namespace, one) for found in pods(objects) for kind, one in references(found)}
    assert named - there == set()
    # And nothing is left over that no pod uses; dashboards are read by Grafana.
    used = {one for one in there if one[0] != "Secret" and not one[2].startswith("grafana-")}
    assert used - named == set()


def references(found: Pods) -> list[tuple[str, str]]:
    names = []
    for volume in found.spec["volumes"]:
        for source in (volume, *volume.get("projected", {}).get("sources", ())):
            names += [("ConfigMap", source["configMap"]["name"])] if "configMap" in source else []
            secret = source.get("secret", {})
            names += [("Secret", secret.get("secretName") or secret["name"])] if secret else []
        claim = volume.get("persistentVolumeClaim")
        names += [("PersistentVolumeClaim", claim["claimName"])] if claim else []
    for container in found.containers:
        mounted = {one["name"] for one in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in found.spec["volumes"]}, found.owner
        froms: list[Mapping[str, Any]] = [one.get("valueFrom", {}) for one in container.get("env", ())]
        names += [("Secret", one["secretKeyRef"]["name"]) for one in froms if "secretKeyRef" in one]
        names += [("Secret", one["secretRef"]["name"]) for one in container.get("envFrom", ())]
    return names


def test_selectors_select(name: str) -> None:
    """Services, Deployments, budgets and monitors select pods that are there, and ports by names that these have."""
    objects = installation(name)
    made = pods(objects)
    for one in of_kind(objects, "Deployment", "Rollout"):
        if one["kind"] == "Rollout":
            [source] = [p for p in made if p.owner == f"Deployment {one['spec']['workloadRef']['name']}"]
        else:
            [source] = pods([one])
        assert selects(one["spec"]["selector"], source.labels), one["metadata"]
    for one in of_kind(objects, "Service"):
        [service_port] = one["spec"]["ports"]
        behind = [
            found
            for found in made
            if found.namespace == one["metadata"]["namespace"]
            and selects({"matchLabels": one["spec"]["selector"]}, found.labels)
        ]
        assert behind, one["metadata"]
        assert all(found.is_server for found in behind), one["metadata"]
        ports = {p["name"]: p["containerPort"] for found in behind for p in found.containers[0]["ports"]}
        assert ports[service_port["targetPort"]] == service_port["port"]
    for one in of_kind(objects, "PodDisruptionBudget", "PodMonitor"):
        behind = [
            found
            for found in made
            if found.namespace == one["metadata"]["namespace"] and selects(one["spec"]["selector"], found.labels)
        ]
        assert behind, one["metadata"]


def test_updates_and_evictions_leave_a_server(name: str) -> None:
    """Where there are several; where there is one, the next begins when it has ended, under its name."""
    objects = installation(name)
    budgets = of_kind(objects, "PodDisruptionBudget")
    for one in of_kind(objects, "Deployment"):
        [found] = pods([one])
        spec = one["spec"]
        if found.labels[NAME] not in ("cognate-server", "agent-server"):
            continue
        budget = [b for b in budgets if selects(b["spec"]["selector"], found.labels)]
        replicas = spec.get("replicas", 2)  # an autoscaler's, which has at least two
        if replicas == 1:
            assert budget == []  # it would hold up every drain of a node
            assert found.labels[NAME] == "agent-server" or spec["strategy"] == {"type": "Recreate"}
        else:
            [budgeted] = budget
            # Servers on trial do not stand in for those that take calls; with Rollouts both have the same labels.
            kept = {"maxUnavailable": 1} if name == "rollouts" and replicas == 0 else {"minAvailable": 1}
            assert kept.items() <= budgeted["spec"].items()
            assert [o.owner for o in pods(objects) if selects(budgeted["spec"]["selector"], o.labels)] == [found.owner]
        if spec.get("strategy", {}).get("type") == "Recreate":
            assert (replicas, found.spec["hostname"]) == (1, one["metadata"]["name"])
        elif found.labels[NAME] == "agent-server":
            assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert scaler["spec"]["minReplicas"] >= 2
