"""Commands about how artifacts are kept: `forge artifacts`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import Progress, RequestId, Service
from cognateforge.cli.names import check_artifact_name, check_version_name
from cognateforge.cli.session import Session, command, first_found, new_request_id, print_line, say
from cognateforge.cli.terminal import can_draw, console

if TYPE_CHECKING:
    from cognateforge.artifact.v1.storage_pb2 import (
        CollectArtifactsResponse,
        Damage,
        Storage,
        Tier,
        VerifyArtifactsResponse,
        VerifyProgress,
    )
    from cognateforge.artifact.v1.storage_pb2_grpc import StorageServiceStub

T = TypeVar("T")

ServiceOption = Annotated[
    Service | None, typer.Option("--service", help="Whose artifacts. Default: both services are asked.")
]
Version = Annotated[
    str, typer.Argument(help="Version, for instance cognate-25m@7.", metavar="NAME", callback=check_version_name)
]
# Bytes are read, and copied, before the answer comes: a model in a bucket takes its time.
Within = Annotated[float, typer.Option(min=1, help="Seconds for it.")]
_WITHIN_S = 600.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    artifacts = typer.Typer(help="Verify, keep, archive and collect what is published.", no_args_is_help=True)
    app.add_typer(artifacts, name="artifacts")
    for add in (_verify, _pins, _tiers, _collect):
        add(artifacts)


def _stub(session: Session, service: Service) -> StorageServiceStub:
    client = session.cognate_client if service is Service.COGNATE else session.agent_client
    return client.storage


def _first(session: Session, service: Service | None, call: Callable[[StorageServiceStub], T]) -> T:
    """Return the answer of the service that knows the name."""
    asked = [service] if service else list(Service)
    return first_found([lambda one=one: call(_stub(session, one)) for one in asked])  # type: ignore[misc]


# --- verify


def _verify(app: typer.Typer) -> None:
    @command(app, "verify")
    def verify(
        session: Session,
        name: Annotated[
            str,
            typer.Argument(
                help="A version, or a family for all of its versions. Default: everything.",
                callback=check_artifact_name,
            ),
        ] = "",
        service: ServiceOption = None,
        progress: Progress = None,
    ) -> Exit:
        """Read stored bytes again and compare every digest. Prints each damaged file; exits with 8 if there is one."""
        from cognateforge.exceptions import ForgeError

        if name:
            with _bar(progress) as show:
                damaged = _first(session, service, lambda stub: _verified(session, stub, name, show))
            return Exit.CORRUPT if damaged else Exit.OK
        worst = Exit.OK
        for one in [service] if service else list(Service):
            try:
                with _bar(progress) as show:
                    damaged = _verified(session, _stub(session, one), "", show, service=one)
            except ForgeError as error:
                worst = worst or session.report(error, service=one.value)
                continue
            # What is damaged is told whatever else went wrong.
            worst = Exit.CORRUPT if damaged else worst
        return worst


def _verified(
    session: Session,
    stub: StorageServiceStub,
    name: str,
    show: Callable[[VerifyProgress], None],
    *,
    service: Service | None = None,
) -> int:
    """Tell what a verification finds, and return how many files are damaged.

    Errors: UnavailableError, when the stream ends before everything was looked at.
    """
    from cognateforge.artifact.v1 import storage_pb2
    from cognateforge.exceptions import UnavailableError

    frames: Iterator[VerifyArtifactsResponse] = stub.VerifyArtifacts(storage_pb2.VerifyArtifactsRequest(name=name))
    beside = {"service": service.value} if service else {}
    damaged = 0
    for frame in frames:
        kind = frame.WhichOneof("frame")
        if kind == "damage":
            damaged += 1
            _tell_damage(session, frame.damage, beside)
        elif kind == "progress":
            show(frame.progress)
        elif kind == "summary":
            _tell_summary(session, frame.summary, damaged, beside)
            return damaged
    raise UnavailableError("the verification ended before everything was looked at: call again")


def _tell_damage(session: Session, damage: Damage, beside: dict[str, str]) -> None:
    from cognateforge.cli.plain import to_plain

    if session.as_json:
        session.emit({**beside, "damage": to_plain(damage)})
    else:
        print_line(f"{damage.name} {damage.path}: {damage.detail.removeprefix(f'{damage.path}: ')}")


def _tell_summary(session: Session, summary: VerifyProgress, damaged: int, beside: dict[str, str]) -> None:
    from cognateforge.cli.plain import to_plain

    if session.as_json:
        session.emit({**beside, "summary": to_plain(summary), "damaged_files": damaged})
        return
    where = f"{beside['service']}: " if beside else ""
    say(
        f"{where}{_count(summary.versions, 'version')}, {_count(summary.files, 'file')} and "
        f"{summary.bytes} bytes read, "
        f"{damaged or 'none'} damaged"
    )


@contextmanager
def _bar(progress: bool | None) -> Iterator[Callable[[VerifyProgress], None]]:
    if progress is False or (progress is None and not can_draw(sys.stderr)):
        yield lambda _progress: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), console=console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda at: bar.update(task, completed=at.versions, total=at.total_versions)


# --- pins and tiers


def _pins(app: typer.Typer) -> None:
    @command(app, "pin")
    def pin(session: Session, name: Version, service: ServiceOption = None, request_id: RequestId = None) -> None:
        """Hold a version for good: nothing collects or archives it."""
        _set_pin(session, name, service, request_id, pinned=True)

    @command(app, "unpin")
    def unpin(session: Session, name: Version, service: ServiceOption = None, request_id: RequestId = None) -> None:
        """Hold a version no longer."""
        _set_pin(session, name, service, request_id, pinned=False)


def _set_pin(session: Session, name: str, service: Service | None, request_id: str | None, *, pinned: bool) -> None:
    from cognateforge.artifact.v1 import storage_pb2

    request = storage_pb2.SetPinRequest(request_id=new_request_id(request_id), name=name, pinned=pinned)
    _show(session, name, _first(session, service, lambda stub: stub.SetPin(request)).storage)


def _tiers(app: typer.Typer) -> None:
    @command(app, "archive")
    def archive(
        session: Session,
        name: Version,
        service: ServiceOption = None,
        within: Within = _WITHIN_S,
        request_id: RequestId = None,
    ) -> None:
        """Move a version's bytes to the archive. It can be fetched from there."""
        from cognateforge.artifact.v1 import storage_pb2

        _set_tier(session, name, service, request_id, tier=storage_pb2.TIER_ARCHIVE, within=within)

    @command(app, "restore")
    def restore(
        session: Session,
        name: Version,
        service: ServiceOption = None,
        within: Within = _WITHIN_S,
        request_id: RequestId = None,
    ) -> None:
        """Move a version's bytes back from the archive."""
        from cognateforge.artifact.v1 import storage_pb2

        _set_tier(session, name, service, request_id, tier=storage_pb2.TIER_STANDARD, within=within)


def _set_tier(
    session: Session,
    name: str,
    service: Service | None,
    request_id: str | None,
    *,
    tier: Tier.ValueType,
    within: float,
) -> None:
    from cognateforge.artifact.v1 import storage_pb2

    request = storage_pb2.SetTierRequest(request_id=new_request_id(request_id), name=name, tier=tier)
    _show(session, name, _first(session, service, lambda stub: stub.SetTier(request, timeout=within)).storage)


def _show(session: Session, name: str, storage: Storage) -> None:
    from cognateforge.artifact.v1 import storage_pb2
    from cognateforge.cli.plain import enum_word

    if session.as_json:
        session.show(storage, name=name)
    else:
        pinned = ", pinned" if storage.pinned else ""
        say(f"{name} is in tier {enum_word(storage_pb2.Tier.DESCRIPTOR, storage.tier)}{pinned}")


# --- collect


def _collect(app: typer.Typer) -> None:
    @command(app, "collect")
    def collect(
        session: Session,
        names: Annotated[
            list[str] | None,
            typer.Argument(help="Versions. Default: what the retention settings keep no longer.", metavar="[NAME]..."),
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
        service: ServiceOption = None,
        within: Within = _WITHIN_S,
        request_id: RequestId = None,
    ) -> Exit:
        """Remove versions on which nothing depends, and bytes that no version names. Prints the versions."""
        from cognateforge.artifact.v1 import storage_pb2
        from cognateforge.exceptions import ForgeError

        wanted = [check_version_name(name) for name in names or ()]
        request = storage_pb2.CollectArtifactsRequest(
            request_id=new_request_id(request_id), names=wanted, validate_only=dry_run
        )

        def call(stub: StorageServiceStub) -> CollectArtifactsResponse:
            answer: CollectArtifactsResponse = stub.CollectArtifacts(request, timeout=within)
            return answer

        if wanted:
            _tell_collected(session, _first(session, service, call), {}, dry_run=dry_run)
            return Exit.OK
        worst = Exit.OK
        for one in [service] if service else list(Service):
            try:
                answer = call(_stub(session, one))
            except ForgeError as error:
                worst = worst or session.report(error, service=one.value)
            else:
                _tell_collected(session, answer, {"service": one.value}, dry_run=dry_run)
        return worst


def _tell_collected(
    session: Session, answer: CollectArtifactsResponse, beside: dict[str, Any], *, dry_run: bool
) -> None:
    from cognateforge.cli.plain import to_plain

    if session.as_json:
        session.emit({**beside, **to_plain(answer), "dry_run": dry_run})
        return
    for one in answer.collected:
        print_line(f"{one.name} {one.digest}: {one.why}")
    where = f"{beside['service']}: " if beside else ""
    would = "would be collected" if dry_run else "collected"
    versions, blobs = _count(len(answer.collected), "version"), _count(answer.blobs, "stored file")
    say(f"{where}{versions} and {blobs} of {answer.bytes} bytes {would}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
