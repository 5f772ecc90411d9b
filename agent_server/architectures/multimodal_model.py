"""Text beside the features of an image: a text encoder, a projection of the features, and one head over both."""

from __future__ import annotations

from pathlib import Path

from agent_server.architectures import recurrent_model, transformers_model
from agent_server.architectures.encoders import EncoderAgent, Sizes, TextEncoder, load_encoder_agent, read_config
from agent_server.architectures.factory import BuildRequest
from cognateforge.exceptions import ArtifactCorruptError

NAME = "multimodal"


def build(request: BuildRequest) -> EncoderAgent:
    """Return an agent on a model folder's encoder, or on a recurrent one from scratch.

    Errors: DataUnavailableError, IncompatibleError.
    """
    encoder: TextEncoder
    if request.base_dir is None:
        encoder = recurrent_model.new_encoder(request)
    else:
        pooling = str(request.settings["pooling"])
        encoder = transformers_model.read_encoder(request.base_dir, request.base_dir.name, pooling=pooling)
    sizes: Sizes = {
        "dropout": float(request.settings["dropout"]),
        "features": int(request.settings["features"]),
        "projection": int(request.settings["projection"]),
    }
    return _on(encoder, request, sizes)


def build_on(folder: Path, request: BuildRequest) -> EncoderAgent:
    """Return a published agent, to be trained further; with other labels its head and projection are new.

    Errors: ArtifactCorruptError, IncompatibleError.
    """
    model = load(folder)
    if model.labels != tuple(request.labels):
        return _on(model.encoder, request, model.sizes)
    model.encoder.adapt(request.adaptation, request.seed)
    return model


def _on(encoder: TextEncoder, request: BuildRequest, sizes: Sizes) -> EncoderAgent:
    encoder.adapt(request.adaptation, request.seed)
    agent = EncoderAgent(encoder, architecture=NAME, task=request.task, labels=request.labels, **sizes)
    agent.start(request.seed)
    return agent


def load(folder: Path) -> EncoderAgent:
    """Return an agent that was saved. Errors: ArtifactCorruptError."""
    config = read_config(folder, NAME).get("encoder", {})
    if config.get("kind") == "transformers":
        return load_encoder_agent(folder, NAME, *transformers_model.reread_encoder(folder, config))
    if config.get("kind") == recurrent_model.NAME:
        return load_encoder_agent(folder, NAME, recurrent_model.reread_encoder(folder, config), set())
    raise ArtifactCorruptError(f"{folder.name}: its encoder is of no kind that this release knows")
