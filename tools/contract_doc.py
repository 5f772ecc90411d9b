"""Write docs/reference.md out of the committed descriptors, comments included: `make docs`.

Everything on the page comes from the contract: comments, options, rules. A validation rule that has no words here yet
ends the run, so that the page never leaves one out in silence.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    EnumValueDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    MethodOptions,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message
from google.rpc import code_pb2

from cognateforge._vendor.buf.validate import validate_pb2
from cognateforge.errors.v1 import reasons_pb2
from cognateforge.policy.v1 import policy_pb2

ROOT = Path(__file__).resolve().parent.parent
DESCRIPTORS = ROOT / "clients" / "cognateforge" / "contract.binpb"
TARGET = ROOT / "docs" / "reference.md"

OURS = "cognateforge."
# In the order in which a caller needs them; a package that is not named here follows, by its name.
PACKAGES = ("cognate.v1", "exchange.v1", "agent.v1", "job.v1", "artifact.v1", "policy.v1", "errors.v1")
REASON = "errors.v1.Reason"
WIDTH = 120

# Numbers of fields in descriptor.proto: the paths by which source_code_info finds a comment.
_PACKAGE, _MESSAGES, _ENUMS, _SERVICES = 2, 4, 5, 6
_FIELDS, _ONEOFS, _METHODS, _VALUES = 2, 8, 2, 2

HEAD = """# Reference of the contract

<!-- Written by `make docs` from the descriptors of `protos/cognateforge`. Edit the comments there, then run it. -->

Every RPC, message, enum and reason of the contract, with its comments and rules. [contract.md](contract.md) is the
guide: how to call the services, and how to change the contract.

Names below lack their beginning `cognateforge.`. A field without the mark "optional", and that is no message, has its
default where it was not sent: 0, false, an empty text, an empty list. A server checks the rules of a request before
it acts on it; those of an answer say what a caller may expect.

"""

RPCS_HEAD = """## Roles and RPCs

Who may call what. "Deadline" says whether a call without one is refused, "repeat" whether a call that brought no answer
may be made again: it is safe, or safe with the same `request_id`. An answer that is a stream has no deadline.

"""

REASONS_HEAD = """## Reasons

What `google.rpc.ErrorInfo` names in the domain `cognateforge`, and `Job.failure` where a job failed. Beside the reasons
that an RPC names, every RPC can answer INVALID_FIELD, ROLE_MISSING, IDENTITY_MISSING, UNAVAILABLE, DEADLINE_EXCEEDED,
RESOURCE_EXHAUSTED and INTERNAL; one that needs a deadline DEADLINE_REQUIRED; and one with a `request_id` UNKNOWN_FIELD
and REQUEST_ID_REUSED. "Repeat as it is" says whether the same call may succeed later without a change.
"""


Comments = Mapping[tuple[int, ...], str]


@dataclass(frozen=True)
class Package:
    """The files of one package."""

    name: str
    files: tuple[FileDescriptorProto, ...]


def comments_of(file: FileDescriptorProto) -> Comments:
    """Return the comments of a file by the path of what they stand before."""
    return {tuple(place.path): place.leading_comments for place in file.source_code_info.location}


def load() -> list[Package]:
    """Return the contract's own packages in the order of the page."""
    files = FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file
    by_name: dict[str, list[FileDescriptorProto]] = {}
    for file in files:
        if file.package.startswith(OURS):
            by_name.setdefault(file.package.removeprefix(OURS), []).append(file)
    order = [*PACKAGES, *sorted(by_name.keys() - set(PACKAGES))]
    return [Package(name, tuple(sorted(by_name[name], key=lambda f: f.name))) for name in order if name in by_name]


# --- Markdown


def paragraphs(comment: str) -> list[str]:
    """Return a comment's paragraphs, each in one line."""
    parts = re.split(r"\n\s*\n", comment.strip())
    return [" ".join(part.split()) for part in parts if part.strip()]


def wrapped(comment: str) -> str:
    """Return a comment as text of the page."""
    return "\n\n".join(_fill(part) for part in paragraphs(comment))


def cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def link(name: str) -> str:
    """Return a link to the heading of "job.v1.Job", as GitHub makes its anchors."""
    return f"[{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    head = list(columns)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]) + "\n"


def section(title: str, *parts: str) -> str:
    """Return a heading and what stands below it."""
    return "\n".join([f"{title}\n", *(f"{part.rstrip()}\n" for part in parts if part.strip())])


# --- rules in words


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _seconds(value: object) -> str:
    return f"{getattr(value, 'seconds'):,} s"  # noqa: B009 - a Duration, whose stub the rules do not name


def _enum_rule(value: object) -> str:
    return "a value of the enum" if value else ""


def _characters(value: object, unit: str = "characters") -> str:
    return f"1 {unit.removesuffix('s')}" if value == 1 else f"{_number(value)} {unit}"


# What is said last: "at least 1; at most 64".
_UPPER = frozenset({"lt", "lte", "max_len", "max_items", "pattern", "items", "cel"})
_NUMBERS = ("int32", "int64", "double")
# A rule by its field in buf.validate, and its words; "" for a rule that says nothing more.
WORDS: Mapping[str, Callable[[object], str]] = {
    "required": lambda value: "required" if value else "",
    "string.max_len": lambda value: f"at most {_characters(value)}",
    "string.min_len": lambda value: f"at least {_characters(value)}",
    "string.pattern": lambda value: f"matches `{value}`",
    "string.uuid": lambda value: "a UUID" if value else "",
    "bytes.max_len": lambda value: f"at most {_characters(value, 'bytes')}",
    "repeated.max_items": lambda value: f"at most {_characters(value, 'items')}",
    "repeated.min_items": lambda value: f"at least {_characters(value, 'items')}",
    "double.finite": lambda value: "finite" if value else "",
    "repeated.unique": lambda value: "no item twice" if value else "",
    "map.max_pairs": lambda value: f"at most {_characters(value, 'pairs')}",
    "enum.defined_only": _enum_rule,
    "enum.not_in": lambda value: "not UNSPECIFIED",
    "duration.gte": lambda value: f"at least {_seconds(value)}",
    "duration.lte": lambda value: f"at most {_seconds(value)}",
    **{f"{kind}.gt": lambda value: f"above {_number(value)}" for kind in _NUMBERS},
    **{f"{kind}.gte": lambda value: f"at least {_number(value)}" for kind in _NUMBERS},
    **{f"{kind}.lt": lambda value: f"below {_number(value)}" for kind in _NUMBERS},
    **{f"{kind}.lte": lambda value: f"at most {_number(value)}" for kind in _NUMBERS},
}
# Rules about the parts of a field.
PARTS: Mapping[str, str] = {"repeated.items": "each item", "map.keys": "each key", "map.values": "each value"}


def rules_in_words(rules: Message, place: str = "") -> Iterator[str]:
    """Yield each rule in words. Errors: SystemExit, for a rule that has none yet."""
    for field, value in sorted(rules.ListFields(), key=lambda rule: rule[0].name in _UPPER):
        path = f"{place}.{field.name}" if place else field.name
        if field.name == "cel":
            yield from (one.message or one.expression for one in value)
        elif path == "oneof":
            for one in value:
                yield f"{'exactly' if one.required else 'at most'} one of {', '.join(one.fields)}"
        elif path in PARTS:
            yield f"{PARTS[path]}: {', '.join(rules_in_words(value))}"
        elif path in WORDS:
            if path == "enum.not_in" and list(value) != [0]:
                raise SystemExit(f"{path} {list(value)} has no words: extend WORDS in {__file__}")
            if words := WORDS[path](value):
                yield words
        elif field.message_type is not None and not field.is_repeated:
            yield from rules_in_words(value, path)
        else:
            raise SystemExit(f"the rule {path} has no words: extend WORDS in {__file__}")


# --- parts of the page


def access_of(method: MethodDescriptorProto) -> policy_pb2.Access:
    """Return the policy of a method."""
    return method.options.Extensions[policy_pb2.access]


def words_of(name: str, prefix: str) -> str:
    """Return a value of an enum as a word: "agent service" for ROLE_AGENT_SERVICE."""
    return name.removeprefix(prefix).lower().replace("_", " ")


REPEAT = {policy_pb2.REPEAT_SAFE: "safe", policy_pb2.REPEAT_BY_REQUEST_ID: "by request_id"}


def access_table(packages: list[Package]) -> str:
    """Return who may call what, a row for each RPC."""
    roles = [role for role in policy_pb2.Role.values() if role != policy_pb2.ROLE_UNSPECIFIED]
    rows = []
    for package in packages:
        for service, method in _methods(package):
            access = access_of(method)
            marks = ["yes" if role in access.roles else "-" for role in roles]
            deadline = "required" if access.deadline_required else "-"
            answer = "stream" if method.server_streaming else "one message"
            rows.append([link(f"{service.name}/{method.name}"), *marks, deadline, REPEAT[access.repeat], answer])
    names = [words_of(policy_pb2.Role.Name(role), "ROLE_") for role in roles]
    return RPCS_HEAD + table(["RPC", *names, "deadline", "repeat", "answer"], rows)


def _methods(package: Package) -> Iterator[tuple[ServiceDescriptorProto, MethodDescriptorProto]]:
    for file in package.files:
        for service in file.service:
            for method in service.method:
                yield service, method


def rpc(service: ServiceDescriptorProto, method: MethodDescriptorProto, comment: str) -> str:
    """Return the section of one RPC."""
    text, _, rest = comment.partition("Callers:")
    facts = " ".join(rest.split())
    said = re.fullmatch(r"(.*?)\. Repeat: (.*?)\. Reasons: (.*)\.", facts)
    if said is None:
        raise SystemExit(f"{service.name}.{method.name}: the comment needs Callers, Repeat and Reasons, in this order")
    access = access_of(method)
    roles = ", ".join(words_of(policy_pb2.Role.Name(role), "ROLE_") for role in access.roles)
    if said[1].strip() != roles:
        raise SystemExit(f"{service.name}.{method.name}: the comment says {said[1]!r}, the policy {roles!r}")
    pure = method.options.idempotency_level == MethodOptions.NO_SIDE_EFFECTS
    reasons = re.sub(r"[A-Z_]{3,}", lambda name: _reason_link(name[0]), said[3])
    answer = f"{'a stream of ' if method.server_streaming else ''}{_type_link(method.output_type)}"
    lines = [
        f"- Request: {_type_link(method.input_type)}. Answer: {answer}.",
        f"- Callers: {roles}.",
        f"- Repeat: {said[2]}{'; it has no side effects' if pure else ''}.",
        f"- Deadline: {'required' if access.deadline_required else 'not asked for'}.",
        f"- Reasons: {reasons}.",
    ]
    return section(f"#### {service.name}/{method.name}", wrapped(text), "\n".join(_fill(line, "  ") for line in lines))


def _reason_link(name: str) -> str:
    if f"REASON_{name}" not in reasons_pb2.Reason.DESCRIPTOR.values_by_name:
        raise SystemExit(f"a comment names {name}, which is no reason of the contract")
    return f"[{name}](#reasons)"


def _type_link(name: str) -> str:
    short = name.removeprefix(".").removeprefix(OURS)
    return link(short) if name.startswith(f".{OURS}") else f"`{name.removeprefix('.')}`"


_SCALARS: Mapping[int, str] = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}


def type_of(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Return a field's type, with a link where it is one of the contract's."""
    entry = next((one for one in message.nested_type if field.type_name.endswith(f".{message.name}.{one.name}")), None)
    if entry is not None and entry.options.map_entry:
        key, value = (type_of(entry, part) for part in entry.field)
        return f"map of {key} to {value}"
    name = _type_link(field.type_name) if field.type_name else _SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def message_section(package: Package, message: DescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    """Return the section of one message."""
    rows = []
    for position, field in enumerate(message.field):
        in_oneof = field.HasField("oneof_index") and not field.proto3_optional
        rules = list(rules_in_words(field.options.Extensions[validate_pb2.field]))
        if in_oneof:
            rules.insert(0, f"one of `{message.oneof_decl[field.oneof_index].name}`")
        comment = " ".join(paragraphs(comments.get((*path, _FIELDS, position), "")))
        rows.append([str(field.number), f"`{field.name}`", type_of(message, field), "; ".join(rules), comment])
    notes = [f"- {rule}" for rule in rules_in_words(message.options.Extensions[validate_pb2.message])]
    for position, oneof in enumerate(message.oneof_decl):
        if comment := comments.get((*path, _ONEOFS, position), ""):
            required = " Required." if oneof.options.Extensions[validate_pb2.oneof].required else ""
            notes.append(f"- One of `{oneof.name}`: {' '.join(paragraphs(comment))}{required}")
    if message.reserved_name:
        notes.append(f"- Reserved names: {', '.join(f'`{name}`' for name in message.reserved_name)}.")
    fields = table(["#", "field", "type", "rules", "what it is"], rows) if rows else "No fields."
    return section(
        f"#### {package.name}.{message.name}",
        wrapped(comments.get(path, "")),
        fields,
        "\n".join(_fill(note, "  ") for note in notes),
    )


def enum_section(package: Package, enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    """Return the section of one enum."""
    values = enumerate(enum.value)
    rows = [
        [str(value.number), f"`{value.name}`", " ".join(paragraphs(comments.get((*path, _VALUES, position), "")))]
        for position, value in values
    ]
    return section(
        f"#### {package.name}.{enum.name}",
        wrapped(comments.get(path, "")),
        table(["#", "value", "what it means"], rows),
    )


def reasons(packages: list[Package]) -> str:
    """Return the table of reasons."""
    package, _, name = REASON.rpartition(".")
    rows = []
    for file in next(one for one in packages if one.name == package).files:
        comments = comments_of(file)
        for number, enum in enumerate(file.enum_type):
            if enum.name == name:
                path = (_ENUMS, number, _VALUES)
                rows += [
                    _reason(value, comments.get((*path, position), ""))
                    for position, value in enumerate(enum.value)
                    if value.number
                ]
    return REASONS_HEAD + "\n" + table(["reason", "status", "repeat as it is", "default message", "when"], rows)


def _reason(value: EnumValueDescriptorProto, comment: str) -> list[str]:
    info = value.options.Extensions[reasons_pb2.info]
    name, status = value.name.removeprefix("REASON_"), code_pb2.Code.Name(info.code)
    return [name, status, "yes" if info.retryable else "-", info.message, " ".join(paragraphs(comment))]


def package_section(package: Package) -> str:
    """Return the section of one package: what it is for, its services, its messages, its enums."""
    intro, services, messages, enums = [], [], [], []
    for file in package.files:
        comments = comments_of(file)
        intro.append(wrapped(comments.get((_PACKAGE,), "")))
        for number, service in enumerate(file.service):
            rpcs = [
                rpc(service, method, comments.get((_SERVICES, number, _METHODS, position), ""))
                for position, method in enumerate(service.method)
            ]
            services.append(
                section(f"### {package.name}.{service.name}", wrapped(comments.get((_SERVICES, number), "")), *rpcs)
            )
        messages += [
            message_section(package, message, comments, (_MESSAGES, number))
            for number, message in enumerate(file.message_type)
        ]
        enums += [
            enum_section(package, enum, comments, (_ENUMS, number))
            for number, enum in enumerate(file.enum_type)
            if f"{package.name}.{enum.name}" != REASON
        ]
    parts = services
    if messages:
        parts.append(section(f"### Messages of {package.name}", *messages))
    if enums:
        parts.append(section(f"### Enums of {package.name}", *enums))
    return section(f"## {package.name}", "\n\n".join(filter(None, intro)), *parts)


def contents(packages: list[Package]) -> str:
    """Return where to find what."""
    lines = ["- [Roles and RPCs](#roles-and-rpcs)"]
    for package in packages:
        lines.append(f"- {link(package.name)}")
        lines += [f"  - {link(f'{package.name}.{one.name}')}" for file in package.files for one in file.service]
    return "\n".join([*lines, "- [Reasons](#reasons)"]) + "\n"


def render() -> str:
    """Return the whole page."""
    packages = load()
    parts = [access_table(packages), *map(package_section, packages), reasons(packages)]
    return HEAD + contents(packages) + "\n" + "\n".join(f"{part.rstrip()}\n" for part in parts)


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
