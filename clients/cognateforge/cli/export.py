"""Models and agents for other tools: `forge export`."""

from __future__ import annotations

import dataclasses
import enum
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.artifacts import KindOption, fetch_any
from cognateforge.cli.jobs import Progress
from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.export import Exported


class Form(enum.StrEnum):
    """What is written."""

    OCI = "oci"
    FOLDER = "folder"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def export(
        session: Session,
        name: Annotated[str, typer.Argument(help="Model or agent, or a folder that forge fetch has written.")],
        form: Annotated[
            Form,
            typer.Option(
                "--format",
                help="oci: an OCI image layout. folder: as transformers, safetensors and tokenizers read it.",
            ),
        ],
        out: Annotated[Path, typer.Option(help="Where it is written; nothing may be there yet.")],
        tar: Annotated[
            bool, typer.Option("--tar", help="With oci: one file, as for a name that ends with .tar.")
        ] = False,
        licence: Annotated[
            str, typer.Option(help="With oci: SPDX expression for everything in it. Default: none is claimed.")
        ] = "",
        architecture: Annotated[str, typer.Option(help="With oci: of the machines that pull the image.")] = "amd64",
        kind: KindOption = None,
        progress: Progress = None,
    ) -> None:
        """Write a model or agent for tools that know nothing of this project, after every digest was compared."""
        from cognateforge.export import open_artifact, require_free, write_folder, write_oci

        if form is Form.FOLDER and (tar or licence):
            raise typer.BadParameter("is for --format oci", param_hint="--tar" if tar else "--licence")
        require_free(out)  # before anything is fetched for it
        folder, fetched = Path(name), None
        if not folder.is_dir():
            check_artifact_name(name)
            folder = fetched = out.with_name(f".{out.name}.fetched")
            fetch_any(session, name, folder, kind, progress)
        try:
            artifact = open_artifact(folder)
            if form is Form.OCI:
                tar = tar or out.suffix == ".tar"
                done = write_oci(artifact, out, tar=tar, licence=licence, architecture=architecture)
            else:
                done = write_folder(artifact, out)
        finally:
            # What was refused is not wanted again, and would stand in the way of another version.
            if fetched is not None:
                shutil.rmtree(fetched)
        _tell(session, done)


def _tell(session: Session, done: Exported) -> None:
    if session.as_json:
        session.emit({**dataclasses.asdict(done), "path": str(done.path)})
        return
    say(f"{done.name} as {done.format}, {done.digest}: {done.size_bytes} bytes")
    print_line(str(done.path))
