"""Find agent architectures, built-in ones and plugins, without torch.

A plugin is an entry point of the group `cognateforge.agent_architectures` that names a class without constructor
arguments. Its object is an `AgentArchitecture`: a description that the server can list, and methods that import torch
only when a worker calls them. Code of a plugin does not run in the server: a process of its own (`probe`) loads and
describes it, within a time limit, and what it does to that process it does to nothing else. A plugin that cannot be
loaded is reported in `problems` and leaves the others alone. docs/architectures.md tells how to write one.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from agent_server.architectures.refusal import refuse_text
from agent_server.architectures.settings import Setting as Setting
from agent_server.architectures.settings import SettingValue as SettingValue
from agent_server.architectures.settings import check_settings
from agent_server.tasks import OUTPUTS
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import ArchitectureNotFoundError, FieldViolation, NotImplementedByServerError

if TYPE_CHECKING:
    from agent_server.adaptation import Adaptation
    from agent_server.architectures.model import AgentModel

GROUP = "cognateforge.agent_architectures"
# They are there however the project was installed; pyproject.toml lists them for other programs.
BUILT_IN: Mapping[str, str] = {
    "causal_lm": "agent_server.architectures.causal_lm:CausalLmArchitecture",
    "cognate": "agent_server.architectures.cognate:CognateArchitecture",
    "multimodal": "agent_server.architectures.multimodal:MultimodalArchitecture",
    "policy": "agent_server.architectures.policy:PolicyArchitecture",
    "recurrent": "agent_server.architectures.recurrent:RecurrentArchitecture",
    "sequence_classifier": "agent_server.architectures.sequence_classifier:SequenceClassifierArchitecture",
}
# The methods of adaptation that a plan can name.
ADAPTATIONS = tuple(method.name for method in pb.Adaptation.DESCRIPTOR.oneofs_by_name["method"].fields)
# The contract's bounds for an architecture's name and description (agent/v1/training.proto).
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
_MAX_DESCRIPTION_CHARS = 500
_MAX_FINGERPRINT_CHARS = 71
# The contract lists at most 256 of each, built-in ones among them.
_MOST_PLUGINS = 200
# Long enough for a module that imports torch on a busy machine, which it had better not.
_PATIENCE_S = 30.0
_PROBES_AT_ONCE = 4
_METHODS = {"violations": 2, "learn_tokenizer": 2, "build": 1, "build_on": 2, "load": 1}


@dataclass(frozen=True, kw_only=True)
class FoundationRequirement:
    """The foundation forward pass that an architecture is built on; it goes into CheckCompatibility as it stands.

    An empty string or a zero is not compared.
    """

    name: str
    fingerprint: str = ""
    act_version: int = 0
    ltm_version: int = 0


class BaseKind(enum.StrEnum):
    """What an agent can be made of, besides agents of its own kind."""

    FOUNDATION = "foundation"
    MODEL_FOLDER = "model_folder"
    SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What an architecture builds an untrained agent of. Equal requests give equal parameters.

    task: its field name in TrainingPlan. base_dir: the fetched foundation or the model folder; None from scratch.
    labels: of classes or slots. settings: all that the architecture declares, defaults filled in.
    tokenizer: from scratch, what its `learn_tokenizer` returned.
    """

    task: str
    adaptation: Adaptation
    seed: int
    base_dir: Path | None = None
    labels: Sequence[str] = ()
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    tokenizer: str = ""


@runtime_checkable
class AgentArchitecture(Protocol):
    """A kind of agent: its description, free of torch, and how to build it. `ArchitectureDefaults` has the defaults."""

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
    def bases(self) -> Sequence[BaseKind]:
        """What it can be built on."""

    @property
    def adaptations(self) -> Sequence[str]:
        """The methods of adaptation that it serves, by their field names in Adaptation."""

    @property
    def settings(self) -> Mapping[str, Setting]:
        """The settings that a plan may give, by name."""

    @property
    def required_architecture(self) -> FoundationRequirement | None:
        """The foundation that it is built on, or None when it needs none."""

    def violations(self, task: str, settings: Mapping[str, SettingValue]) -> Sequence[FieldViolation]:
        """Return which settings do not go with a task, or with each other. Fields: names of settings."""

    def learn_tokenizer(self, texts: Iterable[str], settings: Mapping[str, SettingValue]) -> str:
        """Return the tokenizer of an agent from scratch, in a form of its own; empty where it needs none."""

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent. Errors: IncompatibleError, when it does not fit the base."""

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published agent of this architecture, ready to be trained further.

        What belongs to its labels is kept where the request's are the same ones, and built anew otherwise.
        """

    def load(self, folder: Path) -> AgentModel:
        """Return the agent that `AgentModel.save` wrote into a folder. Errors: ArtifactCorruptError."""


class ArchitectureDefaults:
    """What an architecture need not say: it has no settings, and stands on a foundation."""

    bases: Sequence[BaseKind] = (BaseKind.FOUNDATION,)
    adaptations: Sequence[str] = ("full",)
    settings: Mapping[str, Setting] = {}
    required_architecture: FoundationRequirement | None = None

    def violations(self, task: str, settings: Mapping[str, SettingValue]) -> Sequence[FieldViolation]:
        """Return nothing: every combination will do."""
        return ()

    def learn_tokenizer(self, texts: Iterable[str], settings: Mapping[str, SettingValue]) -> str:
        """Return nothing: it learns none."""
        return ""

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Refuse: its agents cannot be trained further."""
        raise NotImplementedByServerError("agents of this architecture cannot be trained further yet")


@dataclass(frozen=True, kw_only=True)
class PluginProblem:
    """An entry point that gave no usable architecture, and why."""

    name: str
    value: str
    reason: str


class AgentArchitectureFactory:
    """The installed agent architectures, by name.

    given: architectures that take the place of installed ones of the same name. patience_s: how long a plugin's import
    may take. Plugins are looked at when they are first needed, each once.

    Errors: ArchitectureNotFoundError, when `get` is asked for one that is not installed or could not be loaded.
    """

    def __init__(self, *, given: Iterable[AgentArchitecture] = (), patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._usable: dict[str, AgentArchitecture] = {architecture.name: architecture for architecture in given}
        self._problems: list[PluginProblem] = []
        self._waiting: dict[str, metadata.EntryPoint] = {}
        for name, value in BUILT_IN.items():
            if name not in self._usable:
                self._usable[name] = load(metadata.EntryPoint(name=name, value=value, group=GROUP))
        self._find()

    def _find(self) -> None:
        """List the plugins; of two with one name the first by its value is kept. Built-in names are taken."""
        found, self._problems = _entry_points()
        given = set(self._usable) - set(BUILT_IN)
        for entry_point in sorted(found, key=lambda e: (e.name, e.value)):
            if BUILT_IN.get(entry_point.name) == entry_point.value or entry_point.name in given:
                continue
            if entry_point.name in self._usable or entry_point.name in self._waiting:
                self._report(entry_point, f"another architecture already has the name {entry_point.name}; rename one")
            elif len(self._waiting) >= _MOST_PLUGINS:
                self._report(entry_point, f"more than {_MOST_PLUGINS} plugins are installed; remove some")
            else:
                self._waiting[entry_point.name] = entry_point

    def _report(self, entry_point: metadata.EntryPoint, reason: str) -> None:
        self._problems.append(_problem(entry_point.name, entry_point.value, reason))

    def _look(self, names: Iterable[str]) -> None:
        """Describe plugins that nobody asked for before, some at a time."""
        from agent_server.architectures.probe import describe

        asked = [self._waiting.pop(name) for name in names]
        if not asked:
            return
        with ThreadPoolExecutor(max_workers=_PROBES_AT_ONCE) as probes:
            answers = probes.map(functools.partial(describe, patience_s=self._patience_s), asked)
            for entry_point, answer in zip(asked, answers, strict=True):
                if isinstance(answer, str):
                    self._report(entry_point, answer)
                else:
                    self._usable[entry_point.name] = answer

    @property
    def architectures(self) -> Mapping[str, AgentArchitecture]:
        """The usable architectures, sorted by name."""
        self._look(list(self._waiting))
        return dict(sorted(self._usable.items()))

    @property
    def problems(self) -> Sequence[PluginProblem]:
        """The plugins that are installed and could not be loaded."""
        self._look(list(self._waiting))
        return tuple(self._problems)

    def __iter__(self) -> Iterator[AgentArchitecture]:
        return iter(self.architectures.values())

    def get(self, name: str) -> AgentArchitecture:
        """Return one architecture. No other plugin is looked at for it."""
        self._look([name] if name in self._waiting else [])
        if name in self._usable:
            return self._usable[name]
        known = ", ".join(self.architectures) or "none"
        broken = "".join(f"; its plugin failed: {p.reason}" for p in self._problems if p.name == name)
        description = f"no agent architecture {name!r} is installed, there is: {known}{broken}"
        raise ArchitectureNotFoundError(
            description, violations=[FieldViolation(field="architecture", description=description)]
        )


def _entry_points() -> tuple[list[metadata.EntryPoint], list[PluginProblem]]:
    """Return the group's entry points, of each distribution for itself: a broken one hides no other."""
    found: list[metadata.EntryPoint] = []
    problems: list[PluginProblem] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        # Of two with one name the first on the path is the one that imports find.
        name = str(distribution.metadata["Name"] or "").lower().replace("-", "_")
        if not name or name in seen:
            continue
        seen.add(name)
        try:
            found += distribution.entry_points.select(group=GROUP)
        except Exception as error:  # of a file that an installer did not write
            reason = f"the entry points of distribution {name} cannot be read: {type(error).__name__}: {error}"
            problems.append(_problem(name, "", reason))
    return found, problems


def _problem(name: str, value: str, reason: str) -> PluginProblem:
    """Return a problem within the contract's bounds, and safe to print: the words are a stranger's."""
    name, value, reason = ("".join(c if c.isprintable() else " " for c in text) for text in (name, value, reason))
    return PluginProblem(name=name[:128], value=value[:255], reason=reason[:_MAX_DESCRIPTION_CHARS])


def load(entry_point: metadata.EntryPoint) -> AgentArchitecture:
    """Import an entry point's module in this process and return its architecture, checked.

    Errors: whatever the module raises; TypeError and ValueError, for an object that is no proper architecture.
    """
    loaded = entry_point.load()
    architecture = loaded() if isinstance(loaded, type) else loaded
    check(architecture, entry_point)
    return architecture  # type: ignore[no-any-return]


def check(architecture: object, entry_point: metadata.EntryPoint) -> None:
    """Refuse an object that is not what the protocol and the contract ask for. Errors: TypeError, ValueError."""
    _check_form(architecture, entry_point.value)
    if not isinstance(architecture, AgentArchitecture):  # pragma: no cover - its form has been checked
        raise TypeError(f"{entry_point.value} is not an AgentArchitecture")
    if architecture.name != entry_point.name:
        raise ValueError(f"it calls itself {architecture.name!r}, its entry point says {entry_point.name!r}")
    if not _NAME.fullmatch(architecture.name):
        raise ValueError(f"the name {architecture.name!r} does not match {_NAME.pattern}")
    if not 0 < len(architecture.description) <= _MAX_DESCRIPTION_CHARS:
        raise ValueError(f"its description must have 1 to {_MAX_DESCRIPTION_CHARS} characters")
    if not architecture.description.isprintable():
        raise ValueError("its description must be one line of printable characters")
    refuse_text("its description", architecture.description)
    _check_words("tasks", "it serves no task", architecture.tasks, OUTPUTS)
    _check_words("bases", "it can be built on no base", architecture.bases, [kind.value for kind in BaseKind])
    _check_words("adaptations", "it serves no method of adaptation", architecture.adaptations, ADAPTATIONS)
    check_settings(architecture.settings)
    required = architecture.required_architecture
    if required is not None and not isinstance(required, FoundationRequirement):
        raise TypeError(f"its required_architecture is a {type(required).__name__}, not a FoundationRequirement")
    if required is not None and len(required.fingerprint) > _MAX_FINGERPRINT_CHARS:
        raise ValueError(f"the fingerprint that it requires has more than {_MAX_FINGERPRINT_CHARS} characters")


def _check_form(architecture: object, value: str) -> None:
    members = [name for name in vars(AgentArchitecture) if not name.startswith("_")]
    if missing := [name for name in members if not hasattr(architecture, name)]:
        raise TypeError(f"{value} is not an AgentArchitecture: it lacks {', '.join(missing)}")
    for name, count in _METHODS.items():
        if not _takes(getattr(architecture, name), count):
            raise TypeError(f"{value} is not an AgentArchitecture: {name} must take {count} positional arguments")


def _takes(method: Callable[..., object], count: int) -> bool:
    try:
        inspect.signature(method).bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    return True


def _check_words(kind: str, none: str, words: Sequence[str], known: Iterable[str]) -> None:
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"its {kind} must be a sequence of texts, not {words!r}")
    if not words:
        raise ValueError(none)
    if unknown := sorted(set(words) - set(known)):
        raise ValueError(f"its {kind} hold {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
