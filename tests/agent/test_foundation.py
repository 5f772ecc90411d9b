"""Fetching a foundation: resolved, compared, fetched once, verified at every use. The server is real gRPC on port 0."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from agent_server.architectures.factory import FoundationRequirement
from agent_server.foundation import AWAY, CognateLink, Foundation, connect, fetch, holds, refusal
from agent_server.settings import CognateEndpoint
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.client import CognateClient, deadline_within
from cognateforge.exceptions import (
    ArtifactCorruptError,
    ForgeError,
    FoundationNotFoundError,
    IncompatibleError,
    ModelExperimentalError,
    ModelNotFoundError,
    NotImplementedByServerError,
    ProvenanceRefusedError,
    to_status,
)
from cognateforge.exchange.v1 import model_pb2 as pb
from cognateforge.exchange.v1 import model_pb2_grpc
from cognateforge.signatures import make_keys
from tests.support.consul_double import ConsulDouble

FILES = {"model.safetensors": b"weights" * 40_000, "config.json": b"{}", "tokenizer.json": b"{ }"}
FINGERPRINT = "sha256:" + "a" * 64
REQUIRED = FoundationRequirement(name="cognate_v1", fingerprint=FINGERPRINT, act_version=1, ltm_version=1)
CHUNK_BYTES = 50_000


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def model_of(version: int, state: pb.ModelState.ValueType) -> tuple[pb.FoundationModel, bytes]:
    """Return a model and its manifest."""
    files = [artifact_pb2.File(path=path, size_bytes=len(data), digest=sha256(data)) for path, data in FILES.items()]
    entries = [{"path": f.path, "size_bytes": f.size_bytes, "digest": f.digest} for f in files]
    manifest = json.dumps({"name": f"cognate-25m@{version}", "files": entries}).encode()
    model = pb.FoundationModel(
        name=f"cognate-25m@{version}",
        state=state,
        digest=sha256(manifest),
        architecture=pb.Architecture(name="cognate_v1", fingerprint=FINGERPRINT, act_version=1, ltm_version=1),
        files=files,
        size_bytes=sum(map(len, FILES.values())),
    )
    if state == pb.MODEL_STATE_EXPERIMENTAL:
        model.checks.add(name="memory_helps", passed=False)
    return model, manifest


@dataclass
class Registry(model_pb2_grpc.ModelServiceServicer):
    """A registry of models, with a wire that can damage what it carries."""

    models: dict[str, tuple[pb.FoundationModel, bytes]] = field(default_factory=dict)
    fetches: int = 0
    damage: bytes = b""

    def publish(self, version: int, state: pb.ModelState.ValueType = pb.MODEL_STATE_READY) -> pb.FoundationModel:
        model, manifest = model_of(version, state)
        self.models[model.name] = self.models["cognate-25m"] = (model, manifest)
        return model

    def _find(self, name: str, context: grpc.ServicerContext) -> tuple[pb.FoundationModel, bytes]:
        if name not in self.models:
            _abort(context, ModelNotFoundError(f"no model {name}"))
        return self.models[name]

    def GetModelCard(self, request: pb.GetModelCardRequest, context: grpc.ServicerContext) -> pb.GetModelCardResponse:
        return pb.GetModelCardResponse(name=self._find(request.name, context)[0].name)

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._find(request.name, context)[0])

    def CheckCompatibility(
        self, request: pb.CheckCompatibilityRequest, context: grpc.ServicerContext
    ) -> pb.CheckCompatibilityResponse:
        model, _ = self._find(request.name, context)
        parts = ("name", "fingerprint", "act_version", "ltm_version")
        mismatches = [
            pb.Mismatch(field=f"architecture.{part}", model_value=str(has), wanted_value=str(wants))
            for part in parts
            if (wants := getattr(request.architecture, part)) and (has := getattr(model.architecture, part)) != wants
        ]
        verdict = pb.VERDICT_INCOMPATIBLE if mismatches else pb.VERDICT_COMPATIBLE
        return pb.CheckCompatibilityResponse(verdict=verdict, mismatches=mismatches, model_digest=model.digest)

    def GetModelProvenance(
        self, request: pb.GetModelProvenanceRequest, context: grpc.ServicerContext
    ) -> pb.GetModelProvenanceResponse:
        _abort(context, NotImplementedByServerError("a release of before"))
        raise AssertionError

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        raise NotImplementedError

    def RegisterDependents(
        self, request: pb.RegisterDependentsRequest, context: grpc.ServicerContext
    ) -> pb.RegisterDependentsResponse:
        raise NotImplementedError

    def ReleaseDependents(
        self, request: pb.ReleaseDependentsRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseDependentsResponse:
        raise NotImplementedError

    def ListDependents(
        self, request: pb.ListDependentsRequest, context: grpc.ServicerContext
    ) -> pb.ListDependentsResponse:
        raise NotImplementedError

    def WatchModels(
        self, request: pb.WatchModelsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchModelsResponse]:
        raise NotImplementedError

    def FetchModel(
        self, request: pb.FetchModelRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchModelResponse]:
        model, manifest = self._find(request.name, context)
        self.fetches += 1
        yield pb.FetchModelResponse(header=pb.FetchHeader(model=model, manifest=manifest))
        payload = b"".join(FILES.values())
        payload = self.damage + payload[len(self.damage) :]
        for start in range(request.offset_bytes, len(payload), CHUNK_BYTES):
            chunk = artifact_pb2.Chunk(offset_bytes=start, data=payload[start : start + CHUNK_BYTES])
            yield pb.FetchModelResponse(chunk=chunk)


def _abort(context: grpc.ServicerContext, error: ForgeError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


@pytest.fixture
def registry() -> Registry:
    """A registry with one model that is ready."""
    made = Registry()
    made.publish(1)
    return made


@pytest.fixture
def client(registry: Registry) -> Iterator[CognateClient]:
    """A client of a server that serves the registry."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    model_pb2_grpc.add_ModelServiceServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with connect(CognateEndpoint(address=f"127.0.0.1:{port}")) as made:
        yield made
    server.stop(None).wait()


def get(client: CognateClient, cache_dir: Path, name: str = "cognate-25m", **changes: object) -> Foundation:
    settings = {"accept_experimental": False, "required": REQUIRED} | changes
    return fetch(client, name, cache_dir=cache_dir, **settings)  # type: ignore[arg-type]


def test_a_family_is_resolved_and_fetched_once(client: CognateClient, registry: Registry, tmp_path: Path) -> None:
    """The newest version lands in a folder named after its digest; the second time nothing is transferred."""
    registry.publish(2)
    first, second = get(client, tmp_path), get(client, tmp_path, "cognate-25m@2")
    assert first.name == second.name == "cognate-25m@2"
    assert first.path == second.path == tmp_path / first.digest.removeprefix("sha256:")
    assert {path: (first.path / path).read_bytes() for path in FILES} == FILES
    assert registry.fetches == 1


def test_the_exact_version_is_told_before_it_is_needed(
    client: CognateClient, registry: Registry, tmp_path: Path
) -> None:
    """So that it can be held: where that fails, nothing is fetched."""
    told: list[tuple[str, int]] = []
    get(client, tmp_path, on_resolved=lambda name: told.append((name, registry.fetches)))
    get(client, tmp_path, on_resolved=lambda name: told.append((name, registry.fetches)))
    assert [("cognate-25m@1", 0), ("cognate-25m@1", 1)] == told

    def refuse(_name: str) -> None:
        raise ModelNotFoundError("it was collected just now")

    registry.publish(2)
    with pytest.raises(ModelNotFoundError):
        get(client, tmp_path, on_resolved=refuse)
    assert registry.fetches == 1


def test_progress_is_told_in_bytes(client: CognateClient, tmp_path: Path) -> None:
    """The last word of a fetch is that all is there."""
    told: list[tuple[int, int]] = []
    get(client, tmp_path, on_progress=lambda done, total: told.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert told[-1] == (size, size)
    assert told == sorted(told)


@pytest.mark.parametrize("path", [*FILES, "manifest.json"])
def test_a_damaged_cache_is_fetched_again(client: CognateClient, registry: Registry, tmp_path: Path, path: str) -> None:
    """A hit is verified: one changed byte in the cache, and the model comes anew."""
    foundation = get(client, tmp_path)
    damaged = foundation.path / path
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    assert not holds(foundation.path, foundation.model)
    assert holds(get(client, tmp_path).path, foundation.model)
    assert registry.fetches == 2


def test_a_damaged_transfer_leaves_nothing(client: CognateClient, registry: Registry, tmp_path: Path) -> None:
    """Bytes that do not have their digest never reach the cache; the next fetch of sound ones does."""
    registry.damage = b"X"
    with pytest.raises(ArtifactCorruptError):
        get(client, tmp_path)
    assert not (tmp_path / registry.models["cognate-25m"][0].digest.removeprefix("sha256:")).exists()
    registry.damage = b""
    assert holds(get(client, tmp_path).path, registry.models["cognate-25m"][0])


def test_concurrent_workers_fetch_once(client: CognateClient, registry: Registry, tmp_path: Path) -> None:
    """Workers that want the same model at the same time share one transfer."""
    with futures.ThreadPoolExecutor(max_workers=3) as pool:
        barrier = threading.Barrier(3)

        def work() -> Foundation:
            barrier.wait()
            return get(client, tmp_path)

        found = [future.result() for future in [pool.submit(work) for _ in range(3)]]
    assert len({foundation.path for foundation in found}) == 1
    assert registry.fetches == 1


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"name": "cognate-25m@9"}, FoundationNotFoundError, "plan.foundation.name"),
        ({}, ModelExperimentalError, "plan.foundation.accept_experimental"),
        (
            {"accept_experimental": True, "required": FoundationRequirement(name="cognate_v2")},
            IncompatibleError,
            "plan.foundation.name",
        ),
        ({"accept_experimental": True}, type(None), ""),
    ],
)
def test_a_plan_is_refused_with_its_field(
    client: CognateClient, registry: Registry, changes: dict[str, Any], kind: type, field: str
) -> None:
    """FAILED_PRECONDITION at the submission instead of a job that fails a moment later."""
    registry.publish(3, pb.MODEL_STATE_EXPERIMENTAL)
    asked: dict[str, Any] = {"name": "cognate-25m@3", "accept_experimental": False, "required": REQUIRED} | changes
    link = CognateLink(CognateEndpoint(address=client.addresses[0], ask_within_s=10.0))
    answer = refusal(link, **asked)
    link.close()
    assert (kind, [field] if field else []) == (type(answer), [v.field for v in answer.violations] if answer else [])


def test_experimental_models_need_a_yes(client: CognateClient, registry: Registry, tmp_path: Path) -> None:
    """EXPERIMENTAL is refused with the failed checks, and taken when the request says so."""
    registry.publish(3, pb.MODEL_STATE_EXPERIMENTAL)
    with pytest.raises(ModelExperimentalError, match=r"cognate-25m@3 is EXPERIMENTAL \(failed: memory_helps\)"):
        get(client, tmp_path)
    assert registry.fetches == 0
    assert get(client, tmp_path, accept_experimental=True).name == "cognate-25m@3"


def test_an_incompatible_model_is_refused_with_every_mismatch(
    client: CognateClient, registry: Registry, tmp_path: Path
) -> None:
    """Nothing is transferred, and the error names each part with what there is and what was wanted."""
    required = FoundationRequirement(name="cognate_v1", fingerprint="sha256:" + "b" * 64, act_version=2)
    with pytest.raises(IncompatibleError) as error:
        get(client, tmp_path, required=required)
    assert {"architecture.fingerprint": FINGERPRINT, "architecture.act_version": "1"} == error.value.metadata
    assert "architecture.act_version is 1, wanted 2" in error.value.message
    assert registry.fetches == 0


def test_an_architecture_without_requirements_takes_any_model(client: CognateClient, tmp_path: Path) -> None:
    """No requirement, no handshake."""
    assert get(client, tmp_path, required=None).name == "cognate-25m@1"


def test_cognate_is_found_in_consul(client: CognateClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that the settings give; where none passes, that is Cognate being away, and known within the time."""
    consul = ConsulDouble()
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{consul.port}")
    try:
        endpoint = CognateEndpoint(consul_service="cognate", ask_within_s=0.3)
        with pytest.raises(AWAY), deadline_within(0.1), connect(endpoint):
            raise AssertionError
        link = CognateLink(endpoint)
        assert refusal(link, "cognate-25m@9", accept_experimental=False, required=None) is None
        consul.put_instances("cognate", *client.addresses)
        with connect(endpoint) as found:
            assert found.addresses == client.addresses
        link = CognateLink(CognateEndpoint(consul_service="cognate", ask_within_s=10))
        refused = refusal(link, "cognate-25m@9", accept_experimental=False, required=None)
        link.close()
        assert isinstance(refused, FoundationNotFoundError)
    finally:
        consul.close()


def test_a_release_without_signatures_is_refused_where_one_is_required(
    client: CognateClient, registry: Registry, tmp_path: Path
) -> None:
    """It cannot prove where its models come from; what to do is told."""
    key = make_keys(tmp_path / "keys").public
    with pytest.raises(ProvenanceRefusedError, match=r"tells of no signature; use a newer one") as refused:
        get(client, tmp_path / "cache", trusted=[key])
    assert ({"problem": "not_signed"}, 0) == (refused.value.metadata, registry.fetches)


def test_an_unknown_model_keeps_its_class(client: CognateClient, tmp_path: Path) -> None:
    """What the server raises is what the worker catches."""
    with pytest.raises(ModelNotFoundError, match="no model cognate-25m@9"):
        get(client, tmp_path, "cognate-25m@9")


def test_a_digest_that_is_no_digest_makes_no_folder(client: CognateClient, registry: Registry, tmp_path: Path) -> None:
    """The cache's folder names come from the wire, so they are checked before they are used."""
    model, manifest = registry.models["cognate-25m"]
    evil = pb.FoundationModel()
    evil.CopyFrom(model)
    evil.digest = "sha256:../../elsewhere"
    registry.models["cognate-25m"] = registry.models[model.name] = (evil, manifest)
    with pytest.raises(ArtifactCorruptError, match="no sha256"):
        get(client, tmp_path / "cache")
    assert [] == list(tmp_path.iterdir())
