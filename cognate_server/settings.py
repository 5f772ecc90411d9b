"""Settings of the Cognate service."""

from __future__ import annotations

from pathlib import Path

from training_common.settings import ServiceSettings, load

ENVIRONMENT_PREFIX = "COGNATE_SERVER_"


class CognateSettings(ServiceSettings):
    """What the Cognate service is told. GrokFast is not among it: its values are constants of the code."""

    address: str = "127.0.0.1:7101"
    data_dir: Path = Path("var/cognate")


def load_settings(file: Path | None) -> CognateSettings:
    """Read the settings. Errors: SettingsError."""
    return load(CognateSettings, file=file, prefix=ENVIRONMENT_PREFIX)
