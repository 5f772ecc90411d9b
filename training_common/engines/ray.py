"""The Ray engine: a Ray job for each attempt, in which Ray Train runs the worker's processes on an existing cluster.

The cluster's nodes bring the code, and reach the store and the shared folder. The job's submission id is the worker's
handle. What becomes of it is read from one list of all jobs at every look; while the cluster is away, what was seen
last still holds.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import structlog
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_placement_groups
from ray.util.state.exception import RayStateApiException

from training_common.attempt_log import open_log
from training_common.engines.naming import name_of
from training_common.engines.processes import EX_TEMPFAIL, OUTSIDE_STATUSES
from training_common.jobs.scheduler import Ending
from training_common.settings import WorkerSettings

log = structlog.get_logger(__name__)

NAME = "ray"
_OWNER = "cognateforge.dev/server"
# Ended ones are kept so long for people who look into them with Ray's dashboard.
_KEPT_S = 3600.0
_CALL_TIMEOUT_S = 10
# More than any cluster has room for.
_MOST_GROUPS = 10_000
# Ray's client obeys these before the address that it is given.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# What the client raises: refusals are RuntimeError, and the first call of all raises ConnectionError.
_AWAY = (RuntimeError, ConnectionError, requests.RequestException)


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a bound on how long a call may take, for which it has no option."""

    def _do_request(self, *arguments: Any, **options: Any) -> requests.Response:
        response: requests.Response = super()._do_request(*arguments, **{"timeout": _CALL_TIMEOUT_S, **options})
        return response


class RayEngine:
    """Starts workers as Ray jobs and tells whether they live.

    owner: names this server alone, so that it finds its own among a cluster's jobs.
    Errors: OSError, when Ray's environment would lead to another cluster.
    """

    name = NAME

    def __init__(self, settings: WorkerSettings, *, module: str, owner: str, log_dir: Path) -> None:
        self._settings, self._module, self._owner, self._log_dir = settings.ray, module, owner, log_dir
        self._threads = (
            [] if settings.threads else ["--threads", str(max(1, int(settings.ray.resources.get("CPU", 1))))]
        )
        for name in _OVERRIDES:
            if os.environ.get(name, settings.ray.address) != settings.ray.address:
                raise OSError(f"workers.ray.address: {name} names another cluster: unset it, or let both be the same")
        self._connected: _Client | None = None
        # None until they were looked at once.
        self._seen: dict[str, JobDetails] | None = None
        # Launched here, and not seen since.
        self._launched: set[str] = set()
        # Ray's ids of jobs that wait for room; None until somebody asks, once in a look.
        self._waiting: set[str] | None = None

    def _client(self) -> _Client:
        if self._connected is None:
            # It asks the cluster for its version.
            self._connected = _Client(self._settings.address)
        return self._connected

    def launch(
        self,
        arguments: Sequence[str],
        *,
        log_name: str,
        processes: int = 1,
        nodes: int = 1,  # of no effect: the cluster has its own
    ) -> str:
        """Submit a worker's Ray job and return its id. Errors: OSError."""
        name, path = name_of(log_name, arguments), (self._log_dir / log_name).absolute()
        os.close(open_log(path))
        threads = [] if "--threads" in arguments else self._threads
        driver = [
            *("python", "-m", "training_common.engines.ray_driver", "--processes", str(processes)),
            *("--resources", json.dumps(self._settings.resources), "--log", str(path)),
            *(self._module, *arguments, *threads, "--handle", name),
        ]
        environment = self._settings.environment
        try:
            self._client().submit_job(
                entrypoint=shlex.join(driver),
                submission_id=name,
                # Without an environment of its own it may use processes that Ray has at hand.
                runtime_env={"env_vars": environment} if environment else {},
                metadata={_OWNER: self._owner},
            )
        except _AWAY as error:
            if not self._is_there(name):
                raise OSError(0, f"Ray did not take the job: {_told(error)}") from error
        self._launched.add(name)
        return name

    def _is_there(self, name: str) -> bool:
        """Whether a job of that id was submitted before, by a call whose answer was lost."""
        try:
            metadata = self._client().get_job_info(name).metadata or {}
        except _AWAY:
            return False
        return metadata.get(_OWNER) == self._owner

    def tidy(self) -> None:
        """Look at all jobs of this server at once, and delete those that ended long ago."""
        self._waiting = None
        try:
            jobs = self._client().list_jobs()
        except _AWAY as error:
            # Contact lost is no loss of a worker.
            log.warning("Ray jobs cannot be looked at", error=_told(error))
            return
        self._seen = {
            job.submission_id: job
            for job in jobs
            if job.submission_id and (job.metadata or {}).get(_OWNER) == self._owner
        }
        self._launched -= self._seen.keys()
        for name, job in self._seen.items():
            if job.status.is_terminal() and time.time() - (job.end_time or 0) / 1e3 > _KEPT_S:
                self._delete(name)

    def _delete(self, name: str) -> None:
        try:
            self._client().delete_job(name)
        except _AWAY as error:
            log.warning("Ray job not deleted", name=name, error=_told(error))

    def alive(self, handle: str) -> bool:
        """Whether the worker's Ray job has not ended, as far as was seen."""
        if self._seen is None:
            return True
        job = self._seen.get(handle)
        return not job.status.is_terminal() if job is not None else handle in self._launched

    def waits(self, handle: str) -> bool:
        """Whether the worker waits for room on the cluster."""
        job = (self._seen or {}).get(handle)
        if job is None or job.status.is_terminal():
            return False
        return job.status is JobStatus.PENDING or job.job_id in self._without_room()

    def _without_room(self) -> set[str]:
        if self._waiting is None:
            try:
                groups = list_placement_groups(
                    self._settings.address,
                    filters=[("state", "=", "PENDING")],
                    limit=_MOST_GROUPS,
                    timeout=_CALL_TIMEOUT_S,
                    raise_on_missing_output=False,
                )
            except (*_AWAY, RayStateApiException) as error:
                log.warning("Ray's placement groups cannot be looked at", error=_told(error))
                groups = []
            self._waiting = {group.creator_job_id for group in groups}
        return self._waiting

    def ending(self, handle: str) -> Ending:
        """Return how a worker ended: by its driver's exit status, or by what Ray says of the job."""
        job = (self._seen or {}).get(handle)
        if job is None:
            return Ending(words="the worker's Ray job is gone", from_outside=True)
        if job.status is JobStatus.SUCCEEDED:
            return Ending(words="the worker's Ray job succeeded, and it ended without a word", from_outside=False)
        if job.status is JobStatus.STOPPED:
            return Ending(words="the worker's Ray job was stopped", from_outside=True)
        if job.driver_exit_code is None:
            # Its environment could not be made, or the node is gone on which its driver was.
            return Ending(words=f"the worker's Ray job failed: {_first_line(job.message)}", from_outside=True)
        status = job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code
        words = "the worker's Ray job lost a process" if status == EX_TEMPFAIL else "the worker's Ray job failed"
        return Ending(words=f"{words} (exit status {status})", from_outside=status in OUTSIDE_STATUSES)

    def kill(self, handle: str) -> None:
        """Stop a worker's Ray job, and with it all its processes, if it still runs."""
        try:
            self._client().stop_job(handle)
        except _AWAY as error:
            # Its worker writes nothing any more, since its fencing token is not current.
            log.warning("Ray job not stopped", name=handle, error=_told(error))


def _first_line(message: str | None) -> str:
    return (message or "").strip().partition("\n")[0][:200]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(str(error))}"
