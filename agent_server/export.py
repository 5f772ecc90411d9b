"""Write a published agent in another form: python -m agent_server.export FOLDER --format torch|onnx OUT

    torch    a program of torch.export (.pt2), for torch.export.load
    onnx     an ONNX graph, for onnxruntime and others

Both take tokens_BT (int64) and valid_BT (bool, False for padding) and give logits, for any number of rows and tokens.
A file is written only if the logits that it gives are the trained model's, and not those of the model before its first
step: both are in the package (probe.safetensors). The tokenizer stays the package's.
"""

# B rows, T tokens of the longest row.

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.model import AgentBatch, AgentModel
from agent_server.package import PACKAGE_FILE, PROBE_FILE, check_differs, check_equal
from agent_server.runtime import run
from cognateforge.exceptions import (
    ArtifactCorruptError,
    ForgeError,
    IncompatibleError,
    LocalStorageError,
    NotImplementedByServerError,
)
from training_common import faults

# What a built-in architecture has no form for, and why. Those of plugins are tried: the logits decide.
_STEPS = (
    "each token takes as many steps as it needs, which no graph holds, and with a fixed number of steps it is another "
    "function"
)
_UNROLLED = "it would be written out step by step, for texts of one length"
_NOT_BUILT = "this release writes no such file"
_REFUSED: Mapping[str, Mapping[str, str]] = {
    "cognate": {"torch": _STEPS, "onnx": _STEPS},
    "recurrent": {"torch": f"{_UNROLLED}; ONNX has recurrent layers"},
    "causal_lm": {"torch": _NOT_BUILT, "onnx": _NOT_BUILT},
    "multimodal": {"torch": _NOT_BUILT, "onnx": _NOT_BUILT},
    "policy": {"torch": _NOT_BUILT, "onnx": _NOT_BUILT},
}
# Longest text where a model has no bound of its own: tracers want one.
_UNBOUNDED_TOKENS = 1 << 16
# So long a scratch folder may be there before it is locked.
_UNLOCKED_S = 60.0
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written file. distance: of its logits from the trained model's, relative to the largest one (1 at least)."""

    file: str
    format: str
    size_bytes: int
    distance: float
    untrained_distance: float


class _Plain(nn.Module):
    """A model with tensors as its arguments."""

    def __init__(self, model: AgentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(AgentBatch(tokens_BT=tokens_BT, valid_BT=valid_BT))
        return logits


def export_agent(folder: Path, out: Path, form: str, *, factory: AgentArchitectureFactory | None = None) -> Exported:
    """Write the agent of a package's folder to a file, checked.

    form: "torch" or "onnx".
    Errors: ArtifactCorruptError, ArchitectureNotFoundError; LocalStorageError, for a place that is none;
    NotImplementedByServerError, for an architecture that is no graph; IncompatibleError, when it cannot be traced;
    IntegrityCheckFailedError, when its logits are wrong.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        output = json.loads((folder / PACKAGE_FILE).read_text(encoding="utf-8"))["output"]
        probe = safetensors.torch.load_file(folder / PROBE_FILE)
        architecture = str(config["architecture"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ArtifactCorruptError(f"{folder} holds no package of an agent: {error}") from error
    if reason := _REFUSED.get(architecture, {}).get(form):
        raise NotImplementedByServerError(
            f"agents of {architecture} are not exported to {form}: {reason}; the package's run.py answers for them"
        )
    if not out.parent.is_dir():
        raise LocalStorageError(f"{out.parent} is no folder: create it, or give another place for {out.name}")
    model = (factory or AgentArchitectureFactory()).get(architecture).load(folder).eval()
    write, read = _FORMS[form]
    try:
        _clear_abandoned(out)
        with TemporaryDirectory(dir=out.parent, prefix=_scratch_prefix(out)) as scratch, _locked(Path(scratch)):
            made = Path(scratch) / out.name
            try:
                write(_Plain(model).eval(), probe, model.context, made)
                exported = read(made)
            except (ForgeError, OSError):
                raise
            except Exception as error:  # whatever tracers raise
                if faults.of_full_disk(error, Path(scratch)):
                    raise OSError(errno.ENOSPC, "no space left on device", str(made)) from error
                text = str(error).partition("\n")[0]
                raise IncompatibleError(f"{architecture} cannot be exported: {type(error).__name__}: {text}") from error
            distance, before = check_export(exported, probe, output)
            size_bytes = made.stat().st_size
            with made.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(made, out)
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        raise LocalStorageError(f"{out} cannot be written: {error.strerror or error}; {remedy}") from error
    return Exported(file=str(out), format=form, size_bytes=size_bytes, distance=distance, untrained_distance=before)


def _scratch_prefix(out: Path) -> str:
    return f".{out.name}.exporting-"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process, and tell whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or on a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _clear_abandoned(out: Path) -> None:
    """Remove the scratch folders of exports to the same place that were killed. One that runs holds its own locked."""
    for left in out.parent.glob(f"{glob.escape(_scratch_prefix(out))}*"):
        with contextlib.suppress(OSError):  # another one was quicker, or it is somebody else's
            # A moment passes between the making of a folder and its lock.
            if time.time() - left.lstat().st_mtime < _UNLOCKED_S or left.is_symlink():
                continue
            with _locked(left) as free:
                if free:
                    shutil.rmtree(left)


@torch.no_grad()
def check_export(exported: Function, probe: dict[str, Tensor], output: str) -> tuple[float, float]:
    """Return how far an export's logits are from the trained and from the untrained model's.

    It is asked for all rows at once and for each alone, without padding: other shapes than it was traced with.
    Errors: IntegrityCheckFailedError.
    """
    tokens_BT, valid_BT = probe["tokens_BT"], probe["valid_BT"]
    logits = run.where_they_count(output, exported(tokens_BT, valid_BT), valid_BT)
    alone = []
    for tokens_T, valid_T in zip(tokens_BT, valid_BT, strict=True):
        row = (tokens_T[valid_T].unsqueeze(0), valid_T[valid_T].unsqueeze(0))
        alone.append(run.where_they_count(output, exported(*row), row[1]))
    distance = max(check_equal(found, trained=probe["logits"]) for found in (logits, torch.cat(alone)))
    return distance, check_differs(logits, trained=probe["logits"], untrained=probe["untrained_logits"])


def _shapes(context: int) -> dict[str, dict[int, Any]]:
    rows, tokens = Dim("rows", min=1, max=4096), Dim("tokens", min=1, max=context or _UNBOUNDED_TOKENS)
    return {"tokens_BT": {0: rows, 1: tokens}, "valid_BT": {0: rows, 1: tokens}}


def _write_torch(model: nn.Module, probe: dict[str, Tensor], context: int, path: Path) -> None:
    arguments = (probe["tokens_BT"], probe["valid_BT"])
    torch.export.save(torch.export.export(model, arguments, dynamic_shapes=_shapes(context)), path)


def _read_torch(path: Path) -> Function:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, probe: dict[str, Tensor], context: int, path: Path) -> None:
    arguments, names = (probe["tokens_BT"], probe["valid_BT"]), ["tokens_BT", "valid_BT"]
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        # The newer exporter writes a recurrent layer out step by step; the older one has ONNX's own for it.
        axes = {name: {0: "rows", 1: "tokens"} for name in names}
        with warnings.catch_warnings():
            # Of the exporter's age, and of numbers of rows that `check_export` asks for.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, arguments, path, dynamo=False, input_names=names, output_names=["logits"], dynamic_axes=axes
            )
        return
    program = torch.onnx.export(
        model,
        arguments,
        dynamo=True,
        dynamic_shapes=_shapes(context),
        input_names=names,
        output_names=["logits"],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx gave no program")
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Function:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def function(tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        [logits] = session.run(["logits"], {"tokens_BT": tokens_BT.numpy(), "valid_BT": valid_BT.numpy()})
        return torch.from_numpy(logits)

    return function


_FORMS: dict[str, tuple[Callable[[nn.Module, dict[str, Tensor], int, Path], None], Callable[[Path], Function]]] = {
    "torch": (_write_torch, _read_torch),
    "onnx": (_write_onnx, _read_onnx),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Writes a published agent in another form, checked.")
    parser.add_argument("folder", type=Path, help="a fetched agent")
    parser.add_argument("out", type=Path, help="the file to write, for instance model.onnx")
    parser.add_argument("--format", choices=sorted(_FORMS), required=True)
    given = parser.parse_args(arguments)
    try:
        exported = export_agent(given.folder, given.out, given.format)
    except ForgeError as error:
        reason = error.reason_name() if error.reason else "error"
        print(f"{reason}: {error.message}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    print(json.dumps(asdict(exported)))  # noqa: T201 - a command's output
    return 0


if __name__ == "__main__":
    sys.exit(main())
