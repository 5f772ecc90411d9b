"""Rows of demonstrated trajectories: messages in which the agent, who is the assistant, thinks and acts.

The form is FireAct's (Chen et al. 2023, arXiv:2310.05915): the agent's turns have a line `Action: kind[argument]`, and
the last observation tells the reward: `Observation: Episode finished, reward = 1`. A row may say it in the fields
`reward` and `success` instead. Nobody has to speak in turn, anyone may have the last word, and what an environment says
under the assistant's name has no action and is not learnt.

Each turn that acts is a text of its own: all that was said before, and the turn. Trajectories of one question stay in
one split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent_server.data.examples import Written
from agent_server.data.messages import Turn, answered, messages, prompt
from agent_server.data.pipeline import Form, LeftOut, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.attempt import Json
from training_common.findings import ProcessingReport, RowRefusedError, quote

# Rewards that a manifest counts one by one, and kinds of actions.
_COUNTED = 64
# Far beyond any environment's return, and far from what a float cannot hold.
MAX_REWARD = 1e12
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(?P<kind>[A-Za-z_][\w-]*)[ \t]*\[(?P<argument>.*)\][ \t]*$", re.MULTILINE)
_REWARD = re.compile(r"Episode finished, reward = (?P<reward>True|False|-?\d{1,12}(?:\.\d{1,12})?)\.?\s*$")
_QUESTION = re.compile(r"^\s*Question:")
_WORDS = {"True": 1.0, "False": 0.0}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The texts of one trajectory, its reward, None where it tells none, and how many of its turns do not act."""

    texts: tuple[Written, ...]
    reward: float | None
    idle_turns: int


@dataclass(frozen=True, kw_only=True)
class BehaviouralForm(Form[Trajectory, Written]):
    """successes_only: leave out what did not reach its goal.
    weight_by_reward: weigh each trajectory from 0, for the set's lowest reward, to 1, for its highest.
    """

    successes_only: bool = False
    weight_by_reward: bool = False

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Trajectory] | LeftOut:
        """Return a trajectory. Errors: RowRefusedError."""
        split = split_of(content, found)
        turns = messages(content)
        texts = _texts(turns)
        reward = _reward(content, turns)
        if reward is None and (self.successes_only or self.weight_by_reward):
            raise RowRefusedError(
                "missing_field",
                field="reward",
                detail="the trajectory tells no reward",
                remedy="add the field, or end with 'Observation: Episode finished, reward = 1'",
            )
        if self.successes_only and not _succeeded(content, reward):
            return LeftOut("no_success")
        if not texts:
            raise RowRefusedError(
                "no_action",
                field="messages",
                detail="no turn of the agent has a line 'Action: kind[argument]'",
                remedy="write its actions so, or train on the row as a dialogue",
            )
        idle = sum(turn.by_agent for turn in turns) - len(texts)
        said = "\n".join(f"{turn.speaker}: {turn.text}" for turn in turns)
        size = sum(len(segment.text) for text in texts for segment in text.segments)
        return Sound(Trajectory(texts, reward, idle), said, _question(turns), size, split)

    def make(self, splits: Splits[Trajectory], report: ProcessingReport) -> Made[Written]:
        """Return a text for each acting turn, weighted where that is asked for."""
        rows = [row.content for rows in splits.values() for row in rows]
        weigh = _weights([row.reward for row in rows]) if self.weight_by_reward else None
        examples = {
            split: [
                replace(text, weight=weigh(row.content.reward)) if weigh else text
                for row in rows
                for text in row.content.texts
            ]
            for split, rows in splits.items()
        }
        kinds = Counter(str(text.accepted).partition("[")[0] for text in examples["train"])
        rewards = Counter("none" if row.reward is None else f"{row.reward:g}" for row in rows)
        facts: dict[str, Json] = {
            "rewards": dict(sorted(rewards.most_common(_COUNTED))),
            "action_kinds": dict(sorted(kinds.most_common(_COUNTED))),
            "turns_without_action": sum(row.idle_turns for row in rows),
        }
        return Made(examples=examples, facts=facts)


def _texts(turns: Sequence[Turn]) -> tuple[Written, ...]:
    texts = []
    for number, turn in enumerate(turns):
        action = action_of(turn.text) if turn.by_agent else None
        if action is not None:
            texts.append(Written(answered(prompt(turns[:number]), turn.text), accepted=action))
    return tuple(texts)


def action_of(text: str) -> str | None:
    """Return the first action of a turn, `kind[argument]` with single spaces, or None."""
    found = _ACTION.search(text)
    return None if found is None else f"{found['kind']}[{' '.join(found['argument'].split())}]"


def _question(turns: Sequence[Turn]) -> str:
    """Return what a trajectory is about: the first turn, up to where an action begins."""
    first = turns[0].text
    found = _ACTION.search(first)
    return same_text(_QUESTION.sub("", first[: found.start()] if found else first))


def _reward(content: Mapping[str, object], turns: Sequence[Turn]) -> float | None:
    value = content.get("reward")
    if value is not None:
        if isinstance(value, int | float) and abs(value) <= MAX_REWARD:
            return float(value)
        raise RowRefusedError(
            "wrong_type",
            field="reward",
            detail=f"{quote(value)} is no reward",
            remedy=f"write a number up to {MAX_REWARD:g}",
        )
    for turn in reversed(turns):
        found = _REWARD.search(turn.text)
        if found:
            word = found["reward"]
            return _WORDS[word] if word in _WORDS else float(word)
    return None


def _succeeded(content: Mapping[str, object], reward: float | None) -> bool:
    """Return whether a row says so, or has the reward of one that reached its goal."""
    success = content.get("success")
    if success is None:
        return reward is not None and reward >= 1
    if isinstance(success, bool):
        return success
    raise RowRefusedError(
        "wrong_type", field="success", detail=f"{quote(success)} is neither true nor false", remedy="write one of them"
    )


def _weights(rewards: Iterable[float | None]) -> Callable[[float | None], float]:
    """Return the weight of a reward: 0 for the lowest, 1 for the highest; 1 for all where they are equal."""
    told = [reward for reward in rewards if reward is not None]
    low, high = min(told, default=0.0), max(told, default=0.0)

    def weight(reward: float | None) -> float:
        return 1.0 if reward is None or low == high else (reward - low) / (high - low)

    return weight
