"""Keep pretraining's filter out of architectures: by the text of a plugin, and by what its code reaches for.

Text is read before a plugin runs: its names, and every file of its package and its distribution that Python could
import. What text does not show, a name put together at run time for instance, meets the guard: an audit hook of the
interpreter, which nothing can take off again. It refuses to read any file of the pretraining service, however it is
imported. A filter that a plugin writes itself under another name is beyond both: what is installed is trusted to that
degree, and the optimizer that steps the weights is not the plugin's.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cognateforge.exceptions import IncompatibleError

PRETRAINING = "cognate_server"
# Pretraining's gradient filter has no place among agents; the patterns are the contract's own (TrainingPlan).
_REFUSED = re.compile(r"grok[-_ ]?fast", re.IGNORECASE)
_REFUSED_NAME = re.compile(r"grok[-_ ]?fast|slow[-_ ]?gradient", re.IGNORECASE)
# In files, the service that has the filter as well: agents share nothing with it.
_REFUSED_BYTES = re.compile(rb"grok[-_ ]?fast|" + PRETRAINING.encode(), re.IGNORECASE)
# Far more than an architecture needs. A larger package could not be read at every start.
_MOST_FILES = 2000
_MOST_BYTES = 64 << 20
_SUFFIXES = tuple(importlib.machinery.all_suffixes())


def refuse_text(where: str, text: str) -> None:
    """Refuse a text that names the filter. Errors: ValueError."""
    if _REFUSED.search(text):
        raise ValueError(f"{where} mentions GrokFast, which belongs to pretraining alone; remove it to load the plugin")


def refuse_name(where: str, name: str) -> None:
    """Refuse the name or a word of a setting, as the contract does. Errors: ValueError."""
    if _REFUSED_NAME.search(name):
        raise ValueError(f"{where} {name!r} is pretraining's; no agent architecture has a setting for GrokFast")


def refuse_sources(entry_point: metadata.EntryPoint) -> None:
    """Read every importable file of the plugin's top-level package and of its distribution; run none of it.

    Errors: ValueError, for one that names the filter or the pretraining service, and for more than can be read.
    """
    dist = entry_point.dist
    if dist is not None:
        refuse_text("its distribution", " ".join((dist.name, *(dist.requires or ()))))
    left, files = _MOST_BYTES, 0
    for files, path in enumerate(_importable(entry_point), start=1):
        left -= path.stat().st_size
        if files > _MOST_FILES or left < 0:
            raise ValueError(
                f"its package has more than {_MOST_FILES} files or {_MOST_BYTES >> 20} MiB of code, more than is read "
                "before a plugin runs; move the architecture into a package of its own"
            )
        if _REFUSED_BYTES.search(path.read_bytes()):
            raise ValueError(
                f"its file {path.name} mentions GrokFast or {PRETRAINING}, which belong to pretraining alone; remove "
                "that to load the plugin"
            )
    if not files:  # a package in an archive, or a module without a file
        raise ValueError("none of its files can be read before it runs; install it as files in a folder")


def _importable(entry_point: metadata.EntryPoint) -> Iterator[Path]:
    """Yield the files that Python could import, once each, by their real paths."""
    seen: set[str] = set()
    top = entry_point.module.partition(".")[0]
    spec = importlib.util.find_spec(top)  # of a top-level name: this runs nothing of the package
    if spec is None:
        raise ModuleNotFoundError(f"No module named {top!r}")
    roots = [*(spec.submodule_search_locations or ())]
    if spec.origin and os.path.isfile(spec.origin):
        roots.append(spec.origin)
    if entry_point.dist is not None:
        roots += [str(file.locate()) for file in entry_point.dist.files or () if str(file).endswith(_SUFFIXES)]
    for root in roots:
        for found in _walk(root, seen):
            yield Path(found)


def _walk(root: str, seen: set[str]) -> Iterator[str]:
    """Yield the importable files under a folder, through links as Python goes, each real path once."""
    pending = [root]
    while pending:
        path = os.path.realpath(pending.pop())
        if path in seen:
            continue
        seen.add(path)
        if os.path.isdir(path):
            pending += [entry.path for entry in os.scandir(path)]
        elif path.endswith(_SUFFIXES) and os.path.isfile(path):
            yield path


class _Guard:
    """The audit hook and what it has refused. threads: those in which it acts, unless it does in all."""

    def __init__(self) -> None:
        self.installed = False
        self.everywhere = False
        self.threads = threading.local()
        self.refused: list[str] = []
        self._root = ""

    def install(self) -> None:
        """Add the hook, once for a process."""
        if self.installed:
            return
        spec = importlib.util.find_spec(PRETRAINING)
        # An image of the agent service alone has no pretraining service: there is nothing to guard.
        self._root = os.path.realpath(os.path.dirname(spec.origin)) + os.sep if spec and spec.origin else ""
        if self._root:
            sys.addaudithook(self._hear)
        self.installed = True

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not (self.everywhere or getattr(self.threads, "guarded", False)):
            return
        path = arguments[0]
        if isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(self._root):
            self.refused.append(os.path.basename(os.fsdecode(path)))
            raise IncompatibleError(_told(self.refused[-1]))


_guard = _Guard()


def _told(what: str) -> str:
    return (
        f"an agent architecture reached for {what} of the pretraining service, whose filter belongs to pretraining "
        "alone; use another architecture, or remove that from its plugin"
    )


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Refuse the pretraining service's files to this thread, for the time that a plugin's code runs in it.

    Errors: IncompatibleError, also where the plugin took the refusal for its own concern.
    """
    _guard.install()
    outer = getattr(_guard.threads, "guarded", False)
    before, imported = len(_guard.refused), _imported()
    _guard.threads.guarded = True
    try:
        yield
    finally:
        _guard.threads.guarded = outer
    if new := [*_guard.refused[before:], *sorted(_imported() - imported)]:
        raise IncompatibleError(_told(new[0]))


def guard_process() -> None:
    """Refuse the pretraining service's files to this process from now on: it is a worker, and runs plugins' code."""
    _guard.install()
    _guard.everywhere = True


def require_separate() -> None:
    """Refuse to go on where code of this worker reached for the pretraining service, with or without success.

    Errors: IncompatibleError. In a process that is not guarded nothing is checked.
    """
    if _guard.everywhere and (reached := [*_guard.refused, *sorted(_imported())]):
        raise IncompatibleError(_told(reached[0]))


def _imported() -> set[str]:
    """Return the modules that are the pretraining service's, by name or by file."""
    root = _guard._root
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == PRETRAINING or (
            root and isinstance(file, str) and os.path.realpath(file).startswith(root)
        ):
            found.add(name)
    return found
