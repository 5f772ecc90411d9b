"""What is deployed together on a cluster, and what its objects say of pods and of the network between them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.manifests import DEPLOY, build

Object = dict[str, Any]
# Every way to install: a platform, a Cognate and an agent service.
INSTALLATIONS = {
    "development": ("development/platform", "development/cognate", "development/agent"),
    "cluster": ("cluster/platform", "cluster/cognate", "cluster/agent"),
    "ray": ("cluster/platform", "cluster/cognate-ray", "cluster/agent"),
    "production": ("production/platform", "production/cognate", "production/agent"),
    "rollouts": ("production/platform", "production/cognate-rollouts", "production/agent"),
    "pool": ("production/platform", "production/cognate", "production/agent-pool"),
}
NAME = "app.kubernetes.io/name"


@functools.cache
def installation(name: str) -> tuple[Object, ...]:
    """Return all objects of an installation."""
    return tuple(one for part in INSTALLATIONS[name] for one in build(DEPLOY / "overlays" / part))


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """Return the objects of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


@dataclass(frozen=True)
class Pods:
    """Pods that an object makes. owner: its kind and name; spec: a PodSpec."""

    owner: str
    namespace: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    source: Mapping[str, Any] = field(repr=False)

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def is_server(self) -> bool:
        """Whether a server runs in them, rather than a worker or a task that ends."""
        return any(port.get("name") == "admin" for one in self.containers for port in one.get("ports", ()))


def pods(objects: Sequence[Object]) -> list[Pods]:
    """Return what makes pods, of whatever kind it is; a runtime's are in the namespace that has its service account."""
    return [Pods(f"{one['kind']} {one['metadata']['name']}", *made, one) for one in objects for made in _pods(one)]


def _pods(one: Object) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, Any]]]:
    spec, namespace = one.get("spec", {}), one["metadata"].get("namespace", "")
    match one["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            templates = [spec["template"]]
        case "CronJob":
            templates = [spec["jobTemplate"]["spec"]["template"]]
        case "AnalysisTemplate":
            templates = [metric["provider"]["job"]["spec"]["template"] for metric in spec["metrics"]]
        case "RayCluster":
            templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
        case "ClusterTrainingRuntime":
            templates = [job["template"]["spec"]["template"] for job in spec["template"]["spec"]["replicatedJobs"]]
            namespace = {"cognate-worker": "cognate", "agent-worker": "agent-forge"}[
                templates[0]["spec"]["serviceAccountName"]
            ]
        case _:
            templates = []
    for template in templates:
        yield namespace, template["metadata"]["labels"], template["spec"]


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or an address outside of every namespace."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


class Network:
    """Which connections NetworkPolicies let through. Both ends have to, as a cluster's network plugin asks."""

    def __init__(self, objects: Sequence[Object], namespaces: Mapping[str, Mapping[str, str]]) -> None:
        self._policies = of_kind(objects, "NetworkPolicy")
        self._namespaces = {
            name: {"kubernetes.io/metadata.name": name, **namespaces.get(name, {})}
            for name in {*namespaces, *(one["metadata"]["namespace"] for one in self._policies)}
        }

    def allows(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
        """Whether a pod may open a connection to a port of another."""
        return self._side("Egress", source, target, port, protocol) and self._side(
            "Ingress", target, source, port, protocol
        )

    def _side(self, direction: str, at: Peer, other: Peer, port: int, protocol: str) -> bool:
        ours = [
            one["spec"]
            for one in self._policies
            if at.namespace == one["metadata"]["namespace"]
            and direction in one["spec"]["policyTypes"]
            and selects(one["spec"]["podSelector"], at.labels)
        ]
        if not ours:
            return True
        ends = {"Ingress": "from", "Egress": "to"}[direction]
        return any(
            (ends not in rule or any(self._is(peer, other, at.namespace) for peer in rule[ends]))
            and ("ports" not in rule or any(_port(one, port, protocol) for one in rule["ports"]))
            for spec in ours
            for rule in spec.get(direction.lower(), ())
        )

    def _is(self, peer: Mapping[str, Any], other: Peer, own: str) -> bool:
        if "ipBlock" in peer:
            # Addresses of pods are in a private range, and an example of one is as good as another.
            address = ipaddress.ip_address(other.address or "10.244.1.7")
            block = peer["ipBlock"]
            return address in ipaddress.ip_network(block["cidr"]) and not any(
                address in ipaddress.ip_network(one) for one in block.get("except", ())
            )
        if other.address:
            return False
        if "namespaceSelector" in peer:
            inside = selects(peer["namespaceSelector"], self._namespaces.get(other.namespace, {}))
        else:
            inside = other.namespace == own
        return inside and selects(peer.get("podSelector", {}), other.labels)


def _port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    return bool(rule.get("protocol", "TCP") == protocol and rule.get("port", port) == port)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects labels. Errors: KeyError, for an operator that is not known."""
    wanted = selector.get("matchLabels", {}).items() <= dict(labels).items()
    operators: dict[str, Callable[[str, Sequence[str]], bool]] = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, _values: key in labels,
        "DoesNotExist": lambda key, _values: key not in labels,
    }
    return wanted and all(
        operators[one["operator"]](one["key"], one.get("values", ())) for one in selector.get("matchExpressions", ())
    )
