"""Plans of agents that act: names of environments, what is not served, and how many steps there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_server.plan import require_feasible, with_defaults
from agent_server.rl.lookup import look_up
from agent_server.rl.plan import policy_config
from agent_server.rl.registry import make_parallel, require_environment
from agent_server.settings import AgentSettings
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import IncompatibleError, InvalidFieldError, NotImplementedByServerError
from cognateforge.job.v1 import job_pb2
from tests.agent.acting import MEETING, MODULES, SIGNAL
from tests.agent.policies import plan, policies

PLACE = "plan.reinforcement.environment"


def acting(**changes: Any) -> pb.TrainingPlan:
    return plan(
        reinforcement=pb.ReinforcementTask(
            environment="CartPole-v1", policy_optimization=pb.PolicyOptimization(**changes)
        )
    )


def refusal(asked: pb.TrainingPlan) -> dict[str, str]:
    """Return what is wrong with a plan, by field."""
    with pytest.raises((IncompatibleError, InvalidFieldError, NotImplementedByServerError)) as refused:
        require_feasible(with_defaults(asked), policies(), AgentSettings())
    return {violation.field: violation.description for violation in refused.value.violations}


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("reinforcement", "CartPole-v1"),
        ("reinforcement", SIGNAL),
        ("multi_agent", "mpe/simple_spread_v3"),
        ("multi_agent", "mpe2/simple_spread_v3"),
        ("multi_agent", "sisl/pursuit_v5"),
        ("multi_agent", MEETING),
    ],
)
def test_known_names_are_taken(task: str, name: str) -> None:
    """Both registries, and what is in listed packages."""
    require_environment(task, name, modules=("mpe2", *MODULES), field=PLACE)


@pytest.mark.parametrize(
    ("task", "name", "told"),
    [
        ("reinforcement", "CartPol-v1", r"Gymnasium has no environment 'CartPol-v1' .* close to it: CartPole-v1"),
        ("reinforcement", "nowhere", r"Gymnasium has no environment 'nowhere' on this server$"),
        ("reinforcement", "os:CartPole-v1", r"would import os, which the settings' environments.modules do not list"),
        ("reinforcement", "mpe2:CartPol-v1", r"no environment 'mpe2:CartPol-v1' .* close to it: CartPole-v1"),
        ("multi_agent", "mpe2/simple_spred_v3", r"PettingZoo has no .* close to it: mpe2/simple_spread_v3"),
        ("multi_agent", "json/tool", r"in the package json, which the settings' environments.modules do not list"),
        ("multi_agent", "mpe2/_mpe_utils", r"PettingZoo has no environment"),
        ("multi_agent", "mpe2/../os", r"PettingZoo has no environment"),
        ("multi_agent", "CartPole-v1", r"PettingZoo has no environment"),
    ],
)
def test_unknown_names_are_refused(task: str, name: str, told: str) -> None:
    """The field, what is close, and nothing imported that is not listed."""
    with pytest.raises(InvalidFieldError, match=told) as refused:
        require_environment(task, name, modules=("mpe2",), field=PLACE)
    assert [PLACE] == [violation.field for violation in refused.value.violations]


def test_a_server_is_asked_without_torch_or_games() -> None:
    """Defaults, checks and steps of a plan load neither torch nor the environment."""
    program = (
        "import sys\n"
        "from agent_server.plan import require_feasible, with_defaults\n"
        "from cognateforge.agent.v1 import training_pb2 as pb\n"
        "from tests.agent.policies import plan, policies\n"
        "from agent_server.settings import AgentSettings\n"
        "task = pb.MultiAgentTask(environment='mpe/simple_spread_v3', agents=3)\n"
        "for each in (plan(), plan(reinforcement=None, multi_agent=task)):\n"
        "    require_feasible(with_defaults(each), policies(), AgentSettings())\n"
        "print(sorted({'torch', 'pygame', 'mpe2.simple_spread_v3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "[]" == done.stdout.strip()


@pytest.mark.parametrize(
    ("asked", "field", "told"),
    [
        (
            plan(reinforcement=pb.ReinforcementTask(environment="CartPole-v0x")),
            "plan.reinforcement.environment",
            "close to it",
        ),
        (
            plan(reinforcement=None, multi_agent=pb.MultiAgentTask(environment="spread", agents=3)),
            "plan.multi_agent.environment",
            "PettingZoo has no environment",
        ),
        (plan(scratch=None, foundation=pb.FoundationBase(name="cognate-25m")), "plan.foundation", "is built on"),
        (plan(adaptation=pb.Adaptation(lora=pb.LoraAdaptation())), "plan.adaptation.lora", "has no such adaptation"),
        (plan(compute=job_pb2.Compute(processes=2)), "plan.compute.processes", "must be 1"),
        (plan(rehearsal=pb.Rehearsal(file=pb.FileSource(path="a"))), "plan.rehearsal", "must be absent"),
        (
            plan(optimization=pb.Optimization(adam=pb.Adam(), accumulation_steps=2)),
            "plan.optimization.accumulation_steps",
            "must be 1",
        ),
        (
            plan(optimization=pb.Optimization(adam=pb.Adam(), precision=pb.PRECISION_BFLOAT16)),
            "plan.optimization.precision",
            "must be float32",
        ),
        (
            plan(optimization=pb.Optimization(adam=pb.Adam(), schedule=pb.SCHEDULE_PLATEAU)),
            "plan.optimization.schedule",
            "must be another one",
        ),
        (
            plan(optimization=pb.Optimization(adam=pb.Adam(), early_stopping=pb.EarlyStopping())),
            "plan.optimization.early_stopping",
            "must be absent",
        ),
        (
            acting(rollout_steps=4, environments=2, minibatches=9),
            "plan.reinforcement.policy_optimization.minibatches",
            "must be 1 to the samples of a rollout (8",
        ),
        (
            acting(rollout_steps=1, environments=1, minibatches=1, environment_steps=10**9),
            "plan.reinforcement.policy_optimization.environment_steps",
            "take longer rollouts",
        ),
    ],
)
def test_what_is_not_served_is_refused_with_its_place(asked: pb.TrainingPlan, field: str, told: str) -> None:
    """Nothing that a plan says is silently unread."""
    found = refusal(asked)
    assert [field] == list(found)
    assert told in found[field]


def test_rollouts_say_how_many_steps_there_are() -> None:
    """Whatever total_steps says; warm-up and validations are shares of what it really is."""
    filled = with_defaults(
        acting(rollout_steps=32, environments=8, epochs=20, minibatches=1, environment_steps=100_000)
    )
    assert (391 * 20, 391 * 2, 391 * 5) == (
        filled.total_steps,
        filled.optimization.warmup_steps,
        filled.validation_interval_steps,
    )
    config = policy_config(filled, modules=(), settings={})
    assert (filled.total_steps, 391) == (config.total_steps, config.updates)
    assert 98 * 16 == with_defaults(plan()).total_steps


def test_the_number_of_agents_is_the_environments() -> None:
    """Where it can be chosen, it is; where not, the field is named."""
    environment = make_parallel("mpe2/simple_spread_v3", 4, modules=("mpe2",))
    assert 4 == len(environment.possible_agents)
    environment.close()
    with pytest.raises(InvalidFieldError, match="must be 2 for mpe2/simple_speaker") as refused:
        make_parallel("mpe2/simple_speaker_listener_v4", 5, modules=("mpe2",), field="plan.multi_agent.environment")
    assert ["plan.multi_agent.agents"] == [violation.field for violation in refused.value.violations]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise RuntimeError('no display')", "RuntimeError: no display; correct its module"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("import os\nos._exit(3)", "ended the process that looked it up, by exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "by signal SIGSEGV"),
        ("print('{}')", "Gymnasium has no environment"),
        ("import threading\nthreading.Event().wait()", "took more than 8 s to look up: its module hangs"),
        ("import cognate_server", "an agent architecture reached for"),
    ],
)
def test_a_modules_import_does_nothing_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, told: str
) -> None:
    """A process of its own imports it; what it does there refuses the plan, and names the field."""
    (tmp_path / "strange_games.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidFieldError) as refused:
        look_up("reinforcement", "strange_games:Maze-v0", modules=("strange_games",), field=PLACE, patience_s=8)
    [violation] = refused.value.violations
    assert PLACE == violation.field
    assert told in violation.description
    assert "strange_games" not in sys.modules


def test_a_name_of_a_module_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found names are known from then on; those that were not found are looked up again."""
    look_up("reinforcement", SIGNAL, modules=MODULES, field=PLACE)
    monkeypatch.setattr("agent_server.asking.subprocess.Popen", None)
    look_up("reinforcement", SIGNAL, modules=MODULES, field=PLACE)
    with pytest.raises(TypeError):
        look_up("multi_agent", MEETING, modules=MODULES, field=PLACE)
