"""The model card of a published agent: what it is for, what it was made of, what was measured, and its limits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_server.adaptation import MERGE_TOLERANCE
from agent_server.bases import Base
from agent_server.data.examples import DataManifest
from agent_server.evaluation import Evaluation
from agent_server.tasks import OUTPUTS, Output
from training_common.artifacts.cards import results_table, source_text

_USES = {
    "classification": "Gives a short text one of {labels}.",
    "extraction": "Finds the spans of a text that fill slots: {labels}.",
    "behavioural": "Writes an agent's next action, as demonstrated trajectories show it.",
    "dialogue": "Writes the agent's next turn of a dialogue.",
    "domain": "Continues texts of the domain that its documents are of.",
    "question_answering": "Answers a question, with a context where one is given.",
    "tool_calling": "Writes calls of the tools that a request comes with.",
    "preference": "Writes an answer of the kind that was preferred in pairs of answers.",
    "reinforcement": "Chooses an action for each observation of its environment.",
    "multi_agent": "Chooses the actions of several agents in the environment that they share.",
}
_LIMITS = {
    Output.CLASSES: "It always answers with one of its labels, also where none fits.",
    Output.TAGS: "It finds the slots that it was trained on, and no others.",
    Output.LANGUAGE: "It writes what is likely after its training texts, and that need not be true or harmless.",
    Output.ACTIONS: "It knows its own environment, and acts blindly in any other.",
}
# More labels than this are counted, not listed.
_LISTED_LABELS = 40


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells. config: the agent's config.json. licences: names of files in its folder licences/."""

    agent: str
    architecture: str
    task: str
    labels: Sequence[str]
    base: Base
    data: DataManifest
    licences: Sequence[str]
    config: Mapping[str, Any]
    evaluations: Sequence[Evaluation]
    trainable_parameters: int
    total_parameters: int
    runs: bool


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown. Every number in it was measured or counted in the run that made the agent."""
    training = facts.config["training"]
    optimization = training["optimization"]
    measured = results_table(dataclasses.asdict(evaluation) for evaluation in facts.evaluations)
    return f"""# {facts.agent}

{_USES[facts.task].format(labels=_labels(facts.labels))}

## Made of

{_bottom(facts.base)}
- Architecture: {facts.architecture}
- Training rows: {facts.data.rows["train"]} of {source_text(vars(facts.data))}
- Licence of the data: {_licence(facts.data, facts.licences)}
- Trained parameters: {facts.trainable_parameters:,} of {facts.total_parameters:,} ({facts.config["adaptation"]})
- {_steps(facts.config)} of {training["batch_size"]} rows, {optimization["optimizer"]}, peak learning rate \
{optimization["lr"]:g}, schedule {optimization["schedule"]}, seed {training["seed"]}

lineage.json has the digests of all of it.

## Measured

{measured}

{_merge_line(facts.config["merge_logit_change"])}
{running("a text") if facts.runs else _running_by_plugin(facts.architecture)}
## Intended use and limits

It is meant for texts like those that it was trained on. {_limits(facts)} Texts are cut off after
{facts.config["max_tokens"]} tokens. The figures are of the rows named above; others may be answered worse. Nobody has
looked for bias in it: do so before it decides about people.
"""


def running(given: str) -> str:
    """Return how an agent is run, given for instance a text."""
    return f"""
## Running it

    pip install -r requirements.txt
    python run.py '{given}'
    python run.py --check

The last line compares this machine's logits with those of the one where the agent was made (probe.safetensors).
"""


def _running_by_plugin(architecture: str) -> str:
    return f"""
## Running it

The architecture {architecture} is a plugin's, so this folder has no run.py: whoever runs it needs the agent service's
distribution and the plugin installed.

    from pathlib import Path
    from agent_server.architectures.factory import AgentArchitectureFactory

    model = AgentArchitectureFactory().get({json.dumps(architecture)}).load(Path("."))
"""


def _labels(labels: Sequence[str]) -> str:
    if len(labels) > _LISTED_LABELS:
        return f"{len(labels)} labels, named in config.json"
    return f"{len(labels)} labels: {', '.join(labels)}"


def _bottom(base: Base) -> str:
    foundation = f"- Foundation: {base.foundation} ({base.foundation_digest})" if base.foundation else ""
    if base.agent_dir is not None:
        return f"- Agent: {base.name} ({base.digest})" + (f"\n{foundation}" if foundation else "")
    return foundation or f"- Base: {base.text}" + (f" ({base.digest})" if base.digest else "")


def _steps(config: Mapping[str, Any]) -> str:
    taken, kept = config["steps"], config["weights_of_step"]
    best = "" if kept == taken else f" (the weights are those of the best validation, after step {kept})"
    return f"{taken} steps{best}"


def _licence(data: DataManifest, licences: Sequence[str]) -> str:
    if licences:
        return ", ".join(f"[{name}](licences/{name})" for name in licences)
    if data.kind == "generated":
        return "generated by this project, under its own licence"
    return "none was found beside the data: ask its owner"


def _limits(facts: CardFacts) -> str:
    limits = _LIMITS[OUTPUTS[facts.task]]
    if not facts.config["constraints_enforced"]:
        return limits
    held = f"{limits} Its training came to hold it to the kinds of action in package.json"
    return f"{held}, and so does run.py." if facts.runs else f"{held}; whoever runs it has to do so too."


def _merge_line(change: float) -> str:
    if not change:
        return "The files, read back, gave exactly the trained model's logits."
    return (
        f"Merging what was trained beside the base moved no logit by more than {change:.1e} of the largest one "
        f"(allowed: {MERGE_TOLERANCE:.0e}). The files, read back, gave exactly the merged model's logits."
    )
