"""An OCI layout as the image-spec has it: every rule that it states of what is written, and other tools reading it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cognateforge.exceptions import ArtifactCorruptError, LocalStorageError
from cognateforge.export import Artifact, open_artifact, write_folder, write_oci
from cognateforge.layout import SIGNATURE_NAME
from tests.support.fetched import write_manifest

FILES = {
    "README.md": b"# card\n",
    "empty.bin": b"",
    "licences/clinc150_CC-BY-3.0.txt": b"licence",
    f"runtime/{'long' * 40}.py": b"pass\n",
    "weights.safetensors": bytes(range(256)) * 9_000,
}
PARENT = {"name": "cognate-25m@7", "digest": f"sha256:{'f' * 64}"}
CREATED_US = 1_790_000_000_123_456

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[a-f0-9]{64}$")]
_WORD = "[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
MediaType = Annotated[str, StringConstraints(pattern=f"^{_WORD}/{_WORD}$")]
Annotations = dict[Annotated[str, StringConstraints(min_length=1)], str]


# Written from the text of image-spec 1.1: descriptor.md, image-layout.md, image-index.md, manifest.md, config.md. A
# property that those do not know is refused too.
class Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Descriptor(Form):
    mediaType: MediaType
    digest: Digest
    size: Annotated[int, Field(ge=0, lt=2**63)]
    annotations: Annotations = {}
    artifactType: MediaType | None = None


class Layout(Form):
    imageLayoutVersion: Literal["1.0.0"]


class Index(Form):
    schemaVersion: Literal[2]
    mediaType: Literal["application/vnd.oci.image.index.v1+json"]
    manifests: list[Descriptor]


class Manifest(Form):
    schemaVersion: Literal[2]
    mediaType: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifactType: MediaType
    config: Descriptor
    layers: Annotated[list[Descriptor], Field(min_length=1)]
    annotations: Annotations


class RootFs(Form):
    type: Literal["layers"]
    diff_ids: list[Digest]


class Config(Form):
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    architecture: Annotated[str, StringConstraints(min_length=1)]
    os: Annotated[str, StringConstraints(min_length=1)]
    config: dict[str, str]
    rootfs: RootFs


# image-layout.md: the grammar of org.opencontainers.image.ref.name.
REFERENCE = re.compile(r"[A-Za-z0-9]+(([-._:@+]|--)[A-Za-z0-9]+)*(/[A-Za-z0-9]+(([-._:@+]|--)[A-Za-z0-9]+)*)*")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A fetched agent with a file of every awkward kind."""
    folder = tmp_path / "fetched"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    body = {"architecture": "cognate", "task": "classification", "parent": PARENT, "create_us": CREATED_US}
    write_manifest(folder, name="intent-router@3", kind="agent", state="PUBLISHED", **body)
    return open_artifact(folder)


def walk(layout: Path) -> dict[str, bytes]:
    """Check every rule of a layout's form, and return the files that its image holds."""
    Layout.model_validate_json((layout / "oci-layout").read_bytes())
    index = Index.model_validate_json((layout / "index.json").read_bytes())
    seen: set[str] = set()

    def blob(descriptor: Descriptor) -> bytes:
        data = (layout / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")).read_bytes()
        assert (descriptor.size, descriptor.digest) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
        seen.add(descriptor.digest.removeprefix("sha256:"))
        return data

    [named] = index.manifests
    assert named.mediaType == "application/vnd.oci.image.manifest.v1+json"
    assert REFERENCE.fullmatch(named.annotations["org.opencontainers.image.ref.name"])
    manifest = Manifest.model_validate_json(blob(named))
    assert named.artifactType == manifest.artifactType
    assert manifest.config.mediaType == "application/vnd.oci.image.config.v1+json"
    config = Config.model_validate_json(blob(manifest.config))
    files: dict[str, bytes] = {}
    diff_ids = []
    for layer in manifest.layers:
        assert layer.mediaType == "application/vnd.oci.image.layer.v1.tar"
        data = blob(layer)
        diff_ids.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert (member.isreg(), member.uid, member.gid, member.mtime) == (True, 0, 0, 0)
                # layer.md: such a name would remove a file of a layer below.
                assert not member.name.rpartition("/")[2].startswith(".wh.")
                assert layer.annotations["io.cognateforge.path"] == member.name
                files[member.name] = content.read()
    assert diff_ids == config.rootfs.diff_ids
    assert {path.name for path in (layout / "blobs" / "sha256").iterdir()} == seen
    assert {path.name for path in layout.iterdir()} == {"blobs", "index.json", "oci-layout"}
    return files


def read_manifest(layout: Path) -> dict[str, Any]:
    digest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
    found: dict[str, Any] = json.loads((layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())
    return found


def test_a_layout_keeps_every_rule_and_holds_every_file(artifact: Artifact, tmp_path: Path) -> None:
    """Sizes, digests, media types and layers are those that the specification asks for; nothing lies beside them."""
    exported = write_oci(artifact, tmp_path / "layout")
    files = walk(tmp_path / "layout")
    assert {"manifest.json": artifact.manifest.raw, **FILES} == files
    assert exported.digest == json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"][0]["digest"]
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "layout").rglob("*") if path.is_file())
    assert (exported.name, exported.size_bytes) == ("intent-router@3", size_bytes)


@pytest.mark.parametrize(
    "told",
    [
        {"name": "../router@3"},
        {"name": f"{'r' * 60}@3"},
        {"name": ["router@3"]},
        {"kind": "../../x"},
        {"kind": ["agent"]},
        {"parent": "cognate-25m@7"},
        {"architecture": ["cognate"]},
        {"task": {}},
        {"create_us": "yesterday"},
    ],
    ids=str,
)
def test_a_manifest_of_no_version_is_refused(tmp_path: Path, told: dict[str, Any]) -> None:
    """A folder may be anybody's, and what its manifest says goes into other tools' names."""
    write_manifest(tmp_path, **{"name": "router@3", "kind": "agent", **told})
    with pytest.raises(ArtifactCorruptError, match=r"names no version|neither a model|has a form"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("made_us", [-1, 10**30])
def test_a_moment_that_is_none_is_not_told(tmp_path: Path, made_us: int) -> None:
    """The image has no time then."""
    (tmp_path / "fetched").mkdir()
    write_manifest(tmp_path / "fetched", name="router@3", kind="agent", create_us=made_us)
    write_oci(open_artifact(tmp_path / "fetched"), tmp_path / "layout")
    assert "org.opencontainers.image.created" not in read_manifest(tmp_path / "layout")["annotations"]


def test_a_manifest_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    """As any that is no JSON."""
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ArtifactCorruptError, match="the manifest is not JSON"):
        open_artifact(tmp_path)


def test_a_signature_goes_with_the_manifest(artifact: Artifact, tmp_path: Path) -> None:
    """Under its name in a fetched folder, as a layer of its own, and into a folder that is copied."""
    (artifact.folder / SIGNATURE_NAME).write_bytes(b"{}")
    write_oci(artifact, tmp_path / "layout")
    expected = {"manifest.json": artifact.manifest.raw, SIGNATURE_NAME: b"{}", **FILES}
    assert expected == walk(tmp_path / "layout")
    write_folder(artifact, tmp_path / "folder")
    assert b"{}" == (tmp_path / "folder" / SIGNATURE_NAME).read_bytes()


def test_annotations_tell_what_it_is(artifact: Artifact, tmp_path: Path) -> None:
    """Names, digests and the moment of the artifact, of the specification's names where it has one."""
    write_oci(artifact, tmp_path / "layout")
    own, oci = "io.cognateforge", "org.opencontainers.image"
    expected = {
        f"{oci}.title": "intent-router",
        f"{oci}.version": "3",
        f"{oci}.created": "2026-09-21T14:13:20Z",
        f"{own}.name": "intent-router@3",
        f"{own}.digest": artifact.digest,
        f"{own}.state": "PUBLISHED",
        f"{own}.architecture": "cognate",
        f"{own}.task": "classification",
        f"{own}.parent": PARENT["name"],
        f"{own}.parent.digest": PARENT["digest"],
        f"{own}.data.licences": "clinc150_CC-BY-3.0.txt",
    }
    assert expected == read_manifest(tmp_path / "layout")["annotations"]
    write_oci(artifact, tmp_path / "licensed", licence="Apache-2.0", architecture="arm64")
    manifest = read_manifest(tmp_path / "licensed")
    assert {**expected, f"{oci}.licenses": "Apache-2.0"} == manifest["annotations"]
    digest = manifest["config"]["digest"].removeprefix("sha256:")
    assert "arm64" == json.loads((tmp_path / "licensed/blobs/sha256" / digest).read_bytes())["architecture"]


def test_the_same_artifact_gives_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    """Elsewhere, later, and with other modes and times on its files."""
    moved = tmp_path / "moved"
    shutil.copytree(artifact.folder, moved)
    for path in moved.rglob("*"):
        path.chmod(0o700)
    digests = {
        write_oci(one, tmp_path / f"{n}.tar", tar=True).digest for n, one in enumerate([artifact, open_artifact(moved)])
    }
    assert 1 == len(digests)
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar", mode="r:") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert {"manifest.json": artifact.manifest.raw, **FILES} == walk(tmp_path / "unpacked")
    assert digests == {write_oci(artifact, tmp_path / "layout").digest}


def test_what_is_there_is_not_written_over(artifact: Artifact, tmp_path: Path) -> None:
    """A second export to the same place is refused, and one that fails leaves nothing."""
    write_oci(artifact, tmp_path / "layout")
    with pytest.raises(LocalStorageError, match="is there already"):
        write_oci(artifact, tmp_path / "layout")
    (artifact.folder / "README.md").unlink()
    for tar in (False, True):
        with pytest.raises(LocalStorageError, match="other"):
            write_oci(artifact, tmp_path / "other", tar=tar)
    assert {"fetched", "layout"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize("tar", [False, True])
def test_skopeo_reads_an_export(artifact: Artifact, tmp_path: Path, tar: bool) -> None:
    """It copies the image, which compares every digest, and tells the digest that the export told."""
    out = tmp_path / ("image.tar" if tar else "image")
    exported = write_oci(artifact, out, tar=tar)
    source = f"{'oci-archive' if tar else 'oci'}:{out}:intent-router-3"
    command = [
        "skopeo",
        "--insecure-policy",
        "copy",
        "--quiet",
        "--preserve-digests",
        source,
        f"oci:{tmp_path / 'copied'}:copied",
    ]
    subprocess.run(command, check=True, timeout=60)
    told = json.loads((tmp_path / "copied" / "index.json").read_bytes())["manifests"][0]
    assert exported.digest == told["digest"]


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
def test_umoci_unpacks_an_export(artifact: Artifact, tmp_path: Path) -> None:
    """An image tool lays the artifact's files out in one folder."""
    write_oci(artifact, tmp_path / "image")
    image, bundle = f"{tmp_path / 'image'}:intent-router-3", tmp_path / "bundle"
    subprocess.run(["umoci", "unpack", "--rootless", "--image", image, str(bundle)], check=True, timeout=60)
    root = bundle / "rootfs"
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {"manifest.json": artifact.manifest.raw, **FILES} == found
