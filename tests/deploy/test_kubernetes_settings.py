"""Settings, identities, rights and monitoring of every installation, against what the code does with them."""

import ast
import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has Kubernetes' schemas, is missing")
pytest.importorskip("kubeflow_trainer_api", reason="the extra [kubernetes] is missing")

from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from cognateforge.cli.app import app
from deploy.kubernetes import rules
from tests.support.cluster import INSTALLATIONS, NAME, Object, Pods, installation, of_kind, pods, selects
from tests.support.manifests import DEPLOY, ROOT, build, needs_kubectl, problems
from tools import capacity_model
from training_common.backup import command as backup_command
from training_common.engines import kubernetes as engine
from training_common.settings import ServiceSettings, load
from training_common.telemetry.catalog import CATALOG

pytestmark = needs_kubectl

# What the Secrets that have to be brought would hold.
DATABASE = "postgresql+psycopg://service:word@postgresql.databases.svc/service"
TABLES: dict[str, tuple[type[ServiceSettings], str]] = {
    "cognate": (CognateSettings, "COGNATE_SERVER_"),
    "agent": (AgentSettings, "AGENT_SERVER_"),
}
OPERATOR = "spiffe://cognateforge.local/ns/cognateforge/sa/operator"
# What a server takes from SIGTERM to its end beside the grace of its calls: notice, tasks, spans, database.
TIDYING_S = 10
# ForgeCertificateExpires warns two weeks before.
WARNED_S = 14 * 86_400


def service_of(found: Pods) -> str:
    return found.labels[NAME].partition("-")[0]


def with_settings(name: str) -> list[tuple[Pods, Any]]:
    """Return servers, workers and backups of an installation, each with the settings that it reads."""
    objects = installation(name)
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    found = []
    for one in pods(objects):
        cls, prefix = TABLES[service_of(one)]
        files = [
            text
            for volume in one.spec["volumes"]
            for source in (volume, *volume.get("projected", {}).get("sources", ()))
            if "configMap" in source
            for text in maps[source["configMap"]["name"]].values()
        ]
        if files:
            found.append((one, _read(cls, prefix, *files, environment=_environment(one))))
    return found


def _environment(found: Pods) -> dict[str, str]:
    values = {
        one["name"]: one.get("value") or (DATABASE if "secretKeyRef" in one["valueFrom"] else "pod-0")
        for one in found.containers[0].get("env", ())
    }
    return {name: value.replace("$(POD_NAME)", "pod-0") for name, value in values.items()}


def _read(cls: type[ServiceSettings], prefix: str, text: str, *, environment: Mapping[str, str]) -> ServiceSettings:
    class File:
        """Stands for a path: settings are read from it and from nowhere else."""

        def read_text(self, encoding: str) -> str:
            return text

    return load(cls, file=File(), environment=environment, prefix=prefix)  # type: ignore[arg-type]


def mounts(found: Pods) -> dict[str, str]:
    return {one["mountPath"]: one["name"] for one in found.containers[0]["volumeMounts"]}


def volume_of(found: Pods, path: str) -> Mapping[str, Any]:
    name = mounts(found)[path]
    return next(one for one in found.spec["volumes"] if one["name"] == name)


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_loader_takes_every_file(name: str) -> None:
    """With the environment of its pod; folders lie on volumes, ports are those of the pod, files of TLS are mounted."""
    seen = set()
    for found, settings in with_settings(name):
        seen.add(found.labels[NAME])
        assert str(settings.shared_dir) in mounts(found)
        assert any(settings.data_dir.is_relative_to(path) for path in mounts(found))
        assert settings.store_url.startswith("sqlite" if name == "development" else "postgresql"), found.owner
        if "backup" not in found.labels[NAME]:
            assert str(settings.data.folder) in mounts(found)
        if not found.is_server:
            continue
        ports = {one["name"]: one["containerPort"] for one in found.containers[0]["ports"]}
        assert settings.address == f"0.0.0.0:{ports['grpc']}"
        assert settings.telemetry.address == f"0.0.0.0:{ports['admin']}"
        tls = settings.security.tls
        assert {str(tls.cert_file), str(tls.key_file), str(tls.client_ca_file)} <= certificate_files(found)
    assert {"cognate-server", "agent-server"} <= seen


def certificate_files(found: Pods) -> set[str]:
    sources = volume_of(found, "/etc/cognateforge").get("projected", {}).get("sources", ())
    return {
        f"/etc/cognateforge/{item['path']}" for one in sources if "secret" in one for item in one["secret"]["items"]
    }


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_servers_have_the_time_to_drain(name: str) -> None:
    """First they leave their Services, then calls end or workers are handed over; and only then are they killed."""
    for found, settings in with_settings(name):
        if not found.is_server:
            continue
        leaves_s = found.containers[0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        workers = settings.workers
        drains_s = max(settings.drain_grace_s, workers.hand_over_grace_s) + TIDYING_S
        assert leaves_s + drains_s <= found.spec["terminationGracePeriodSeconds"]
        # The next pod is another server, but where it has the name and the folder of the one before.
        same = "hostname" in found.spec and "pod-0" not in str(settings.data_dir)
        assert workers.on_drain == ("keep" if same else "hand_over"), found.owner


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_engines_find_what_they_name(name: str) -> None:
    """Runtime, queue and priority class of TrainJobs, the file that workers read, or the job server of Ray."""
    objects = installation(name)
    named = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]): one for one in objects}
    engines = {}
    for found, settings in with_settings(name):
        if not found.is_server:
            continue
        engines[found.labels[NAME]] = settings.workers.engine
        told = settings.workers.kubernetes
        if settings.workers.engine == "kubernetes":
            assert told.namespace == found.namespace
            [workers] = pods([named["ClusterTrainingRuntime", None, told.runtime]])
            assert str(told.settings_file) == f"/etc/cognateforge/{service_of(found)}.toml"
            assert "/etc/cognateforge" in mounts(workers)
            if told.queue:
                local = named["LocalQueue", told.namespace, told.queue]
                queue = named["ClusterQueue", None, local["spec"]["clusterQueue"]]["spec"]
                assert selects(queue["namespaceSelector"], {"kubernetes.io/metadata.name": told.namespace})
                [group] = queue["resourceGroups"]
                assert told.resources.keys() <= set(group["coveredResources"])
                assert all(("ResourceFlavor", None, one["name"]) in named for one in group["flavors"])
                assert ("WorkloadPriorityClass", None, told.priority_class) in named
        elif settings.workers.engine == "ray":
            [cluster] = of_kind(objects, "RayCluster")
            assert settings.workers.ray.address == f"http://{cluster['metadata']['name']}-head-svc:8265"
    wanted = {
        "development": {"cognate-server": "local", "agent-server": "local"},
        "ray": {"cognate-server": "ray", "agent-server": "kubernetes"},
        "pool": {"cognate-server": "kubernetes", "agent-server": "local", "agent-worker": "local"},
    }
    assert engines == wanted.get(name, {"cognate-server": "kubernetes", "agent-server": "kubernetes"})


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_slots_are_counted_together(name: str) -> None:
    """Cognate's servers share a store: what can be reserved is what all of them have, whichever colour runs."""
    objects = installation(name)
    servers = [(f, s) for f, s in with_settings(name) if f.is_server and isinstance(s, CognateSettings)]
    replicas = [one.source["spec"].get("replicas", 1) for one, _ in servers]
    replicas += [one["spec"]["replicas"] for one in of_kind(objects, "Rollout")]
    for _, settings in servers:
        if max(replicas) > 1:
            assert settings.reservations.slots == max(replicas) * settings.workers.slots
        else:
            assert settings.reservations.slots in (None, settings.workers.slots)


@pytest.mark.parametrize("name", ["production", "rollouts"])
def test_a_server_on_trial_takes_no_job(name: str) -> None:
    """It would find out with a job that it is unfit, before its smoke test does."""
    tests = [one for one in of_kind(installation(name), "CronJob") if "smoke" in one["metadata"]["name"]]
    longest_s = max(one["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] for one in tests)
    for found, settings in with_settings(name):
        if found.is_server and isinstance(settings, CognateSettings):
            assert settings.workers.start_delay_s > longest_s


def test_the_pool_follows_the_jobs() -> None:
    """As many jobs for a server as it has slots, none for none; servers that take calls have no slots."""
    [scaled] = of_kind(installation("pool"), "ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    servers = {found.owner: settings for found, settings in with_settings("pool") if found.is_server}
    pool = servers[f"Deployment {scaled['spec']['scaleTargetRef']['name']}"]
    assert trigger["metadata"]["threshold"] == str(pool.workers.slots)
    assert (scaled["spec"]["minReplicaCount"], servers["Deployment agent"].workers.slots) == (0, 0)
    # Kubernetes sets the number of pods by two masters in turn, if a file does as well.
    [deployment] = [
        one for one in of_kind(installation("pool"), "Deployment") if one["metadata"]["name"] == "agent-pool"
    ]
    assert "replicas" not in deployment["spec"]


@pytest.mark.parametrize("name", ["cluster", "production", "pool"])
def test_scalers_ask_for_metrics_that_there_are(name: str) -> None:
    """With labels that these have."""
    labels = {one.name: set(one.labels) | {"service"} for one in CATALOG}
    for scaler in of_kind(installation(name), "HorizontalPodAutoscaler"):
        external = [one["external"]["metric"] for one in scaler["spec"]["metrics"] if one["type"] == "External"]
        for metric in external:
            assert metric["selector"]["matchLabels"].keys() <= labels[metric["name"]]
    for scaled in of_kind(installation(name), "ScaledObject"):
        query = scaled["spec"]["triggers"][0]["metadata"]["query"]
        [(metric, selected)] = re.findall(r"(forge_\w+)\{([^}]*)\}", query)
        assert set(re.findall(r"(\w+)[!=~]+\"", selected)) <= labels[metric]


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_identities_are_those_of_the_role_tables(name: str) -> None:
    """Each certificate has one, of the namespace and account that mount it; whoever has a role has a certificate."""
    objects = installation(name)
    given = {}
    for one in of_kind(objects, "Certificate"):
        spec = one["spec"]
        if spec.get("isCA"):
            continue
        [identity] = spec["uris"]
        given[one["metadata"]["namespace"], spec["secretName"]] = identity
        assert seconds(spec["renewBefore"]) > WARNED_S
        assert seconds(spec["duration"]) > seconds(spec["renewBefore"])
        assert spec["privateKey"]["rotationPolicy"] == "Always"
    for found in pods(objects):
        for volume in found.spec["volumes"]:
            for source in (volume, *volume.get("projected", {}).get("sources", ())):
                secret = source.get("secret", {})
                if secret:
                    identity = given[found.namespace, secret.get("secretName") or secret["name"]]
                    account = found.spec["serviceAccountName"]
                    assert identity == f"spiffe://cognateforge.local/ns/{found.namespace}/sa/{account}"
    tables = {service_of(found): settings.security.roles for found, settings in with_settings(name) if found.is_server}
    cognate, agent = tables["cognate"], tables["agent"]
    assert {identity for table in tables.values() for identity in table} <= set(given.values())
    own = "spiffe://cognateforge.local/ns/{}/sa/{}"
    assert {identity for identity, roles in cognate.items() if roles == ("agent_service",)} == {
        own.format("agent-forge", "agent-server"),
        own.format("agent-forge", "agent-worker"),
    }
    # Nobody of Cognate's has a role at the agent service.
    assert set(agent) == {own.format("agent-forge", "agent-smoke"), OPERATOR}


def seconds(duration: str) -> int:
    return int(duration.removesuffix("h")) * 3600


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_certificates_bear_the_names_that_are_dialed(name: str) -> None:
    """By the agent service and by smoke tests; each name is a Service's."""
    objects = installation(name)
    services = {f"{one['metadata']['name']}.{one['metadata']['namespace']}.svc" for one in of_kind(objects, "Service")}
    names = {one["metadata"]["name"]: set(one["spec"].get("dnsNames", ())) for one in of_kind(objects, "Certificate")}
    for found, settings in with_settings(name):
        if isinstance(settings, AgentSettings):
            host = settings.cognate.address.rpartition(":")[0]
            assert host in names["cognate-server"] & services
            files = settings.cognate.tls
            if found.labels[NAME] != "agent-backup":
                assert files is not None
                assert {str(files.ca_file), str(files.cert_file), str(files.key_file)} <= certificate_files(found)
    for found in pods(objects):
        if found.labels[NAME].endswith("-smoke") and "CronJob" in found.owner:
            variables = _environment(found)
            service = service_of(found)
            host = variables[f"FORGE_{service.upper()}"].rpartition(":")[0]
            assert host in names[f"{service}-server"] & services
            assert {str(Path(variables[f"FORGE_TLS_{one}"]).parent) for one in ("CA", "CERT", "KEY")} <= set(
                mounts(found)
            )


@pytest.mark.parametrize("name", ["cluster", "ray", "production", "rollouts", "pool"])
def test_rights_are_the_calls_of_the_engine(name: str) -> None:
    """Verb by verb and resource by resource; nobody has a right in the whole cluster."""
    objects = installation(name)
    roles = of_kind(objects, "Role")
    assert roles
    assert of_kind(objects, "ClusterRole", "ClusterRoleBinding") == []
    for role in roles:
        given = {
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        assert given == calls_of_the_engine()
    for binding in of_kind(objects, "RoleBinding"):
        [subject] = binding["subjects"]
        service = binding["metadata"]["name"].removesuffix("-trainjobs")
        assert (subject["name"], subject["namespace"]) == (f"{service}-server", binding["metadata"]["namespace"])
        assert binding["roleRef"]["name"] in {role["metadata"]["name"] for role in roles}


def calls_of_the_engine() -> set[tuple[str, str, str]]:
    """Return group, resource and verb of every call that the engine's code makes."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(engine))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        place = node.func.value
        if isinstance(place, ast.Attribute) and place.attr in ("_objects", "_core"):
            verb, _, what = node.func.attr.partition("_namespaced_")
            trainjobs = ("trainer.kubeflow.org", "trainjobs", verb)
            found.add({"custom_object": trainjobs, "pod": ("", "pods", verb)}[what])
    return found


@pytest.mark.parametrize("name", ["production", "rollouts"])
def test_workers_run_on_the_nodes_that_are_kept_for_them(name: str) -> None:
    """Cognate's tolerate the taint and need the label, as the flavor of their queue says; agents' do neither."""
    objects = installation(name)
    flavors = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "ResourceFlavor")}
    for found in pods(of_kind(objects, "ClusterTrainingRuntime")):
        tolerations = found.spec.get("tolerations", [])
        taints = flavors["cognate-gpu"]["nodeTaints"]
        tolerated = [
            any(
                (one["key"], one.get("value"), one["effect"]) == (t["key"], t["value"], t["effect"])
                for one in tolerations
            )
            for t in taints
        ]
        assert tolerated == [service_of(found) == "cognate"] * len(taints)
        if service_of(found) == "cognate":
            [term] = found.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
                "nodeSelectorTerms"
            ]
            assert selects(term, flavors["cognate-gpu"]["nodeLabels"])
            assert not selects(term, flavors["agent"]["nodeLabels"])


def test_a_trainjob_of_the_settings_is_valid(tmp_path: Path) -> None:
    """What the engine makes of production's settings: runtime, queue, priority and resources."""
    settings = next(settings for found, settings in with_settings("production") if found.owner == "Deployment agent")
    kubeconfig = tmp_path / "config"
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    kubeconfig.write_text(
        json.dumps(
            {
                "clusters": [cluster],
                "contexts": [context],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "current-context": "c",
            }
        )
    )
    told = settings.workers.kubernetes.model_copy(update={"kubeconfig": kubeconfig})
    made = engine.KubernetesEngine(told, module="agent_server.worker", owner="a")._manifest("forge-1-1", ["--job"], 2)
    assert problems(made) == []
    labels = made["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "training"
    assert labels["kueue.x-k8s.io/priority-class"] == "agent-training"
    assert made["spec"]["runtimeRef"] == {"name": "agent-worker"} | made["spec"]["runtimeRef"]
    assert made["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"cpu": "4", "memory": "16Gi"}


@pytest.mark.parametrize("name", ["cluster", "production"])
def test_backups_are_commands_that_there_are(name: str) -> None:
    """`forge backup` takes their arguments, each for its own service."""
    registered = typer.Typer()
    backup_command.register(registered)
    commands = typer.main.get_command(registered).commands  # type: ignore[attr-defined]
    places = {}
    for found in pods(of_kind(installation(name), "CronJob")):
        [container] = found.containers
        if container.get("command") == ["forge", "backup"]:
            variables = _environment(found)
            arguments = [one.replace("$(BACKUP_TO)", variables["BACKUP_TO"]) for one in container["args"]]
            given = commands["backup"].make_context("backup", arguments, resilient_parsing=False).params
            assert (given["service"], given["prune"], given["checkpoints"]) == (service_of(found), 96, True)
            assert str(given["settings"]) == f"/etc/cognateforge/{service_of(found)}.toml"
            places[service_of(found)] = given["to"]
            if not given["to"].startswith("s3://"):
                assert given["to"] in mounts(found)
    assert places.keys() == {"cognate", "agent"}


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_smoke_tests_are_commands_that_there_are(name: str) -> None:
    """`forge smoke` takes their arguments, each for its own service; in production each expects a release."""
    smoke = typer.main.get_command(app).commands["smoke"]  # type: ignore[attr-defined]
    found = [one for one in pods(installation(name)) if one.labels[NAME].endswith("-smoke")]
    assert {service_of(one) for one in found} == {"cognate", "agent"}
    for one in found:
        command, *arguments = one.containers[0]["args"]
        given = smoke.make_context("smoke", arguments).params
        assert (command, given["service"]) == ("smoke", service_of(one))
        if name in ("production", "pool"):
            assert re.fullmatch(r"\d+\.\d+\.\d+", given["expect_version"])


@pytest.mark.parametrize("name", ["cluster", "production"])
def test_monitoring_is_that_of_both_services(name: str) -> None:
    """Rules and dashboards word for word, and scrape jobs by the names that the rules ask for."""
    objects = installation(name)
    assert rules.WRITTEN.read_text() == rules.rules(), "run python deploy/kubernetes/rules.py"
    files = [yaml.safe_load(file.read_text()) for file in sorted(rules.RULES.glob("*.yml"))]
    found = {json.dumps(one["spec"], sort_keys=True) for one in of_kind(objects, "PrometheusRule")}
    assert found == {json.dumps(one, sort_keys=True) for one in files}
    dashboards: dict[str, str] = {}
    for one in of_kind(objects, "ConfigMap"):
        dashboards |= one["data"] if one["metadata"]["name"].startswith("grafana-") else {}
    assert dashboards == {file.name: file.read_text() for file in (ROOT / "deploy/monitoring/grafana").glob("*.json")}
    scraped = yaml.safe_load((ROOT / "deploy/monitoring/prometheus/prometheus.yml").read_text())["scrape_configs"]
    jobs = {job_of(one) for one in of_kind(objects, "PodMonitor")}
    assert jobs == {one["job_name"] for one in scraped}


def job_of(monitor: Object) -> str:
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    [name] = [one["replacement"] for one in endpoint["relabelings"] if one["targetLabel"] == "job"]
    assert (endpoint["port"], endpoint["path"]) == ("admin", "/metrics")
    return str(name)


def test_a_switch_is_one_selector() -> None:
    """The Services of calls and of trials select a colour each, of two Deployments that are alike but for it."""
    objects = installation("production")
    colours = {
        one["metadata"]["name"]: one["spec"]["selector"]["cognateforge.dev/colour"]
        for one in of_kind(objects, "Service")
        if one["metadata"]["namespace"] == "cognate"
    }
    assert set(colours) == {"cognate", "cognate-preview"}
    assert set(colours.values()) == {"blue", "green"}
    texts = {}
    for one in of_kind(objects, "Deployment"):
        if one["metadata"]["namespace"] == "cognate":
            colour = one["metadata"]["labels"]["cognateforge.dev/colour"]
            texts[colour] = json.dumps(one["spec"]["template"]).replace(colour, "COLOUR")
            assert one["spec"]["selector"]["matchLabels"]["cognateforge.dev/colour"] == colour
            idle = colour != colours["cognate"]
            assert (one["spec"]["replicas"] == 0) == idle
    versions = {colour: re.sub(r"(cognateforge/[\w-]+):[\w.]+", r"\1", text) for colour, text in texts.items()}
    assert versions["blue"] == versions["green"]


def test_a_registry_that_an_overlay_names_reaches_every_image(tmp_path: Path) -> None:
    """As docs/kubernetes.md tells to name it: also where the value of a variable is an image, for Argo Rollouts."""
    below = os.path.relpath(DEPLOY / "overlays" / "production" / "cognate-rollouts", tmp_path)
    names = [f"cognateforge/{one}" for one in ("cognate-server", "cognate-worker", "forge")]
    images = [{"name": one, "newName": f"registry.example.org/{one}", "newTag": "0.3.0"} for one in names]
    (tmp_path / "kustomization.yaml").write_text(json.dumps({"resources": [below], "images": images}))
    found = re.findall(rf"[\w./-]*(?:{'|'.join(names)}):[\w.-]+", json.dumps(build(tmp_path)))
    assert sorted({*found}) == sorted(f"registry.example.org/{one}:0.3.0" for one in names)
    [server] = [one for one in pods(build(tmp_path)) if one.is_server]
    assert _environment(server)["COGNATE_SERVER_WORKERS__KUBERNETES__IMAGE"] in found


def test_pods_of_ray_are_probed_by_what_the_image_has() -> None:
    """KubeRay's own probes run bash and wget in some releases; the agent of each node answers them over HTTP too."""
    containers = [one for found in pods(of_kind(installation("ray"), "RayCluster")) for one in found.containers]
    assert containers
    for container in containers:
        for part in ("readinessProbe", "livenessProbe"):
            assert container[part]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_whoever_talks_to_ray_has_it_in_its_image() -> None:
    """The server's engine is a client of Ray's own package."""
    for found, settings in with_settings("ray"):
        if found.is_server and settings.workers.engine == "ray":
            assert found.containers[0]["image"].endswith("-ray"), found.owner
    for found in pods(of_kind(installation("ray"), "RayCluster")):
        assert all(container["image"].endswith("-ray") for container in found.containers), found.owner


def test_the_simulator_keeps_trainjobs_for_as_long_as_the_engine() -> None:
    """tools/capacity.py counts those that ended: it has the time a second time, since the engine is an extra."""
    assert capacity_model._KEPT_HOURS * capacity_model.HOUR_S == engine._KEPT_S
