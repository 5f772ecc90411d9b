"""The services that each client speaks to, as descriptors, and the words for their health."""

from __future__ import annotations

from grpc_health.v1 import health_pb2

from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.artifact.v1 import storage_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2, resource_pb2

COGNATE = (
    pretraining_pb2.DESCRIPTOR.services_by_name["CognatePretrainingService"],
    model_pb2.DESCRIPTOR.services_by_name["ModelService"],
    resource_pb2.DESCRIPTOR.services_by_name["ResourceService"],
    storage_pb2.DESCRIPTOR.services_by_name["StorageService"],
)
AGENT = (
    training_pb2.DESCRIPTOR.services_by_name["AgentForgeTrainingService"],
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
    storage_pb2.DESCRIPTOR.services_by_name["StorageService"],
)


def health_word(status: int) -> str:
    """Return the name of a health status; a number that this release does not know is UNKNOWN."""
    known = health_pb2.HealthCheckResponse.ServingStatus.DESCRIPTOR.values_by_number.get(status)
    return known.name if known else "UNKNOWN"
