"""The services that each client speaks to, as descriptors."""

from __future__ import annotations

from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2, resource_pb2

COGNATE = (
    pretraining_pb2.DESCRIPTOR.services_by_name["CognatePretrainingService"],
    model_pb2.DESCRIPTOR.services_by_name["ModelService"],
    resource_pb2.DESCRIPTOR.services_by_name["ResourceService"],
)
AGENT = (
    training_pb2.DESCRIPTOR.services_by_name["AgentForgeTrainingService"],
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
)
