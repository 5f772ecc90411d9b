"""One training on two machines, each a network namespace: a cut link, a lost node, and a node that is back."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cognate_server.trainer import pretrain
from tests.cognate._support import MemoryAttempt
from tests.cognate.pretraining_processes import UnevenStream
from tests.support.node_worker import NODE_CONFIG
from tests.support.waiting import until
from training_common.engines.processes import kill_tree

PORT = 29_500  # of a namespace that nobody else is in
EXCHANGE_TIMEOUT_S = 5


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """Two namespaces with a link between them."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = [f"forge-{tag}-{number}" for number in (1, 2)]
        self.links = [f"fg{tag}{number}" for number in (1, 2)]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        for name in self.names:
            ip("netns", "add", name)
        one, other = zip(self.links, self.names, strict=True)
        ip("link", "add", one[0], "netns", one[1], "type", "veth", "peer", "name", other[0], "netns", other[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def set_link(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", self.links[0], state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        network = Network()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
    yield network
    network.remove()


class Nodes:
    """The agents of both machines."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.running: dict[int, psutil.Process] = {}

    def start(self, node: int) -> None:
        network = self.network
        command = [
            *("ip", "netns", "exec", network.names[node], sys.executable, "-m", "training_common.engines.torchrun"),
            *("--processes", "1", "--run-id", "two-nodes", "--nodes", "1:2", "--restarts", "20"),
            *("--rendezvous", f"{network.addresses[0]}:{PORT}", "--address", network.addresses[node]),
            *("--interface", network.links[node], "tests.support.node_worker"),
            *(str(self.folder), str(EXCHANGE_TIMEOUT_S)),
        ]
        with (self.folder / f"node-{node}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.running[node] = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def kill(self, node: int) -> None:
        """End a machine: its agent, and with it its process."""
        process = self.running.pop(node)
        kill_tree(process)
        process.wait()

    def stop(self) -> None:
        for node in list(self.running):
            self.kill(node)

    def steps(self) -> list[tuple[int, int, float]]:
        """Return step, number of processes and loss of every step that was told of, in the order of telling."""
        file = self.folder / "steps"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    async def until_trained_by(self, size: int, more: int = 6) -> None:
        """Wait until so many processes have taken so many more steps."""
        known = len(self.steps())

        def there() -> bool:
            return sum(by == size for _, by, _ in self.steps()[known:]) >= more

        await until(there, 60)


@pytest.mark.slow
@pytest.mark.timeout(280)
async def test_training_goes_on_without_the_other_node_and_takes_it_in_again(network: Network, tmp_path: Path) -> None:
    """Link cut, node back, node gone: every step has the loss that one process alone has, and the training ends."""
    nodes = Nodes(network, tmp_path)
    try:
        nodes.start(0)
        nodes.start(1)
        await nodes.until_trained_by(2)
        network.set_link("down")
        await nodes.until_trained_by(1)
        nodes.kill(1)
        network.set_link("up")
        nodes.start(1)
        await nodes.until_trained_by(2)
        nodes.kill(1)
        await nodes.until_trained_by(1)
        first = nodes.running[0]
        await until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE, 90)
        assert first.wait() == 0
    finally:
        nodes.stop()
    expected = alone(tmp_path / "alone")
    told = nodes.steps()
    assert sorted({step for step, _, _ in told}) == sorted(expected)
    assert [loss for _, _, loss in told] == pytest.approx([expected[step] for step, _, _ in told], rel=1e-4)


def alone(folder: Path) -> dict[int, float]:
    attempt = MemoryAttempt(folder)
    pretrain(NODE_CONFIG, UnevenStream(), attempt)
    return {step: metrics["loss"] for step, metrics in attempt.rows if "loss" in metrics}
