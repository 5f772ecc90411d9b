"""What an agent's card says of running it, with a run.py and without."""

from __future__ import annotations

import pytest

from agent_server.bases import Base
from agent_server.card import CardFacts, model_card
from agent_server.data.examples import DataManifest
from training_common.findings import ProcessingReport


def card(*, runs: bool, enforced: bool = False, task: str = "classification") -> str:
    """Return the card of a made-up agent of a plugin."""
    training = {"batch_size": 8, "seed": 0, "optimization": {"optimizer": "adamw", "lr": 0.1, "schedule": "constant"}}
    data = DataManifest(
        name="set",
        kind="folder",
        source={},
        files=(),
        digest="sha256:0",
        labels=("a", "b"),
        rows={"train": 3, "validation": 1, "test": 1},
        report=ProcessingReport(),
        facts={},
    )
    config = {
        "training": training,
        "adaptation": "full",
        "merge_logit_change": 0.0,
        "max_tokens": 9,
        "steps": 3,
        "weights_of_step": 3,
        "constraints_enforced": enforced,
    }
    facts = CardFacts(
        agent="words",
        architecture="hashed_words",
        task=task,
        labels=("a", "b"),
        base=Base(),
        data=data,
        licences=(),
        config=config,
        evaluations=(),
        trainable_parameters=1,
        total_parameters=1,
        runs=runs,
    )
    return model_card(facts)


def test_a_card_tells_what_a_folder_without_an_entry_needs() -> None:
    """A plugin's agent has no run.py: the card says so, and how it is loaded."""
    told = card(runs=False)
    assert "plugin's, so this folder has no run.py" in told
    assert 'AgentArchitectureFactory().get("hashed_words").load(Path("."))' in told
    assert "python run.py" not in told
    assert "python run.py 'a text'" in card(runs=True)


@pytest.mark.parametrize(("runs", "told"), [(True, "and so does run.py."), (False, "whoever runs it has to do so too")])
def test_a_card_names_who_keeps_to_the_allowed_actions(runs: bool, told: str) -> None:
    """Where there is no run.py, nothing but the reader does."""
    assert told in card(runs=runs, enforced=True, task="behavioural")
