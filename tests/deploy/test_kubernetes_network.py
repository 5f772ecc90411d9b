"""The network between pods of every installation: the exchange's arrow, what each needs beside it, and nothing else."""

import itertools

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has Kubernetes' schemas, is missing")

from tests.support.cluster import INSTALLATIONS, NAME, Network, Peer, installation, of_kind, pods
from tests.support.manifests import needs_kubectl

pytestmark = needs_kubectl
on_every_installation = pytest.mark.parametrize("name", INSTALLATIONS)

GRPC = {"cognate": 7101, "agent-forge": 7102}
ADMIN = {"cognate": 7111, "agent-forge": 7112}
SERVICE = {"cognate": "cognate", "agent-forge": "agent"}
STORES = {
    "databases": {"cognateforge.dev/provides": "postgresql"},
    "buckets": {"cognateforge.dev/provides": "objects"},
    "monitoring": {},
    "kube-system": {},
    "elsewhere": {},
}
PROMETHEUS = Peer("monitoring", {NAME: "prometheus"})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
DATABASE, BUCKET = Peer("databases", {"app": "postgresql"}), Peer("buckets", {"app": "seaweedfs"})
STRANGER = Peer("elsewhere", {"app": "anything"})
OPERATOR = Peer("cognateforge", {NAME: "forge"})
OUTSIDE, CONTROL_PLANE = Peer(address="93.184.215.14"), Peer(address="172.18.0.2")


def network(name: str) -> Network:
    objects = installation(name)
    own = {one["metadata"]["name"]: one["metadata"]["labels"] for one in of_kind(objects, "Namespace")}
    return Network(objects, {**STORES, **own})


def peers(name: str) -> list[Peer]:
    """Every pod of both services, each kind once."""
    made = {(found.namespace, tuple(sorted(found.labels.items()))) for found in pods(installation(name))}
    return [Peer(namespace, dict(labels)) for namespace, labels in sorted(made)]


def role(peer: Peer) -> str:
    return peer.labels[NAME]


@on_every_installation
def test_between_the_services_is_the_exchange_alone(name: str) -> None:
    """Of all pods and all ports that the services use: from agents' servers and workers to Cognate's servers."""
    net = network(name)
    ports = [*GRPC.values(), *ADMIN.values(), 5432, 443, 6443, 8265, 6379, 10001, 29400, 45_123]
    edges = {
        (role(source), role(target), port)
        for source, target in itertools.permutations(peers(name), 2)
        if source.namespace != target.namespace
        for port in ports
        if net.allows(source, target, port)
    }
    assert edges == {(source, "cognate-server", 7101) for source in agents_that_fetch(name)}


def agents_that_fetch(name: str) -> set[str]:
    return {role(one) for one in peers(name)} & {"agent-server", "agent-worker"}


@on_every_installation
def test_every_namespace_lets_nothing_through_by_itself(name: str) -> None:
    """A policy without rules for all pods; a pod that no other policy knows reaches nothing but names."""
    for namespace in ("cognate", "agent-forge", "cognateforge"):
        denied = {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
        }
        found = [
            one["spec"]
            for one in of_kind(installation(name), "NetworkPolicy")
            if one["metadata"]["namespace"] == namespace
        ]
        assert denied in found
    net = network(name)
    unknown = Peer("agent-forge", {"app": "unknown"})
    for other in (*peers(name), DATABASE, BUCKET, STRANGER, OUTSIDE, CONTROL_PLANE):
        for port in (443, 5432, 7101, 7102, 7111, 7112):
            assert not net.allows(unknown, other, port), (other, port)
            assert other.address or not net.allows(other, unknown, port), (other, port)


@on_every_installation
def test_inside_a_service(name: str) -> None:
    """Smoke tests call servers, workers exchange gradients; nobody else dials anybody."""
    net = network(name)
    for source, target in itertools.product(peers(name), peers(name)):
        if source.namespace != target.namespace:
            continue
        service = SERVICE[source.namespace]
        both = (role(source), role(target))
        calls = both == (f"{service}-smoke", f"{service}-server")
        assert net.allows(source, target, GRPC[source.namespace]) == (
            calls or (both == (f"{service}-worker",) * 2 and trains_alone(name, source))
        ), both
        assert net.allows(source, target, 29_400) == (
            both == (f"{service}-worker",) * 2 and trains_alone(name, source)
        ), both
        ray = (f"{service}-server", f"{service}-worker") == both and "ray" in name and service == "cognate"
        if source is not target and not ray:
            assert not net.allows(source, target, ADMIN[source.namespace]) or both == (f"{service}-worker",) * 2, both


def trains_alone(name: str, worker: Peer) -> bool:
    """Whether workers are pods of their own, and not processes in a pool's."""
    return not (name == "pool" and worker.namespace == "agent-forge")


@on_every_installation
def test_what_each_needs_is_open(name: str) -> None:
    """DNS for all, stores for those that use them, scrapes by Prometheus, operators' calls, the cluster's API."""
    net = network(name)
    for one in peers(name):
        service, kind = role(one).rsplit("-", 1)
        stores = kind in ("server", "worker", "backup") and name != "development"
        buckets = stores and name not in ("cluster", "ray")
        assert net.allows(one, DNS, 53, "UDP")
        assert net.allows(one, DATABASE, 5432) == stores, role(one)
        assert net.allows(one, BUCKET, 9000) == buckets, role(one)
        assert net.allows(one, OUTSIDE, 443) == (buckets or (kind == "server" and uses_api(name, service))), role(one)
        assert net.allows(one, CONTROL_PLANE, 6443) == (kind == "server" and uses_api(name, service)), role(one)
        assert not net.allows(one, STRANGER, 80)
        assert not net.allows(STRANGER, one, GRPC[one.namespace])
        is_server = any(found.is_server for found in pods(installation(name)) if found.labels == one.labels)
        assert net.allows(PROMETHEUS, one, ADMIN[one.namespace]) == (is_server and name != "development"), role(one)
        assert net.allows(OPERATOR, one, GRPC[one.namespace]) == (kind == "server"), role(one)


def uses_api(name: str, service: str) -> bool:
    """Whether its servers create TrainJobs."""
    return name != "development" and (name, service) not in {("ray", "cognate"), ("pool", "agent")}


def test_only_servers_reach_rays_job_server() -> None:
    """It asks nobody who they are. KubeRay labels the head; its operator looks at it too."""
    net = network("ray")
    head = Peer("cognate", {NAME: "cognate-worker", "ray.io/node-type": "head"})
    reaching = {
        role(one) for one in (*peers("ray"), OPERATOR, STRANGER) if NAME in one.labels and net.allows(one, head, 8265)
    }
    assert reaching == {"cognate-server", "cognate-worker"}
    assert net.allows(Peer("ray-system", {NAME: "kuberay-operator"}), head, 8265)
