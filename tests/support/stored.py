"""Places of bytes under test, and hands that reach into them past the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
from obstore.store import LocalStore, S3Store

from tests.support.s3 import S3Server
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.open import open_store
from training_common.settings import ArtifactSettings


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A store of each kind, by its settings. files_dir: where the folder of a store without a URL is."""

    files_dir: Path
    url: str = ""
    archive_url: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> ArtifactSettings:
        return ArtifactSettings(url=self.url, archive_url=self.archive_url, options=dict(self.options))

    def open(self) -> BlobStore:
        """Open it as a service does."""
        return open_store(self.settings, self.files_dir)

    def keys(self, *, archive: bool = False) -> list[str]:
        """Return the keys of everything that is there, whatever it is."""
        hands = self._hands(archive)
        found = sorted(entry["path"] for page in obstore.list(hands) for entry in page)
        if isinstance(hands, LocalStore):  # which hides what it takes for its own
            assert found == sorted(_files_in(self._folder(archive)))
        return found

    def replace(self, digest: str, data: bytes, *, archive: bool = False) -> None:
        """Let other bytes stand under a digest."""
        obstore.put(self._hands(archive), _key(digest), data, use_multipart=False)

    def remove(self, digest: str, *, archive: bool = False) -> None:
        """Lose the bytes of a digest."""
        obstore.delete(self._hands(archive), _key(digest))

    def _hands(self, archive: bool) -> Any:
        url = self.archive_url if archive else self.url
        if url.startswith("s3://"):
            own = {name: value for name, value in self.options.items() if name != "allow_http"}
            return S3Store.from_url(url, config=own, client_options={"allow_http": True})  # type: ignore[arg-type]
        folder = self._folder(archive)
        folder.mkdir(parents=True, exist_ok=True)
        return LocalStore(folder)

    def _folder(self, archive: bool) -> Path:
        return Path(self.archive_url) if archive else self.files_dir / "artifacts"


def a_folder(root: Path, s3: S3Server) -> Stored:
    """Return a folder, with an archive in a bucket."""
    return Stored(files_dir=root, archive_url=s3.new_url(), options=s3.options)


def a_bucket(root: Path, s3: S3Server) -> Stored:
    """Return a bucket, with an archive in a folder."""
    return Stored(files_dir=root, url=s3.new_url(), archive_url=str(root / "archive"), options=s3.options)


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _key(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"
