"""What a published agent's folder holds beside its weights, so that it runs where nothing of this project is installed.

    package.json        what run.py needs to know: which module, which output, which tolerance
    run.py, runtime/    the runnable entry, and the modules that it loads, byte for byte as they are here
    probe.safetensors   logits of the trained and of the untrained model on made-up rows, for checks on other machines
    requirements.txt    the exact versions that it was made with
    metrics.json, lineage.json, README.md, licences/    what was measured, and what it was made of
    provenance.json     the same as a statement that is signed; written at the publication

No row of the training data is in it.
"""

# B rows, T tokens of the longest row.

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import agent_server.bottlenecks
import agent_server.runtime
from agent_server.adaptation import MERGE_TOLERANCE
from agent_server.architectures.model import AgentBatch, AgentModel
from agent_server.objectives.metrics import actions
from agent_server.runtime import run
from agent_server.tasks import Output
from cognateforge.exceptions import IntegrityCheckFailedError
from training_common.attempt import Json
from training_common.models import cognate_v1

FORMAT = 1
PACKAGE_FILE, PROBE_FILE = "package.json", "probe.safetensors"
# Made up, so that a package gives away no row. Short and long ones, so that padding counts.
_PROBE_TEXTS = (
    "yes",
    "What is the weather like in Lisbon tomorrow?",
    "Please move 250 from my savings to my checking account, and tell me what is left on both of them.",
    "no, cancel that",
    "A red bicycle stands in front of the old town hall; nobody has claimed it since the third of May.",
    "Translate 'good morning' into Finnish.",
    "12 + 30 = 42",
    "Book a table for four at a quiet place near the river, tonight at half past eight, under the name of Okafor.",
)
# A vocabulary's logits are long: a few rows of them are as good.
_LANGUAGE_PROBE_ROWS = 4
_PROBE_OBSERVATIONS = 16
_RUNTIME_DIR = Path(agent_server.runtime.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs the agents of an architecture elsewhere.

    module: the name of the file, without its ending, whose `load(folder, config, output)` returns a `run.Model`.
    files: it and what it imports beside installed packages. packages: those, by their names in the package index.
    """

    module: str
    files: tuple[Path, ...]
    packages: tuple[str, ...]


def _runtime(module: str, *beside: str, packages: tuple[str, ...] = ()) -> Runtime:
    files = tuple(_RUNTIME_DIR / f"{name}.py" for name in (module, *beside))
    packages = ("torch", "safetensors", "tokenizers", *packages)
    return Runtime(module=module, files=(*files, _BOTTLENECKS), packages=packages)


_BOTTLENECKS = Path(agent_server.bottlenecks.__file__)
_MASK = (_RUNTIME_DIR / "allowed_actions.py", Path(actions.__file__))
_COGNATE = _runtime("cognate_agent")
_HEAD = ("encoder_head", "text_parts")
RUNTIMES = {
    "cognate": replace(_COGNATE, files=(*_COGNATE.files, Path(cognate_v1.__file__))),
    "recurrent": _runtime("recurrent_agent", *_HEAD),
    "sequence_classifier": _runtime("transformers_agent", *_HEAD, packages=("transformers",)),
    "causal_lm": _runtime("transformers_agent", *_HEAD, packages=("transformers",)),
    "multimodal": _runtime(
        "multimodal_agent", *_HEAD, "recurrent_agent", "transformers_agent", packages=("transformers",)
    ),
    "policy": Runtime(
        module="policy_agent", files=(_RUNTIME_DIR / "policy_agent.py",), packages=("torch", "safetensors")
    ),
}


def write_package(
    folder: Path,
    model: AgentModel,
    untrained: AgentModel,
    *,
    architecture: str,
    runtime: Runtime | None = None,
    allowed_actions: Collection[str] = (),
) -> None:
    """Add to a saved agent's folder what runs it elsewhere, and run it from there.

    model: trained, merged, as it was saved. untrained: as it was before its first step; both in evaluation mode.
    runtime: that of an architecture which is not built in. Without one, the folder gets no run.py.
    allowed_actions: kinds of action that the agent is held to where it runs. None: to all.
    Errors: IntegrityCheckFailedError, when the package's logits are not the model's, or are the untrained one's.
    """
    batch = probe_batch(model)
    logits, before = probe_logits(model, batch), probe_logits(untrained, batch)
    check_differs(logits, trained=logits, untrained=before)
    probe = {"tokens_BT": batch.tokens_BT, "valid_BT": batch.valid_BT, "logits": logits, "untrained_logits": before}
    if batch.features_BF is not None:
        probe["features_BF"] = batch.features_BF
    safetensors.torch.save_file({k: v.contiguous() for k, v in probe.items()}, folder / PROBE_FILE)
    runtime = runtime or RUNTIMES.get(architecture)
    facts: dict[str, Json] = {"format": FORMAT, "output": model.output.value, "tolerance": MERGE_TOLERANCE}
    if runtime is not None:
        facts["module"] = runtime.module
    if allowed_actions:
        facts["allowed_actions"] = list[Json](sorted(allowed_actions))
        if runtime is not None:
            runtime = replace(runtime, files=(*runtime.files, *_MASK))
    (folder / PACKAGE_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if runtime is not None:
        _copy(runtime, folder)
        _check_runs(folder, model, batch)


def as_before(model: AgentModel, build: Callable[[], AgentModel]) -> AgentModel:
    """Return a model as it was before its first step, in evaluation mode, with what the trained one has measured.

    build: returns the untrained model.
    """
    untrained, measured = build().eval(), dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in untrained.named_buffers():
            if name in measured:
                buffer.copy_(measured[name])
    return untrained


def probe_batch(model: AgentModel) -> AgentBatch:
    """Return the made-up rows, as a model reads them."""
    features = numbers_read(model)
    if model.output is Output.ACTIONS:
        tokens_BT = torch.zeros(_PROBE_OBSERVATIONS, 0, dtype=torch.int64)
        return AgentBatch(
            tokens_BT=tokens_BT, valid_BT=tokens_BT.bool(), features_BF=_numbers(len(tokens_BT), features)
        )
    texts = _PROBE_TEXTS[:_LANGUAGE_PROBE_ROWS] if model.output is Output.LANGUAGE else _PROBE_TEXTS
    rows = [encoding.tokens for encoding in model.encode(texts)]
    # A row needs a token; what a tokenizer cannot read gives none.
    rows = [row[: model.context or len(row)] for row in rows if row]
    if not rows:
        raise IntegrityCheckFailedError("the tokenizer gives no token for plain English sentences")
    tokens_BT, valid_BT = run.collate(rows)
    features_BF = _numbers(len(rows), features) if features else None
    return AgentBatch(tokens_BT=tokens_BT, valid_BT=valid_BT, features_BF=features_BF)


def numbers_read(model: AgentModel) -> int:
    """Return how many numbers a model reads of each row: beside a text, or of an observation."""
    if model.output is Output.ACTIONS:
        return sum(int(agent.observation.width) for agent in getattr(model, "agents", ()))
    found = getattr(model, "features", 0)
    return found if isinstance(found, int) else 0


def _numbers(rows: int, count: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe_logits(model: AgentModel, batch: AgentBatch) -> Tensor:
    """Return a model's logits on the made-up rows, where they count."""
    return run.where_they_count(model.output.value, model.comparable_logits(batch), batch.valid_BT)


def check_equal(logits: Tensor, *, trained: Tensor, tolerance: float = MERGE_TOLERANCE) -> float:
    """Return how far logits are from the trained model's, relative to the largest one (1 at least).

    Errors: IntegrityCheckFailedError, when that is above the tolerance.
    """
    distance = run.apart(logits, trained)
    if not distance <= tolerance:  # a NaN fails too
        raise IntegrityCheckFailedError(
            f"the logits are {distance:.2e} away from the trained model's, which is above {tolerance:.0e}"
        )
    return distance


def check_differs(logits: Tensor, *, trained: Tensor, untrained: Tensor) -> float:
    """Return how far logits are from the untrained model's, relative to the largest one (1 at least).

    A model that hardly moved is within any tolerance of both, so nearness decides: what is published has to be nearer
    to the trained model than to the one before its first step.
    Errors: IntegrityCheckFailedError, when it is not.
    """
    distance = run.apart(logits, untrained)
    if not distance > run.apart(logits, trained):
        raise IntegrityCheckFailedError(
            "the logits are no nearer to the trained model's than to those of the model before its first step: nothing "
            "was learnt, or the wrong weights were written"
        )
    return distance


def _copy(runtime: Runtime, folder: Path) -> None:
    below = folder / "runtime"
    below.mkdir()
    for file in runtime.files:
        shutil.copyfile(file, below / file.name)
    shutil.copyfile(_RUNTIME_DIR / "run.py", folder / "run.py")
    (folder / "requirements.txt").write_text(requirements(runtime.packages), encoding="utf-8")


def requirements(packages: Sequence[str]) -> str:
    """Return the installed versions as a requirements file. A local part ("+cpu") is another index's, and left out."""
    lines = [f"{name}=={version(name).partition('+')[0]}" for name in packages]
    python = ".".join(map(str, sys.version_info[:2]))
    return "\n".join([f"# made with Python {python}", *lines, ""])


@torch.no_grad()
def _check_runs(folder: Path, model: AgentModel, batch: AgentBatch) -> None:
    """Load the package as another machine does, and hold every logit against the model's, bit for bit."""
    with _fresh_modules(folder):
        loaded = run.Agent(folder).model
    given = (batch.tokens_BT, batch.valid_BT, batch.features_BF)
    if loaded.output != model.output or not (
        torch.equal(loaded(*given), model(batch))
        and torch.equal(loaded.comparable(*given), model.comparable_logits(batch))
    ):
        raise IntegrityCheckFailedError("the package, loaded by its own run.py, gives other logits than the model")


@contextmanager
def _fresh_modules(folder: Path) -> Iterator[None]:
    """Let a package's modules be loaded from its own folder, whatever was loaded before, and forget them afterwards.

    Nothing is written beside them: what this interpreter makes of them is no part of a package.
    """
    names = {path.stem for path in (folder / "runtime").glob("*.py")}
    kept = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    writes_nothing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_nothing
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


# --- what it was made of


def copy_licences(data_folder: Path | None, path: str, folder: Path) -> list[str]:
    """Copy the licences of a set into a package, and return their names.

    They are files named after a licence in the set's own folder or one above it, up to the data folder; or, in a folder
    `licenses` there, files in whose name the set's folder stands between underscores: "clinc150_CC-BY-3.0.txt". A link
    that leads out of the data folder is not followed: a package is handed on.
    """
    if data_folder is None or not path:
        return []
    found = list(_licences(data_folder.resolve(), (data_folder / path).resolve()))
    if found:
        (folder / "licences").mkdir()
    for file in found:
        shutil.copyfile(file, folder / "licences" / file.name)
    return [file.name for file in found]


def _file_within(root: Path, file: Path) -> bool:
    return file.is_file() and file.resolve().is_relative_to(root)


_LICENCE = re.compile(r"(licen[cs]e|copying)([._-].*)?", re.IGNORECASE)
_LICENCE_DIR = re.compile(r"licen[cs]es?", re.IGNORECASE)


def _licences(root: Path, data: Path) -> Iterator[Path]:
    place = data if data.is_dir() else data.parent
    word = (data.name.partition(".")[0] if place == root else place.name).lower()
    while place.is_relative_to(root):
        files = sorted(place.iterdir()) if place.is_dir() else []
        own = [file for file in files if _LICENCE.fullmatch(file.name) and _file_within(root, file)]
        for below in files:
            if below.is_dir() and _LICENCE_DIR.fullmatch(below.name):
                named = (file for file in sorted(below.iterdir()) if word in file.stem.lower().split("_"))
                own += [file for file in named if _file_within(root, file)]
        if own:
            yield from own
            return
        if place == root:
            return
        place = place.parent
