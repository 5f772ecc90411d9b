"""Sets of the hub at one commit: streamed through `datasets`, checked to be what was named, and kept once read.

What is kept is one gzipped JSONL file for each set, configuration and commit: a job that starts again, and the next
one, need no network. A commit never changes, so what is kept is never stale.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.exceptions import DataUnavailableError, FieldViolation, InvalidFieldError
from training_common.findings import RowRefusedError
from training_common.hub import unbroken
from training_common.parquet import plain
from training_common.rows import MAX_ROW_BYTES, Row, read_rows

# What is kept of one set, before it is packed: eight times the text that a job can hold.
MAX_HUB_BYTES = 1 << 30
_REMEDY = "put the set into the data folder and name the file"


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A set as a plan names it. config: "" for the only one. revision: a commit."""

    dataset: str
    config: str
    revision: str

    @property
    def name(self) -> str:
        """What manifests call it."""
        return f"{self.dataset}/{self.config}" if self.config else self.dataset

    def require_allowed(self, hub: bool) -> None:
        """Refuse what cannot be read, without asking the hub. Errors: DataUnavailableError, InvalidFieldError."""
        if "/" not in self.dataset:
            # `datasets` takes such names for its own readers, which read the working folder.
            description = f"{self.dataset!r} has no owner: name the set as the hub does, for instance clinc/clinc_oos"
            violation = FieldViolation(field="hub.dataset", description=description)
            raise InvalidFieldError(description, violations=[violation])
        if not hub:
            raise _unavailable(f"the hub is not allowed on this server (data.hub), so {self.name} cannot be read")
        if importlib.util.find_spec("datasets") is None:
            raise _unavailable(f"the package `datasets` is not installed on this server, so {self.name} cannot be read")

    def rows(self, hub_dir: Path | None, each_row: Callable[[], None]) -> Iterator[tuple[Row, str]]:
        """Yield every row and its split. Errors: DataUnavailableError, where the hub does not give the set whole."""
        if hub_dir is None:
            for line, (split, streamed) in enumerate(self._streamed(), start=1):
                yield Row(self.name, line, streamed), split
            return
        kept = hub_dir / self._file_name()
        if not kept.exists():
            self._keep(kept, each_row)
        for row in read_rows(kept):
            try:
                content: Any = row.load()
            except RowRefusedError as error:
                yield Row(self.name, row.line, error), ""
            else:
                yield Row(self.name, row.line, content["row"]), content["split"]

    def _file_name(self) -> str:
        named = f"{self.dataset}\n{self.config}\n{self.revision}"
        return f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.jsonl.gz"

    def _keep(self, kept: Path, each_row: Callable[[], None]) -> None:
        """Write every row into a file that appears whole or not at all."""
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch, written = kept.with_name(f".{kept.name}.{os.getpid()}"), 0
        try:
            with scratch.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=3) as file:
                for split, row in self._streamed():
                    each_row()
                    line = _line({"split": split, "row": row})
                    if len(line) > MAX_ROW_BYTES:
                        line = line[: MAX_ROW_BYTES + 1]  # refused when it is read, in its own place
                    written += len(line)
                    if written > MAX_HUB_BYTES:
                        raise _unavailable(f"{self.name} has more than {MAX_HUB_BYTES} bytes of rows")
                    file.write(line + b"\n")
            scratch.rename(kept)
        finally:
            scratch.unlink(missing_ok=True)

    def _streamed(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Yield every row of every split. Code from the hub is never run, and no file but the commit's is read."""
        try:
            import datasets

            # The prefix keeps `datasets` from a folder of that name on this machine.
            builder = datasets.load_dataset_builder(
                f"hf://datasets/{self.dataset}", self.config or None, revision=self.revision
            )
            self._require_own_files(builder.config.data_files)
            splits: Mapping[str, Any] = builder.as_streaming_dataset()
        except DataUnavailableError:
            raise
        except Exception as error:  # whatever a network and a foreign library can raise
            raise _unavailable(
                f"the hub did not give {self.name} at {self.revision} ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        for split, rows in splits.items():
            words = _words(rows)
            for row in unbroken(f"{self.name}/{split}", rows, remedy=_REMEDY):
                yield str(split), _named(row, words)

    def _require_own_files(self, data_files: Mapping[Any, Iterable[str]] | None) -> None:
        # A set's card may point anywhere, into this machine's own folders too.
        own = f"hf://datasets/{self.dataset}@{self.revision}/"
        for file in (file for files in (data_files or {}).values() for file in files):
            if not str(file).startswith(own):
                raise _unavailable(f"{self.name} points at {str(file)[:120]!r}, which is no file of its own commit")


def _line(kept: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(kept, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which is refused in its own field when it is read
        return json.dumps(kept).encode("ascii")


def _words(rows: Any) -> dict[str, Callable[[int], str]]:
    """Return, for every column of numbers that stand for words, how to tell the word."""
    found = {}
    for name, feature in (getattr(rows, "features", None) or {}).items():
        with contextlib.suppress(AttributeError):
            found[name] = feature.int2str
    return found


def _named(row: Mapping[str, object], words: Mapping[str, Callable[[int], str]]) -> dict[str, object]:
    named = {str(name): plain(value) for name, value in row.items()}
    for name, word in words.items():
        number = named.get(name)
        if isinstance(number, int):
            named[name] = word(number) if number >= 0 else None  # below 0: the row has no label
    return named


def _unavailable(problem: str) -> DataUnavailableError:
    description = f"{problem}; {_REMEDY}"
    return DataUnavailableError(description, violations=[FieldViolation(field="hub", description=description)])
