"""The Kubernetes engine: a TrainJob of Kubeflow Trainer for each attempt, queued by Kueue where a queue is named.

The training runtime that the settings name brings the image, the volumes and the environment of the worker, which has
to reach the store and the shared folder. A TrainJob says what runs in it, on how many nodes, and in which queue. Its
name is the worker's handle. What becomes of it is read from its conditions, of all of them at once at every look; while
the API is away, what was seen last still holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from kubeflow_trainer_api import models
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from training_common.engines.naming import name_of
from training_common.engines.processes import OUTSIDE_STATUSES
from training_common.jobs.scheduler import Ending
from training_common.settings import KubernetesSettings

log = structlog.get_logger(__name__)

NAME = "kubernetes"
_GROUP, _VERSION, _PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
_OWNER_LABEL = "cognateforge.dev/server"
_OF_JOB_SET = "jobset.sigs.k8s.io/jobset-name"
_COMPLETE, _FAILED, _SUSPENDED = "Complete", "Failed", "Suspended"
# Ended ones are kept so long for people who look into them with kubectl.
_KEPT_S = 3600.0
_CALL_TIMEOUT_S = 10
# TrainJobs in one answer: as many as kubectl asks for.
_PAGE = 500
# Of what Kubernetes says to a refused call; a webhook may quote a whole object.
_MOST_CHARS = 500
# Pods that a machine or the scheduler of the cluster ended, by their status's reason.
_OUTSIDE_REASONS = frozenset(
    {"Evicted", "Preempted", "Preempting", "NodeLost", "NodeShutdown", "Terminated", "Shutdown"}
)


@dataclass(frozen=True)
class _Seen:
    """What was seen last of a TrainJob. condition: the newest that ended it, or none."""

    ended: str
    message: str
    suspended: bool
    end_s: float


class KubernetesEngine:
    """Starts workers as TrainJobs and tells whether they live.

    owner: a label value of this server alone, under which it finds its own.
    Errors: OSError, when the cluster's address and credentials are not to be had.
    """

    name = NAME

    def __init__(self, settings: KubernetesSettings, *, module: str, owner: str) -> None:
        self._settings, self._module, self._owner = settings, module, owner
        try:
            if settings.kubeconfig is None:
                config.load_incluster_config()
                api = client.ApiClient()
            else:
                api = config.new_client_from_config(str(settings.kubeconfig), context=settings.context or None)
        except config.ConfigException as error:
            raise OSError(f"workers.kubernetes: {error}") from error
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        # None until they were looked at once.
        self._seen: dict[str, _Seen] | None = None
        # Launched here, and not seen since.
        self._launched: set[str] = set()
        # Nobody knows whether these were created, and another attempt goes on in their place.
        self._doubtful: set[str] = set()
        # Why the last look failed, so that an outage is one line and not one for every look.
        self._away = ""

    def launch(
        self,
        arguments: Sequence[str],
        *,
        log_name: str,
        processes: int = 1,
        nodes: int = 1,  # of no effect: the cluster has its own
    ) -> str:
        """Create a worker's TrainJob and return its name. Its output is its pods' log. Errors: OSError."""
        name = name_of(log_name, arguments)
        manifest = self._manifest(name, [*arguments, "--handle", name], processes)
        try:
            self._objects.create_namespaced_custom_object(
                _GROUP, _VERSION, self._settings.namespace, _PLURAL, manifest, _request_timeout=_CALL_TIMEOUT_S
            )
        except ApiException as error:
            # 409: created by a call whose answer was lost. A server that failed may have created it, too.
            if error.status != 409 and not (_failed(error) and self._is_there(name)):
                raise OSError(0, f"Kubernetes refused the TrainJob: {_told(error)}") from error
        except HTTPError as error:
            if not self._is_there(name):
                raise OSError(0, f"Kubernetes cannot be reached: {type(error).__name__}") from error
        self._launched.add(name)
        return name

    def _is_there(self, name: str) -> bool:
        """Whether a TrainJob was created by a call whose answer was lost. One that turns up later is deleted."""
        try:
            found = bool(self._list(field_selector=f"metadata.name={name}"))
        except (ApiException, HTTPError):
            found = False
        if not found:
            self._doubtful.add(name)
        return found

    def _manifest(self, name: str, arguments: Sequence[str], processes: int) -> dict[str, Any]:
        settings = self._settings
        per_node = next(n for n in range(min(settings.processes_per_node, processes), 0, -1) if processes % n == 0)
        command = ["python", "-m"]
        if processes > 1:
            # Not the runtime's own torchrun: its exit code is 1 whatever ended a process.
            command += ["training_common.engines.torchrun", "--cluster", "--run-id", name]
        labels = {_OWNER_LABEL: self._owner, "app.kubernetes.io/managed-by": "cognateforge"}
        if settings.queue:
            labels[_QUEUE_LABEL] = settings.queue
        if settings.priority_class:
            labels[_PRIORITY_LABEL] = settings.priority_class
        quantities = {
            kind: models.IoK8sApimachineryPkgApiResourceQuantity(amount) for kind, amount in settings.resources.items()
        }
        trainer = models.TrainerV1alpha1Trainer(
            image=settings.image or None,
            command=command,
            args=[self._module, *arguments],
            numNodes=processes // per_node,
            numProcPerNode=per_node,
            resourcesPerNode=models.IoK8sApiCoreV1ResourceRequirements(requests=quantities, limits=quantities)
            if quantities
            else None,
        )
        job = models.TrainerV1alpha1TrainJob(
            apiVersion=f"{_GROUP}/{_VERSION}",
            kind="TrainJob",
            metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(name=name, labels=labels),
            spec=models.TrainerV1alpha1TrainJobSpec(
                runtimeRef=models.TrainerV1alpha1RuntimeRef(name=settings.runtime), trainer=trainer
            ),
        )
        manifest: dict[str, Any] = job.to_dict()
        return manifest

    def tidy(self) -> None:
        """Look at all TrainJobs of this server at once, and delete those that ended long ago."""
        try:
            found = self._list()
        except (ApiException, HTTPError) as error:
            # Contact lost is no loss of a worker.
            if _told(error) != self._away:
                self._away = _told(error)
                log.warning("TrainJobs cannot be looked at", error=self._away)
            return
        self._away = ""
        self._seen = {item["metadata"]["name"]: _seen(item) for item in found}
        self._launched -= self._seen.keys()
        for name, seen in list(self._seen.items()):
            if name in self._doubtful or (seen.ended and time.time() - seen.end_s > _KEPT_S):
                self._doubtful.discard(name)
                self.kill(name)

    def _list(self, **selected: str) -> list[dict[str, Any]]:
        """Return this server's TrainJobs, page by page. Errors: ApiException, 410 where the pages grew too old."""
        items: list[dict[str, Any]] = []
        page: dict[str, str] = {}
        while True:
            answer: Any = self._objects.list_namespaced_custom_object(
                _GROUP,
                _VERSION,
                self._settings.namespace,
                _PLURAL,
                label_selector=f"{_OWNER_LABEL}={self._owner}",
                limit=_PAGE,
                _request_timeout=_CALL_TIMEOUT_S,
                **selected,
                **page,
            )
            items += answer["items"]
            page = {"_continue": answer["metadata"].get("continue", "")}
            if not page["_continue"]:
                return items

    def alive(self, handle: str) -> bool:
        """Whether the worker's TrainJob has not ended, as far as was seen."""
        if self._seen is None:
            return True
        seen = self._seen.get(handle)
        return not seen.ended if seen is not None else handle in self._launched

    def waits(self, handle: str) -> bool:
        """Whether the worker waits in a queue of the cluster."""
        seen = (self._seen or {}).get(handle)
        return seen is not None and not seen.ended and seen.suspended

    def ending(self, handle: str) -> Ending:
        """Return how a worker ended: from its pods, which know more than its conditions, or else from these."""
        seen = (self._seen or {}).get(handle)
        if seen is None:
            return Ending(words="the worker's TrainJob was deleted", from_outside=True)
        if seen.ended == _COMPLETE:
            return Ending(words="the worker's TrainJob is complete, and it ended without a word", from_outside=False)
        from_outside, detail = self._why(handle)
        words = f"the worker's TrainJob failed: {seen.message}"
        return Ending(words=f"{words} ({detail})" if detail else words, from_outside=from_outside)

    def _why(self, handle: str) -> tuple[bool, str]:
        """Return whether something outside ended a worker's pods, and what is known of it."""
        try:
            pods = self._core.list_namespaced_pod(
                self._settings.namespace, label_selector=f"{_OF_JOB_SET}={handle}", _request_timeout=_CALL_TIMEOUT_S
            ).items
        except (ApiException, HTTPError) as error:
            return True, f"its pods cannot be looked at: {_told(error)}"
        if not pods:
            return True, "its pods are gone"
        # A pod that no node has taken yet has a status without containers, or none.
        states = [pod.status for pod in pods if pod.status is not None]
        ends = [
            status.state.terminated
            for state in states
            for status in state.container_statuses or ()
            if status.state is not None and status.state.terminated is not None
        ]
        codes = [end.exit_code for end in ends if end.exit_code != 0]
        reasons = {state.reason for state in states if state.reason}
        # Where one process fails by itself, the others fail for its sake.
        own = [code for code in codes if code not in OUTSIDE_STATUSES]
        if own:
            return False, f"exit code {own[0]}"
        return bool(codes or reasons & _OUTSIDE_REASONS), ", ".join(
            [*sorted(reasons), *(f"exit code {c}" for c in codes)]
        )

    def kill(self, handle: str) -> None:
        """Delete a worker's TrainJob, and with it its pods, if it is still there."""
        try:
            self._objects.delete_namespaced_custom_object(
                _GROUP,
                _VERSION,
                self._settings.namespace,
                _PLURAL,
                handle,
                propagation_policy="Foreground",
                _request_timeout=_CALL_TIMEOUT_S,
            )
        except ApiException as error:
            if error.status != 404:
                log.warning("TrainJob not deleted", name=handle, error=_told(error))
        except HTTPError as error:
            # Its worker writes nothing any more, since its fencing token is not current.
            log.warning("TrainJob not deleted", name=handle, error=_told(error))


def _seen(item: Mapping[str, Any]) -> _Seen:
    conditions = {one["type"]: one for one in item.get("status", {}).get("conditions", ()) if one["status"] == "True"}
    end = conditions.get(_FAILED) or conditions.get(_COMPLETE)
    suspended = bool(item.get("spec", {}).get("suspend")) or _SUSPENDED in conditions
    if end is None:
        return _Seen("", "", suspended, 0.0)
    at = datetime.fromisoformat(end["lastTransitionTime"]).astimezone(UTC)
    return _Seen(end["type"], end.get("message", ""), suspended, at.timestamp())


def _failed(error: ApiException) -> bool:
    """Whether the server itself failed, so that the call may have been carried out all the same."""
    return bool(error.status is None or error.status >= 500)


def _told(error: Exception) -> str:
    """Return what Kubernetes says to a refused call, which names the account and the right that it lacks."""
    if not isinstance(error, ApiException):
        return type(error).__name__
    try:
        message = str(json.loads(error.body)["message"])
    except (ValueError, TypeError, KeyError):
        message = ""
    told = f"{error.status} {error.reason}"
    return f"{told}: {message}"[:_MOST_CHARS] if message and message != error.reason else told
