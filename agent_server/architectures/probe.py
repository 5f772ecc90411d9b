"""Describe a plugin from a process of its own: python -m agent_server.architectures.probe ENTRY

The server's side, `describe`, reads the plugin's text first, then starts that process and waits for its answer, one
line of JSON. The answer is checked again here: the plugin's code ran in the process that gave it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_server.architectures.factory import (
    GROUP,
    AgentArchitecture,
    BaseKind,
    BuildRequest,
    FoundationRequirement,
    check,
    load,
)
from agent_server.architectures.refusal import guard_process, guarded, refuse_sources, refuse_text, require_separate
from agent_server.architectures.settings import Setting, SettingValue
from agent_server.asking import ask
from cognateforge.exceptions import FieldViolation, IncompatibleError

if TYPE_CHECKING:
    from agent_server.architectures.model import AgentModel

# A description within the contract's bounds takes a small part of that.
_MAX_ANSWER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstalledPlugin:
    """A plugin that was described, and is loaded into this process when it is to build or load an agent."""

    entry_point: metadata.EntryPoint
    name: str
    tasks: Sequence[str]
    description: str
    bases: Sequence[BaseKind]
    adaptations: Sequence[str]
    settings: Mapping[str, Setting]
    required_architecture: FoundationRequirement | None

    def violations(self, task: str, settings: Mapping[str, SettingValue]) -> Sequence[FieldViolation]:
        """Return nothing: the plugin itself is asked in the worker, when it builds."""
        return ()

    def learn_tokenizer(self, texts: Iterable[str], settings: Mapping[str, SettingValue]) -> str:
        """Let the plugin learn a tokenizer."""
        with guarded():
            return self._loaded().learn_tokenizer(texts, settings)

    def build(self, request: BuildRequest) -> AgentModel:
        """Let the plugin build an agent. Errors: IncompatibleError, and the plugin's own."""
        with guarded():
            return self._willing(request).build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Let the plugin go on with an agent. Errors: as `build`."""
        with guarded():
            return self._willing(request).build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Let the plugin load an agent."""
        with guarded():
            return self._loaded().load(folder)

    def _willing(self, request: BuildRequest) -> AgentArchitecture:
        architecture = self._loaded()
        if refused := architecture.violations(request.task, request.settings):
            raise IncompatibleError("; ".join(f"the setting {v.field}: {v.description}" for v in refused))
        return architecture

    def _loaded(self) -> AgentArchitecture:
        """Return the plugin's object. Errors: IncompatibleError, also for a module that ends its process."""
        try:
            refuse_sources(self.entry_point)
            return load(self.entry_point)
        except (Exception, SystemExit) as error:
            raise IncompatibleError(f"the plugin {self.name} failed: {_reason(error)}") from error


def describe(entry_point: metadata.EntryPoint, *, patience_s: float) -> InstalledPlugin | str:
    """Return what a plugin is, or why it cannot be used. May block for a little more than `patience_s`."""
    try:
        refuse_text("its entry point", f"{entry_point.name} {entry_point.value}")
        refuse_sources(entry_point)
        answer = _ask(entry_point, patience_s)
        if problem := answer.get("problem"):
            return str(problem)
        plugin = _from_json(entry_point, answer)
        check(plugin, entry_point)
    except Exception as error:
        return _reason(error)
    return plugin


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _ask(entry_point: metadata.EntryPoint, patience_s: float) -> dict[str, Any]:
    """Run the process and return its answer. Its output goes nowhere, and its children end with it."""
    question = json.dumps([entry_point.name, entry_point.value])
    try:
        text, end = ask(__name__, question, patience_s=patience_s, most_bytes=_MAX_ANSWER_BYTES)
    except TimeoutError:
        raise TimeoutError(
            f"it took more than {patience_s:g} s to import; import what is large inside build() and load()"
        ) from None
    if not text:
        raise ChildProcessError(f"its import ended the process that tried it, by {end}")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ChildProcessError("the process that tried it gave no description")
    return value


def _to_json(architecture: AgentArchitecture) -> dict[str, Any]:
    required = architecture.required_architecture
    return {
        "name": architecture.name,
        "tasks": list(architecture.tasks),
        "description": architecture.description,
        "bases": list(architecture.bases),
        "adaptations": list(architecture.adaptations),
        "settings": {name: dataclasses.asdict(setting) for name, setting in architecture.settings.items()},
        "required_architecture": None if required is None else dataclasses.asdict(required),
    }


def _from_json(entry_point: metadata.EntryPoint, answer: Mapping[str, Any]) -> InstalledPlugin:
    required = answer["required_architecture"]
    return InstalledPlugin(
        entry_point=entry_point,
        name=str(answer["name"]),
        tasks=tuple(answer["tasks"]),
        description=str(answer["description"]),
        bases=tuple(BaseKind(kind) for kind in answer["bases"]),
        adaptations=tuple(answer["adaptations"]),
        settings={
            str(name): Setting(**{**setting, "words": tuple(setting["words"])})
            for name, setting in answer["settings"].items()
        },
        required_architecture=None if required is None else FoundationRequirement(**required),
    )


def main(arguments: Sequence[str]) -> int:
    """Load the entry point and answer on standard output, where nothing else is let through."""
    name, value = json.loads(arguments[0])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what the plugin prints is no answer
        try:
            guard_process()
            described = _to_json(load(metadata.EntryPoint(name=name, value=value, group=GROUP)))
            require_separate()
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: it is the plugin's, and told by name
            described = {"problem": _reason(error)}
        json.dump(described, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
