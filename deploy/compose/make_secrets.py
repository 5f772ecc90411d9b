"""Write the secrets of deploy/compose.yaml, each into a file of its own; those that are there stay.

    python3 deploy/compose/make_secrets.py

Needs nothing but Python. The folder is for its owner alone; the files in it are readable, because containers read them
as users of their own.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "secrets"


def make(folder: Path) -> list[str]:
    """Write what is missing, and return its names."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: list[str] = []

    def keep(name: str, value: str) -> str:
        file = folder / name
        if not file.exists():
            # Whole or not at all: what is there stays, and would be half a password for good.
            begun = file.with_suffix(".new")
            begun.write_text(value, encoding="utf-8")
            begun.chmod(0o644)
            begun.replace(file)
            made.append(name)
        return file.read_text(encoding="utf-8")

    for name in ("postgres_password", "grafana_password"):
        keep(name, secrets.token_urlsafe(24))
    for service in ("cognate", "agent"):
        password = keep(f"{service}_database_password", secrets.token_urlsafe(24))
        keep(f"{service}_store_url", f"postgresql+psycopg://{service}:{password}@postgres:5432/{service}")
    key_id = keep("s3_access_key_id", secrets.token_hex(10))
    secret = keep("s3_secret_access_key", secrets.token_urlsafe(30))
    credentials = [{"accessKey": key_id, "secretKey": secret}]
    identities = [{"name": "cognateforge", "credentials": credentials, "actions": ["Admin"]}]
    keep("s3_identities", json.dumps({"identities": identities}))
    return made


if __name__ == "__main__":
    print(f"{FOLDER}: {', '.join(make(FOLDER)) or 'nothing was missing'}")  # noqa: T201 - for people
    sys.exit(0)
