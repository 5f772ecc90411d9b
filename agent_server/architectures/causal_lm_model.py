"""A language model out of a model folder of `transformers`, writing with its key-value cache."""

# B rows, T tokens of the longest row, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agent_server.architectures.encoders import read_config, read_weights, write_agent
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentBatch, AgentModel, Encoding
from agent_server.architectures.transformers_model import (
    PretrainedText,
    adapt_pretrained,
    read_base,
    reread_base,
    write_base,
)
from agent_server.bottlenecks import bottleneck_width, install_bottlenecks
from agent_server.runtime.text_parts import blocks_of, end_of, is_causal
from agent_server.tasks import Output
from cognateforge.exceptions import IncompatibleError
from training_common.attempt import Json

NAME = "causal_lm"


class CausalLanguageModel(AgentModel):
    """A causal language model. Every text stands behind the tokens that its tokenizer begins texts with.

    A text without any, and a prompt without tokens, begins with the token that ends texts.
    """

    output = Output.LANGUAGE

    def __init__(self, base: Any, text: PretrainedText, *, task: str) -> None:
        super().__init__()
        self.base = base
        self.text = text
        self.task = task
        self.context = text.context(len(text.prefix))
        self._end = end_of(base)
        if self._end < 0:
            raise IncompatibleError(
                "the model folder names no token that ends texts; set eos_token_id in its config.json"
            )

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        return self.text.encode(texts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.text.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def end_token(self) -> int:
        """The token that ends a text."""
        return self._end

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return logits_BTV of each next token."""
        tokens_BT, valid_BT = self.text.framed(batch, suffix=())
        logits_BTV: Tensor = self.base(input_ids=tokens_BT, attention_mask=valid_BT.long(), use_cache=False).logits
        return logits_BTV[:, len(self.text.prefix) :]

    def head_parameters(self) -> list[nn.Parameter]:
        """Return none: the language head was trained with the rest."""
        return []

    def base_model(self) -> nn.Module:
        """Return the model of transformers."""
        module: nn.Module = self.base
        return module

    def blocks(self) -> Sequence[nn.Module]:
        """Return its layers."""
        return blocks_of(self.base)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, cut off where the context ends."""
        begun = [[*self.text.prefix, *prompt] or [self.end_token] for prompt in prompts]
        bound = self.text.positions
        room = [min(max_tokens, bound - len(row)) if bound else max_tokens for row in begun]
        written: list[list[int]] = [[] for _ in begun]
        # Rows of equal room go together: none of them may run past its last position.
        for size in sorted({size for size in room if size > 0}):
            rows = [i for i, other in enumerate(room) if other == size]
            for i, tokens in zip(rows, self._continue([begun[i] for i in rows], size, stop), strict=True):
                written[i] = tokens
        return written

    def _continue(self, rows: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        from transformers import GenerationConfig

        ends = sorted({self.end_token, *stop})
        device = next(self.base.parameters()).device
        longest = max(map(len, rows))
        # Padded on the left, so that every row goes on at the same place.
        tokens_BT = torch.tensor([[self.text.pad] * (longest - len(row)) + list(row) for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        # Of its own: what the folder sets, such as sampling or a penalty, is another model's answer.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=self.text.pad
        )
        answer_BT = self.base.generate(input_ids=tokens_BT, attention_mask=mask_BT, generation_config=config)
        return [_before(row, ends) for row in answer_BT[:, longest:].tolist()]

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write the folder `base`, the weights beside it, and the configuration."""
        written = {f"base.{name}" for name in write_base(self.base, self.text.files, folder)}
        config: dict[str, Json] = {
            "architecture": NAME, "task": self.task, "bottleneck_width": bottleneck_width(self.blocks())
        }  # fmt: skip
        write_agent(self, folder, written=written, config=config | dict(extra))


def _before(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:place])


def build(request: BuildRequest) -> CausalLanguageModel:
    """Return the model of a model folder, adapted. Errors: DataUnavailableError, IncompatibleError."""
    if request.base_dir is None:
        raise IncompatibleError(f"the {NAME} architecture stands on a model folder; name one in plan.model_folder")
    name = request.base_dir.name
    base, files = read_base(request.base_dir, name, language=True)
    if not is_causal(base.config):
        raise IncompatibleError(
            f"{name} is a {base.config.model_type}, whose tokens see what is behind them; use a decoder, or the "
            "architecture sequence_classifier"
        )
    model = CausalLanguageModel(base, PretrainedText(base, files, name), task=request.task)
    adapt_pretrained(base, request.adaptation, request.seed)
    return model


def build_on(folder: Path, request: BuildRequest) -> CausalLanguageModel:
    """Return a published agent, to be trained further. Errors: ArtifactCorruptError, IncompatibleError."""
    model = load(folder)
    model.task = request.task
    adapt_pretrained(model.base, request.adaptation, request.seed)
    return model


def load(folder: Path) -> CausalLanguageModel:
    """Return an agent that was saved. Errors: ArtifactCorruptError."""
    config = read_config(folder, NAME)
    base, text = reread_base(folder, language=True)
    read = {f"base.{name}" for name in base.state_dict()}
    width = int(config.get("bottleneck_width", 0))
    install_bottlenecks(blocks_of(base), width, features=int(base.config.get_text_config().hidden_size))
    model = CausalLanguageModel(base, text, task=str(config.get("task", "")))
    read_weights(model, folder, read=read)
    return model.eval()
