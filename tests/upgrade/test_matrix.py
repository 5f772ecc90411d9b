"""Neighbouring releases of both services and of the client, in every combination, over real sockets."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.previous import Release
from tests.support.release_servers import run_json, write_model
from tests.upgrade.conftest import Servers

WALK = Path(__file__).with_name("client_walk.py")


def test_processes_of_the_previous_release_are_that_release(old: Release) -> None:
    """Its metadata and all of its code come from its wheel, and nothing from the checkout."""
    told = (
        "import importlib.metadata as m, cognateforge, training_common, cognate_server, agent_server;"
        "print(m.version('cognateforge'), *(p.__file__ for p in (cognateforge, training_common, cognate_server)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", told], env=old.surroundings(), check=True, capture_output=True, text=True
    )
    version, *places = done.stdout.split()
    assert old.version == version
    assert {old.environment["PYTHONPATH"]} == {str(Path(place).parents[1]) for place in places}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_combination_makes_an_agent_across_the_exchange(
    old: Release, new: Release, servers: Servers, tmp_path: Path
) -> None:
    """Either release of Cognate serves either release of the agent service, called by the client of the other one."""
    files = write_model(tmp_path / "files")
    cognates = {release.name: servers.add("cognate", tmp_path / f"cognate-{release.name}") for release in (old, new)}
    for release in (old, new):
        cognates[release.name].launch(release)
    pairs = {}
    for release in (old, new):
        cognates[release.name].wait()
        assert "cognate-25m@1" == cognates[release.name].publish(release, files)
    for cognate, agent in itertools.product((old, new), repeat=2):
        folder = tmp_path / f"agent-{cognate.name}-{agent.name}"
        pair = servers.add("agent", folder, COGNATE__ADDRESS=cognates[cognate.name].address)
        pair.launch(agent)
        pairs[cognate, agent] = pair

    def walk(cognate: Release, agent: Release) -> object:
        client = old if agent is new else new
        where = pairs[cognate, agent].wait()
        folder = tmp_path / f"fetched-{cognate.name}-{agent.name}"
        folder.mkdir()
        return run_json(client, WALK, cognates[cognate.name].address, where, "cognate-25m@1", folder)

    with ThreadPoolExecutor(len(pairs)) as pool:
        seen = dict(zip(pairs, pool.map(lambda pair: walk(*pair), pairs), strict=True))
    for (cognate, agent), told in seen.items():
        assert told == {
            "client": (old if agent is new else new).version,
            "cognate": cognate.version,
            "agent": agent.version,
            "first_news": "cognate-25m@1",
            "job": [True, True, "JOB_STATE_SUCCEEDED"],
            "contiguous": True,
            "foundation": ["cognate-25m@1", True],
            "models": ["cognate-25m@1"],
            "fetched": ["cognate-25m@1", "router@1"],
            "digest": True,
        }
