"""Plugins: found by entry point, described by a process of their own, and kept free of pretraining's filter."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import cognate_server
from agent_server.adaptation import Adaptation
from agent_server.architectures.blame import plugin_blamed
from agent_server.architectures.factory import (
    BUILT_IN,
    AgentArchitectureFactory,
    BuildRequest,
    FoundationRequirement,
)
from agent_server.architectures.settings import Setting
from cognateforge.exceptions import ArchitectureNotFoundError, IncompatibleError
from tests.agent.plugins import ECHO, write_package
from training_common.attempt import AttemptStopped, StopKind

Install = Callable[..., None]
REQUEST = BuildRequest(task="classification", adaptation=Adaptation(), seed=0)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Return a function that installs a package: its name, its files, and its entry points."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def put(
        files: Mapping[str, str],
        entry_points: Mapping[str, str] | None = None,
        *,
        name: str = "echo_dist",
        metadata: str = "",
    ) -> None:
        write_package(site, name, files, entry_points or {"echo": "echo_plugin:Echo"}, metadata=metadata)

    yield put
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in ("echo_plugin", "echo_package", "other_plugin"):
            del sys.modules[module]


def reason(name: str = "echo") -> str:
    """Return why a plugin was not loaded. Built-in architectures are there in any case."""
    made = AgentArchitectureFactory(patience_s=20)
    assert set(made.architectures) >= set(BUILT_IN)
    return next((problem.reason for problem in made.problems if problem.name == name), "")


def test_a_plugin_stands_beside_the_built_in(install: Install) -> None:
    """What is installed is listed, sorted by name, as its own process described it; its module is not run here."""
    described = ECHO.replace(
        'description = "Says what it heard."',
        'description = "Says what it heard."\n'
        '    settings = {"loudness": Setting(description="How loud.", default=3, minimum=1, maximum=9)}\n'
        '    required_architecture = FoundationRequirement(name="cognate_v1", act_version=1)',
    ).replace("import ArchitectureDefaults,", "import ArchitectureDefaults, FoundationRequirement,")
    install({"echo_plugin.py": described})
    made = AgentArchitectureFactory()
    assert list(made.architectures) == sorted([*BUILT_IN, "echo"])
    assert list(made.problems) == []
    echo = made.get("echo")
    assert echo.settings == {"loudness": Setting(description="How loud.", default=3, minimum=1, maximum=9)}
    assert echo.required_architecture == FoundationRequirement(name="cognate_v1", act_version=1)
    assert "echo_plugin" not in sys.modules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemError('boom')", "SystemError: boom"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("import os\nos._exit(3)", "ended the process that tried it, by exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "by signal SIGSEGV"),
        ("print('hello')\nclass Echo: pass", "it lacks name, tasks"),
        (
            ECHO.replace("def build(self, request)", "def build(self, *, foundation_dir)"),
            "build must take 1 positional",
        ),
        (ECHO.replace('"echo"', '"other"'), "it calls itself 'other'"),
        (ECHO.replace('("classification",)', "()"), "it serves no task"),
        (ECHO.replace('("classification",)', '"classification"'), "its tasks must be a sequence of texts"),
        (ECHO.replace('("classification",)', '("clasification",)'), "its tasks hold 'clasification'; known: class"),
        (ECHO.replace("Says what it heard.", ""), "its description must have"),
        (ECHO.replace("Says what", "\\x1b[31mSays what"), "one line of printable characters"),
        ("raise SystemError('\\x1b[31mboom\\n')", "SystemError:  [31mboom "),
        (ECHO + '    bases = ("air",)\n', "its bases hold 'air'"),
        (ECHO + '    adaptations = ("half",)\n', "its adaptations hold 'half'; known: full, lora"),
        (
            ECHO + '    settings = {"Loud": Setting(description="x", default=True)}\n',
            "the setting 'Loud' does not match",
        ),
        (ECHO + '    settings = {"loud": 3}\n', "the setting loud is no Setting"),
        (
            ECHO + '    settings = {"loud": Setting(description="x", default=3)}\n',
            "must have a minimum below its maximum",
        ),
        (
            ECHO + '    settings = {"loud": Setting(description="x", default=3, minimum=4, maximum=5)}\n',
            "has the default 3, and must be a whole number from 4 to 5",
        ),
        (ECHO + '    settings = {"loud": Setting(description="x", default="a")}\n', "must have 1 to 32 words"),
    ],
)
def test_a_broken_plugin_is_reported_and_leaves_the_others_alone(install: Install, source: str, expected: str) -> None:
    """Whatever a plugin does, it does to a process of its own, and is named with the reason."""
    install({"echo_plugin.py": source})
    assert expected in reason()


def test_asking_for_a_broken_plugin_says_why(install: Install) -> None:
    """Who asks for it learns what is wrong with it, and what there is."""
    install({"echo_plugin.py": "raise SystemError('boom')"})
    with pytest.raises(
        ArchitectureNotFoundError, match=r"there is: causal_lm, .*; its plugin failed: SystemError: boom"
    ):
        AgentArchitectureFactory().get("echo")


def test_a_plugin_that_does_not_end_is_given_up(install: Install) -> None:
    """An import that hangs costs its patience, and no more; what it started ends with it."""
    install({"echo_plugin.py": "import threading\nthreading.Event().wait()"})
    made = AgentArchitectureFactory(patience_s=1.5)
    assert [(p.name, p.reason[:45]) for p in made.problems] == [
        ("echo", "TimeoutError: it took more than 1.5 s to impo")
    ]


def test_a_distribution_with_broken_metadata_hides_no_other(install: Install, tmp_path: Path) -> None:
    """A file of entry points that cannot be read is reported under its distribution's name."""
    install({"echo_plugin.py": ECHO})
    install({}, name="torn")
    (tmp_path / "site" / "torn-1.0.dist-info" / "entry_points.txt").write_text("[group]\nno value\n", encoding="utf-8")
    made = AgentArchitectureFactory()
    assert "echo" in made.architectures
    assert [(p.name, p.value) for p in made.problems] == [("torn", "")]
    assert "cannot be read" in made.problems[0].reason


def test_names_are_taken_once(install: Install) -> None:
    """No plugin takes a built-in's name, and of two plugins with one name one is kept."""
    install({"echo_plugin.py": ECHO})
    install({"other_plugin.py": ECHO}, {"echo": "other_plugin:Echo", "cognate": "other_plugin:Echo"}, name="other")
    made = AgentArchitectureFactory()
    problems = {(p.name, p.value): p.reason for p in made.problems}
    assert set(problems) == {("cognate", "other_plugin:Echo"), ("echo", "other_plugin:Echo")}
    assert all("already has the name" in text for text in problems.values())
    assert made.get("echo").name == "echo"


def test_other_plugins_are_not_looked_at_for_one(install: Install) -> None:
    """A worker that builds one architecture is not held up by the others."""
    install({"echo_plugin.py": "import threading\nthreading.Event().wait()"})
    assert AgentArchitectureFactory(patience_s=100).get("recurrent").name == "recurrent"


def test_listing_imports_no_torch() -> None:
    """A server process can list and describe architectures without torch, peft, tokenizers or transformers."""
    program = (
        "import sys\n"
        "from agent_server.architectures.factory import AgentArchitectureFactory\n"
        "import agent_server.foundation, agent_server.train_config, agent_server.plan\n"
        "[(a.description, a.settings) for a in AgentArchitectureFactory()]\n"
        "print(sorted({'torch', 'peft', 'tokenizers', 'safetensors', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# The filter of pretraining

HIDDEN = "import importlib\nFILTER = 'cognate_' + 'server.gro' + 'kfast'\n"


@pytest.mark.parametrize(
    ("name", "value", "source"),
    [
        ("grokfast", "echo_plugin:Echo", ECHO),
        ("echo", "echo_plugin:GrokFastEcho", ECHO),
        ("echo", "echo_plugin:Echo", ECHO.replace("Says what", "Uses Grok-Fast on what")),
        ("echo", "echo_plugin:Echo", "from cognate_server import losses\nraise SystemExit('it ran')"),
        ("echo", "echo_plugin:Echo", "import grokfast_pytorch\nraise SystemExit('it ran')"),
        ("echo", "cognate_server.settings:CognateSettings", ""),
    ],
)
def test_a_plugin_that_names_the_filter_is_refused_before_it_runs(
    install: Install, name: str, value: str, source: str
) -> None:
    """By name, by text or by import: the refusal comes before the plugin's first line."""
    install({"echo_plugin.py": source}, {name: value})
    assert "belongs to pretraining alone" in reason(name) or "belong to pretraining alone" in reason(name)


@pytest.mark.parametrize("field", ["name", "word"])
def test_settings_cannot_bring_the_filter(install: Install, field: str) -> None:
    """A name or a word that is put together at run time is refused as the contract refuses it."""
    made = {
        "name": '    settings = {"slow_" + "gradient": Setting(description="x", default=True)}\n',
        "word": '    settings = {"a": Setting(description="x", default="b", words=("b", "gro" + "kfast"))}\n',
    }
    install({"echo_plugin.py": ECHO + made[field]})
    assert "no agent architecture has a setting for GrokFast" in reason()


@pytest.mark.parametrize(
    "place", ["echo_package/inner/filters.py", "echo_package/inner/_native.abi3.so", "echo_package/__pycache__/a.pyc"]
)
def test_every_file_of_a_package_is_read(install: Install, place: str) -> None:
    """A filter in another module than the entry point's is found, compiled or not, though nothing imports it yet."""
    install(
        {
            "echo_package/__init__.py": ECHO,
            "echo_package/inner/__init__.py": "",
            place: "import cognate_server.grokfast",
        },
        {"echo": "echo_package:Echo"},
    )
    assert f"its file {Path(place).name} mentions GrokFast or cognate_server" in reason()


def test_other_modules_of_its_distribution_are_read(install: Install) -> None:
    """A second top-level module of the same distribution is read with the first."""
    install({"echo_plugin.py": ECHO, "other_plugin.py": "import cognate_server"})
    assert "its file other_plugin.py mentions" in reason()


def test_what_its_distribution_requires_is_read(install: Install) -> None:
    """A dependency on a package of the filter is refused by its name."""
    install({"echo_plugin.py": ECHO}, metadata="Requires-Dist: GrokFast-pytorch>=0.1\n")
    assert "its distribution mentions GrokFast" in reason()


def test_links_into_pretraining_are_followed(install: Install, tmp_path: Path) -> None:
    """A package that links to the pretraining service's folder is as good as one that holds it."""
    install({"echo_package/__init__.py": ECHO}, {"echo": "echo_package:Echo"})
    source = Path(cognate_server.__file__).parent / "grokfast"
    (tmp_path / "site" / "echo_package" / "inner").symlink_to(source, target_is_directory=True)
    assert "belong to pretraining alone" in reason()


def test_code_that_cannot_be_read_is_not_run(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in an archive, and one that is too large to read at every start, are refused with the remedy."""
    import zipfile

    archive = tmp_path / "site" / "packed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("echo_plugin.py", ECHO)
    monkeypatch.syspath_prepend(str(archive))
    install({}, {"echo": "echo_plugin:Echo"})
    assert "install it as files in a folder" in reason()
    monkeypatch.setattr("agent_server.architectures.refusal._MOST_FILES", 3)
    files = {f"echo_package/m{i}.py": "" for i in range(3)} | {"echo_package/__init__.py": ECHO}
    install(files, {"large": "echo_package:Echo"}, name="large")
    assert "move the architecture into a package of its own" in reason("large")


@pytest.mark.parametrize(
    "code",
    [
        "importlib.import_module(FILTER)",
        "__import__(FILTER)",
        "exec(open(importlib.util.find_spec(FILTER).origin).read())",
        "importlib.util.spec_from_file_location('mine', importlib.util.find_spec(FILTER[:14]).origin)"
        ".loader.exec_module(importlib.util.module_from_spec(importlib.util.spec_from_file_location("
        "'mine', importlib.util.find_spec(FILTER[:14]).origin)))",
    ],
)
def test_a_hidden_import_is_refused_when_the_plugin_is_looked_at(install: Install, code: str) -> None:
    """What the text does not show meets the guard, whatever way the file is read, and though the plugin hides that."""
    install(
        {"echo_plugin.py": f"{HIDDEN}import importlib.util\ntry:\n    {code}\nexcept BaseException:\n    pass\n{ECHO}"}
    )
    assert "reached for" in reason()
    assert "belongs to pretraining alone" in reason()


def test_a_hidden_import_in_build_is_refused(install: Install) -> None:
    """A plugin that keeps quiet until it builds is refused then."""
    lazy = HIDDEN + ECHO.replace(
        "def build(self, request):\n        raise NotImplementedError",
        "def build(self, request):\n        importlib.import_module(FILTER)",
    )
    install({"echo_plugin.py": lazy})
    program = (
        "from agent_server.adaptation import Adaptation\n"
        "from agent_server.architectures.factory import AgentArchitectureFactory, BuildRequest\n"
        "request = BuildRequest(task='classification', adaptation=Adaptation(), seed=0)\n"
        "AgentArchitectureFactory().get('echo').build(request)\n"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 1
    assert "IncompatibleError: an agent architecture reached for" in done.stderr.splitlines()[-1]


LATE = """
import importlib, sys, threading
from agent_server.architectures.refusal import guard_process, require_separate

guard_process()
require_separate()


def late():
    try:
        importlib.import_module("cognate_" + "server.losses")
    except Exception:
        pass


thread = threading.Thread(target=late)
thread.start()
thread.join()
assert "cognate_" + "server" not in sys.modules
require_separate()
"""


def test_a_worker_is_guarded_for_good() -> None:
    """An import in the middle of training, in another thread and with its error hidden, stops the publication."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60)
    assert "IncompatibleError: an agent architecture reached for" in done.stderr.splitlines()[-1]


def test_a_plugin_that_fails_in_the_worker_fails_its_job_alone(install: Install) -> None:
    """A module that ends its process when it is loaded for real becomes an error that names the plugin."""
    install({"echo_plugin.py": ECHO})
    echo = AgentArchitectureFactory().get("echo")
    Path(sys.path[0], "echo_plugin.py").write_text("import sys\nsys.exit('bye')", encoding="utf-8")
    with pytest.raises(IncompatibleError, match="the plugin echo failed: SystemExit: bye"):
        echo.build(REQUEST)


@pytest.mark.parametrize(
    ("architecture", "error", "told"),
    [
        ("echo", ValueError("bad\n\x1b[31m"), IncompatibleError),
        ("echo", SystemExit("bye"), IncompatibleError),
        ("recurrent", ValueError("ours"), ValueError),
        ("echo", OSError(errno.ENOSPC, "full"), OSError),
        ("echo", MemoryError(), MemoryError),
        ("echo", AttemptStopped(StopKind.PAUSE), AttemptStopped),
        ("echo", IncompatibleError("its own words"), IncompatibleError),
    ],
)
def test_a_plugins_fault_is_named_and_no_others(
    tmp_path: Path, architecture: str, error: BaseException, told: type[BaseException]
) -> None:
    """What a plugin raises in a worker names it, one that ends its process too; a stop or a full disk does not."""
    with pytest.raises(told) as caught, plugin_blamed(architecture, doing="trained", folder=tmp_path):
        raise error
    if told is IncompatibleError and error is not caught.value:
        first = str(error).partition("\n")[0]
        expected = f"an agent of the plugin echo cannot be trained: {type(error).__name__}: {first}; correct the plugin"
        assert expected == str(caught.value)


def test_a_full_disk_is_no_fault_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries tell of it in words of their own."""
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("training_common.faults.shutil.disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="unexpected pos"), plugin_blamed("echo", doing="trained", folder=tmp_path):
        raise RuntimeError("unexpected pos 64")
