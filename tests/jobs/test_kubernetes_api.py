"""The Kubernetes engine against an API alone: created, seen, suspended, ended, deleted, refused, and out of reach.

Against the double, or against a cluster with Kubeflow Trainer where KUBECONFIG and FORGE_TEST_NAMESPACE are set; there
FORGE_TEST_RUNTIME and FORGE_TEST_IMAGE name the runtime and an image that has Python. What cannot be forced on a
cluster is skipped. Workers are `timeit`, of Python itself: it runs the statements that it is given.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training_common.settings import KubernetesSettings

for library in ("kubernetes", "kubeflow_trainer_api", "kubernetes_validate"):
    pytest.importorskip(library, reason="the extra [kubernetes] or kubernetes-validate is not installed")

from kubernetes import client, config  # noqa: E402 - only where the extra is

from tests.support.kubernetes_double import ACCOUNT, KubernetesDouble  # noqa: E402
from training_common.engines import kubernetes as engine_module  # noqa: E402
from training_common.engines.kubernetes import KubernetesEngine  # noqa: E402

_SLEEPS, _ENDS, _FAILS = "import time; time.sleep(600)", "import os; os._exit(0)", "import os; os._exit(3)"
_GROUP = ("trainer.kubeflow.org", "v1alpha1")


class OnDouble:
    """The double, and what happens on its cluster."""

    patience_s = 20.0

    def __init__(self, double: KubernetesDouble) -> None:
        self.double = double
        self.settings = KubernetesSettings(namespace="team", runtime="torch-cpu", kubeconfig=double.kubeconfig)

    def suspend(self, name: str) -> None:
        self.double.preempt(name)

    def resume(self, name: str) -> None:
        self.double.admit(name)

    def delete(self, name: str) -> None:
        self.double.answer("DELETE", f"/apis/{'/'.join(_GROUP)}/namespaces/team/trainjobs/{name}", None)


class OnCluster:
    """A cluster, on which this test does by hand what Kueue and people do."""

    patience_s = 300.0

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        values = {"namespace": namespace, "kubeconfig": kubeconfig, "image": os.environ.get("FORGE_TEST_IMAGE", "")}
        runtime = os.environ.get("FORGE_TEST_RUNTIME", "torch-distributed")
        self.settings = KubernetesSettings.model_validate({**values, "runtime": runtime})
        self._objects = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))

    def suspend(self, name: str) -> None:
        self._patch(name, {"spec": {"suspend": True}})

    def resume(self, name: str) -> None:
        self._patch(name, {"spec": {"suspend": False}})

    def delete(self, name: str) -> None:
        self._objects.delete_namespaced_custom_object(*_GROUP, self.settings.namespace, "trainjobs", name)

    def _patch(self, name: str, body: dict[str, Any]) -> None:
        self._objects.patch_namespaced_custom_object(*_GROUP, self.settings.namespace, "trainjobs", name, body)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[OnDouble | OnCluster]:
    kubeconfig, namespace = os.environ.get("KUBECONFIG"), os.environ.get("FORGE_TEST_NAMESPACE")
    if kubeconfig and namespace:
        yield OnCluster(Path(kubeconfig), namespace)
        return
    double = KubernetesDouble(tmp_path, environment={})
    yield OnDouble(double)
    double.stop()


@pytest.fixture
def double(place: OnDouble | OnCluster) -> KubernetesDouble:
    if isinstance(place, OnCluster):
        pytest.skip("cannot be forced on a cluster")
    return place.double


@pytest.fixture
def engine(place: OnDouble | OnCluster) -> Iterator[KubernetesEngine]:
    """An engine of an owner of its own, whose TrainJobs are deleted in the end."""
    engine = KubernetesEngine(place.settings, module="timeit", owner=f"test-{_letters()}")
    yield engine
    if isinstance(place, OnCluster):
        engine.tidy()
        for name in engine._seen or ():
            engine.kill(name)


def _letters() -> str:
    return "".join(chr(ord("a") + byte % 26) for byte in os.urandom(12))


def launch(engine: KubernetesEngine, statement: str, *, job: str = "", number: int = 1) -> str:
    arguments = ["-n", "1", "-r", "1", statement, "--attempt", str(number)]
    return engine.launch(arguments, log_name=f"{job or _letters()}/logs/attempt-{number}.log")


def until(place: OnDouble | OnCluster, engine: KubernetesEngine, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + place.patience_s
    while True:
        engine.tidy()
        if condition():
            return
        assert time.monotonic() < end, engine._seen
        time.sleep(0.05)


def test_a_worker_is_created_seen_and_deleted(place: OnDouble | OnCluster, engine: KubernetesEngine) -> None:
    """It lives from its creation on, by its handle; killed, it is gone, and once more is no error."""
    name = launch(engine, _SLEEPS)
    assert engine.alive(name)
    until(place, engine, lambda: name in (engine._seen or ()))
    assert (engine.alive(name), engine.waits(name)) == (True, False)
    engine.kill(name)
    until(place, engine, lambda: not engine.alive(name))
    engine.kill(name)
    assert engine.ending(name).from_outside


@pytest.mark.parametrize(("statement", "words"), [(_ENDS, "complete"), (_FAILS, "exit code 3")])
def test_an_end_is_told(place: OnDouble | OnCluster, engine: KubernetesEngine, statement: str, words: str) -> None:
    """With the exit code of a process that failed by itself."""
    name = launch(engine, statement)
    until(place, engine, lambda: not engine.alive(name))
    ending = engine.ending(name)
    assert words in ending.words
    assert not ending.from_outside


def test_a_suspended_worker_waits_and_is_resumed(place: OnDouble | OnCluster, engine: KubernetesEngine) -> None:
    """As Kueue does both: it lives all the while, and waits only while it is suspended."""
    name = launch(engine, _SLEEPS)
    until(place, engine, lambda: name in (engine._seen or ()))
    place.suspend(name)
    until(place, engine, lambda: engine.waits(name))
    assert engine.alive(name)
    place.resume(name)
    until(place, engine, lambda: not engine.waits(name))
    assert engine.alive(name)


def test_a_train_job_deleted_by_hand_is_lost(place: OnDouble | OnCluster, engine: KubernetesEngine) -> None:
    """And nothing of its job's doing."""
    name = launch(engine, _SLEEPS)
    until(place, engine, lambda: name in (engine._seen or ()))
    place.delete(name)
    until(place, engine, lambda: not engine.alive(name))
    assert engine.ending(name).from_outside


def test_a_repeated_create_is_the_same_worker(place: OnDouble | OnCluster, engine: KubernetesEngine) -> None:
    """409 from the second on: a call whose answer was lost has created it."""
    job = _letters()
    assert launch(engine, _SLEEPS, job=job) == launch(engine, _SLEEPS, job=job)
    until(place, engine, lambda: len(engine._seen or ()) == 1)


def test_a_lost_answer_is_no_lost_worker(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """Created, and the connection cut before the answer: it is looked up."""
    double.loses_answer = True
    name = launch(engine, _SLEEPS)
    assert list(double.jobs) == [name]
    assert engine.alive(name)


def test_a_worker_that_nobody_waits_for_is_deleted(
    double: KubernetesDouble, engine: KubernetesEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API that hangs, and creates what it was asked for after the engine has given up: another attempt goes on."""
    monkeypatch.setattr(engine_module, "_CALL_TIMEOUT_S", 0.2)
    job = _letters()
    double.held_up.clear()
    with pytest.raises(OSError, match="cannot be reached"):
        launch(engine, _SLEEPS, job=job)
    double.held_up.set()
    monkeypatch.setattr(engine_module, "_CALL_TIMEOUT_S", 10)
    second = launch(engine, _SLEEPS, job=job, number=2)
    end = time.monotonic() + 20
    while len(double.jobs) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    engine.tidy()
    assert list(double.jobs) == [second]


def test_a_failing_server_takes_nobody(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """500: what was seen last still holds, new workers wait, and what Kubernetes said is told."""
    name = launch(engine, _SLEEPS)
    engine.tidy()
    double.broken = True
    engine.tidy()
    assert engine.alive(name)
    with pytest.raises(OSError, match=r"500 .*etcdserver: request timed out"):
        launch(engine, _SLEEPS)
    double.broken = False
    engine.tidy()
    assert engine.alive(name)


def test_a_right_that_is_missing_is_told(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """403: which account lacks which verb on what. One that may not list loses no worker."""
    name = launch(engine, _SLEEPS)
    engine.tidy()
    double.forbidden = {"create", "list"}
    with pytest.raises(OSError, match=f'403 .*"{ACCOUNT}" cannot create resource "trainjobs" in API group'):
        launch(engine, _SLEEPS)
    engine.tidy()
    assert engine.alive(name)


def test_pods_that_may_not_be_listed_are_no_ones_fault(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """An end whose reason cannot be looked at costs the job nothing, and says which right is missing."""
    name = launch(engine, _FAILS)
    double.processes[name].wait()
    engine.tidy()
    double.forbidden = {"list pods"}
    ending = engine.ending(name)
    assert ending.from_outside
    assert 'cannot list resource "pods"' in ending.words


def test_a_long_list_is_read_to_its_end(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """Page by page. Where the pages grow too old on the way (410), what was seen before still holds."""
    names = {launch(engine, _SLEEPS) for _ in range(5)}
    double.page = 2
    engine.tidy()
    assert set(engine._seen or ()) == names
    assert sum("continue=" in call for call in double.calls) == 2
    double.expires = True
    engine.tidy()
    assert all(engine.alive(name) for name in names)
    double.expires = False
    engine.kill(gone := names.pop())
    engine.tidy()
    assert not engine.alive(gone)


def test_the_double_refuses_what_the_schema_does(double: KubernetesDouble, engine: KubernetesEngine) -> None:
    """A field that a TrainJob does not have, or that is of another type: 422, with its path."""
    right = engine._manifest("forge-a-1", ["--attempt", "1"], 1)
    path = f"/apis/{'/'.join(_GROUP)}/namespaces/team/trainjobs"
    for field, value in [("numNode", 1), ("numNodes", "one")]:
        wrong = {**right, "spec": {**right["spec"], "trainer": {**right["spec"]["trainer"], field: value}}}
        code, status = double.answer("POST", path, wrong)
        assert (code, status["reason"]) == (422, "Invalid")
        assert "spec.trainer" in status["message"]
    assert double.answer("POST", path, right)[0] == 201
