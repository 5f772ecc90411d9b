"""Where a job's files lie: one folder for each, in the folder that all servers of a store reach."""

from __future__ import annotations

from pathlib import Path

from training_common.settings import ServiceSettings


def jobs_dir(settings: ServiceSettings) -> Path:
    """Return the folder of all jobs' folders."""
    return settings.files_dir / "jobs"


def nodes_dir(settings: ServiceSettings) -> Path:
    """Return the folder by which nodes are asked to take part in runs."""
    return settings.files_dir / "nodes"


def folder_name(job_name: str) -> str:
    """Return the name of one job's folder: what follows "jobs/"."""
    return job_name.removeprefix("jobs/")


def job_dir(settings: ServiceSettings, job_name: str) -> Path:
    """Return the folder of one job: checkpoints, scratch files, logs."""
    return jobs_dir(settings) / folder_name(job_name)


def log_name(job_name: str, attempt: int) -> str:
    """Return the path of an attempt's log below the folder of all jobs' folders."""
    return f"{folder_name(job_name)}/logs/attempt-{attempt}.log"


def verification_log_name(job_name: str, verification_id: int) -> str:
    """Return the path of a verification's log, beside those of its job's attempts."""
    return f"{folder_name(job_name)}/logs/verify-{verification_id}.log"


def scratch_dir(settings: ServiceSettings, verification_name: str) -> Path:
    """Return the folder of one verification's replay, on the same file system as its job's."""
    return settings.files_dir / verification_name
