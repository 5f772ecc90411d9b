"""The Cognate service's composition root: settings in, a server that is ready to start out."""

from __future__ import annotations

import functools
from pathlib import Path

from cognate_server import metrics, migrations, telemetry
from cognate_server.dependents import ModelHolds
from cognate_server.forecast import Forecast
from cognate_server.leases import LeaseStore, end_leases
from cognate_server.models import find_model
from cognate_server.reservations import Calendar, RoomForReservations
from cognate_server.resources import CognateResourceManager
from cognate_server.rpc import convert
from cognate_server.rpc.models import ModelServicer
from cognate_server.rpc.pretraining import PretrainingServicer
from cognate_server.rpc.resources import ResourceServicer
from cognate_server.settings import CognateSettings
from cognate_server.validating import ModelValidator
from cognateforge.artifact.v1 import storage_pb2_grpc
from cognateforge.cognate.v1 import pretraining_pb2_grpc
from cognateforge.exchange.v1 import model_pb2_grpc, resource_pb2_grpc
from cognateforge.job.v1 import job_pb2
from training_common.artifacts.collect import ArtifactCollector
from training_common.artifacts.keeping import ArtifactKeeper
from training_common.artifacts.open import open_registry, require_store
from training_common.artifacts.outbox import compact_forever
from training_common.artifacts.scrub import Scrubber
from training_common.artifacts.search import adopt
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

TRAINING = ("cognateforge.cognate.v1.CognatePretrainingService",)
EXCHANGE = ("cognateforge.exchange.v1.ModelService", "cognateforge.exchange.v1.ResourceService")
STORAGE = ("cognateforge.artifact.v1.StorageService",)
SERVICES = (*TRAINING, *EXCHANGE, *STORAGE)


def build(settings: CognateSettings, settings_file: Path | None) -> RunningServer:
    """Wire the service. The database is brought to its newest revision first. Errors: SettingsError."""
    require_signing_key(settings)
    require_exporters(settings)
    require_store(settings)
    listener = create_server(settings, SERVICES)
    server = listener.server
    lock = FolderLock(settings.data_dir)
    database = Database(settings.database_url)
    database.upgrade(Path(migrations.__file__).parent)
    reservable = settings.reservations.slots
    calendar = Calendar(database, slots=settings.workers.slots if reservable is None else reservable)
    store = JobStore(database, calendar)
    registry = open_registry(settings, database)
    adopt(registry)
    engine = build_engine(settings, module="cognate_server.worker")
    worker_settings = worker_settings_file(settings, settings_file)
    leases = LeaseStore(database)
    resources = CognateResourceManager(store, leases, workers=settings.workers, lending=settings.lending)
    verifier = Verifier(
        VerificationStore(store),
        engine,
        settings.workers,
        settings_file=worker_settings,
        server=settings.server_name,
        may_start=lambda connection: calendar.has_room(connection) and resources.has_room(connection),
    )
    scheduler = Scheduler(
        store,
        engine,
        settings.workers,
        settings_file=worker_settings,
        server=settings.server_name,
        in_the_way=resources.make_room,
        verifier=verifier,
        preempting=RoomForReservations(store, calendar, grace_s=settings.reservations.grace_s),
    )
    events, outbox = ChangeHub(database, store.progress), ChangeHub(database, registry.progress)
    changed_leases = ChangeHub(database, leases.progress)
    health = HealthMonitor(database, scheduler, training=TRAINING, other=(*EXCHANGE, *STORAGE))
    keeper = ArtifactKeeper(registry, settings.artifacts, ModelHolds(), find_model)
    collector, scrubber = ArtifactCollector(keeper), Scrubber(registry, settings.artifacts)
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
        bounds=calendar,
        forecast=Forecast(calendar, server=settings.server_name).expected,
    )
    info = job_pb2.ServerInfo(
        version=release_of(settings.SERVICE), capabilities=[f"engine.{engine.name}", "watch_models"]
    )
    pretraining_pb2_grpc.add_CognatePretrainingServiceServicer_to_server(
        PretrainingServicer(
            jobs,
            calendar=calendar,
            settings=settings,
            validator=ModelValidator(registry, settings, scratch=settings.data_dir / "validations"),
            info=info,
        ),
        server,
    )
    models = ModelServicer(
        registry,
        outbox,
        heartbeat_s=settings.heartbeat_frame_s,
        sent=listener.telemetry.sender("cognateforge.exchange.v1.ModelService/FetchModel"),
    )
    model_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
    resource_pb2_grpc.add_ResourceServiceServicer_to_server(
        ResourceServicer(resources, changed_leases, heartbeat_s=settings.heartbeat_frame_s), server
    )
    storage_pb2_grpc.add_StorageServiceServicer_to_server(StorageServicer(keeper, collector, scrubber), server)
    listener.telemetry.watch(
        database,
        live=[functools.partial(of_scheduler, scheduler), functools.partial(of_artifacts, scrubber)],
        stored=[
            JobReadings(
                store,
                lambda: scheduler.standing,
                bounds=calendar,
                training_jobs=settings.telemetry.training_jobs,
            ).read,
            telemetry.LeaseReadings(leases).read,
            telemetry.outbox(models.slowest_watcher),
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
            outbox.run(),
            compact_forever(registry, keep_events=settings.outbox.keep_events),
            changed_leases.run(),
            end_leases(leases, scheduler.wake),
        ],
    )
