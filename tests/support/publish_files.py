"""Publishes a folder's files as the next cognate-25m, by whichever release's code it finds: it imports nothing else.

python publish_files.py STORE_URL ARTIFACTS FILES BODY
"""

import json
import sys
from pathlib import Path

from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry
from training_common.store.database import Database

store_url, artifacts, files, body = sys.argv[1:]
database = Database(store_url)
registry = ArtifactRegistry(database, BlobStore(Path(artifacts)))
stored = [registry.blobs.put(file, file.name) for file in sorted(Path(files).iterdir())]
with database.write() as connection:
    row = registry.publish(
        connection, family="cognate-25m", state="EXPERIMENTAL", job="jobs/x", files=stored, body=json.loads(body)
    )
database.close()
print(json.dumps(row.name))
