"""Texts beside numbers, such as the features of an image: a text encoder of either kind, and one head over both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_server.runtime.encoder_head import EncoderAgent, load_weights
else:  # a package holds it beside this file
    from encoder_head import EncoderAgent, load_weights


def load(folder: Path, config: Mapping[str, Any], output: str) -> EncoderAgent:
    """Return the agent of a package's folder."""
    encoder: Any
    read: set[str] = set()
    if config["encoder"]["kind"] == "transformers":
        if TYPE_CHECKING:
            from agent_server.runtime import transformers_agent
        else:
            import transformers_agent
        encoder, read = transformers_agent.read_encoder(folder, config["encoder"])
    else:
        if TYPE_CHECKING:
            from agent_server.runtime import recurrent_agent
        else:
            import recurrent_agent
        encoder = recurrent_agent.read_encoder(folder, config["encoder"])
    model = EncoderAgent(encoder, output, config["labels"], config["sizes"])
    load_weights(model, folder, read=read)
    return model.eval()
