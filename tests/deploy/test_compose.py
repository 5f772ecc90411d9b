"""deploy/compose.yaml, read as an engine would: what it mounts is there, what it sets is known, and nothing is open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
import yaml  # type: ignore[import-untyped]

from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from deploy.compose import make_secrets
from tests.support.postgres import PACKAGE, PostgresServer
from training_common.settings import ServiceSettings, load

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "compose.yaml"
OURS = ("cognate", "agent", "forge", "certificates", "certificate-of-cognate", "certificate-of-agent")
SERVICES: dict[str, tuple[type[ServiceSettings], str, int, int]] = {
    "cognate": (CognateSettings, "COGNATE_SERVER_", 7101, 7111),
    "agent": (AgentSettings, "AGENT_SERVER_", 7102, 7112),
}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> Json:
    return cast(Json, yaml.safe_load(FILE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    make_secrets.make(folder)
    return folder


def settings(compose: Json, service: str, secrets: Path) -> ServiceSettings:
    """Load a service's settings as its container does, by the real loader."""
    cls, prefix, *_ = SERVICES[service]
    here = {key: value.replace("/run/secrets", str(secrets)) for key, value in environment(compose, service).items()}
    return load(cls, file=ROOT / "deploy" / "compose" / f"{service}.toml", environment=here, prefix=prefix)


def environment(compose: Json, service: str) -> dict[str, str]:
    return cast(dict[str, str], compose["services"][service].get("environment", {}))


def mounts(service: Json) -> list[tuple[str, str, bool]]:
    """Return source, target and whether it is read-only, of each volume."""
    found = []
    for volume in service.get("volumes", ()):
        source, target, *mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")
        found.append((source, target, mode == ["ro"]))
    return found


def test_it_is_valid_by_the_specification() -> None:
    """The schema is the specification's own, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_container_can_do_more_than_it_must(compose: Json) -> None:
    """Read-only, without capabilities, not as root, bounded in memory and processors."""
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if name == "s3-folder":  # gives a volume to the user of the next one, and has ended when that starts
            assert (["CHOWN"], "none", "no") == (service["cap_add"], service["network_mode"], service["restart"])
        else:
            assert "cap_add" not in service, name
            assert service["user"].partition(":")[0] not in {"", "0", "root"}, name
        assert {"mem_limit", "cpus"} <= set(service), name
        if name in OURS:
            assert service["user"] == "10001:10001", name


def test_images_of_others_are_pinned_and_ours_are_built_here(compose: Json) -> None:
    """A tag for people, a digest for the engine. Ours are targets of the Containerfile."""
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "deploy/images/Containerfile").read_text(), re.MULTILINE)
    for name, service in compose["services"].items():
        if name in OURS:
            image, _, tag = service["image"].partition(":")
            assert tag == "${FORGE_VERSION:-dev}"
            assert image == f"cognateforge/{service['build']['target']}"
            assert service["build"]["target"] in targets
            assert (FILE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        else:
            assert re.fullmatch(r"docker\.io/[a-z/]+:v?\d+(\.\d+)+@sha256:[0-9a-f]{64}", service["image"]), name


def test_everything_that_is_mounted_is_there(compose: Json, secrets: Path) -> None:
    """Files of the repository are read-only; volumes and secrets are declared; nothing else of the host is seen."""
    for name, service in compose["services"].items():
        for source, _, read_only in mounts(service):
            if source.startswith("."):
                assert (FILE.parent / source).exists(), f"{name}: {source}"
                assert read_only, f"{name}: {source}"
            else:
                assert source in compose["volumes"], f"{name}: {source}"
        assert set(service.get("secrets", ())) <= set(compose["secrets"]), name
    assert {path.name for path in secrets.iterdir()} == set(compose["secrets"])
    for name, secret in compose["secrets"].items():
        assert secret["file"] == f"./compose/secrets/{name}"
    assert "/deploy/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_volumes_of_ours_are_mounted_where_the_image_has_a_folder_of_its_user(compose: Json) -> None:
    """A new volume takes owner and mode from there; anywhere else it would be root's, and nobody could write."""
    text = (ROOT / "deploy/images/Containerfile").read_text()
    made = re.search(r"install --directory --owner 10001 --group 10001 --mode 0750 \\\n(.*)$", text, re.MULTILINE)
    assert made
    for name in OURS:
        for source, target, _ in mounts(compose["services"][name]):
            assert source.startswith(".") or target in made[1].split(), name


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """A second run changes nothing: a database keeps the passwords of its first start."""
    assert make_secrets.make(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / "grafana_password").unlink()
    assert make_secrets.make(tmp_path) == ["grafana_password"]
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert before.pop("grafana_password") != after.pop("grafana_password")
    assert before == after


def test_a_secret_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was cut off would stay: whoever writes it is stopped before it has its name."""

    def stopped(self: Path, mode: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "chmod", stopped)
        make_secrets.make(tmp_path)
    assert "postgres_password" in make_secrets.make(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {""}


@pytest.mark.parametrize("service", SERVICES)
def test_the_settings_are_those_of_the_service(compose: Json, secrets: Path, service: str) -> None:
    """Each file and variable passes the real loader, and ports, paths and secrets agree with the container's."""
    _, prefix, port, admin = SERVICES[service]
    container, read = compose["services"][service], settings(compose, service, secrets)
    assert [] == [key for key in environment(compose, service) if not key.startswith((prefix, "CONSUL_HTTP_ADDR"))]
    assert read.address == f"0.0.0.0:{port}"
    assert read.telemetry.address == f"0.0.0.0:{admin}"
    assert container["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"http://127.0.0.1:{admin}/healthz" in container["healthcheck"]["test"][3]
    assert read.store_url == (secrets / f"{service}_store_url").read_text()
    assert read.artifacts.options["secret_access_key"] == (secrets / "s3_secret_access_key").read_text()
    assert read.artifacts.options["endpoint"] == "http://s3:8333"
    assert read.consul.advertise == f"{container['hostname']}:{port}"
    assert float(container["stop_grace_period"].removesuffix("s")) > read.drain_grace_s + 5
    targets = {target: read_only for _, target, read_only in mounts(container)}
    assert targets[str(read.data_dir)] is False
    assert targets[str(read.data.folder)] is True
    assert container["command"] == [f"{service}_server", "--settings", f"/etc/cognateforge/{service}.toml"]
    assert targets[container["command"][2]] is True
    assert read.security.tls is not None
    assert str(read.security.tls.key_file.parent) in targets
    used = {
        value.removeprefix("/run/secrets/") for key, value in environment(compose, service).items() if "FILE" in key
    }
    assert used == set(container["secrets"])


def test_the_agent_service_finds_cognate_in_consul_and_trusts_its_name(compose: Json, secrets: Path) -> None:
    """Under the name that Cognate registers, with a certificate that has the name it is dialled by."""
    cognate, agent = (settings(compose, service, secrets) for service in SERVICES)
    assert isinstance(agent, AgentSettings)
    assert agent.cognate.consul_service == cognate.consul.service
    assert environment(compose, "agent")["CONSUL_HTTP_ADDR"] == f"{cognate.consul.host}:{cognate.consul.port}"
    assert agent.cognate.tls is not None
    issued = compose["services"]["certificate-of-cognate"]["command"]
    assert agent.cognate.tls.server_name == "cognate"
    assert "--host=cognate" in issued
    assert cognate.security.roles["spiffe://cognateforge.local/agent"] == ("agent_service",)


def test_nothing_is_published_beyond_this_machine(compose: Json) -> None:
    """And the stores are reached by the services alone."""
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
    assert compose["networks"]["stores"] == {"internal": True}
    members = {name for name, service in compose["services"].items() if "stores" in service.get("networks", ())}
    assert members == {"postgres", "s3", "cognate", "agent"}
    assert "ports" not in compose["services"]["postgres"]


def test_what_is_waited_for_can_become_what_is_waited_for(compose: Json) -> None:
    """Healthy where there is a health check, ended where it ends by itself."""
    for name, service in compose["services"].items():
        for other, how in service.get("depends_on", {}).items():
            awaited = compose["services"][other]
            if how["condition"] == "service_healthy":
                assert "healthcheck" in awaited, f"{name}: {other}"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert awaited["restart"] == "no", f"{name}: {other}"


def test_monitoring_asks_the_services_and_shows_the_projects_dashboards(compose: Json) -> None:
    """The jobs have the names that the rules ask for, at the ports of the settings."""
    plain = yaml.safe_load((ROOT / "deploy/monitoring/prometheus/prometheus.yml").read_text())
    here = yaml.safe_load((ROOT / "deploy/compose/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in here["scrape_configs"]}
    assert {job["job_name"] for job in plain["scrape_configs"]} == set(jobs)
    assert jobs == {"forge-cognate": ["cognate:7111"], "forge-agent": ["agent:7112"]}
    assert plain["rule_files"] == here["rule_files"]
    provider = yaml.safe_load((ROOT / "deploy/compose/grafana/dashboards.yml").read_text())["providers"][0]
    assert provider["options"]["path"] in [target for _, target, _ in mounts(compose["services"]["grafana"])]
    source = yaml.safe_load((ROOT / "deploy/compose/grafana/datasources.yml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")


def test_each_service_has_a_database_of_its_own(postgres: PostgresServer, tmp_path: Path) -> None:
    """By the real psql, which the image runs the file with: each role enters its database, and not the other's."""
    secrets = tmp_path / "it's"  # a password is quoted, whatever is in it
    make_secrets.make(secrets)
    script = (ROOT / "deploy/compose/databases.sql").read_text().replace("/run/secrets", f'"{secrets}"')
    (tmp_path / "databases.sql").write_text(script)
    owner = sa.create_engine(postgres.new_database(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    psql = PACKAGE / "pginstall" / "bin" / "psql"
    command = [str(psql), "-q", "-h", str(postgres.folder), "-U", "forge", "-d", "postgres", "-f"]
    try:
        done = subprocess.run([*command, str(tmp_path / "databases.sql")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with owner.connect() as connection:
            stored = connection.execute(sa.text("SELECT rolpassword FROM pg_authid WHERE rolname = 'cognate'")).scalar()
        assert str(stored).startswith("SCRAM-SHA-256$")
        for role, database, enters in (
            ("cognate", "cognate", True),
            ("agent", "agent", True),
            ("agent", "cognate", False),
        ):
            url = owner.url.set(username=role, database=database)
            engine = sa.create_engine(url, poolclass=sa.NullPool)
            if enters:
                engine.connect().close()
            else:
                with pytest.raises(sa.exc.OperationalError, match="permission denied for database"):
                    engine.connect()
    finally:
        with owner.connect() as connection:
            for name in ("cognate", "agent"):
                connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name}"))
                connection.execute(sa.text(f"DROP ROLE IF EXISTS {name}"))
