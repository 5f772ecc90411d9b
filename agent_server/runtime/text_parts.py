"""What agents over texts and their packages share: parts of networks, and how a model of transformers is read.

Like every module here it imports nothing of this project; a package holds it byte for byte.
"""

# B rows, T tokens of the longest row, D width, H width of a direction, F features.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

# A feature that hardly moves among the measured rows must not be blown up beyond reason.
_MIN_DEVIATION = 1e-3
_CELLS: Mapping[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


def mean_of(hidden_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the mean over valid positions, [B, D]; zeros of a row without any."""
    valid_BT1 = valid_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD.masked_fill(~valid_BT.unsqueeze(-1), 0) * valid_BT1).sum(1) / valid_BT1.sum(1).clamp(min=1)


class Standardized(nn.Module):
    """(x - mean) / deviation, each as it was measured. Until then it changes nothing.

    Features differ in scale by what made them: a head that starts near zero would learn from the largest alone.
    """

    mean_F: Tensor
    scale_F: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(features))
        self.register_buffer("scale_F", torch.ones(features))

    @torch.no_grad()
    def measure(self, x_BF: Tensor) -> None:
        """Take mean and deviation from rows, unless they were taken before: a trained head rests on them."""
        if bool((self.scale_F == 1).all()):
            self.mean_F.copy_(x_BF.mean(0))
            self.scale_F.copy_(1 / x_BF.std(0, correction=0).clamp(min=_MIN_DEVIATION))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Return x, standardized."""
        return (x_BF - self.mean_F) * self.scale_F


class State:
    """What a layer has read of each row: a tensor of a GRU, a pair of an LSTM, None at the beginning."""

    value: Any = None


class RecurrentLayer(nn.Module):
    """One layer, read from left to right and, if asked, from right to left beside it; padding changes nothing.

    The second direction reads every row turned around within its own length, in place of a packed sequence.
    """

    def __init__(self, cell: str, inputs: int, width: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.forwards = _CELLS[cell](inputs, width, batch_first=True)
        self.backwards = _CELLS[cell](inputs, width, batch_first=True) if bidirectional else None

    def forward(self, x_BTD: Tensor, valid_BT: Tensor, state: State | None = None) -> Tensor:
        """Return hidden_BTD. With a state: go on from it, and leave in it what follows from each row's last token."""
        if state is not None:
            return self._continue(x_BTD, valid_BT, state)
        there: Tensor = self.forwards(x_BTD)[0]
        if self.backwards is None:
            return there
        lengths_B1 = valid_BT.sum(1, keepdim=True)
        places_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        turned_BT1 = torch.where(valid_BT, lengths_B1 - 1 - places_T, places_T).unsqueeze(-1)
        back: Tensor = self.backwards(x_BTD.gather(1, turned_BT1.expand_as(x_BTD)))[0]
        return torch.cat((there, back.gather(1, turned_BT1.expand_as(back))), -1)

    def _continue(self, x_BTD: Tensor, valid_BT: Tensor, state: State) -> Tensor:
        lengths_B = valid_BT.sum(1).cpu()  # where packing wants them
        packed = pack_padded_sequence(x_BTD, lengths_B, batch_first=True, enforce_sorted=False)
        read, state.value = self.forwards(packed, state.value)
        hidden_BTD: Tensor = pad_packed_sequence(read, batch_first=True, total_length=x_BTD.shape[1])[0]
        return hidden_BTD


# Models of transformers


def framed(
    tokens_BT: Tensor, valid_BT: Tensor, *, prefix: Sequence[int], suffix: Sequence[int], pad: int
) -> tuple[Tensor, Tensor]:
    """Return tokens and mask with special tokens around every text. A row without tokens is one pad token at least."""
    rows = tokens_BT.shape[0]
    lengths_B1 = valid_BT.sum(1, keepdim=True) + len(prefix)
    before, after = tokens_BT.new_tensor(prefix), tokens_BT.new_tensor(suffix)
    framed_BT = torch.cat(
        (
            before.expand(rows, len(prefix)),
            tokens_BT.masked_fill(~valid_BT, pad),
            after.new_full((rows, len(suffix)), pad),
        ),
        1,
    )
    places_T = torch.arange(framed_BT.shape[1], device=tokens_BT.device)
    if suffix:
        framed_BT = framed_BT.scatter(1, lengths_B1 + places_T[: len(suffix)], after.expand(rows, len(suffix)))
    return framed_BT, (places_T < lengths_B1 + len(suffix)) | (places_T == 0)


def pooled(hidden_BTD: Tensor, valid_BT: Tensor, *, by: str) -> Tensor:
    """Return what stands for each row, [B, D]: its first token, its last, or the mean."""
    if by == "first":
        return hidden_BTD[:, 0]
    if by == "last":
        last_B11 = (valid_BT.sum(1) - 1)[:, None, None]  # gathered, so that a graph of it takes any number of rows
        return hidden_BTD.gather(1, last_B11.expand(-1, 1, hidden_BTD.shape[2])).squeeze(1)
    return mean_of(hidden_BTD, valid_BT)


def pooling_of(config: Any, pooling: str) -> str:
    """Return how a model's texts are pooled: "auto" is the last token where a token sees only what is before it."""
    if pooling != "auto":
        return pooling
    return "last" if is_causal(config) else "mean"


def pad_of(config: Any) -> int:
    """Return the token that fills rows up; it is masked, so that any will do where there is none."""
    pad = config.get_text_config().pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    first, last = (own[0], own[-1] + 1) if own else (len(encoding.ids), len(encoding.ids))
    return encoding.ids[:first], encoding.ids[last:]


def positions_of(base: Any) -> int:
    """Return the most tokens that the model has positions for; 0 for no bound."""
    config = base.config.get_text_config()
    bound = getattr(config, "max_position_embeddings", None) or 0
    for name, module in base.named_modules():
        # RoBERTa and its kin count positions from behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return int(bound) if isinstance(bound, int) and bound > 0 else 0


def blocks_of(base: Any) -> list[nn.Module]:
    """Return a model's layers in order, or none where they are not one list that is run once through."""
    count = getattr(base.config.get_text_config(), "num_hidden_layers", 0)
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count > 0]
    return list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=()))


def is_causal(config: Any) -> bool:
    """Whether a token sees only what is before it: a model for writing that is none for filling gaps."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITING,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as FILLING,
    )

    known = config.model_type in WRITING and config.model_type not in FILLING
    return known or bool(getattr(config, "is_decoder", False))


def end_of(base: Any) -> int:
    """Return the token that ends a model's texts; -1 where it names none."""
    for config in (getattr(base, "generation_config", None), base.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        end = ends[0] if isinstance(ends, list | tuple) and ends else ends
        if isinstance(end, int):
            return end
    return -1
