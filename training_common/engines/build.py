"""The engine that the settings name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from training_common.engines.local import LocalEngine
from training_common.jobs.folders import jobs_dir
from training_common.jobs.scheduler import Engine
from training_common.settings import ServiceSettings, SettingsError


def build_engine(settings: ServiceSettings, *, module: str) -> Engine:
    """Return what starts this server's workers. Errors: SettingsError, when its library or its cluster is not there."""
    if settings.workers.engine == "local":
        return LocalEngine(module=module, log_dir=jobs_dir(settings))
    try:
        from training_common.engines.kubernetes import KubernetesEngine
    except ImportError as error:
        raise SettingsError(
            "workers.engine: kubernetes needs its client library: pip install 'cognateforge[kubernetes]'"
        ) from error
    # Label values hold 63 letters, digits, '-', '_' and '.'; a server's name may have others, and more.
    owner = hashlib.sha256(settings.server_name.encode()).hexdigest()[:16]
    try:
        return KubernetesEngine(settings.workers.kubernetes, module=module, owner=owner)
    except OSError as error:
        raise SettingsError(str(error)) from error


def worker_settings_file(settings: ServiceSettings, own: Path | None) -> Path | None:
    """Return the settings file that workers read: the server's own, or the one where they run."""
    return settings.workers.kubernetes.settings_file if settings.workers.engine == "kubernetes" else own
