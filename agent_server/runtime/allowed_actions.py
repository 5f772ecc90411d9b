"""Keep what an agent writes to the kinds of action that it may take."""

# V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING or __package__:
    from agent_server.objectives.metrics import actions
else:  # a package holds it beside this file
    import actions


class Writer(Protocol):
    """A language model that goes on with texts."""

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    def clip(self, tokens: Sequence[int]) -> list[int]:
        """Return the newest tokens that leave room for an answer."""

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Return the likeliest continuation."""

    def next_logits(self, before: Sequence[int], choices: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return, for each choice after `before`, the logits of its tokens: [tokens of the choice, V]."""


def masked_action(writer: Writer, prompt: Sequence[int], text: str, kinds: Sequence[str]) -> str:
    """Return a turn with an action of one of the kinds; one that has such an action already as it is.

    It is what was written before its action, the likeliest kind token by token, and what the model writes after that. A
    turn that begins no action is given one.
    """
    if not kinds or not actions.violates(text, kinds):
        return text
    head = actions.before_action(text)
    if head is None:
        head = f"{text.rstrip()}\nAction:" if text.strip() else "Action:"
    # The space before a kind goes with it: tokenizers have it in the word's token, in demonstrations as here.
    head = head.rstrip(" \t")
    before = writer.clip([*prompt, *writer.encode(head)])
    choices = [writer.encode(f" {kind}[") for kind in kinds]
    chosen = _likeliest(writer.next_logits(before, choices), choices)
    line = writer.decode(writer.go_on([*before, *choices[chosen]])).split("\n", 1)[0]
    argument = line[: line.rindex("]")] if "]" in line else line
    return f"{head} {kinds[chosen]}[{argument}]"


def _likeliest(logits: Sequence[Tensor], choices: Sequence[Sequence[int]]) -> int:
    """Return which of several continuations greedy decoding would take if all others were forbidden."""
    log_p = [rows_TV.float().log_softmax(-1) for rows_TV in logits]
    alive, depth = list(range(len(choices))), 0
    while len(alive) > 1:
        going = [i for i in alive if depth < len(choices[i])]
        if not going:
            break
        scores = {i: float(log_p[i][depth, choices[i][depth]]) for i in going}
        best = choices[max(going, key=lambda i: scores[i])][depth]
        alive = [i for i in going if choices[i][depth] == best]
        depth += 1
    return alive[0]
