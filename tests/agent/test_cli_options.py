"""What `forge train` and `forge agents` would not heed is refused, before any server is asked."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from cognateforge.cli.app import app

BASE = ("train", "--agent", "a", "--steps", "9", "--data", "d.jsonl")
ACTING = ("train", "--agent", "a", "--task", "reinforcement", "--environment", "CartPole-v1")
NOBODY = ("--agent-server", "unix:/nobody/listens", "--timeout", "0.5")


def forge(*arguments: str) -> Result:
    """Run a command that reaches no server."""
    return CliRunner().invoke(app, [*arguments, *NOBODY])


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (("--scratch", "--momentum", "0.9"), "--momentum: is for --optimizer sgd"),
        (("--scratch", "--optimizer", "sgd", "--weight-decay", "0.1"), "--weight-decay: is for --optimizer adamw"),
        (("--scratch", "--schedule", "one-cycle", "--warmup-steps", "2"), "is for other schedules than one-cycle"),
        (("--scratch", "--beta", "0.2"), "--beta: is for --task preference"),
        (("--scratch", "--successes-only"), "--successes-only: is for --task behavioural"),
        (("--scratch", "--weight-by-reward"), "--weight-by-reward: is for --task behavioural"),
        (("--scratch", "--task", "dialogue", "--domain", "banking"), "--domain: is for --task classification"),
        (("--scratch", "--task", "dialogue", "--max-rows-per-label", "9"), "is for --task classification"),
        (("--scratch", "--task", "dialogue", "--include-out-of-scope"), "is for --task classification"),
        (("--scratch", "--data-seed", "3"), "--data-seed: is for --data generated"),
        (("--scratch", "--accept-experimental"), "--accept-experimental: is for --foundation"),
        (("--scratch", "--model-folder", "tiny"), "leave out all but one of --model-folder, --scratch"),
        ((), "one of them is needed for classification"),
    ],
)
def test_an_option_that_would_not_be_heeded_is_refused(arguments: tuple[str, ...], refused: str) -> None:
    """The error names the option and what it is for."""
    result = forge(*BASE, *arguments)
    assert result.exit_code == 2
    assert refused in " ".join(result.stderr.split())


@pytest.mark.parametrize("option", [("--rehearse", "d"), ("--rehearsal-share", "0.3"), ("--max-refused-share", "0")])
def test_an_agent_that_acts_has_no_rows(option: tuple[str, str]) -> None:
    """What is said of rows is refused where there are none; a share of 0 is said too."""
    result = forge(*ACTING, *option)
    assert result.exit_code == 2
    assert f"{option[0]}: is for tasks with rows" in result.stderr


@pytest.mark.parametrize("task", ["tool-calling", "tool_calling"])
def test_a_list_knows_both_spellings_of_a_task(task: str) -> None:
    """The command gets as far as the server, whose address is nobody's."""
    assert forge("agents", "list", "--task", task).exit_code != 2


@pytest.mark.parametrize("task", ["clasification", "Tool_Kalling", "_"])
def test_a_list_by_a_task_that_there_is_not_is_no_empty_list(task: str) -> None:
    """A misspelt task is refused with those that there are."""
    result = forge("agents", "list", "--task", task)
    assert result.exit_code == 2
    assert "is not one of classification, " in " ".join(result.stderr.split())
