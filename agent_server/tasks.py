"""The tasks that agents are trained for, by their field names in TrainingPlan: what each asks of a model.

Free of torch.

Forms of examples (`agent_server.data.examples`) and of `Written.accepted`:

    classification      Labelled
    extraction          Tagged; the labels are the slots
    behavioural         Written, one text for each turn of the agent that acts: accepted = the action as it is written
    dialogue            Written; accepted = None
    domain              Written, one segment; accepted = None
    question_answering  Written; accepted = the list of accepted answers
    tool_calling        Written; accepted = the row's {"category": ..., "functions": [...], "ground_truth": [...]}
    preference          Preferred
    reinforcement, multi_agent   none: they act in environments
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Output(enum.StrEnum):
    """What a model gives for a batch of B rows of T tokens."""

    CLASSES = "classes"
    """Logits of each row's labels, [B, L]."""
    TAGS = "tags"
    """Logits of each token's tags, [B, T, 1 + 2 L]: outside, then beginning and inside of each slot."""
    LANGUAGE = "language"
    """Logits of each next token, [B, T, V]."""
    ACTIONS = "actions"
    """Logits of each observation's actions, or mean and deviation of them."""


OUTPUTS: Mapping[str, Output] = {
    "classification": Output.CLASSES,
    "extraction": Output.TAGS,
    "behavioural": Output.LANGUAGE,
    "dialogue": Output.LANGUAGE,
    "domain": Output.LANGUAGE,
    "question_answering": Output.LANGUAGE,
    "tool_calling": Output.LANGUAGE,
    "preference": Output.LANGUAGE,
    "reinforcement": Output.ACTIONS,
    "multi_agent": Output.ACTIONS,
}

# The tasks that act in environments, and those that learn from rows.
ACTING: tuple[str, ...] = tuple(task for task, output in OUTPUTS.items() if output is Output.ACTIONS)
WITH_ROWS: tuple[str, ...] = tuple(task for task in OUTPUTS if task not in ACTING)
# The tasks of language models.
WRITING: tuple[str, ...] = tuple(task for task, output in OUTPUTS.items() if output is Output.LANGUAGE)
