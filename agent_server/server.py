"""The agent service's composition root: settings in, a server that is ready to start out."""

from __future__ import annotations

import functools
from pathlib import Path

import structlog

from agent_server import metrics, migrations, telemetry
from agent_server.agents import AgentHolds, adopt_agents, find_agent
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.borrowing import Borrower
from agent_server.descents import adopt_descents
from agent_server.evaluating import Evaluator, Places
from agent_server.foundation import CognateLink, require_public_keys
from agent_server.preemption import Preemption
from agent_server.resources import AgentResourceManager
from agent_server.rpc import convert
from agent_server.rpc.agents import AgentServicer
from agent_server.rpc.training import TrainingServicer
from agent_server.settings import AgentSettings, require_model_folder
from agent_server.telling import Teller
from cognateforge.agent.v1 import agent_pb2_grpc, training_pb2_grpc
from cognateforge.artifact.v1 import storage_pb2_grpc
from cognateforge.job.v1 import job_pb2
from training_common.artifacts.collect import ArtifactCollector
from training_common.artifacts.keeping import ArtifactKeeper
from training_common.artifacts.open import open_registry, require_store
from training_common.artifacts.scrub import Scrubber
from training_common.artifacts.signing import require_signing_key
from training_common.engines.build import build_engine, worker_settings_file
from training_common.exporters import require_exporters
from training_common.folder_lock import FolderLock
from training_common.jobs.folders import jobs_dir
from training_common.jobs.hub import ChangeHub
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.store import JobStore
from training_common.jobs.sweeper import Sweeper
from training_common.jobs.verifications import VerificationStore
from training_common.jobs.verifier import Verifier
from training_common.release import release_of
from training_common.rpc.estimates import Estimator
from training_common.rpc.health import HealthMonitor
from training_common.rpc.jobs import JobService
from training_common.rpc.logs import log_watcher
from training_common.rpc.server import RunningServer, create_server
from training_common.rpc.storage import StorageServicer
from training_common.store.database import Database
from training_common.telemetry.job_state import JobReadings
from training_common.telemetry.service_state import of_artifacts, of_scheduler

log = structlog.get_logger(__name__)

TRAINING = ("cognateforge.agent.v1.AgentForgeTrainingService",)
REGISTRY = ("cognateforge.agent.v1.AgentService",)
STORAGE = ("cognateforge.artifact.v1.StorageService",)
SERVICES = (*TRAINING, *REGISTRY, *STORAGE)


def build(settings: AgentSettings, settings_file: Path | None) -> RunningServer:
    """Wire the service. The database is brought to its newest revision first. Errors: SettingsError."""
    require_model_folder(settings.models)
    require_signing_key(settings)
    require_exporters(settings)
    require_public_keys(settings.cognate)
    require_store(settings)
    listener = create_server(settings, SERVICES)
    server = listener.server
    factory = AgentArchitectureFactory()
    for problem in factory.problems:
        log.warning("agent architecture not loaded", plugin=problem.name, entry=problem.value, reason=problem.reason)
    lock = FolderLock(settings.data_dir)
    database = Database(settings.database_url)
    database.upgrade(Path(migrations.__file__).parent)
    resources = AgentResourceManager(database, settings)
    store = JobStore(database, resources)
    registry = open_registry(settings, database)
    adopt_agents(registry)
    adopt_descents(registry)
    keeper = ArtifactKeeper(registry, settings.artifacts, AgentHolds(database), find_agent)
    collector, scrubber = ArtifactCollector(keeper), Scrubber(registry, settings.artifacts)
    engine = build_engine(settings, module="agent_server.worker")
    worker_settings, name = worker_settings_file(settings, settings_file), settings.server_name
    verifier = Verifier(VerificationStore(store), engine, settings.workers, settings_file=worker_settings, server=name)
    scheduler = Scheduler(
        store,
        engine,
        settings.workers,
        settings_file=worker_settings,
        server=name,
        verifier=verifier,
        preempting=Preemption(store, resources, settings.preemption) if settings.preemption.least_difference else None,
    )
    events = ChangeHub(database, store.progress)
    health = HealthMonitor(database, scheduler, training=TRAINING, other=(*REGISTRY, *STORAGE))
    sweeper = Sweeper(database, jobs_dir(settings), settings.retention)
    jobs = JobService(
        store=store,
        scheduler=scheduler,
        hub=events,
        to_message=convert.job,
        estimator=Estimator(
            server=settings.server_name,
            price=settings.price,
            gpus=settings.workers.devices_per_worker if settings.workers.devices else 0,
        ),
        units={name: metric.unit for name, metric in metrics.METRICS.items()},
        heartbeat_s=settings.heartbeat_frame_s,
        logs=log_watcher(settings, store),
        sweeper=sweeper,
        damaged_artifacts=lambda: scrubber.damaged,
        bounds=resources,
    )
    link = CognateLink(settings.cognate)
    tasks = sorted({task for architecture in factory for task in architecture.tasks})
    info = job_pb2.ServerInfo(
        version=release_of(settings.SERVICE),
        capabilities=[f"engine.{engine.name}", *(f"task.{task}" for task in tasks)],
    )
    evaluator = Evaluator(
        registry,
        settings.evaluation,
        scratch=settings.data_dir / "evaluations",
        places=Places(
            files_dir=settings.files_dir,
            artifacts=settings.artifacts,
            hub_dir=settings.files_dir / "hub",
            data=settings.data,
            modules=settings.environments.modules,
        ),
    )
    training_pb2_grpc.add_AgentForgeTrainingServiceServicer_to_server(
        TrainingServicer(
            jobs,
            factory=factory,
            settings=settings,
            cognate=link,
            resources=resources,
            evaluator=evaluator,
            registry=registry,
            info=info,
        ),
        server,
    )
    sent = listener.telemetry.sender("cognateforge.agent.v1.AgentService/FetchAgent")
    agent_pb2_grpc.add_AgentServiceServicer_to_server(AgentServicer(registry, sent=sent), server)
    storage_pb2_grpc.add_StorageServiceServicer_to_server(StorageServicer(keeper, collector, scrubber), server)
    borrower = Borrower(store, scheduler, link, slots=settings.workers.slots, settings=settings.borrow)
    borrowing = [borrower.run] if settings.borrow.cores else []
    listener.telemetry.watch(
        database,
        live=[
            functools.partial(of_scheduler, scheduler),
            functools.partial(of_artifacts, scrubber),
            functools.partial(telemetry.of_link, link),
        ],
        stored=[
            JobReadings(
                store,
                lambda: scheduler.standing,
                bounds=resources,
                training_jobs=settings.telemetry.training_jobs,
            ).read
        ],
        recoveries=telemetry.RECOVERIES,
    )
    return RunningServer(
        listener,
        settings=settings,
        services=SERVICES,
        health=health,
        database=database,
        lock=lock,
        hand_over=scheduler.hand_over,
        tasks=[
            scheduler.run(),
            events.run(),
            sweeper.run(),
            collector.run(),
            scrubber.run(),
            link.keep(Teller(database, link).run, *borrowing),
        ],
    )
