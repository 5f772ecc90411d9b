"""Generate the Python side of the contracts: `make proto`.

protoc (from grpcio-tools) writes messages, services and typed stubs straight into clients/, because the proto path
equals the import path. One file needs help: buf/validate/validate.proto would claim the top-level package `buf`, so
its module is relocated below cognateforge._vendor, by substitutions that fail loudly on anything unexpected.
"""

from __future__ import annotations

import importlib.resources
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "protos"
THIRD_PARTY = ROOT / "third_party" / "proto"
TARGET = ROOT / "clients"
VENDOR = "cognateforge._vendor"
DESCRIPTORS = TARGET / "cognateforge" / "contract.binpb"

# Every way in which generated code refers to the relocated module; both forms are anchored to a line's start.
RELOCATIONS = (
    (re.compile(r"^from buf\.validate import ", re.MULTILINE), f"from {VENDOR}.buf.validate import "),
    (re.compile(r"^import buf\.validate\.validate_pb2\b", re.MULTILINE), f"import {VENDOR}.buf.validate.validate_pb2"),
    (
        re.compile(r"BuildTopDescriptorsAndMessages\(DESCRIPTOR, 'buf\.validate\."),
        f"BuildTopDescriptorsAndMessages(DESCRIPTOR, '{VENDOR}.buf.validate.",
    ),
)
LEFT_OVER = re.compile(r"^(from|import) buf\b", re.MULTILINE)


def protoc(*arguments: str) -> None:
    wkt = importlib.resources.files("grpc_tools") / "_proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{OURS}", f"-I{THIRD_PARTY}", f"-I{wkt}", *arguments]
    subprocess.run(command, check=True)


def relocate(text: str, source: Path) -> str:
    for pattern, replacement in RELOCATIONS:
        text = pattern.sub(replacement, text)
    if LEFT_OVER.search(text):
        raise SystemExit(f"{source}: still imports the top-level package buf; extend RELOCATIONS in {__file__}")
    return text


def main() -> None:
    ours = sorted(str(path.relative_to(OURS)) for path in OURS.rglob("*.proto"))
    plugin_dir = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={plugin_dir / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    for stale in TARGET.rglob("*_pb2*.py*"):
        if "__pycache__" not in stale.parts:
            stale.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        services = [name for name in ours if re.search(r"^service ", (OURS / name).read_text(), re.MULTILINE)]
        protoc(f"--python_out={out}", f"--mypy_out={out}", *plugins, *ours, "buf/validate/validate.proto")
        protoc(f"--grpc_python_out={out}", f"--mypy_grpc_out={out}", *plugins, *services)
        for path in sorted(p for p in out.rglob("*") if p.is_file()):
            relative = path.relative_to(out)
            home = TARGET if relative.parts[0] == "cognateforge" else TARGET / "cognateforge" / "_vendor"
            target = home / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(relocate(path.read_text(encoding="utf-8"), relative), encoding="utf-8")
            for folder in target.relative_to(TARGET).parents[:-2]:
                (TARGET / folder / "__init__.py").touch()
    protoc(f"--descriptor_set_out={DESCRIPTORS}", "--include_imports", "--include_source_info", *ours)
    shutil.rmtree(TARGET / "cognateforge" / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main()
