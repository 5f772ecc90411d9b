"""Texts in pieces as a language model reads them: tokens, and with what weight each of them is to be predicted.

Every text begins with the model's begin token, so that its first token is predicted from something. Pieces are encoded
one by one: a prompt has the same tokens with and without its answer.
"""

# B rows, T tokens of the longest row, N tokens that are predicted, V vocabulary, K tokens kept of the untrained model.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agent_server.architectures.model import AgentBatch, AgentModel, collate
from agent_server.data.examples import Segment, Written
from cognateforge.exceptions import FieldViolation, InvalidFieldError
from training_common.attempt import Json

# A prompt keeps this share of the tokens at least, however long the answer is.
_PROMPT_SHARE = 4
NO_TURN = -1


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """The tokens of a text, or of a part of it.

    targets: what is predicted in each token's place: itself, or the end token where a trained piece has ended and the
    text goes on. So the text that is read stays plain, and the model learns where to stop.
    weights: of each target; 0 for what is only read.
    turns: number of the trained piece that each target belongs to, which parts of one text share, or NO_TURN.
    prompt: tokens before the first trained one. lost: trained tokens that were cut off. cut: whether anything was.
    reference: the untrained model's likeliest tokens and their log probabilities at each token's place, [T, K] each.
    """

    tokens: Sequence[int]
    targets: Sequence[int]
    weights: Sequence[float]
    turns: Sequence[int]
    prompt: int
    accepted: Json = None
    lost: int = 0
    cut: bool = False
    reference: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> bool:
        """Whether any token is to be predicted."""
        return any(self.weights)


def encode_texts(model: AgentModel, examples: Sequence[Written], *, ends: bool = True) -> list[EncodedText]:
    """Return every text whole.

    ends: behind each trained run of pieces the end token is predicted.
    """
    merged = [_merge(example.segments) for example in examples]
    encodings = iter(model.encode([segment.text for segments in merged for segment in segments]))
    rows, turn = list[EncodedText](), 0
    for example, segments in zip(examples, merged, strict=True):
        tokens, targets, turns, ending = [model.begin_token], [model.begin_token], [NO_TURN], False
        for segment in segments:
            own = list(next(encodings).tokens)
            tokens += own
            targets += own
            turns += [turn if segment.trained else NO_TURN] * len(own)
            if own and ending:  # the piece before was trained: behind it comes the end, whatever is read next
                targets[-len(own)], turns[-len(own)], ending = model.end_token, turn - 1, False
            turn += segment.trained
            ending = ending or (segment.trained and ends)
        if ending:
            tokens, targets, turns = [*tokens, model.end_token], [*targets, model.end_token], [*turns, turn - 1]
        rows.append(
            EncodedText(
                tokens=tokens,
                targets=targets,
                weights=[0.0 if one == NO_TURN else example.weight for one in turns],
                turns=turns,
                prompt=next((i for i, one in enumerate(turns) if one != NO_TURN), len(tokens)),
                accepted=example.accepted,
            )
        )
    return rows


def encode_prompt(model: AgentModel, segments: Sequence[Segment], *, max_tokens: int) -> list[int]:
    """Return the tokens that an agent answers to, the last max_tokens of them."""
    (row,) = encode_texts(model, [Written((*segments, Segment("", trained=True)))], ends=False)
    return clip_left(row.tokens, max_tokens)


def clip_left(tokens: Sequence[int], most: int) -> list[int]:
    """Return the first token and the last ones, `most` together."""
    return list(tokens) if len(tokens) <= most else [tokens[0], *tokens[len(tokens) - most + 1 :]]


def _merge(segments: Iterable[Segment]) -> list[Segment]:
    """Return the pieces, neighbours of a kind in one."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].trained == segment.trained:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.trained)
        else:
            merged.append(segment)
    return merged


def room(model: AgentModel, max_tokens: int) -> int:
    """Return how many tokens a row may have. Errors: InvalidFieldError, where nothing could be predicted."""
    if max_tokens < 2:
        description = f"must be 2 at least where texts are written, not {max_tokens}: the first token is only read"
        raise InvalidFieldError(
            f"max_tokens {description}", violations=[FieldViolation(field="max_tokens", description=description)]
        )
    return min(max_tokens, model.context) if model.context else max_tokens


def cut(row: EncodedText, most: int) -> EncodedText:
    """Return a text of at most so many tokens, as much as can be of its first trained tokens among them.

    The prompt is cut from the left, down to a quarter of `most`; what is still too long is cut from the right.
    """
    total = len(row.tokens)
    if total <= most:
        return row
    kept_prompt = max(1, min(row.prompt, max(most - (total - row.prompt), most // _PROMPT_SHARE)))
    first, end = row.prompt - kept_prompt + 1, row.prompt + most - kept_prompt
    kept = [0, *range(first, min(end, total))]
    return replace(
        row,
        tokens=[row.tokens[i] for i in kept],
        targets=[row.targets[i] for i in kept],
        weights=[row.weights[i] for i in kept],
        turns=[row.turns[i] for i in kept],
        prompt=kept_prompt,
        lost=sum(turn != NO_TURN for turn in row.turns[end:]),
        cut=True,
    )


def windows(row: EncodedText, most: int, *, overlap: int) -> list[EncodedText]:
    """Return a text in parts of at most so many tokens, so that each trained token is predicted in one of them.

    overlap: tokens that a part repeats from the end of the one before and only reads. Parts that train nothing are left
    out; of a text without trained tokens the first remains.
    """
    parts: list[EncodedText] = []
    start, end = 0, 0
    while end < len(row.tokens):
        start = max(0, end - min(overlap, most - 1))
        read, end = end, min(start + most, len(row.tokens))
        weights = [weight if i >= read else 0.0 for i, weight in enumerate(row.weights[start:end], start)]
        if any(weights) or not parts:
            turns = [turn if i >= read else NO_TURN for i, turn in enumerate(row.turns[start:end], start)]
            prompt = next((i for i, turn in enumerate(turns) if turn != NO_TURN), len(turns))
            read_tokens, targets = row.tokens[start:end], row.targets[start:end]
            parts.append(replace(row, tokens=read_tokens, targets=targets, weights=weights, turns=turns, prompt=prompt))
    trained = [part for part in parts if part.trained]
    return trained or parts[:1]


def padded(rows: Sequence[EncodedText]) -> dict[str, Tensor]:
    """Return tokens_BT and valid_BT, targets_BT and their weights_BT."""
    inputs = collate([row.tokens for row in rows])
    targets = collate([row.targets for row in rows])
    weights_BT = torch.zeros(inputs.tokens_BT.shape)
    for i, row in enumerate(rows):
        weights_BT[i, : len(row.weights)] = torch.tensor(row.weights)
    weights_BT[:, 0] = 0  # of nothing before it, the first token is never predicted
    return {
        "tokens_BT": inputs.tokens_BT,
        "valid_BT": inputs.valid_BT,
        "targets_BT": targets.tokens_BT,
        "weights_BT": weights_BT,
    }


def target_logits(model: AgentModel, batch: AgentBatch, chosen_BT: Tensor) -> Tensor:
    """Return the logits that the chosen targets are predicted by, row by row, [N, V]: those of the token before."""
    return model.logits_at(batch, F.pad(chosen_BT[:, 1:], (0, 1))).float()


def first_rows(tensors: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Return as many rows of a batch as have so many tokens together, one at least."""
    rows = max(1, tokens // tensors["tokens_BT"].shape[1])
    return {name: part[:rows] for name, part in tensors.items()}
