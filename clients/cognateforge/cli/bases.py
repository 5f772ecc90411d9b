"""Options of what an agent is made of, and of its architecture's settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.names import check_artifact_name

if TYPE_CHECKING:
    from cognateforge.agent.v1 import training_pb2

Foundation = Annotated[
    str, typer.Option(help="Foundation model, for instance cognate-25m@7.", callback=check_artifact_name)
]
ModelFolder = Annotated[str, typer.Option(help="Model folder of transformers, relative to the server's.")]
Scratch = Annotated[bool, typer.Option("--scratch", help="Begin with random values.")]
Continue = Annotated[
    str,
    typer.Option("--continue", help="Published agent to go on with, as intent-router@3.", callback=check_artifact_name),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", help="NAME=VALUE, as the architecture declares it. May be repeated."),
]

# Of a value that is refused, so much is quoted.
_TOLD_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an agent is made of: one of these, or, for one that acts, none."""

    foundation: str
    model_folder: str
    scratch: bool
    agent: str

    def given(self) -> list[str]:
        """Return the options that were given."""
        named = (
            ("--foundation", self.foundation),
            ("--model-folder", self.model_folder),
            ("--scratch", self.scratch),
            ("--continue", self.agent),
        )
        return [option for option, value in named if value]


def set_base(plan: training_pb2.TrainingPlan, base: Base, *, task: str, acts: bool, accept_experimental: bool) -> None:
    """Set a plan's base, and its architecture where that was left out. Errors: typer.BadParameter."""
    given = base.given()
    if acts:
        if given:
            raise typer.BadParameter(
                f"is not for {task}: an agent that acts learns in its environment", param_hint=given[0]
            )
        plan.scratch.SetInParent()
        plan.architecture = plan.architecture or "policy"
        return
    options = "--foundation, --model-folder, --scratch, --continue"
    if len(given) > 1:
        raise typer.BadParameter(
            f"an agent is made of one base: leave out all but one of {', '.join(given)}", param_hint=options
        )
    if not given:
        raise typer.BadParameter(f"one of them is needed for {task}", param_hint=options)
    if base.foundation:
        plan.foundation.name = base.foundation
        plan.foundation.accept_experimental = accept_experimental
        default = "cognate"
    elif base.model_folder:
        plan.model_folder.path = base.model_folder
        default = "sequence_classifier" if task in ("classification", "extraction") else "causal_lm"
    elif base.scratch:
        plan.scratch.SetInParent()
        default = "recurrent"
    else:
        plan.agent_version.name = base.agent
        default = ""
    plan.architecture = plan.architecture or default
    if not plan.architecture:
        raise typer.BadParameter("is needed with --continue: that of the agent", param_hint="--architecture")


def set_settings(plan: training_pb2.TrainingPlan, given: list[str] | None) -> None:
    """Set the architecture's settings, each of the kind that it looks like. Errors: typer.BadParameter."""
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--setting")
        setting = plan.settings.add(name=name)
        if value in ("true", "false"):
            setting.flag = value == "true"
        elif (number := _number(value)) is None:
            setting.word = value
        elif isinstance(number, int):
            setting.integer = number
        else:
            setting.number = number


def _number(text: str) -> int | float | None:
    """Return a number, None of what is none. Errors: typer.BadParameter, for one that no setting can be."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # What int() reads in full and the contract cannot carry must not become a word, nor a rounded number.
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise _beyond(text)
        if math.isfinite(number):
            return number
    # int() gives up on thousands of digits, and float() on what is beyond its range becomes infinite.
    if re.fullmatch(r"[+-]?(?=\.?[0-9])[0-9_]*\.?[0-9_]*([eE][+-]?[0-9]+)?", text):
        raise _beyond(text)
    return None


def _beyond(text: str) -> typer.BadParameter:
    told = text if len(text) <= _TOLD_CHARS else f"{text[:_TOLD_CHARS]}..."
    return typer.BadParameter(
        f"{told} is beyond what a setting can hold: a whole number has 64 bits, another one is finite",
        param_hint="--setting",
    )
