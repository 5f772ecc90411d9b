"""Model folders out of the Hugging Face hub: weights as safetensors, the tokenizer, and nothing that could run."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from agent_server.architectures.model_folder import CONFIG_FILE, FIELD, OTHER_FILES, TOKENIZER_FILE, open_folder
from cognateforge.exceptions import DataUnavailableError, FieldViolation, ForgeError


def fetch_from_hub(name: str, target: Path) -> None:
    """Load a model of the hub into a folder that does not exist yet: all of it is there in the end, or nothing.

    Errors: DataUnavailableError, for a hub that cannot be reached or has no such model; those of `open_folder`.
    """
    from huggingface_hub import snapshot_download

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        snapshot_download(
            repo_id=name,
            local_dir=str(scratch),
            allow_patterns=[
                CONFIG_FILE,
                TOKENIZER_FILE,
                *OTHER_FILES,
                "model*.safetensors",
                "model.safetensors.index.json",
            ],
        )
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the library's own notes
        open_folder(scratch, name)
        with contextlib.suppress(OSError):  # another job was faster: its folder is as good
            scratch.rename(target)
    except ForgeError:
        raise
    except Exception as error:  # the library's errors have no common root
        text = f"{name} cannot be loaded from the hub: {type(error).__name__}: {error}"[:500]
        raise DataUnavailableError(text, violations=[FieldViolation(field=FIELD, description=text)]) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
