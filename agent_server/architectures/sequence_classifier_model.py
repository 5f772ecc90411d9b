"""A model folder of `transformers` with a head of ours: labels for texts, or slots within them."""

from __future__ import annotations

from pathlib import Path

from agent_server.architectures.encoders import EncoderAgent, TextEncoder, load_encoder_agent, read_config
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.transformers_model import read_encoder, reread_encoder
from agent_server.tasks import OUTPUTS
from cognateforge.exceptions import IncompatibleError

NAME = "sequence_classifier"


def build(request: BuildRequest) -> EncoderAgent:
    """Return an untrained head on a model folder's encoder. Errors: DataUnavailableError, IncompatibleError."""
    if request.base_dir is None:
        raise IncompatibleError(f"the {NAME} architecture stands on a model folder; name one in plan.model_folder")
    encoder = read_encoder(request.base_dir, request.base_dir.name, pooling=str(request.settings["pooling"]))
    return _on(encoder, request, float(request.settings["dropout"]))


def build_on(folder: Path, request: BuildRequest) -> EncoderAgent:
    """Return a published agent, to be trained further; its head is kept where task and labels are the same ones.

    Errors: ArtifactCorruptError, IncompatibleError.
    """
    model = load(folder)
    if OUTPUTS[request.task] is not model.output or model.labels != tuple(request.labels):
        return _on(model.encoder, request, model.dropout.p)
    model.task = request.task
    model.encoder.adapt(request.adaptation, request.seed)
    return model


def _on(encoder: TextEncoder, request: BuildRequest, dropout: float) -> EncoderAgent:
    encoder.adapt(request.adaptation, request.seed)
    agent = EncoderAgent(encoder, architecture=NAME, task=request.task, labels=request.labels, dropout=dropout)
    agent.start(request.seed)
    return agent


def load(folder: Path) -> EncoderAgent:
    """Return an agent that was saved. Errors: ArtifactCorruptError."""
    config = read_config(folder, NAME).get("encoder", {})
    return load_encoder_agent(folder, NAME, *reread_encoder(folder, config))
