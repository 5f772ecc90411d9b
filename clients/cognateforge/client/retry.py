"""gRPC's own retries, for exactly those methods whose policy in the contract allows a repetition."""

from __future__ import annotations

import json
from collections.abc import Iterable

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from cognateforge.policy.v1 import policy_pb2

REPEATABLE = frozenset({policy_pb2.REPEAT_SAFE, policy_pb2.REPEAT_BY_REQUEST_ID})

# 0.1 + 0.2 + 0.4 s at most: long enough for a restart behind a balancer, short enough for a person who waits.
RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# Retries stop while more than half of the recent calls fail, so that they do not add to an outage.
RETRY_THROTTLING = {"maxTokens": 10, "tokenRatio": 0.1}


def may_repeat(method: MethodDescriptor) -> bool:
    """Return whether the contract allows a call without an answer to be made again."""
    return method.GetOptions().Extensions[policy_pb2.access].repeat in REPEATABLE


def service_config(services: Iterable[ServiceDescriptor], *, balanced: bool = False) -> str:
    """Return the channel's service config as JSON.

    `balanced` spreads calls over several addresses and leaves out those whose health service says NOT_SERVING. There is
    no `timeout` in it: gRPC's fires early and is not sent to the server.
    """
    names = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if may_repeat(method)
    ]
    config: dict[str, object] = {"retryThrottling": RETRY_THROTTLING}
    if names:
        config["methodConfig"] = [{"name": names, "retryPolicy": RETRY_POLICY}]
    if balanced:
        config |= {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    return json.dumps(config)
