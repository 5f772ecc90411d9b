"""Switches Cognate to its other colour, if the smoke test passes there, and back again if it fails after the switch.

    python deploy/kubernetes/switch.py --expect-version 0.3.0

Needs kubectl with the right to change Services and create Jobs in the namespace, and the other colour's Deployment with
its new tags and replicas applied. Exit status 0: switched. 1: calls go where they went. 2: switched, and returned.
3: switched, and whether it was returned is not known: look at the Service's selector.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

NAMESPACE, SERVICE, PREVIEW, SMOKE = "cognate", "cognate", "cognate-preview", "cognate-smoke"
PORT = 7101
COLOUR = "cognateforge.dev/colour"
COLOURS = ("blue", "green")
_POLL_S = 2.0
# Beyond the Job's own activeDeadlineSeconds: for its pod to be scheduled and its end to be seen.
_SMOKE_S = 420.0

# Takes kubectl's arguments and what it reads from stdin; returns what it says. Errors: CalledProcessError.
Kubectl = Callable[[list[str], str], str]


def call_kubectl(arguments: list[str], stdin: str) -> str:
    """Run kubectl in Cognate's namespace."""
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    # Arguments of our own, without a shell.
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return done.stdout


class Switch:
    """One switch, from the colour that takes calls to the other one. say: gets a line for each step."""

    def __init__(
        self,
        *,
        expect_version: str,
        kubectl: Kubectl = call_kubectl,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._version, self._kubectl, self._say, self._sleep = expect_version, kubectl, say, sleep

    def run(self) -> int:
        """Try, switch, try again. Returns the exit status. Errors: CalledProcessError, before calls go elsewhere."""
        old = self._get("service", SERVICE)["spec"]["selector"][COLOUR]
        new = COLOURS[1 - COLOURS.index(old)]
        deployment = self._get("deployment", f"{SERVICE}-{new}")
        if not deployment["spec"]["replicas"]:
            self._say(f"{new} has no replicas: set its count and tags, apply, and switch then")
            return 1
        self._kubectl(["rollout", "status", f"deployment/{SERVICE}-{new}", "--timeout=15m"], "")
        # The idle colour is what the preview shows, whatever was there before.
        self._select(PREVIEW, new)
        if not self._smoke(PREVIEW):
            self._say(f"{new} failed its smoke test; {old} goes on")
            return 1
        try:
            # In here, since a call that is cut off may have been carried out.
            self._select(SERVICE, new)
            self._say(f"calls go to {new}")
            well = self._smoke(SERVICE)
        except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
            # Whether it works is not known, and the old colour is known to.
            self._say(f"the smoke test could not be run: {error}")
            well = False
        if not well:
            return self._returned(old)
        try:
            self._select(PREVIEW, old)
        except subprocess.CalledProcessError as error:
            self._say(f"{PREVIEW} still shows {new}: {error}")
        self._say(f"switched; {old} may be set to 0 replicas, write {new} down in active.yaml")
        return 0

    def _returned(self, old: str) -> int:
        try:
            self._select(SERVICE, old)
        except subprocess.CalledProcessError as error:
            self._say(f"calls may still go to the new colour: set the selector of {SERVICE} to {old} by hand: {error}")
            return 3
        self._say(f"calls go to {old} again")
        return 2

    def _get(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._kubectl(["get", kind, name, "--output=json"], ""))
        return found

    def _select(self, service: str, colour: str) -> None:
        patch = json.dumps({"spec": {"selector": {COLOUR: colour}}})
        self._kubectl(["patch", "service", service, f"--patch={patch}"], "")

    def _smoke(self, service: str) -> bool:
        """Run the smoke test against a Service. Returns whether it passed; one without an end in time has not."""
        spec = self._get("cronjob", SMOKE)["spec"]["jobTemplate"]["spec"]
        [container] = spec["template"]["spec"]["containers"]
        container["args"] = ["smoke", "cognate", f"--expect-version={self._version}"]
        address = {"name": "FORGE_COGNATE", "value": f"{service}.{NAMESPACE}.svc:{PORT}"}
        container["env"] = [address if one["name"] == address["name"] else one for one in container["env"]]
        metadata = {"generateName": f"{SMOKE}-", "namespace": NAMESPACE}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
        name = json.loads(self._kubectl(["create", "--filename=-", "--output=json"], json.dumps(job)))["metadata"][
            "name"
        ]
        for _ in range(int(_SMOKE_S / _POLL_S)):
            for condition in self._get("job", name).get("status", {}).get("conditions", ()):
                if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
                    self._say(f"{name} against {service}: {condition['type']}")
                    return bool(condition["type"] == "Complete")
            self._sleep(_POLL_S)
        self._say(f"{name} against {service}: no end after {_SMOKE_S:.0f} s")
        return False


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Switch Cognate to its other colour, and back if that does not work.")
    parser.add_argument("--expect-version", required=True, help="release that the other colour has to be of")
    try:
        return Switch(expect_version=parser.parse_args().expect_version).run()
    except subprocess.CalledProcessError as error:
        print(f"kubectl ended with {error.returncode}: {' '.join(error.cmd)}", file=sys.stderr)  # noqa: T201
        return 1
    except FileNotFoundError:
        print("kubectl is not in PATH: install it, nothing was changed", file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
