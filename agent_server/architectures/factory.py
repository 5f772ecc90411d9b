"""Find agent architectures by entry point, without torch.

An entry point of the group `cognateforge.agent_architectures` names a class without constructor arguments. Its object
is an `AgentArchitecture`: a description that the server can list, and two methods that import torch only when a worker
calls them. A plugin that cannot be loaded is reported in `problems` and leaves the others alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cognateforge.exceptions import ArchitectureNotFoundError, FieldViolation

if TYPE_CHECKING:
    from agent_server.adaptation import Adaptation
    from agent_server.architectures.model import AgentModel

GROUP = "cognateforge.agent_architectures"
# The contract's bounds for an architecture's name and description (agent/v1/training.proto).
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
_MAX_DESCRIPTION_CHARS = 500
# Pretraining's gradient filter has no place among agents; this pattern is the contract's own (TrainingPlan).
_REFUSED = re.compile(r"grok[-_ ]?fast", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FoundationRequirement:
    """The foundation forward pass that an architecture is built on; it goes into CheckCompatibility as it stands.

    An empty string or a zero is not compared.
    """

    name: str
    fingerprint: str = ""
    act_version: int = 0
    ltm_version: int = 0


@runtime_checkable
class AgentArchitecture(Protocol):
    """A kind of agent: its description, free of torch, and how to build it."""

    @property
    def name(self) -> str:
        """The name that a plan refers to, as the entry point spells it."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks it serves, by their field names in TrainingPlan."""

    @property
    def description(self) -> str:
        """One sentence about it."""

    @property
    def required_architecture(self) -> FoundationRequirement | None:
        """The foundation that it is built on, or None when it needs none."""

    def build(
        self, *, foundation_dir: Path, task: str, labels: Sequence[str], adaptation: Adaptation, seed: int
    ) -> AgentModel:
        """Return an untrained agent on top of a fetched foundation. Equal seeds give equal parameters."""

    def load(self, folder: Path) -> AgentModel:
        """Return the agent that `AgentModel.save` wrote into a folder."""


@dataclass(frozen=True, kw_only=True)
class PluginProblem:
    """An entry point that gave no usable architecture, and why."""

    name: str
    value: str
    reason: str


class AgentArchitectureFactory:
    """The installed agent architectures, by name.

    given: architectures that take the place of installed ones of the same name.

    Errors: ArchitectureNotFoundError, when `get` is asked for one that is not installed or could not be loaded.
    """

    def __init__(self, *, given: Iterable[AgentArchitecture] = ()) -> None:
        self._architectures: dict[str, AgentArchitecture] = {architecture.name: architecture for architecture in given}
        self.problems: list[PluginProblem] = []
        # Sorted, with this project's own first, so that no plugin can take the place of a built-in by its name.
        entry_points = sorted(
            metadata.entry_points(group=GROUP), key=lambda e: (not e.value.startswith("agent_server."), e.name, e.value)
        )
        taken = set(self._architectures)
        for entry_point in entry_points:
            if entry_point.name in taken:
                continue
            try:
                self._add(_load(entry_point))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:_MAX_DESCRIPTION_CHARS]
                self.problems.append(PluginProblem(name=entry_point.name, value=entry_point.value, reason=reason))

    def _add(self, architecture: AgentArchitecture) -> None:
        if architecture.name in self._architectures:
            raise ValueError(f"another plugin already has the name {architecture.name}; rename one of them")
        self._architectures[architecture.name] = architecture

    @property
    def architectures(self) -> Mapping[str, AgentArchitecture]:
        """The usable architectures, sorted by name."""
        return dict(sorted(self._architectures.items()))

    def __iter__(self) -> Iterator[AgentArchitecture]:
        return iter(self.architectures.values())

    def get(self, name: str) -> AgentArchitecture:
        """Return one architecture."""
        if name in self._architectures:
            return self._architectures[name]
        known = ", ".join(self.architectures) or "none"
        broken = "".join(f"; its plugin failed: {p.reason}" for p in self.problems if p.name == name)
        description = f"no agent architecture {name!r} is installed, there is: {known}{broken}"
        raise ArchitectureNotFoundError(
            description, violations=[FieldViolation(field="architecture", description=description)]
        )


def _load(entry_point: metadata.EntryPoint) -> AgentArchitecture:
    """Return the architecture of an entry point. The refusal comes before its module runs."""
    _refuse("its entry point", f"{entry_point.name} {entry_point.value}")
    spec = util.find_spec(entry_point.module)
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        _refuse("its module", Path(spec.origin).read_text(encoding="utf-8"))
    loaded = entry_point.load()
    architecture = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(architecture, AgentArchitecture):
        raise TypeError(f"{entry_point.value} is not an AgentArchitecture")
    _check(architecture, entry_point.name)
    return architecture


def _refuse(where: str, text: str) -> None:
    if _REFUSED.search(text):
        raise ValueError(f"{where} mentions GrokFast, which belongs to pretraining alone; remove it to load the plugin")


def _check(architecture: AgentArchitecture, entry_point_name: str) -> None:
    if architecture.name != entry_point_name:
        raise ValueError(f"it calls itself {architecture.name!r}, its entry point says {entry_point_name!r}")
    if not _NAME.fullmatch(architecture.name):
        raise ValueError(f"the name {architecture.name!r} does not match {_NAME.pattern}")
    if not 0 < len(architecture.description) <= _MAX_DESCRIPTION_CHARS:
        raise ValueError(f"its description must have 1 to {_MAX_DESCRIPTION_CHARS} characters")
    if not architecture.tasks:
        raise ValueError("it serves no task")
    _refuse("its description", " ".join((architecture.description, *architecture.tasks)))
