"""One of several servers that share a store: schedules toy jobs until it is killed.

python -m tests.support.toy_server SETTINGS_FILE
"""

import asyncio
import sys
from pathlib import Path

from tests.support.toy_worker import load_settings
from training_common.engines.local import LocalEngine
from training_common.jobs.folders import jobs_dir
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.store import JobStore
from training_common.store.database import Database

if __name__ == "__main__":
    file = Path(sys.argv[1])
    settings = load_settings(file)
    database = Database(settings.database_url)
    engine = LocalEngine(module="tests.support.toy_worker", log_dir=jobs_dir(settings))
    scheduler = Scheduler(JobStore(database), engine, settings.workers, settings_file=file, server=settings.server_name)
    asyncio.run(scheduler.run())
