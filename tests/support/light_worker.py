"""A service's worker that hashes instead of training, in the place of its own: see `tests.support.previous.light`.

All that it tells the store, publishes and fetches goes through the code of the release that runs it; it is written for
either. A step takes as many milliseconds as the plan's seed says. What is published depends on every step, so a resumed
run publishes the same bytes only when nothing was lost or done twice.
"""

import contextlib
import hashlib
import json
import time
from importlib import import_module
from inspect import signature
from typing import Any

from training_common.artifacts.open import open_registry
from training_common.artifacts.publish import publish_and_succeed
from training_common.attempt import AttemptStopped, AttemptWaits
from training_common.jobs.states import JobState
from training_common.worker import WorkerContext, run

SERVICE = (__spec__.name if __spec__ else "cognate_server").partition(".")[0]  # launched by -m
IS_COGNATE = SERVICE == "cognate_server"


def work(context: WorkerContext[Any]) -> None:
    """Take one job from its plan to a published version."""
    attempt = context.attempt
    plan: Any = plan_type().FromString(attempt.store.job.plan)
    parent = {} if IS_COGNATE else fetch(context, plan)
    step, value = 0, b""
    if checkpoint := attempt.latest_checkpoint():
        saved = json.loads((checkpoint.path / "state.json").read_text())
        step, value = saved["step"], bytes.fromhex(saved["value"])
    attempt.move(JobState.RUNNING)

    def save() -> None:
        text = json.dumps({"step": step, "value": value.hex()})
        attempt.save_checkpoint(step=step, write=lambda folder: _write(folder / "state.json", text))

    while step < plan.total_steps:
        if stop := attempt.stop_requested():
            if stop.saves:
                save()
            raise AttemptStopped(stop)
        time.sleep(plan.seed / 1000)
        step, value = step + 1, hashlib.sha256(value + step.to_bytes(4)).digest()
        attempt.progress(step=step, total_steps=plan.total_steps, metrics={"loss": 1 / step})
        if step % plan.checkpoint_interval_steps == 0:
            save()
    attempt.trained()
    folder = context.job_dir / "product"
    folder.mkdir(exist_ok=True)
    _write(folder / "weights.txt", value.hex() * 1000)
    publish: Any = publish_and_succeed
    # Releases since 0.2 name the service whose version the statement tells.
    service = {"service": SERVICE.removesuffix("_server")} if "service" in signature(publish).parameters else {}
    publish(
        open_registry(context.settings, context.database),
        attempt,
        folder=folder,
        family="cognate-25m" if IS_COGNATE else plan.agent,
        state="READY" if IS_COGNATE else "PUBLISHED",
        **service,
        body=_foundation() if IS_COGNATE else _agent(plan, parent),
        code=(SERVICE, "training_common"),
        plan=plan,
        also=None if IS_COGNATE else import_module("agent_server.agents").record_agent,
    )


def plan_type() -> Any:
    """Return what a job's plan is."""
    if IS_COGNATE:
        return import_module("cognateforge.cognate.v1.pretraining_pb2").PretrainingPlan
    return import_module("cognateforge.agent.v1.training_pb2").TrainingPlan


def fetch(context: WorkerContext[Any], plan: Any) -> dict[str, str]:
    """Fetch the foundation across the exchange, as the agent worker does."""
    foundation = import_module("agent_server.foundation")
    endpoint = context.settings.cognate
    give_up = time.monotonic() + endpoint.hold_slot_s
    while True:
        try:
            with contextlib.ExitStack() as stack:
                found = foundation.fetch(
                    stack.enter_context(foundation.connect(endpoint)),
                    plan.foundation.name,
                    accept_experimental=True,
                    required=None,
                    cache_dir=context.settings.files_dir / "foundations",
                    patience_s=endpoint.hold_slot_s,
                )
            return {"name": found.name, "digest": found.digest}
        except foundation.AWAY as error:
            if time.monotonic() > give_up:
                raise AttemptWaits("Cognate", message=error.message) from error
        if stop := context.attempt.stop_requested():
            raise AttemptStopped(stop)
        time.sleep(0.2)


def _foundation() -> dict[str, Any]:
    fingerprints = import_module("training_common.models.fingerprints")
    return {
        "kind": "foundation",
        "architecture": {
            "name": "cognate_v1",
            "fingerprint": fingerprints.COGNATE_V1_25M,
            "parameter_count": 24_998_668,
            "act_version": 1,
            "ltm_version": 1,
        },
        "tokenizer_digest": f"sha256:{'b' * 64}",
        "data": [],
        "checks": [],
        "training": {"steps": 1, "tokens": 512},
        "recovery": [],
    }


def _agent(plan: Any, parent: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": "agent",
        "architecture": plan.architecture,
        "task": plan.WhichOneof("task"),
        "labels": ["greeting", "farewell"],
        "parent": parent,
        "made_of": {"kind": "foundation", **parent},
        "parameters": {"trainable": 7, "total": 11},
        "evaluations": [],
        "data": [],
        "recovery": [],
    }


def _write(path: Any, text: str) -> None:
    path.write_text(text)


def expected_weights(steps: int) -> bytes:
    """Return the bytes of the one file that a job of so many steps publishes."""
    value = b""
    for step in range(steps):
        value = hashlib.sha256(value + step.to_bytes(4)).digest()
    return (value.hex() * 1000).encode()


if __name__ == "__main__":
    run(import_module(f"{SERVICE}.settings").load_settings, work, plan_type=plan_type())
