"""A worker's job whose agents act: from its plan to a folder to publish, and what is told of the environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.settings import settings_of
from agent_server.bases import Base
from agent_server.data.examples import DataManifest
from agent_server.rl.config import PolicyConfig
from agent_server.rl.plan import policy_config
from agent_server.rl.trainer import train_policy
from agent_server.tracker import NO_COST, Cost
from agent_server.trainer import AgentResult
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.attempt import Attempt, Json
from training_common.digests import canonical_json, sha256_bytes
from training_common.findings import ProcessingReport

# What decides how an environment behaves, beside the code of the package that it is in.
_PACKAGES = ("gymnasium", "pettingzoo", "numpy")


def train_acting(
    plan: pb.TrainingPlan,
    base: Base,
    attempt: Attempt,
    *,
    modules: Sequence[str],
    cost: Cost = NO_COST,
    factory: AgentArchitectureFactory | None = None,
) -> tuple[AgentResult, DataManifest]:
    """Train what acts in a plan's environment; return it, and where it has acted. Errors: as `train_policy`."""
    factory = factory or AgentArchitectureFactory()
    architecture = factory.get(plan.architecture)
    config = policy_config(
        plan,
        modules=tuple(modules),
        settings=settings_of(architecture.name, architecture.settings, plan.settings),
        parent=base.name,
        parent_digest=base.digest,
    )
    result = train_policy(config, attempt, parent_dir=base.agent_dir, cost=cost, factory=factory)
    manifest = _manifest(config, result)
    (result.folder / "data.json").write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    return result, manifest


def _manifest(config: PolicyConfig, result: AgentResult) -> DataManifest:
    """Return what there is to tell of an environment where other agents have rows."""
    packages: dict[str, Json] = {}
    for name in sorted({*_PACKAGES, *config.modules}):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    source: dict[str, Json] = {"environment": config.environment, "agents": config.agents, "packages": packages}
    steps = result.steps // config.steps_of_update * config.rollout_steps * config.environments
    return DataManifest(
        name=config.environment[:64],  # the contract's bound
        kind="environment",
        source=source,
        files=(),
        digest=sha256_bytes(canonical_json(source)),
        labels=(),
        rows={"train": steps},
        report=ProcessingReport(),
        facts={},
    )
