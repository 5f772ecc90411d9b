"""The switch between Cognate's colours, over a double of kubectl that has what production's overlay is built to."""

import copy
import json
import subprocess
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has Kubernetes' schemas, is missing")

from deploy.kubernetes.switch import COLOUR, Switch
from tests.support.cluster import installation
from tests.support.manifests import needs_kubectl, problems

pytestmark = needs_kubectl


class Kubectl:
    """Answers from objects that it holds. failing: addresses at which the smoke test fails."""

    def __init__(self, *, failing: tuple[str, ...] = (), replicas: int = 2) -> None:
        self.objects = {
            (one["kind"].lower(), one["metadata"]["name"]): copy.deepcopy(one) for one in installation("production")
        }
        self.objects["deployment", "cognate-green"]["spec"]["replicas"] = replicas
        self.failing, self.jobs, self.lines = failing, list[dict[str, Any]](), list[str]()
        self.away = ""

    def __call__(self, arguments: list[str], stdin: str) -> str:
        if self.away and self.away in arguments:
            raise subprocess.CalledProcessError(1, ["kubectl", *arguments])
        match arguments:
            case ["get", "job", name, "--output=json"]:
                return json.dumps(self._run(self.jobs[int(name)]))
            case ["get", kind, name, "--output=json"]:
                return json.dumps(self.objects[kind, name])
            case ["create", "--filename=-", "--output=json"]:
                self.jobs.append(json.loads(stdin))
                return json.dumps({"metadata": {"name": str(len(self.jobs) - 1)}})
            case ["patch", "service", name, patch]:
                selector = json.loads(patch.removeprefix("--patch="))["spec"]["selector"]
                self.objects["service", name]["spec"]["selector"] |= selector
            case ["rollout", "status", *_]:
                pass
            case _:
                raise AssertionError(arguments)
        return ""

    def _run(self, job: dict[str, Any]) -> dict[str, Any]:
        [container] = job["spec"]["template"]["spec"]["containers"]
        address = {one["name"]: one["value"] for one in container["env"]}["FORGE_COGNATE"]
        ended = "Failed" if address in self.failing else "Complete"
        return {"status": {"conditions": [{"type": ended, "status": "True"}]}}

    def colours(self) -> tuple[str, str]:
        """Return the colours of calls and of trials."""
        calls, trials = (self.objects["service", name]["spec"]["selector"] for name in ("cognate", "cognate-preview"))
        assert calls["app.kubernetes.io/name"] == trials["app.kubernetes.io/name"] == "cognate-server"
        return calls[COLOUR], trials[COLOUR]

    def switch(self) -> int:
        return Switch(expect_version="0.3.0", kubectl=self, say=self.lines.append, sleep=lambda _: None).run()


CALLS, TRIALS = "cognate.cognate.svc:7101", "cognate-preview.cognate.svc:7101"


def test_the_other_colour_is_tried_before_and_after() -> None:
    """By Jobs that a cluster would take, which expect the release; the old colour is what is tried next."""
    kubectl = Kubectl()
    assert (kubectl.switch(), kubectl.colours()) == (0, ("green", "blue"))
    assert [problems({**job, "metadata": {"name": "a", "namespace": "cognate"}}) for job in kubectl.jobs] == [[], []]
    [before, after] = [job["spec"]["template"]["spec"]["containers"][0] for job in kubectl.jobs]
    assert before["args"] == after["args"] == ["smoke", "cognate", "--expect-version=0.3.0"]
    assert [one["env"][0]["value"] for one in (before, after)] == [TRIALS, CALLS]
    # And back, when the next release is blue again.
    assert (kubectl.switch(), kubectl.colours()) == (0, ("blue", "green"))


def test_a_colour_that_fails_its_trial_gets_no_call() -> None:
    """The Service is not touched."""
    kubectl = Kubectl(failing=(TRIALS,))
    assert (kubectl.switch(), kubectl.colours()) == (1, ("blue", "green"))
    assert len(kubectl.jobs) == 1


def test_a_colour_that_fails_at_work_is_taken_back() -> None:
    """By itself, with a status of its own."""
    kubectl = Kubectl(failing=(CALLS,))
    assert (kubectl.switch(), kubectl.colours()) == (2, ("blue", "green"))


def test_what_cannot_be_tried_is_taken_back() -> None:
    """The cluster refuses the second smoke test: whether the new colour works is not known."""
    kubectl = Kubectl()
    patched = kubectl.objects["service", "cognate"]["spec"]["selector"]

    def refusing(arguments: list[str], stdin: str) -> str:
        kubectl.away = "create" if patched[COLOUR] == "green" else ""
        return kubectl(arguments, stdin)

    status = Switch(expect_version="0.3.0", kubectl=refusing, say=kubectl.lines.append, sleep=lambda _: None).run()
    assert (status, kubectl.colours()) == (2, ("blue", "green"))


@pytest.mark.parametrize(("service", "status"), [("cognate", 3), ("cognate-preview", 0)])
def test_what_is_not_known_is_no_success_and_what_was_switched_is_no_failure(service: str, status: int) -> None:
    """The cluster refuses a change behind the switch: of the way back, and of the preview, which matters less."""
    kubectl = Kubectl(failing=(CALLS,) if service == "cognate" else ())
    calls = kubectl.objects["service", "cognate"]["spec"]["selector"]

    def refusing(arguments: list[str], stdin: str) -> str:
        kubectl.away = service if calls[COLOUR] == "green" and "patch" in arguments else ""
        return kubectl(arguments, stdin)

    switch = Switch(expect_version="0.3.0", kubectl=refusing, say=kubectl.lines.append, sleep=lambda _: None)
    assert (switch.run(), calls[COLOUR]) == (status, "green")
    assert any("by hand" in line for line in kubectl.lines) is (status == 3)


def test_a_colour_without_servers_is_not_tried() -> None:
    """It is said what to do."""
    kubectl = Kubectl(replicas=0)
    assert (kubectl.switch(), kubectl.colours()) == (1, ("blue", "green"))
    assert kubectl.lines == ["green has no replicas: set its count and tags, apply, and switch then"]


def test_a_trial_without_an_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that no node takes, for instance."""
    kubectl = Kubectl()
    monkeypatch.setattr(kubectl, "_run", lambda _job: {"status": {}})
    assert (kubectl.switch(), kubectl.colours()) == (1, ("blue", "green"))
