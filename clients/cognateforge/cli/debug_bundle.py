"""`forge debug-bundle`: what is known of a job, in one file for whoever looks into it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cognateforge.cli.doctor import AgentSettings, CognateSettings, all_checks
from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import JobName, JobService, Service, ServiceOption, owner
from cognateforge.cli.names import full_job_name
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.diagnostics.bundle import Bundle
    from cognateforge.diagnostics.plugins import Evidence
    from cognateforge.job.v1.job_pb2 import Job

# A job that was tried again and again repeats itself.
_ATTEMPTS = 10
# As many as a plot has columns.
_POINTS = 1000
# Of the room that is left when events are gathered: the rest is for logs.
_EVENTS_SHARE = 0.5
_OWN_VARIABLES = ("FORGE_", "COGNATE_SERVER_", "AGENT_SERVER_", "OMP_", "CUDA_", "CONSUL_", "GRPC_")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "debug-bundle")
    def debug_bundle(
        session: Session,
        name: JobName,
        service: ServiceOption = None,
        output: Annotated[
            Path | None, typer.Option(help="File to write. Default: forge-debug-JOB.tar.gz here.")
        ] = None,
        most_mib: Annotated[int, typer.Option("--max-mib", min=1, max=1024, help="MiB of contents at most.")] = 32,
        cognate_settings: CognateSettings = None,
        agent_settings: AgentSettings = None,
    ) -> Exit:
        """Gather what is known of a job in a tar.gz, without secrets: plan, events, metrics, logs, versions, checks.

        With its service's settings file also the settings, masked, and the logs on this machine, when the service is
        away too.
        """
        from cognateforge.diagnostics.bundle import Bundle
        from cognateforge.masking import Redactor, secrets_of_environment

        job_name = full_job_name(name)
        path = output or Path(f"forge-debug-{job_name.removeprefix('jobs/')}.tar.gz")
        settings = {Service.COGNATE: cognate_settings, Service.AGENT: agent_settings}
        evidence, unusable = _evidence(settings, job_name)
        secrets = [*secrets_of_environment(), *(text for one in evidence.values() for text in one.secrets)]
        bundle = Bundle(Redactor(secrets), most_mib << 20)
        bundle.missing.update((name, bundle.redactor.text(why)) for name, why in unusable.items())
        found = _job(session, bundle, service, job_name, alone=not evidence)
        bundle.add_json("client.json", _client())
        bundle.add_json("doctor.json", [check.to_plain() for check in all_checks(session, settings)])
        for one in Service:
            with bundle.gathering(f"{one.value}/server.json"):
                jobs = JobService(one, session)
                bundle.add_json(f"{one.value}/server.json", {"health": jobs.health(), "info": _plain(jobs.info())})
        for one, local in evidence.items():
            bundle.add_json(f"{one.value}/settings.json", local.settings)
        if found is not None:
            _of_service(bundle, *found)
        _of_machine(bundle, evidence)
        bundle.write(path)
        _tell(session, path, bundle)
        return Exit.OK


def _evidence(settings: dict[Service, Path | None], job: str) -> tuple[dict[Service, Evidence], dict[str, str]]:
    """Return what is there, and why the rest is not: settings that are invalid may be why the job needs a look."""
    from cognateforge.diagnostics.plugins import server_side
    from cognateforge.exceptions import ClientSetupError

    found, unusable = {}, {}
    for service, file in settings.items():
        if file is None:
            continue
        side = server_side(service.value)
        try:
            found[service] = side.evidence(file, job)
        except ClientSetupError as error:
            unusable[f"{service.value}/settings.json"] = error.message
    return found, unusable


def _job(
    session: Session, bundle: Bundle, service: Service | None, name: str, *, alone: bool
) -> tuple[JobService, Job] | None:
    """Add the job and its plan. A service that is away is no error where this machine has something to tell."""
    from cognateforge.exceptions import UnavailableError

    try:
        found, item = owner(session, service, name)
    except UnavailableError as error:
        if alone:
            raise
        bundle.missing["job.json"] = bundle.redactor.text(error.message)
        return None
    bundle.add_json("job.json", {"service": found.service.value, **_plain(item)})
    return found, item.job


def _of_service(bundle: Bundle, jobs: JobService, job: Job) -> None:
    """Add what the job's service tells of it."""
    with bundle.gathering("checkpoints.json"):
        bundle.add_json("checkpoints.json", [_plain(one) for one in jobs.checkpoints(job.name)])
    with bundle.gathering("metrics.jsonl"):
        bundle.add_lines("metrics.jsonl", map(_thinned, jobs.metrics(job.name, [], max_points=_POINTS)))
    with bundle.gathering("events.jsonl"):
        bundle.add_lines("events.jsonl", _events(jobs, job), share=_EVENTS_SHARE)
    attempts = range(job.attempt, max(0, job.attempt - _ATTEMPTS), -1)
    for index, attempt in enumerate(attempts):
        name = f"logs/attempt-{attempt}.log"
        with bundle.gathering(name):
            most = bundle.left_bytes // (len(attempts) - index + 1)
            bundle.add_text(name, _log(jobs, job.name, attempt), most_bytes=most)
    if job.attempt > _ATTEMPTS:
        bundle.missing["logs of older attempts"] = f"only the newest {_ATTEMPTS} are gathered"


def _of_machine(bundle: Bundle, evidence: dict[Service, Evidence]) -> None:
    """Add the logs that lie on this machine."""
    from cognateforge.diagnostics.bundle import tail_of

    files = [file for one in evidence.values() for file in reversed(one.files)]
    for index, (name, path) in enumerate(files):
        with bundle.gathering(name):
            most = bundle.left_bytes // (len(files) - index)
            bundle.add_text(name, tail_of(path, 2 * most)(), most_bytes=most)


def _events(jobs: JobService, job: Job) -> Iterator[dict[str, Any]]:
    """Yield the events that there are now, also of a job that goes on."""
    if not job.last_sequence:
        return
    for frame in jobs.watch(job.name, max(0, job.first_sequence - 1)):
        if not frame.HasField("event"):
            return
        yield _plain(frame.event)
        if frame.event.sequence >= job.last_sequence:
            return


def _log(jobs: JobService, name: str, attempt: int) -> Iterator[str]:
    for frame in jobs.logs(name, attempt=attempt, position=0, follow=False):
        if frame.HasField("gap"):
            yield f"[{frame.gap.next_position - frame.gap.position} bytes are no longer kept]\n"
        for line in frame.lines.lines:
            yield line.text if line.continued else f"{line.text}\n"


def _thinned(series: Any) -> dict[str, Any]:
    """Return a series with as many points as are asked for, whatever the service makes of the wish."""
    plain, count = _plain(series), len(series.values)
    if count > _POINTS:
        kept = [round(index * (count - 1) / (_POINTS - 1)) for index in range(_POINTS)]
        plain |= {name: [plain[name][index] for index in kept] for name in ("steps", "values")}
    return plain


def _client() -> dict[str, Any]:
    from cognateforge.diagnostics.environment import installed_versions

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed_versions(),
        # That they are set may matter, and what they say may be secret.
        "variables_set": sorted(name for name in os.environ if name.startswith(_OWN_VARIABLES)),
    }


def _plain(message: Any) -> dict[str, Any]:
    from cognateforge.cli.plain import to_plain

    return to_plain(message)


def _tell(session: Session, path: Path, bundle: Bundle) -> None:
    contents = {"path": str(path), "size_bytes": path.stat().st_size, **bundle.contents()}
    if session.as_json:
        session.emit(contents)
        return
    for member in bundle.members:
        note = f" ({member.note})" if member.note else ""
        say(f"{len(member.data):>10}  {member.name}{note}")
    for name, why in bundle.missing.items():
        say(f"{'-':>10}  {name}: {why}")
    say("secrets that were found are asterisks: look through it before you pass it on")
    print_line(str(path))
