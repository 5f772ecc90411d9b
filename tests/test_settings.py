"""Settings: what is wrong is told by its key, whether it came from the file or the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from deploy.services import Services
from training_common.rpc.policy import role_names
from training_common.rpc.server import create_server
from training_common.settings import ServiceSettings, SettingsError, is_local_address, load

PREFIX = "COGNATE_SERVER_"


def settings(tmp_path: Path, toml: str = "", **environment: str) -> CognateSettings:
    file = tmp_path / "settings.toml"
    file.write_text(toml)
    variables = {f"{PREFIX}{key}": value for key, value in environment.items()}
    return load(CognateSettings, file=file, environment={"PATH": "/bin", **variables}, prefix=PREFIX)


def test_every_key_has_a_default(tmp_path: Path) -> None:
    """No file and no variable are fine, and an empty file is the same."""
    plain = load(CognateSettings, file=None, environment={}, prefix=PREFIX)
    assert plain == settings(tmp_path) == CognateSettings()
    assert plain.database_url == f"sqlite:///{Path('var/cognate/store.db').resolve()}"


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("adress = '127.0.0.1:1'", "adress: unknown key"),
        ("[workers]\nslot = 2", "workers.slot: unknown key"),
        ("[grokfast]\nalpha = 0.9", "grokfast: unknown key"),
        ("[workers]\nslots = 'many'", "workers.slots: Input should be a valid integer"),
        ("[workers]\nslots = 65", "workers.slots: Input should be less than or equal to 64"),
        ("[workers]\nheartbeat_interval_s = nan", "workers.heartbeat_interval_s: "),
        ("workers = 3", "workers: Input should be a valid dictionary"),
        ("address = 7101", "address: Input should be a valid string"),
        ("[data]\nhub = 'perhaps'", "data.hub: Input should be a valid boolean"),
        ("[limits]\nmax_request_bytes = -1", "limits.max_request_bytes: "),
        ("address = '0.0.0.0:7101'", "address '0.0.0.0:7101' is not loopback"),
        ("address = 'unix:/s'\n[consul]\nservice = 'c'", "consul.advertise is missing: nobody can dial 'unix:/s'"),
        ("address = 'unix:/s'\n[consul]\nservice = 'c'\nadvertise = 'h'", "consul.advertise 'h' has no port"),
        (
            "address = '[::]:7101'\n[consul]\nservice = 'c'\n"
            "[security.tls]\ncert_file = 'c'\nkey_file = 'k'\nclient_ca_file = 'a'",
            "consul.advertise is missing: nobody can dial '[::]:7101'",
        ),
        ("[consul]\nttl_s = 0.5", "consul.ttl_s: "),
        ("[consul]\nderegister_critical_after_s = 59", "consul.deregister_critical_after_s: "),
    ],
)
def test_a_wrong_key_of_the_file_is_named(tmp_path: Path, toml: str, named: str) -> None:
    """With its section, what is wrong with it, and the file it stands in."""
    with pytest.raises(SettingsError) as caught:
        settings(tmp_path, toml)
    assert named in str(caught.value)
    assert "Value error" not in str(caught.value)
    assert str(tmp_path / "settings.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ADRESS": "127.0.0.1:1"}, "adress: unknown key"),
        ({"WORKERS__SLOT": "2"}, "workers.slot: unknown key"),
        ({"WORKERS_SLOTS": "2"}, "workers_slots: unknown key"),
        ({"WORKERS__SLOTS": "many"}, "workers.slots: Input should be a valid integer"),
        ({"WORKERS": "3"}, "workers: Input should be a valid dictionary"),
        ({"ADDRESS": "example.com:7101"}, "address 'example.com:7101' is not loopback"),
        ({"ADDRESS__PORT": "7101"}, "address: Input should be a valid string"),
        ({"ADDRESS": "127.0.0.1:0", "ADDRESS__PORT": "7101"}, "COGNATE_SERVER_ADDRESS__PORT: a key above it"),
        ({"WORKERS": "3", "WORKERS__SLOTS": "2"}, "COGNATE_SERVER_WORKERS__SLOTS: a key above it"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variables: dict[str, str], named: str) -> None:
    """A variable with the service's prefix is meant for it: a misspelt one is no other program's."""
    with pytest.raises(SettingsError) as caught:
        settings(tmp_path, **variables)
    assert named in str(caught.value)
    assert PREFIX in str(caught.value)


def test_a_variable_below_a_value_of_the_file_is_named(tmp_path: Path) -> None:
    """The file says that a section is a number, the environment goes on below it: neither wins in silence."""
    with pytest.raises(SettingsError, match="COGNATE_SERVER_WORKERS__SLOTS: a key above it has a value of its own"):
        settings(tmp_path, "workers = 3", WORKERS__SLOTS="2")


def test_all_wrong_keys_are_told_at_once(tmp_path: Path) -> None:
    """Nobody has to start a server once for each mistake."""
    with pytest.raises(SettingsError) as caught:
        settings(tmp_path, "one = 1\n[workers]\ntwo = 2", THREE="3")
    for key in ("one", "workers.two", "three"):
        assert f"{key}: unknown key" in str(caught.value)


def test_the_environment_goes_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    """Key by key: a variable replaces its own key and leaves the section's others to the file."""
    read = settings(
        tmp_path,
        "address = '127.0.0.1:1'\ndrain_grace_s = 3\n[workers]\nslots = 5\nthreads = 6\n"
        "[security]\nlocal_roles = ['viewer']",
        ADDRESS="127.0.0.1:2",
        WORKERS__SLOTS="7",
        SECURITY__LOCAL_ROLES="viewer, operator",
        DATA__HUB="true",
    )
    assert ("127.0.0.1:2", 3.0, 7, 6) == (read.address, read.drain_grace_s, read.workers.slots, read.workers.threads)
    assert (("viewer", "operator"), True) == (read.security.local_roles, read.data.hub)
    assert CognateSettings().workers.lost_after_s == read.workers.lost_after_s


def test_a_variable_may_name_a_file_that_holds_the_value(tmp_path: Path) -> None:
    """Secrets need not stand in the environment; the end of the file's last line is no part of them."""
    (tmp_path / "url").write_text("postgresql+psycopg://cognate:secret@db/cognate\n")
    (tmp_path / "key").write_text("abc ")
    read = settings(
        tmp_path,
        "[artifacts]\nurl = 's3://models'",
        FILE__STORE_URL=str(tmp_path / "url"),
        FILE__ARTIFACTS__OPTIONS__SECRET_ACCESS_KEY=str(tmp_path / "key"),
    )
    assert read.store_url == "postgresql+psycopg://cognate:secret@db/cognate"
    assert read.artifacts.options == {"secret_access_key": "abc "}


def test_a_variable_that_names_a_file_without_a_value_is_told(tmp_path: Path) -> None:
    """It would otherwise look like a key that was left out."""
    with pytest.raises(
        SettingsError, match=r"COGNATE_SERVER_FILE__STORE_URL: file .*/url cannot be read: No such file"
    ):
        settings(tmp_path, FILE__STORE_URL=str(tmp_path / "url"))
    (tmp_path / "url").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="cannot be read: it is no UTF-8 text"):
        settings(tmp_path, FILE__STORE_URL=str(tmp_path / "url"))
    with pytest.raises(SettingsError, match="COGNATE_SERVER_STORE_URL gives the same key: set one of the two"):
        settings(tmp_path, FILE__STORE_URL=str(tmp_path / "url"), STORE_URL="sqlite://")


def test_the_other_services_variables_are_not_read(tmp_path: Path) -> None:
    """Both services run in one environment."""
    file = tmp_path / "settings.toml"
    file.write_text("[cognate]\naddress = 'unix:/run/cognate'")
    read = load(AgentSettings, file=file, environment={f"{PREFIX}NONSENSE": "1"}, prefix="AGENT_SERVER_")
    assert ("unix:/run/cognate", "127.0.0.1:7102") == (read.cognate.address, read.address)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.toml", None, "No such file or directory"),
        ("broken.toml", b"address = ", "Invalid value"),
        ("twice.toml", b"address = 'a'\naddress = 'b'", "Cannot overwrite a value"),
        ("latin.toml", "address = 'ä'".encode("latin-1"), "can't decode byte"),
        (".", None, "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    """Missing, not TOML, not UTF-8, not a file."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load(CognateSettings, file=file, environment={}, prefix=PREFIX)
    assert f"settings file {file}: " in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:7101", True),
        ("127.8.8.8:0", True),
        ("[::1]:7101", True),
        ("localhost:7101", True),
        ("unix:/run/cognate.sock", True),
        ("unix:relative.sock", True),
        ("0.0.0.0:7101", False),
        ("[::]:7101", False),
        (":7101", False),
        ("10.0.0.1:7101", False),
        ("[fe80::1]:7101", False),
        ("[::ffff:10.0.0.1]:7101", False),
        ("127.0.0.1.example.com:7101", False),
        ("localhost.example.com:7101", False),
        ("example.com:7101", False),
        ("dns:///127.0.0.1:7101", False),
        ("127.0.0.1", False),
        ("7101", False),
        ("", False),
    ],
)
def test_plaintext_is_served_to_this_machine_only(tmp_path: Path, address: str, local: bool) -> None:
    """Any other address is refused at the start, before a socket is opened."""
    assert local == is_local_address(address)
    if local:
        assert address == settings(tmp_path, ADDRESS=address).address
    else:
        with pytest.raises(SettingsError, match="is not loopback, and plaintext stays on this machine"):
            settings(tmp_path, ADDRESS=address)


def test_a_role_that_the_contract_lacks_is_named(tmp_path: Path) -> None:
    """A misspelt role would lock everybody out in silence."""
    wrong = ServiceSettings.model_validate(
        {"address": "127.0.0.1:0", "data_dir": tmp_path, "security": {"local_roles": ("viewer", "root")}}
    )
    with pytest.raises(SettingsError, match=r"security\.local_roles: root is no role; choose from viewer, operator"):
        create_server(wrong, [])
    assert ServiceSettings(address="unix:x", data_dir=tmp_path).security.local_roles == role_names()


def test_a_data_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A mistyped folder would otherwise be a server without data. A worker that runs already goes on without it."""
    wrong = settings(tmp_path, DATA__FOLDER=str(tmp_path / "gone"))
    with pytest.raises(SettingsError, match=r"data\.folder: .*/gone is no folder; correct the path, create it, or"):
        create_server(wrong, [])
    with pytest.raises(SettingsError, match=r"data\.folder: .* is no folder"):
        create_server(settings(tmp_path, DATA__FOLDER=str(tmp_path / "settings.toml")), [])


def test_the_starter_refuses_a_data_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make up` and `make demo` name their own variable, and start nothing."""
    monkeypatch.setenv("FORGE_DATA", str(tmp_path / "gone"))
    with pytest.raises(RuntimeError, match=r"FORGE_DATA: .*/gone is no folder"):
        Services(tmp_path / "var").start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
    assert [] == list(tmp_path.iterdir())


def test_a_server_with_wrong_settings_says_so_and_does_not_start(tmp_path: Path) -> None:
    """Exit status 2 and one line for people; no folder, no database, no address file."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("AGENT_SERVER_")},
        "AGENT_SERVER_DATA_DIR": str(tmp_path / "data"),
        "AGENT_SERVER_WORKERS__SLOT": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "agent_server", "--address-file", str(tmp_path / "address")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 2 == done.returncode
    assert "agent_server: settings from defaults and AGENT_SERVER_*: workers.slot: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
    assert [] == list(tmp_path.iterdir())
