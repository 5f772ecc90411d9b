"""Get a foundation model from Cognate: resolve, shake hands, fetch once.

With agent_server.borrowing the only module of the agent service that speaks to Cognate. The cache holds a folder per
model, named after its digest, so it needs no invalidation: a folder is either the model of that digest or is thrown
away.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from agent_server.architectures.factory import FoundationRequirement
from agent_server.settings import CognateEndpoint
from cognateforge.client import (
    CallBreaker,
    CognateClient,
    ConsulDiscovery,
    TlsFiles,
    deadline_within,
    remaining_budget_s,
)
from cognateforge.client.breaker import BreakerSnapshot, BreakerState
from cognateforge.client.discovery import discovery_for
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.client.patience import BREAKS, GIVE_UP_AFTER_S
from cognateforge.client.provenance import Problem, VerifiedProvenance, refused, verify_provenance
from cognateforge.exceptions import (
    ArtifactCorruptError,
    ClientSetupError,
    FieldViolation,
    ForgeError,
    FoundationNotFoundError,
    IncompatibleError,
    ModelExperimentalError,
    ModelNotFoundError,
    NotImplementedByServerError,
    PreconditionError,
    ProvenanceRefusedError,
    UnavailableError,
)
from cognateforge.exchange.v1 import model_pb2 as pb
from cognateforge.signatures import load_library, read_public_key
from training_common.settings import SettingsError

log = structlog.get_logger(__name__)

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
# 1 MiB, the exchange's own chunk: enough that hashing, not reading, decides the speed.
_READ_BYTES = 1 << 20

Kind = pb.MismatchKind
_USABLE = frozenset({pb.MODEL_STATE_READY, pb.MODEL_STATE_EXPERIMENTAL})


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """A verified foundation model in the cache; `path` must not be written to."""

    path: Path
    name: str
    digest: str
    model: pb.FoundationModel


@dataclass(frozen=True, kw_only=True)
class Descent:
    """An agent or a job, and the foundation model that it descends from. digest: the agent's, empty for a job."""

    model: str
    name: str
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Below:
    """The foundation model at the bottom of an agent, as its manifest names it; empty where there is none."""

    name: str
    digest: str


# What says that Cognate is away, and nothing about the model that was asked for.
AWAY = BREAKS


# What the worker passes on without knowing it.
Client = CognateClient


# What rpc/convert reads of the circuit to Cognate.
CircuitSnapshot = BreakerSnapshot


class CognateLink:
    """This service's own connection to Cognate, with one circuit breaker for all of its calls.

    It is opened when first needed. Workers have connections of their own.
    """

    def __init__(self, endpoint: CognateEndpoint) -> None:
        self.endpoint = endpoint
        self._breaker = CallBreaker("cognate", on_state_change=_log_circuit)
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        self._client: CognateClient | None = None

    def client(self) -> CognateClient:
        """Return the client. May block for as long as Consul takes for a first answer, or the deadline allows.

        Errors: UnavailableError, when Cognate cannot be found.
        """
        left_s = remaining_budget_s()
        if not self._lock.acquire(timeout=-1 if left_s is None else max(0.0, left_s)):
            raise UnavailableError("Cognate is still being looked for")
        try:
            if self._client is None:
                self._client = self._open.enter_context(connect(self.endpoint, self._breaker))
            return self._client
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def client_within(self, seconds: float) -> Iterator[CognateClient]:
        """Yield the client, whose calls in the body have so long together. Errors: as `client`."""
        with deadline_within(seconds):
            yield self.client()

    def snapshot(self) -> BreakerSnapshot:
        """Return how the calls fare."""
        return self._breaker.snapshot()

    async def keep(self, *users: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run what uses the connection until cancelled, and let go of it when all of that has ended.

        A user that is cancelled has to end its call first: each is cancelled once, and waited for.
        """
        tasks = [asyncio.create_task(user()) for user in (asyncio.Event().wait, *users)]
        try:
            # Unlike gather, wait leaves its tasks alone when it is cancelled: a second cancellation would break into
            # what a user still does to end.
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for one in ended:
                one.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            self._open.close()
            self._client = None


def _log_circuit(name: str, before: BreakerState, after: BreakerState) -> None:
    log.warning("circuit changed", peer=name, before=before, after=after)


@contextlib.contextmanager
def connect(endpoint: CognateEndpoint, breaker: CallBreaker | None = None) -> Iterator[CognateClient]:
    """Open a client of Cognate. Nothing is dialled before the first call.

    Errors: UnavailableError, when Consul names no instance within the time that is left.
    """
    tls = None
    if endpoint.tls is not None:
        tls = TlsFiles(ca=endpoint.tls.ca_file, cert=endpoint.tls.cert_file, key=endpoint.tls.key_file)
    found = ConsulDiscovery(endpoint.consul_service) if endpoint.consul_service else discovery_for(endpoint.address)
    name = endpoint.tls.server_name if endpoint.tls else ""
    try:
        with CognateClient(found, tls=tls, tls_server_name=name or None, breaker=breaker) as client:
            yield client
    finally:
        found.close()


def fetch(
    client: CognateClient,
    name: str,
    *,
    accept_experimental: bool,
    required: FoundationRequirement | None,
    cache_dir: Path,
    tokenizer_digest: str = "",
    trusted: Sequence[Path] = (),
    on_resolved: Callable[[str], None] = lambda _name: None,
    on_progress: Callable[[int, int], None] | None = None,
    patience_s: float = GIVE_UP_AFTER_S,
) -> Foundation:
    """Return a foundation model that fits, from the cache where it is there already.

    name: family and version, or a family alone for its newest version at this moment.
    trusted: public keys, one of which must have signed it; none: nobody need have. Looked at before anything is
    transferred, and as well where nothing has to be.
    on_resolved: called with the exact version, before anything of it is needed.
    on_progress: bytes there are, bytes there will be; not called on a cache hit.
    patience_s: how long a broken transfer is tried again without a new byte. The next fetch goes on where it stopped.

    Errors: ModelNotFoundError, ModelExperimentalError, IncompatibleError, ProvenanceRefusedError, ArtifactCorruptError,
    LocalStorageError; UnavailableError and its kin when Cognate cannot be reached.
    """
    model = client.models.GetModel(pb.GetModelRequest(name=name)).model
    check_compatible(
        client, model, required=required, accept_experimental=accept_experimental, tokenizer_digest=tokenizer_digest
    )
    check_provenance(client, model, trusted)
    on_resolved(model.name)
    path = cache_dir / _hexadecimal(model)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / f"{path.name}.lock"):
        if path.exists() and not holds(path, model):
            shutil.rmtree(path)
        if not path.exists():
            # By its exact version: a newer one may have been published since it was resolved.
            fetched = client.fetch_model(model.name, path, on_progress, give_up_after_s=patience_s)
            if fetched.digest != model.digest or not holds(path, model):
                raise ArtifactCorruptError(f"what came for {model.name} is not what {model.digest} names")
    return Foundation(path=path, name=model.name, digest=model.digest, model=model)


def register(client: CognateClient, descents: Sequence[Descent]) -> None:
    """Tell Cognate what descends from its models, at most 100 at once. All of it is known then, or nothing new.

    Errors: ModelNotFoundError; NotImplementedByServerError, by a Cognate of an earlier release.
    """
    client.models.RegisterDependents(
        pb.RegisterDependentsRequest(request_id=str(uuid.uuid4()), dependents=map(_dependent, descents))
    )


def release(client: CognateClient, descents: Sequence[Descent]) -> None:
    """Tell Cognate what descends from its models no longer. Errors: as `register`."""
    client.models.ReleaseDependents(
        pb.ReleaseDependentsRequest(request_id=str(uuid.uuid4()), dependents=map(_dependent, descents))
    )


def _dependent(one: Descent) -> pb.Dependent:
    return pb.Dependent(model=one.model, name=one.name, digest=one.digest)


def refusal(
    link: CognateLink,
    name: str,
    *,
    accept_experimental: bool,
    required: FoundationRequirement | None,
    caller_left_s: float | None = None,
) -> PreconditionError | None:
    """Return what speaks against a plan's foundation, or None.

    Also None where Cognate gives no answer in time: a job may be submitted while Cognate is down, and waits for it.
    caller_left_s: what is left of the deadline of who submits. Half of it stays for the submission itself.
    """
    within_s = _within_s(link, caller_left_s)
    if within_s <= 0:
        return None
    try:
        with deadline_within(within_s):
            client = link.client()
            model = client.models.GetModel(pb.GetModelRequest(name=name)).model
            check_compatible(client, model, required=required, accept_experimental=accept_experimental)
            check_provenance(client, model, trusted_keys(link.endpoint))
    except ModelNotFoundError as error:
        return FoundationNotFoundError(error.message, violations=_blame("name", error))
    except ModelExperimentalError as error:
        return ModelExperimentalError(error.message, violations=_blame("accept_experimental", error))
    except IncompatibleError as error:
        return IncompatibleError(error.message, violations=_blame("name", error), metadata=error.metadata)
    except ProvenanceRefusedError as error:
        return ProvenanceRefusedError(error.message, violations=_blame("name", error), metadata=error.metadata)
    except ForgeError:
        return None
    return None


def refusal_below(
    link: CognateLink, agent: str, below: Below, *, caller_left_s: float | None = None
) -> PreconditionError | None:
    """Return what speaks against the foundation below the agent that a plan goes on with, or None, as `refusal`."""
    within_s, trusted = _within_s(link, caller_left_s), trusted_keys(link.endpoint)
    if within_s <= 0 or not trusted:
        return None
    try:
        with deadline_within(within_s):
            check_below(link.client(), agent, below, trusted)
    except ProvenanceRefusedError as error:
        field = FieldViolation(field="plan.agent_version.name", description=error.message)
        return ProvenanceRefusedError(error.message, violations=[field], metadata=error.metadata)
    except ForgeError:
        return None
    return None


def _within_s(link: CognateLink, caller_left_s: float | None) -> float:
    """Return how long Cognate is asked while somebody submits."""
    asked_s = link.endpoint.ask_within_s
    return asked_s if caller_left_s is None else min(asked_s, caller_left_s / 2)


def _blame(field: str, error: ForgeError) -> list[FieldViolation]:
    return [FieldViolation(field=f"plan.foundation.{field}", description=error.message)]


def _hexadecimal(model: pb.FoundationModel) -> str:
    """Return the digest's hex digits, safe as a folder's name."""
    found = _DIGEST.fullmatch(model.digest)
    if found is None:
        raise ArtifactCorruptError(f"Cognate names {model.digest!r} as the digest of {model.name}, which is no sha256")
    return found[1]


def trusted_keys(endpoint: CognateEndpoint) -> tuple[Path, ...]:
    """Return the keys that a model must be signed with one of; none where it need not be signed."""
    return endpoint.public_key_files if endpoint.provenance == "require" else ()


def require_public_keys(endpoint: CognateEndpoint) -> None:
    """Refuse keys that could verify nothing, and load what verifies. Errors: SettingsError."""
    if endpoint.provenance != "require":
        return
    try:
        for path in endpoint.public_key_files:
            read_public_key(path)
        load_library()
    except ClientSetupError as error:
        raise SettingsError(f"cognate.public_key_files: {error.message}; or leave cognate.provenance out") from error


def check_provenance(client: CognateClient, model: pb.FoundationModel, trusted: Sequence[Path]) -> None:
    """Make sure that somebody who is trusted has signed a model, and that its statement is about it.

    Errors: ProvenanceRefusedError; ArtifactCorruptError, for a statement that has changed in Cognate's store.
    """
    if not trusted:
        return
    try:
        provenance = client.models.GetModelProvenance(pb.GetModelProvenanceRequest(name=model.name)).provenance
    except NotImplementedByServerError as error:
        raise refused(
            Problem.NOT_SIGNED, model.name, "this release of Cognate tells of no signature; use a newer one"
        ) from error
    found = verify_provenance(provenance, name=model.name, digest=model.digest, public_keys=trusted)
    _require_as_signed(model, found)
    log.info("provenance verified", model=model.name, digest=model.digest, key=found.key)


def check_below(client: CognateClient, agent: str, below: Below, trusted: Sequence[Path]) -> None:
    """Make sure that the foundation at the bottom of an agent is published as it was, and signed by who is trusted.

    The agent may have been made before that was asked for, or while another key was trusted.
    Errors: as `check_provenance`, naming the agent; UnavailableError and its kin when Cognate cannot be reached.
    """
    if not trusted or not below.name:
        return
    try:
        model = client.models.GetModel(pb.GetModelRequest(name=below.name)).model
    except ModelNotFoundError as error:
        why = f"its foundation {below.name} is not published any more, so nothing tells who signed it"
        raise refused(Problem.NOT_PUBLISHED, agent, why) from error
    if model.digest != below.digest:
        why = f"it was made of {below.name} as {below.digest}, and that is {model.digest} now"
        raise refused(Problem.OTHER_VERSION, agent, why)
    try:
        check_provenance(client, model, trusted)
    except ProvenanceRefusedError as error:
        message = f"{agent} is refused for its foundation: {error.message}"
        raise ProvenanceRefusedError(message, metadata=error.metadata) from error


def _require_as_signed(model: pb.FoundationModel, found: VerifiedProvenance) -> None:
    """Make sure that what Cognate says of a model beside its manifest, and this service goes by, was signed as well."""
    told = {
        "state": pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_"),
        "files": [{"path": f.path, "size_bytes": f.size_bytes, "digest": f.digest} for f in model.files],
        "tokenizer_digest": model.tokenizer_digest,
    }
    signed_architecture = found.manifest.get("architecture")
    if not isinstance(signed_architecture, dict):
        raise refused(Problem.MANIFEST, model.name, "its manifest names no architecture")
    differs = [part for part, value in told.items() if found.manifest.get(part) != value]
    differs += [
        f"architecture.{part.name}"
        for part in pb.Architecture.DESCRIPTOR.fields
        if signed_architecture.get(part.name, part.default_value) != getattr(model.architecture, part.name)
    ]
    if differs:
        raise refused(Problem.MANIFEST, model.name, f"Cognate says otherwise than its manifest: {', '.join(differs)}")


def check_compatible(
    client: CognateClient,
    model: pb.FoundationModel,
    *,
    required: FoundationRequirement | None,
    accept_experimental: bool,
    tokenizer_digest: str = "",
) -> None:
    """Shake hands with Cognate over one model.

    Only what this release understands is consent: a state or a verdict of a newer Cognate that it does not know, or a
    part that Cognate did not look at, is a refusal.

    Errors: ModelExperimentalError, when that alone is in the way; IncompatibleError, naming every mismatch.
    """
    if model.state == pb.MODEL_STATE_EXPERIMENTAL and not accept_experimental:
        raise _experimental(model)
    if model.state not in _USABLE:
        raise IncompatibleError(
            f"{model.name} is in state {model.state}, which this release does not know: use another model, or a newer "
            "release of the agent service",
            metadata={"state": str(model.state)},
        )
    if required is None:
        return
    wanted = pb.Architecture(
        name=required.name,
        fingerprint=required.fingerprint,
        act_version=required.act_version,
        ltm_version=required.ltm_version,
    )
    request = pb.CheckCompatibilityRequest(
        name=model.name,
        architecture=wanted,
        tokenizer_digest=tokenizer_digest,
        accept_experimental=accept_experimental,
    )
    answer = client.models.CheckCompatibility(request)
    if answer.verdict != pb.VERDICT_COMPATIBLE:
        # That alone is a matter of the plan. Every other kind, and one that this release does not know, is not.
        if {mismatch.kind for mismatch in answer.mismatches} == {Kind.MISMATCH_KIND_EXPERIMENTAL}:
            raise _experimental(model)
        reasons = "; ".join(f"{m.field} is {m.model_value}, wanted {m.wanted_value}" for m in answer.mismatches)
        raise IncompatibleError(
            f"{model.name} does not fit the agent architecture: {reasons or 'Cognate gave no reason'}",
            metadata={m.field: m.model_value for m in answer.mismatches},
        )
    # A Cognate without kinds compares all that a request of this release can ask.
    if answer.compared and (unseen := asked_kinds(request) - set(answer.compared)):
        names = ", ".join(sorted(Kind.Name(kind).removeprefix("MISMATCH_KIND_") for kind in unseen))
        raise IncompatibleError(f"Cognate did not compare {names} of {model.name}: use a newer release of Cognate")
    if answer.model_digest != model.digest:
        raise IncompatibleError(f"Cognate compared {answer.model_digest}, but {model.name} is {model.digest}")


def _experimental(model: pb.FoundationModel) -> ModelExperimentalError:
    failed = [check.name for check in model.checks if not check.passed]
    why = f" (failed: {', '.join(failed)})" if failed else ""
    return ModelExperimentalError(
        f"{model.name} is EXPERIMENTAL{why}; to use it all the same, set plan.foundation.accept_experimental "
        "(forge train --accept-experimental)"
    )


def asked_kinds(request: pb.CheckCompatibilityRequest) -> set[Kind.ValueType]:
    """Return the parts that a request asks Cognate to compare."""
    asked = {
        Kind.MISMATCH_KIND_ARCHITECTURE_NAME: request.architecture.name,
        Kind.MISMATCH_KIND_FINGERPRINT: request.architecture.fingerprint,
        Kind.MISMATCH_KIND_PARAMETER_COUNT: request.architecture.parameter_count,
        Kind.MISMATCH_KIND_ACT_VERSION: request.architecture.act_version,
        Kind.MISMATCH_KIND_LTM_VERSION: request.architecture.ltm_version,
        Kind.MISMATCH_KIND_TOKENIZER: request.tokenizer_digest,
        Kind.MISMATCH_KIND_EXPERIMENTAL: not request.accept_experimental,
    }
    return {kind for kind, value in asked.items() if value}


def holds(path: Path, model: pb.FoundationModel) -> bool:
    """Return whether a folder holds a model's manifest and every file of it, each with its size and digest."""
    manifest = path / MANIFEST_NAME
    return (
        manifest.is_file()
        and file_digest(manifest) == model.digest
        and all(
            (path / file.path).is_file()
            and (path / file.path).stat().st_size == file.size_bytes
            and file_digest(path / file.path) == file.digest
            for file in model.files
        )
    )


def file_digest(path: Path) -> str:
    """Return "sha256:" and the hex digest of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256', _bufsize=_READ_BYTES).hexdigest()}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with its process, however that ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
