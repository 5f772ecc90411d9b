"""What the contract promises about itself, read from its descriptors."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor

import agent_server.server
import cognate_server.server
from cognateforge._vendor.buf.validate import validate_pb2
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.errors.v1 import reasons_pb2
from cognateforge.exceptions import BY_REASON
from cognateforge.policy.v1 import policy_pb2
from training_common.rpc import patterns
from training_common.rpc.policy import policies, role_names

ROOT = Path(__file__).resolve().parents[2]
SERVICES = (*cognate_server.server.SERVICES, *agent_server.server.SERVICES)
BIN = Path(sys.executable).parent
# Fields of messages, by their numbers in descriptor.proto: comments are found by such paths.
_MESSAGE, _FIELD, _NESTED, _SERVICE, _METHOD = 4, 2, 3, 6, 2


def service(name: str) -> ServiceDescriptor:
    return descriptor_pool.Default().FindServiceByName(name)


def comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(place.path): place.leading_comments for place in file.source_code_info.location}


def fields(files: list[descriptor_pb2.FileDescriptorProto]) -> Iterator[tuple[str, FieldDescriptor]]:
    for file in files:
        for message in file.message_type:
            found = descriptor_pool.Default().FindMessageTypeByName(f"{file.package}.{message.name}")
            for field in found.fields:
                yield f"{found.full_name}.{field.name}", field


def test_the_access_table_is_the_committed_one() -> None:
    """Who may call what changes only together with the table that people review."""
    lines = ["| RPC | " + " | ".join(role_names()) + " | deadline |", "| --- |" + " --- |" * (len(role_names()) + 1)]
    for path, policy in sorted(policies(SERVICES).items()):
        marks = ["yes" if role in policy.roles else "-" for role in role_names()]
        deadline = "required" if policy.deadline_required else "-"
        lines.append(f"| {path[1:]} | {' | '.join(marks)} | {deadline} |")
    text = "\n".join(lines) + "\n"
    print(text)
    committed = Path(__file__).parent / "access_table.md"
    assert committed.read_text() == text, f"the table has changed: review it, then write it to {committed.name}"


def test_every_rpc_carries_a_policy_and_says_what_it_is() -> None:
    """An RPC without a policy could be called by nobody, and one without words by nobody who reads."""
    for name in SERVICES:
        for method in service(name).methods:
            access = method.GetOptions().Extensions[policy_pb2.access]
            assert access.roles, method.full_name
            assert access.repeat != policy_pb2.REPEAT_UNSPECIFIED, method.full_name
            assert access.deadline_required != method.server_streaming, method.full_name
            has_id = "request_id" in method.input_type.fields_by_name
            assert has_id == (access.repeat == policy_pb2.REPEAT_BY_REQUEST_ID), method.full_name


def test_every_part_of_the_contract_is_commented(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """RPCs name callers, repeatability and reasons; messages and fields say what they are."""
    for file in files:
        told = comments(file)
        for number, message in enumerate(file.message_type):
            assert told.get((_MESSAGE, number)), f"{file.package}.{message.name}"
            for position, field in enumerate(message.field):
                assert told.get((_MESSAGE, number, _FIELD, position)), f"{message.name}.{field.name}"
        for number, item in enumerate(file.service):
            for position, method in enumerate(item.method):
                text = told.get((_SERVICE, number, _METHOD, position), "")
                for part in ("Callers:", "Repeat:", "Reasons:"):
                    assert part in text, f"{item.name}.{method.name} lacks {part}"


def test_every_reason_in_a_comment_exists(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """The reasons that an RPC names are those of the table."""
    known = {name.removeprefix("REASON_") for name in dict(reasons_pb2.Reason.items())}
    for file in files:
        for text in comments(file).values():
            match = re.search(r"Reasons: (.*)", text, re.DOTALL)
            if match:
                assert set(re.findall(r"[A-Z]+_[A-Z_]+", match.group(1))) <= known, text


def test_every_reason_has_a_class_and_a_row() -> None:
    """Servers raise and clients raise the same class; its status and message are the contract's."""
    for value in reasons_pb2.Reason.DESCRIPTOR.values:
        if value.number == reasons_pb2.REASON_UNSPECIFIED:
            continue
        info = value.GetOptions().Extensions[reasons_pb2.info]
        assert 1 <= info.code <= 16, value.name
        assert info.message, value.name
        assert value.name.removeprefix("REASON_") in BY_REASON


def test_everything_that_can_grow_is_bounded(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Every repeated field, map, string and bytes field has a bound, and every number of a request a range."""
    unbounded = []
    for name, field in fields(files):
        if name.startswith(("cognateforge.policy.", "cognateforge.errors.")):
            continue  # options of the contract itself: they are written here, never sent
        rules = field.GetOptions().Extensions[validate_pb2.field]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            bounded = rules.map.max_pairs > 0
        elif field.is_repeated:
            bounded = rules.repeated.max_items > 0
        elif field.type == FieldDescriptor.TYPE_STRING:
            bounded = rules.string.max_len > 0 or "$" in rules.string.pattern or rules.string.uuid
        elif field.type == FieldDescriptor.TYPE_BYTES:
            bounded = rules.bytes.max_len > 0
        elif field.containing_type is not None and field.containing_type.name.endswith(
            ("Plan", "Request", "Share", "Adaptation", "Optimization", "Task")
        ):
            bounded = field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_BOOL) or rules.ByteSize() > 0
        else:
            bounded = True
        if not bounded:
            unbounded.append(name)
    assert [] == unbounded


def test_every_pattern_has_words(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """A refusal says what is asked for: each pattern of the contract has its words, and no words are left over."""
    found = set[str]()
    for _, field in fields(files):
        rules = field.GetOptions().Extensions[validate_pb2.field]
        inner = (rules, rules.repeated.items, rules.map.keys, rules.map.values)
        found |= {each.string.pattern for each in inner if each.string.pattern}
    assert set(patterns.WORDS) == found
    assert all(len(patterns.in_words(pattern)) < 300 for pattern in found)


def _reachable(name: str, seen: set[str]) -> None:
    message = descriptor_pool.Default().FindMessageTypeByName(name)
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        if field.message_type is not None:
            _reachable(field.message_type.full_name, seen)


def test_grokfast_cannot_be_written_on_the_agent_side() -> None:
    """No field, no enum value, no free-form map of options, and the names are reserved."""
    seen: set[str] = set()
    for name in agent_server.server.SERVICES:
        for method in service(name).methods:
            _reachable(method.input_type.full_name, seen)
    forbidden = re.compile(r"grok|slow_gradient|lambda|alpha_ema|ema_", re.IGNORECASE)
    for full_name in seen:
        message = descriptor_pool.Default().FindMessageTypeByName(full_name)
        for field in message.fields:
            assert not forbidden.search(field.name), f"{full_name}.{field.name}"
            assert not (field.message_type and field.message_type.GetOptions().map_entry), f"{full_name}.{field.name}"
            for value in field.enum_type.values if field.enum_type else ():
                assert not forbidden.search(value.name), value.name
    for message in (training_pb2.TrainingPlan.DESCRIPTOR, training_pb2.Optimization.DESCRIPTOR):
        stored = descriptor_pb2.DescriptorProto()
        message.CopyToProto(stored)
        assert {"grokfast", "grok_fast", "grokfast_lambda", "grokfast_alpha"} <= set(stored.reserved_name)


def test_grokfast_has_no_settings_on_the_pretraining_side() -> None:
    """It is mandatory: no request can set alpha or lambda, or switch it off."""
    seen: set[str] = set()
    for name in cognate_server.server.SERVICES:
        for method in service(name).methods:
            _reachable(method.input_type.full_name, seen)
    names = {f.name for n in seen for f in descriptor_pool.Default().FindMessageTypeByName(n).fields}
    assert not {name for name in names if re.search(r"grok|lambda|alpha", name)}


def test_no_operator_message_crosses_the_exchange() -> None:
    """exchange/v1 is the whole of what may pass: its messages use no message of either operator API."""
    seen: set[str] = set()
    for name in cognate_server.server.EXCHANGE:
        for method in service(name).methods:
            _reachable(method.input_type.full_name, seen)
            _reachable(method.output_type.full_name, seen)
    packages = {name.rpartition(".")[0] for name in seen}
    allowed = {"cognateforge.exchange.v1", "cognateforge.artifact.v1", "google.protobuf"}
    assert packages <= allowed


def test_an_agent_can_be_asked_for_by_every_form_of_its_name() -> None:
    """Version, alias, or newest."""
    import protovalidate

    for name in ("router", "router@3", "router@production"):
        assert [] == protovalidate.collect_violations(agent_pb2.GetAgentRequest(name=name))
    for name in ("Router", "router@", "router@0", "router@Prod", "a" * 98, "../x"):
        assert protovalidate.collect_violations(agent_pb2.GetAgentRequest(name=name))


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """Generating again gives the committed bytes."""
    for folder in ("protos", "third_party", "tools", "clients"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = run(sys.executable, "tools/generate.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def snapshot(root: Path) -> dict[str, bytes]:
        wanted = [*root.rglob("*_pb2*.py*"), *root.rglob("*.binpb")]
        return {str(path.relative_to(root)): path.read_bytes() for path in wanted if "__pycache__" not in path.parts}

    before, after = snapshot(ROOT / "clients"), snapshot(tmp_path / "clients")
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert [] == stale, "run `make proto` and commit what it writes"


@pytest.mark.parametrize(
    "command",
    [
        ("lint",),
        ("format", "--diff", "--exit-code", "protos"),
        ("breaking", "protos", "--against", "protos/released.binpb"),
    ],
    ids=["lint", "format", "breaking"],
)
def test_buf_agrees(command: tuple[str, ...]) -> None:
    """Style, layout, and nothing that an older client or server would stumble over."""
    done = run(str(BIN / "buf"), *command)
    assert done.returncode == 0, done.stdout + done.stderr
