"""`forge backup`, `forge backups` and `forge restore`: run where the service runs, over its settings.

They are no calls: a service that is gone can be restored, and one that cannot answer can be backed up.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training_common.backup.manifest import Backup
    from training_common.backup.service import StoredService
    from training_common.settings import ServiceSettings

Service = Annotated[str, typer.Option(help="cognate or agent.")]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="The service's settings file; its environment goes over it.")
]
From = Annotated[str, typer.Option("--from", help="Folder or URL that backups were written to.", metavar="PLACE")]
Name = Annotated[str, typer.Option("--backup", help="Its id, from `forge backups list`.", metavar="ID")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    _backup(app)
    _restore(app)
    backups = typer.Typer(help="List, verify and prune backups.", no_args_is_help=True)
    app.add_typer(backups, name="backups")
    _list(backups)
    _verify(backups)
    _prune(backups)


def _backup(app: typer.Typer) -> None:
    @command(app)
    def backup(
        session: Session,
        service: Service,
        to: Annotated[
            str, typer.Option(help="Folder, or URL such as s3://BUCKET/PREFIX: for backups alone.", metavar="PLACE")
        ],
        settings: SettingsFile = None,
        checkpoints: Annotated[
            bool, typer.Option("--checkpoints", help="Checkpoints of jobs that have not ended, too.")
        ] = False,
        verify: Annotated[bool, typer.Option("--verify", help="Read all of it again afterwards.")] = False,
        prune: Annotated[
            int, typer.Option(min=0, help="Afterwards, keep only so many of the service's backups. 0: all of them.")
        ] = 0,
    ) -> Exit:
        """Back up a service's database and artifacts while it is at work. What is there already is not copied again."""
        with _using(service, settings) as (stored, values):
            from training_common.backup.create import back_up
            from training_common.backup.destination import open_destination

            with open_destination(to, make=True) as destination:
                made = back_up(stored, values, destination, checkpoints=checkpoints)
                manifest = made.backup.manifest
                _tell(
                    session,
                    {
                        **_facts(made.backup),
                        "copied_objects": made.copied.objects,
                        "copied_bytes": made.copied.size_bytes,
                        "jobs_without_checkpoint": made.copied.passed_over,
                        "seconds": round(made.seconds, 3),
                    },
                )
                for one in manifest.missing:
                    say(f"not in the backup: {one.version}: {one.problem}")
                found = _verified(session, destination, made.backup) if verify else Exit.OK
                if found is not Exit.OK or not manifest.whole:
                    return Exit.CORRUPT  # and nothing older is removed
                if prune:
                    _pruned(session, destination, service, prune)
        return Exit.OK


def _restore(app: typer.Typer) -> None:
    @command(app)
    def restore(
        session: Session, service: Service, place: From, settings: SettingsFile = None, name: Name = ""
    ) -> None:
        """Restore a service into an empty database and an empty store of artifacts. Default: its newest backup."""
        with _using(service, settings) as (stored, values):
            from training_common.backup import restore as restoring
            from training_common.backup.destination import open_destination
            from training_common.backup.manifest import newest_backup, open_backup

            with open_destination(place) as destination:
                found = open_backup(destination, name) if name else newest_backup(destination, service)
                restored = restoring.restore(stored, values, destination, found)
            settled = restored.settled
            _tell(
                session,
                {
                    **_facts(found),
                    "jobs_cut": settled.cut,
                    "checkpoints_gone": settled.checkpoints_gone,
                    "jobs_begin_anew": settled.anew,
                    "versions_damaged": list(settled.damaged),
                    "seconds": round(restored.seconds, 3),
                },
            )


def _list(backups: typer.Typer) -> None:
    @command(backups, "list")
    def list_backups(
        session: Session, place: From, service: Annotated[str, typer.Option(help="Of one service only.")] = ""
    ) -> None:
        """List backups, the oldest first."""
        with _installed():
            from cognateforge.exceptions import ArtifactCorruptError
            from training_common.backup.destination import open_destination
            from training_common.backup.manifest import backup_ids, open_backup

            with open_destination(place) as destination:
                for name in backup_ids(destination, service):
                    try:
                        _tell(session, _facts(open_backup(destination, name)), line=True)
                    except ArtifactCorruptError as error:
                        say(error.message)


def _verify(backups: typer.Typer) -> None:
    @command(backups, "verify")
    def verify_backup(session: Session, place: From, name: Name = "") -> Exit:
        """Read backups again and compare every digest. Default: all of them."""
        with _installed():
            from cognateforge.exceptions import NotFoundError
            from training_common.backup.destination import open_destination
            from training_common.backup.manifest import backup_ids, open_backup

            worst = Exit.OK
            with open_destination(place) as destination:
                for one in [name] if name else backup_ids(destination):
                    try:
                        worst = max(worst, _verified(session, destination, open_backup(destination, one)))
                    except NotFoundError as error:
                        if name:
                            raise
                        say(error.message)
        return worst


def _prune(backups: typer.Typer) -> None:
    @command(backups, "prune")
    def prune_backups(
        session: Session,
        place: From,
        service: Service,
        keep: Annotated[int, typer.Option(min=1, help="So many backups of the service stay, the newest.")],
    ) -> None:
        """Remove old backups of a service, and what no backup names any more."""
        with _installed():
            from training_common.backup.destination import open_destination

            with open_destination(place) as destination:
                _pruned(session, destination, service, keep)


@contextmanager
def _installed() -> Iterator[None]:
    """Tell of a missing part of the installation in our words. Errors: ClientSetupError."""
    from cognateforge.exceptions import ClientSetupError

    try:
        yield
    except ModuleNotFoundError as error:
        raise ClientSetupError(
            f"{error.name} is not installed: run this where the service is, or install cognateforge[cognate] or [agent]"
        ) from error


@contextmanager
def _using(service: str, file: Path | None) -> Iterator[tuple[StoredService, ServiceSettings]]:
    """Yield a service and its settings.

    Errors: InvalidRequestError; ClientSetupError, for settings of no use; LocalStorageError, when its database fails,
    also later.
    """
    from cognateforge.exceptions import ClientSetupError, LocalStorageError

    with _installed():
        import sqlalchemy as sa

        from training_common.backup.service import find_service
        from training_common.settings import SettingsError

        try:
            stored = find_service(service)
            yield stored, stored.load_settings(file)
        except SettingsError as error:
            raise ClientSetupError(str(error)) from error
        except sa.exc.DBAPIError as error:
            why = " ".join(str(error.orig).split())
            raise LocalStorageError(
                f"the database of the {service} service cannot be used: {why}; check store_url and data_dir, and that "
                "it is up"
            ) from error


def _facts(backup: Backup) -> dict[str, Any]:
    import datetime

    manifest = backup.manifest
    moment = datetime.datetime.fromtimestamp(manifest.snapshot_us / 1e6, datetime.UTC)
    return {
        "backup": backup.id,
        "service": manifest.service,
        "snapshot_time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "revision": manifest.revision,
        "whole": manifest.whole,
        "rows": manifest.rows,
        "versions": manifest.versions,
        "blobs": manifest.blobs.lines,
        "blob_bytes": manifest.blob_bytes,
        "checkpoint_bytes": manifest.checkpoint_bytes,
    }


def _tell(session: Session, facts: dict[str, Any], *, line: bool = False) -> None:
    if session.as_json:
        session.emit(facts)
    elif line:
        print_line("  ".join(f"{key} {value}" if key != "backup" else str(value) for key, value in facts.items()))
    else:
        for key, value in facts.items():
            print_line(f"{key}: {value}")


def _verified(session: Session, destination: Any, backup: Backup) -> Exit:
    from cognateforge.exceptions import NotFoundError
    from training_common.backup.manifest import backup_ids
    from training_common.backup.verify import verify

    found = verify(destination, backup)
    # A prune removes the manifest first: what lacks objects then is no backup any more, and not a damaged one.
    if found.damaged and backup.id not in backup_ids(destination):
        raise NotFoundError(f"backup {backup.id} was pruned while it was read")
    _tell(
        session,
        {"verified": backup.id, "objects": found.objects, "bytes": found.size_bytes, "damaged": found.damaged},
        line=True,
    )
    for problem in found.problems:
        say(f"damaged: {problem}")
    return Exit.CORRUPT if found.damaged else Exit.OK


def _pruned(session: Session, destination: Any, service: str, keep: int) -> None:
    from training_common.backup.prune import prune

    gone = prune(destination, service, keep=keep)
    facts = {"removed_backups": gone.backups, "removed_objects": gone.objects, "removed_bytes": gone.size_bytes}
    _tell(session, facts, line=True)
