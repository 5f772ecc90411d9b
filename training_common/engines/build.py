"""The engine that the settings name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from training_common.engines.local import LocalEngine, Spread
from training_common.engines.network import listen
from training_common.jobs.folders import jobs_dir, nodes_dir
from training_common.jobs.scheduler import Engine
from training_common.settings import ServiceSettings, SettingsError


def build_engine(settings: ServiceSettings, *, module: str) -> Engine:
    """Return what starts this server's workers. Errors: SettingsError, when its library or its cluster is not there."""
    workers = settings.workers
    # Label values hold 63 letters, digits, '-', '_' and '.'; a server's name may have others, and more.
    owner = hashlib.sha256(settings.server_name.encode()).hexdigest()[:16]
    try:
        # A server loads the libraries of its own engine only.
        if workers.engine == "kubernetes":
            from training_common.engines.kubernetes import KubernetesEngine

            return KubernetesEngine(workers.kubernetes, module=module, owner=owner)
        if workers.engine == "ray":
            from training_common.engines.ray import RayEngine

            return RayEngine(workers, module=module, owner=owner, log_dir=jobs_dir(settings))
    except ImportError as error:
        raise SettingsError(
            f"workers.engine: {workers.engine} needs its client library: pip install 'cognateforge[{workers.engine}]'"
        ) from error
    except OSError as error:
        raise SettingsError(str(error)) from error
    spread = None
    if workers.rendezvous_host:
        try:
            listen(workers.rendezvous_host).close()
        except OSError as error:
            raise SettingsError(f"workers.rendezvous_host: {error.strerror}") from error
        spread = Spread(
            folder=nodes_dir(settings),
            owner=owner,
            host=workers.rendezvous_host,
            lost_after_s=workers.node_lost_after_s,
        )
    return LocalEngine(module=module, log_dir=jobs_dir(settings), spread=spread)


def worker_settings_file(settings: ServiceSettings, own: Path | None) -> Path | None:
    """Return the settings file that workers read: the server's own, or the one where they run."""
    workers = settings.workers
    there = {"kubernetes": workers.kubernetes.settings_file, "ray": workers.ray.settings_file}
    return there.get(workers.engine, own)
