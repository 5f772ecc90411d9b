"""Settings of the Cognate service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from training_common.settings import Section, ServiceSettings, load

ENVIRONMENT_PREFIX = "COGNATE_SERVER_"


class PretrainingSettings(Section):
    """How pretraining computes."""

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of matrix products; auto is bfloat16 where the processor multiplies it"
    )


class OutboxSettings(Section):
    """How much of what happened to models can be watched from an earlier position."""

    keep_events: int = Field(default=100_000, ge=0, description="newest model events that are kept; 0 keeps all")


class CognateSettings(ServiceSettings):
    """What the Cognate service is told. GrokFast is not among it: its values are constants of the code."""

    address: str = "127.0.0.1:7101"
    data_dir: Path = Path("var/cognate")
    pretraining: PretrainingSettings = PretrainingSettings()
    outbox: OutboxSettings = OutboxSettings()


def load_settings(file: Path | None) -> CognateSettings:
    """Read the settings. Errors: SettingsError."""
    return load(CognateSettings, file=file, prefix=ENVIRONMENT_PREFIX)
