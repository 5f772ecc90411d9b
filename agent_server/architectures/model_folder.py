"""A model folder in the form of `transformers`: where it is, whether it can be used, and its digest.

Free of torch and transformers, since the server looks at it before a job is taken. Weights are safetensors alone and
the tokenizer is tokenizer.json: neither can run code. A folder that needs code of its own is refused.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_server.settings import ModelSettings
from cognateforge.exceptions import DataUnavailableError, FieldViolation, IncompatibleError
from training_common.digests import canonical_json, sha256_bytes, sha256_file

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# What transformers reads beside these, where a folder has it.
OTHER_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# A header names every tensor: far more than any model needs.
_MAX_HEADER_BYTES = 100 << 20
FIELD = "model_folder.path"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A usable folder. files: names of what is read of it, sorted."""

    path: Path
    model_type: str
    files: tuple[str, ...]

    def digest(self) -> str:
        """Return a digest over every file that is read."""
        digests = {name: sha256_file(self.path / name) for name in self.files}
        return sha256_bytes(canonical_json(digests))

    def companions(self) -> dict[str, bytes]:
        """Return the files beside configuration and weights, by name: the tokenizer's, in small."""
        kept = (TOKENIZER_FILE, *OTHER_FILES)
        return {name: (self.path / name).read_bytes() for name in self.files if name in kept}


def find_folder(settings: ModelSettings, path: str) -> Path:
    """Return the place of a plan's model folder, which may not be there yet where the hub may be asked.

    Errors: DataUnavailableError, naming what to set or to put where.
    """
    if settings.folder is None:
        raise _unavailable("this server has no folder of models; set models.folder, and put the model below it")
    folder = settings.folder / path
    if not folder.is_dir() and not settings.hub:
        raise _unavailable(f"there is no folder {path} below models.folder; put the model there, or set models.hub")
    return folder


def open_folder(folder: Path, name: str) -> ModelFolder:
    """Return a folder whose files are all there and sound in form. name: what messages call it.

    Errors: DataUnavailableError, for what is missing or torn; IncompatibleError, for what will not be loaded.
    """
    config = _read_json(folder / CONFIG_FILE, name)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise _incompatible(f"{name}: {CONFIG_FILE} names no model_type; save the model with transformers")
    if "auto_map" in config:
        raise _incompatible(
            f"{name}: {CONFIG_FILE} has an auto_map, which runs code of the folder; use a model that transformers knows"
        )
    if not (folder / TOKENIZER_FILE).is_file():
        raise _unavailable(
            f"{name} has no {TOKENIZER_FILE}; save its tokenizer with transformers as a fast one (AutoTokenizer)"
        )
    weights = _weights(folder, name)
    for shard in weights:
        if shard != _INDEX_FILE:
            _require_whole(folder / shard, name)
    others = [other for other in OTHER_FILES if (folder / other).is_file()]
    return ModelFolder(
        path=folder, model_type=model_type, files=tuple(sorted({CONFIG_FILE, TOKENIZER_FILE, *weights, *others}))
    )


def _weights(folder: Path, name: str) -> list[str]:
    """Return the names of the files of weights."""
    if (folder / _WEIGHTS_FILE).is_file():
        return [_WEIGHTS_FILE]
    if (folder / _INDEX_FILE).is_file():
        shards = sorted(set(map(str, _read_json(folder / _INDEX_FILE, name).get("weight_map", {}).values())))
        if not shards or any(os.path.basename(shard) != shard for shard in shards):
            raise _incompatible(f"{name}: {_INDEX_FILE} names no files of this folder; save the model anew")
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise _unavailable(f"{name} lacks {', '.join(missing[:3])}, which {_INDEX_FILE} names; copy it whole")
        return [_INDEX_FILE, *shards]
    if pickles := sorted(file.name for file in folder.iterdir() if file.name.endswith(_PICKLES)):
        raise _incompatible(
            f"{name} has its weights only as {', '.join(pickles[:3])}, whose loading can run code; save them as "
            "safetensors: model.save_pretrained(folder)"
        )
    raise _unavailable(f"{name} has no {_WEIGHTS_FILE}; copy the folder whole, or save the model with transformers")


def _require_whole(path: Path, name: str) -> None:
    """Hold a file's size against its header: 8 bytes of its length, JSON, and the tensors' bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Any = json.loads(file.read(length)) if length <= min(size, _MAX_HEADER_BYTES) else None
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (struct.error, ValueError, TypeError, AttributeError, KeyError, IndexError):
        raise _unavailable(f"{name}: {path.name} is no safetensors file, or is torn; copy it anew") from None
    if 8 + length + end != size:
        raise _unavailable(f"{name}: {path.name} has {size} bytes and should have {8 + length + end}; copy it anew")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise _unavailable(
            f"{name} has no {path.name} that can be read; it is no model folder of transformers"
        ) from None
    except ValueError as error:
        raise _unavailable(f"{name}: {path.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise _unavailable(f"{name}: {path.name} is no JSON object")
    return value


def _unavailable(text: str) -> DataUnavailableError:
    return DataUnavailableError(text, violations=[FieldViolation(field=FIELD, description=text)])


def _incompatible(text: str) -> IncompatibleError:
    return IncompatibleError(text, violations=[FieldViolation(field=FIELD, description=text)])
