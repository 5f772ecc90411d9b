"""Validations of published models on request: a short-lived process runs the gate on the stored files again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import sqlalchemy as sa

from cognate_server.models import find_model
from cognate_server.settings import CognateSettings
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import require_whole
from training_common.rpc.mutations import mutate
from training_common.side_process import SideProcesses

METHOD = "ValidateModel"
MODULE = "cognate_server.validate"


class ModelValidator:
    """Validates models of one registry.

    scratch: a folder of this server's own; what it holds is removed. module: what a process runs.
    """

    def __init__(
        self, registry: ArtifactRegistry, settings: CognateSettings, *, scratch: Path, module: str = MODULE
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._processes = SideProcesses(
            registry.database,
            method=METHOD,
            module=module,
            scratch=scratch,
            what="validations",
            at_once=settings.validation.at_once,
            setting="validation.at_once",
        )

    async def validate(self, request: pb.ValidateModelRequest) -> bytes:
        """Return the answer's bytes: the stored one, that of a validation under way, or of a new one.

        When the last of its callers has gone, the validation is ended. The version itself never changes.
        Errors: ModelNotFoundError, ArtifactCorruptError, DataUnavailableError, IncompatibleError, and those of
        `SideProcesses`.
        """
        row = await self._registry.database.run(find_model, self._registry, request.name)
        return await self._processes.answer(request, lambda: self._run(request, row))

    async def _run(self, request: pb.ValidateModelRequest, row: ArtifactRow) -> bytes:
        await asyncio.to_thread(require_whole, self._registry, row)
        settings = self._settings
        checks = await self._processes.result(
            {
                "files_dir": str(settings.files_dir.resolve()),
                "artifacts": settings.artifacts.model_dump(mode="json"),
                "data": settings.data.model_dump(mode="json"),
                "pretraining": settings.pretraining.model_dump(mode="json"),
                "threads": settings.validation.threads,
                "name": row.name,
                "manifest": row.manifest.decode(),
            }
        )

        def answer(_connection: sa.Connection) -> pb.ValidateModelResponse:
            return pb.ValidateModelResponse(checks=[artifact_pb2.Check(**check) for check in checks])

        return await mutate(self._registry.database, METHOD, request, answer)
