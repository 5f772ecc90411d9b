"""Settings that architectures declare: their schema, and a plan's values for them. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent_server.architectures.refusal import refuse_name, refuse_text
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import FieldViolation, InvalidFieldError

SettingValue = bool | int | float | str

# The contract's bounds (ArchitectureSettingSpec in agent/v1/training.proto).
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
_MOST_SETTINGS = 32
_MAX_DESCRIPTION_CHARS = 200
_MOST_WORDS = 32
_MAX_WORD_CHARS = 64
# Where float64 has every whole number, so that bounds compare exactly.
_LARGEST = 2.0**53


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that a plan may give an architecture. Its kind is that of its default.

    minimum, maximum: bounds of a number; every number has them, both inclusive. words: what a text may be.
    """

    description: str
    default: SettingValue
    minimum: float = 0.0
    maximum: float = 0.0
    words: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """The name of its kind, as ArchitectureSetting spells it: flag, integer, number or word."""
        return _field_of(self.default)

    def allowed(self) -> str:
        """Return what its values are, for messages."""
        match self.default:
            case bool():
                return "true or false"
            case str():
                return f"one of the words {', '.join(self.words)}"
            case int():
                return f"a whole number from {self.minimum:.17g} to {self.maximum:.17g}"
            case _:
                return f"a number from {self.minimum:g} to {self.maximum:g}"

    def accepts(self, value: SettingValue) -> bool:
        """Whether a value is of its kind and within its bounds. A whole number is a number too."""
        kinds = {self.field, "integer"} if self.field == "number" else {self.field}
        if _field_of(value) not in kinds:
            return False
        if isinstance(value, str):
            return value in self.words
        return isinstance(value, bool) or self.minimum <= value <= self.maximum


def _field_of(value: SettingValue) -> str:
    for kind, field in ((bool, "flag"), (int, "integer"), (float, "number"), (str, "word")):
        if isinstance(value, kind):
            return field
    raise ValueError(f"{value!r} is neither a flag, nor a number, nor a word")


def check_settings(settings: Mapping[str, Setting]) -> None:
    """Refuse a schema that the contract could not carry. Errors: ValueError, TypeError."""
    if len(settings) > _MOST_SETTINGS:
        raise ValueError(f"it declares {len(settings)} settings, and {_MOST_SETTINGS} are allowed")
    for name, setting in settings.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"the setting {name!r} does not match {_NAME.pattern}")
        if not isinstance(setting, Setting):
            raise TypeError(f"the setting {name} is no Setting, but a {type(setting).__name__}")
        refuse_name("the setting", name)
        refuse_text(f"the description of the setting {name}", setting.description)
        for word in setting.words:
            refuse_name(f"a word of the setting {name}:", word)
        if fault := _fault(setting):
            raise ValueError(f"the setting {name} {fault}")


def _fault(setting: Setting) -> str:
    """Return what is wrong with one setting, or nothing."""
    if not (0 < len(setting.description) <= _MAX_DESCRIPTION_CHARS and setting.description.isprintable()):
        return f"must have a description of 1 to {_MAX_DESCRIPTION_CHARS} printable characters"
    if setting.field == "word":
        fits = 0 < len(setting.words) <= _MOST_WORDS and all(
            0 < len(word) <= _MAX_WORD_CHARS and word.isprintable() for word in setting.words
        )
        if not fits:
            return f"must have 1 to {_MOST_WORDS} words of 1 to {_MAX_WORD_CHARS} printable characters"
    elif setting.words:
        return "has words, and its default is none"
    if setting.field in ("integer", "number"):
        bounds = (setting.minimum, setting.maximum)
        if not all(math.isfinite(bound) and abs(bound) <= _LARGEST for bound in bounds) or bounds[0] >= bounds[1]:
            return "is a number and must have a minimum below its maximum, both within 2^53"
    if not setting.accepts(setting.default):
        return f"has the default {setting.default!r}, and must be {setting.allowed()}"
    return ""


def settings_of(
    architecture: str, declared: Mapping[str, Setting], given: Iterable[pb.ArchitectureSetting]
) -> dict[str, SettingValue]:
    """Return every declared setting with a plan's value or its default.

    Errors: InvalidFieldError, which names the place in `settings` and what is allowed there.
    """
    values: dict[str, SettingValue] = {name: setting.default for name, setting in declared.items()}
    violations: list[FieldViolation] = []
    for place, item in enumerate(given):
        setting = declared.get(item.name)
        if setting is None:
            known = ", ".join(declared) or "none"
            text = f"architecture {architecture} has no setting {item.name!r}; it has: {known}"
            violations.append(FieldViolation(field=f"settings[{place}].name", description=text))
            continue
        kind = item.WhichOneof("value")
        value: SettingValue | None = getattr(item, kind) if kind else None
        if value is None or not setting.accepts(value):
            text = f"{item.name} must be {setting.allowed()}, not {value!r}; give it as `{setting.field}`"
            violations.append(FieldViolation(field=f"settings[{place}].{kind or setting.field}", description=text))
            continue
        values[item.name] = float(value) if setting.field == "number" else value
    if violations:
        raise InvalidFieldError("; ".join(v.description for v in violations), violations=violations)
    return values
