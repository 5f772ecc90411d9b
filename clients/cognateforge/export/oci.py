"""An OCI image of a model or an agent: a layout that image tools and artifact tools read alike.

An ordinary image whose layers are uncompressed tars of one file each, so that an image tool lays the files out in one
folder, and a registry keeps a file once that several versions share. The first layers are the manifest and, of a signed
artifact, its signature, under their names in a fetched folder: whoever has the image can hold every file against them.
The same artifact gives the same bytes.

Sources: OCI image-spec 1.1, image-layout.md, manifest.md, config.md, layer.md, annotations.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cognateforge.export.artifact import Artifact, Exported, whole

ARTIFACT_TYPE = "application/vnd.cognateforge.{kind}.v1"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
# What the specification defines, and what is this project's own.
OCI, OWN = "org.opencontainers.image", "io.cognateforge"
_LICENCES = "licences/"
# RFC 3339 has no later one.
_YEAR_10000_US = 253_402_300_800 * 1_000_000


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Stored bytes, and what a descriptor says of them."""

    media_type: str
    digest: str
    size_bytes: int

    def descriptor(self, annotations: Mapping[str, str] | None = None, **beside: str) -> dict[str, Any]:
        """Return the descriptor that names it."""
        found = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes, **beside}
        return found | ({"annotations": dict(annotations)} if annotations else {})


def write_oci(
    artifact: Artifact, out: Path, *, tar: bool = False, licence: str = "", architecture: str = "amd64"
) -> Exported:
    """Write an OCI image layout: a folder, or one file where `tar` is set.

    licence: SPDX expression for everything in it; empty: none is claimed, and the files' names in licences/ are told.
    architecture: of the machines that pull it, as image tools refuse another; the bytes are the same on all.
    Errors: LocalStorageError.
    """
    with whole(out) as scratch:
        layout = scratch.with_name(f"{scratch.name}.layout") if tar else scratch
        try:
            image = _Layout(layout).image(artifact, licence=licence, architecture=architecture)
            if tar:
                _pack(layout, scratch)
        finally:
            if tar:
                shutil.rmtree(layout, ignore_errors=True)
        files = [scratch] if tar else [path for path in scratch.rglob("*") if path.is_file()]
        size_bytes = sum(path.stat().st_size for path in files)
    return Exported(path=out, format="oci", name=artifact.name, digest=image.digest, size_bytes=size_bytes)


class _Layout:
    """An image layout while it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)

    def image(self, artifact: Artifact, *, licence: str, architecture: str) -> Blob:
        """Write everything, and return the image's manifest."""
        paths = {**artifact.proofs, **artifact.files}
        layers = {name: self._layer(name, path) for name, path in paths.items()}
        created = _created(artifact)
        config = self._json(
            CONFIG,
            {
                **({"created": created} if created else {}),
                "architecture": architecture,
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers.values()]},
            },
        )
        image = self._json(
            MANIFEST,
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "artifactType": _type(artifact),
                "config": config.descriptor(),
                "layers": [layer.descriptor({f"{OWN}.path": name}) for name, layer in layers.items()],
                "annotations": _annotations(artifact, created=created, licence=licence),
            },
        )
        family, _, version = artifact.name.partition("@")
        named = image.descriptor({f"{OCI}.ref.name": f"{family}-{version}"}, artifactType=_type(artifact))
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]}
        (self.folder / "index.json").write_bytes(_canonical(index))
        (self.folder / "oci-layout").write_bytes(_canonical({"imageLayoutVersion": "1.0.0"}))
        return image

    def _layer(self, name: str, path: Path) -> Blob:
        """Store a tar of one file."""
        scratch = self.folder / "layer"
        with scratch.open("wb") as file:
            hashed = _Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as tar, path.open("rb") as content:
                tar.addfile(_entry(name, path.stat().st_size), content)
        digest = f"sha256:{hashed.hash.hexdigest()}"
        os.replace(scratch, self._path(digest))
        return Blob(media_type=LAYER, digest=digest, size_bytes=hashed.size_bytes)

    def _json(self, media_type: str, value: Mapping[str, Any]) -> Blob:
        data = _canonical(value)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._path(digest).write_bytes(data)
        return Blob(media_type=media_type, digest=digest, size_bytes=len(data))

    def _path(self, digest: str) -> Path:
        return self._blobs / digest.removeprefix("sha256:")


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size_bytes = 0

    def writable(self) -> bool:
        """It is written to, in order."""
        return True

    def tell(self) -> int:
        """Return what was written, in bytes."""
        return self.size_bytes

    def write(self, data: Any) -> int:
        """Write and hash some bytes."""
        self.hash.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    """Return a tar's entry that tells of nothing but the file: no owner, no time."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size_bytes, 0o644, 0
    return entry


def _pack(layout: Path, out: Path) -> None:
    with tarfile.open(out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        # The two small ones first: whoever reads a stream knows at once what comes.
        names = ["oci-layout", "index.json", *sorted(f"blobs/sha256/{p.name}" for p in layout.glob("blobs/sha256/*"))]
        for name in names:
            with (layout / name).open("rb") as content:
                tar.addfile(_entry(name, (layout / name).stat().st_size), content)


def _type(artifact: Artifact) -> str:
    return ARTIFACT_TYPE.format(kind=artifact.kind)


def _created(artifact: Artifact) -> str:
    """Return when the artifact was made, empty where its manifest does not tell."""
    made_us = artifact.document.get("create_us")
    if not isinstance(made_us, int) or not 0 <= made_us < _YEAR_10000_US:
        return ""
    return datetime.fromtimestamp(made_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _annotations(artifact: Artifact, *, created: str, licence: str) -> dict[str, str]:
    document = artifact.document
    family, _, version = artifact.name.partition("@")
    parent = document.get("parent") or {}
    licences = [name.removeprefix(_LICENCES) for name in artifact.files if name.startswith(_LICENCES)]
    architecture = document.get("architecture")
    found = {
        f"{OCI}.title": family,
        f"{OCI}.version": version,
        f"{OCI}.created": created,
        f"{OCI}.licenses": licence,
        f"{OWN}.name": artifact.name,
        f"{OWN}.digest": artifact.digest,
        f"{OWN}.state": str(document.get("state", "")),
        f"{OWN}.architecture": architecture if isinstance(architecture, str) else (architecture or {}).get("name", ""),
        f"{OWN}.task": str(document.get("task", "")),
        f"{OWN}.parent": str(parent.get("name", "")),
        f"{OWN}.parent.digest": str(parent.get("digest", "")),
        f"{OWN}.data.licences": ", ".join(licences),
    }
    return {name: value for name, value in found.items() if value}


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
