"""The artifacts of a service, where its settings say that they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.folder import Folder
from training_common.artifacts.places import Place
from training_common.artifacts.registry import ArtifactRegistry
from training_common.artifacts.signing import signer_of
from training_common.settings import ArtifactSettings, ServiceSettings, SettingsError
from training_common.store.database import Database


def open_blobs(settings: ServiceSettings) -> BlobStore:
    """Return the store of the artifacts' bytes. Errors: SettingsError."""
    return open_store(settings.artifacts, settings.files_dir)


def open_store(artifacts: ArtifactSettings, files_dir: Path) -> BlobStore:
    """Return the store of a service's bytes. files_dir: where they are if no URL is given. Errors: SettingsError."""
    here = _open(artifacts.url, artifacts.options, setting="artifacts.url") or Folder(files_dir / "artifacts")
    return BlobStore(here, _open(artifacts.archive_url, artifacts.options, setting="artifacts.archive_url"))


def require_store(settings: ServiceSettings) -> None:
    """Make sure that artifacts can be put, read and removed. Errors: SettingsError, with the setting and the remedy."""
    artifacts = settings.artifacts
    here = _open(artifacts.url, artifacts.options, setting="artifacts.url")
    archive = _open(artifacts.archive_url, artifacts.options, setting="artifacts.archive_url")
    # The folder in the service's own one is made when something is published.
    for setting, place in (("artifacts.url", here), ("artifacts.archive_url", archive)):
        if place is not None:
            try:
                place.probe()
            except ValueError as error:
                raise SettingsError(f"{setting}: {error}") from error


def look_at_store(settings: ServiceSettings) -> list[str]:
    """Return the URLs of the buckets that artifacts are in, each of which was read and none written to.

    Errors: SettingsError, with the setting and the remedy.
    """
    looked = []
    artifacts = settings.artifacts
    for setting, url in (("artifacts.url", artifacts.url), ("artifacts.archive_url", artifacts.archive_url)):
        if not url.startswith("s3://"):
            continue
        from training_common.artifacts.bucket import Bucket

        try:
            Bucket(url, artifacts.options, setting=setting).look()
        except ValueError as error:
            raise SettingsError(f"{setting}: {error}") from error
        looked.append(url)
    return looked


def open_registry(settings: ServiceSettings, database: Database) -> ArtifactRegistry:
    """Return the service's versions, over their bytes. Errors: SettingsError."""
    return ArtifactRegistry(database, open_blobs(settings), signer_of(settings))


def _open(url: str, options: Mapping[str, str], *, setting: str) -> Place | None:
    scheme, separator, rest = url.partition("://")
    if not url:
        return None
    if not separator:
        return Folder(Path(url))
    if scheme == "file":
        return Folder(Path(rest))
    if scheme != "s3" or "@" in rest:
        raise SettingsError(f"{setting}: it is neither a folder nor s3://BUCKET/PREFIX: give one of these")
    # Loaded where it is used: a service over a folder starts without it.
    from training_common.artifacts.bucket import Bucket

    try:
        return Bucket(url, options, setting=setting)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from error
