"""Settings of the Cognate service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from training_common.settings import Section, ServiceSettings, load

ENVIRONMENT_PREFIX = "COGNATE_SERVER_"


class PretrainingSettings(Section):
    """How pretraining computes."""

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="type of matrix products; auto is bfloat16 where the processor multiplies it"
    )
    reasoning_problems: int = Field(
        default=16,
        ge=1,
        le=10_000,
        description="held-out problems of each set that a score of reasoning asks for; a share of 16 is coarse, and "
        "takes 30 s of one core while no answer ends early",
    )
    # The whole solution fits for 84 % of held-out GSM8K, 90 % of HotpotQA and all generated problems; 64 tokens would
    # hold 6 % of GSM8K's, and no score could be above that.
    reasoning_tokens: int = Field(
        default=192, ge=1, le=4096, description="longest answer to such a problem, in tokens; what is cut off is wrong"
    )


class ValidationSettings(Section):
    """Validations of published models on request. Each is a process beside the workers, and takes no slot of theirs."""

    at_once: int = Field(default=1, ge=1, le=64, description="validations at the same time; further ones are refused")
    threads: int = Field(default=1, ge=1, le=1024, description="torch threads of each")


class LendingSettings(Section):
    """What of this host may be borrowed while Cognate's own jobs leave it idle, and how it is taken back."""

    keep_cores: int = Field(default=0, ge=0, description="processor cores that are never lent")
    keep_memory_bytes: int = Field(default=2 << 30, ge=0, description="main memory that is never lent")
    keep_gpus: int = Field(default=0, ge=0, description="graphics processors that are never lent")
    gpus: int | None = Field(default=None, ge=0, description="graphics processors of this host; none: as found")
    grace_s: float = Field(default=30.0, gt=0, le=3600, description="time to let go when a job needs what is lent")
    longest_ttl_s: float = Field(default=3600.0, ge=1, description="a lease that asks for more gets this")


class ReservationSettings(Section):
    """What of the slots can be kept for a time."""

    slots: int | None = Field(
        default=None,
        ge=0,
        le=4096,
        description="slots of all servers that share the store; none: this server's, which is the only one",
    )
    grace_s: float = Field(
        default=120.0, gt=0, le=3600, description="time for other jobs to make room, before their workers are killed"
    )


class OutboxSettings(Section):
    """How much of what happened to models can be watched from an earlier position."""

    keep_events: int = Field(default=100_000, ge=0, description="newest model events that are kept; 0 keeps all")


class CognateSettings(ServiceSettings):
    """What the Cognate service is told. GrokFast is not among it: its values are constants of the code."""

    SERVICE: ClassVar[str] = "cognate"
    address: str = "127.0.0.1:7101"
    data_dir: Path = Path("var/cognate")
    pretraining: PretrainingSettings = PretrainingSettings()
    validation: ValidationSettings = ValidationSettings()
    lending: LendingSettings = LendingSettings()
    reservations: ReservationSettings = ReservationSettings()
    outbox: OutboxSettings = OutboxSettings()

    @model_validator(mode="after")
    def _reservations_are_of_all_slots(self) -> Self:
        slots = self.reservations.slots
        if slots is not None and slots < self.workers.slots:
            raise ValueError(
                f"reservations.slots: {slots} is less than this server's own {self.workers.slots} (workers.slots): "
                "write the slots of all servers of the store"
            )
        return self


def load_settings(file: Path | None) -> CognateSettings:
    """Read the settings. Errors: SettingsError."""
    return load(CognateSettings, file=file, prefix=ENVIRONMENT_PREFIX)
