"""Who may call what, read from the descriptors.

Every RPC of this project carries `(cognateforge.policy.v1.access)`; one without it is refused. The standard services
(health and reflection) cannot carry it, so their rule stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pool

from cognateforge.policy.v1 import policy_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor

_PREFIX = "ROLE_"


@dataclass(frozen=True, kw_only=True)
class MethodPolicy:
    """The rule of one RPC. An empty set of roles means everybody."""

    roles: frozenset[str]
    deadline_required: bool
    # It changes something. With a field that this server does not know it would do something other than was asked.
    mutation: bool


# Load balancers ask for health before they have an identity; reflection tells the contract, which is public.
OPEN = MethodPolicy(roles=frozenset(), deadline_required=False, mutation=False)
STANDARD_SERVICES = frozenset(
    {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"}
)


def role_names() -> tuple[str, ...]:
    """Return every role of the contract in lower case, as settings name them."""
    names = policy_pb2.Role.keys()
    return tuple(name.removeprefix(_PREFIX).lower() for name in names if not name.endswith("_UNSPECIFIED"))


def read_policy(method: MethodDescriptor) -> MethodPolicy | None:
    """Return the rule that a method's descriptor carries, or None where it carries none."""
    options = method.GetOptions()
    if not options.HasExtension(policy_pb2.access):
        return None
    access = options.Extensions[policy_pb2.access]
    roles = frozenset(policy_pb2.Role.Name(role).removeprefix(_PREFIX).lower() for role in access.roles)
    if not roles:
        return None
    return MethodPolicy(
        roles=roles,
        deadline_required=access.deadline_required,
        mutation=access.repeat == policy_pb2.REPEAT_BY_REQUEST_ID,
    )


def policies(services: Iterable[str]) -> Mapping[str, MethodPolicy]:
    """Return the rules of every method of the named services, by full method path ("/package.Service/Method")."""
    pool = descriptor_pool.Default()
    table: dict[str, MethodPolicy] = {}
    for service in services:
        if service in STANDARD_SERVICES:
            continue
        for method in pool.FindServiceByName(service).methods:
            policy = read_policy(method)
            if policy is not None:
                table[f"/{service}/{method.name}"] = policy
    return table


def streams_of(methods: Iterable[str]) -> frozenset[str]:
    """Return those of the methods, as "package.Service/Method", that answer by a stream."""
    pool = descriptor_pool.Default()
    found = set()
    for method in methods:
        service, _, name = method.partition("/")
        if pool.FindServiceByName(service).methods_by_name[name].server_streaming:
            found.add(method)
    return frozenset(found)
