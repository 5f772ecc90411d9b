"""What happens to foundation models as CloudEvents 1.0, in structured JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from cognateforge.exceptions import ClientSetupError
from cognateforge.exchange.v1 import model_pb2

CONTENT_TYPE = "application/cloudevents+json"
MODEL_PUBLISHED = "cognateforge.exchange.v1.ModelPublished"
MODEL_CHANGED = "cognateforge.exchange.v1.ModelChanged"
# The extension "sequence" orders as text: as many digits as the largest int64 has.
_SEQUENCE_DIGITS = 19


@dataclass(frozen=True, kw_only=True)
class ModelCloudEvent:
    """One event: which model it is about, and its place in the outbox.

    sequence: the outbox's; 0 for a model out of a snapshot, whose own entry is gone. The snapshot's last model has the
    sequence that the snapshot was taken at.
    newest: of a change, the newest model that was told of before; a reader of the stream's end goes on behind it.
    """

    source: str
    subject: str
    sequence: int
    time: str
    data: dict[str, Any]
    type: str = MODEL_PUBLISHED
    newest: str = ""

    @property
    def id(self) -> str:
        """Return what is unique in the source: a version is published once, whether event or snapshot tells of it."""
        what = "published" if self.type == MODEL_PUBLISHED else f"{self.sequence}"
        return f"{self.subject}/{what}"

    def to_json(self) -> bytes:
        """Return the event in structured mode."""
        attributes = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "subject": self.subject,
            "time": self.time,
            "datacontenttype": "application/json",
            **({"sequence": f"{self.sequence:0{_SEQUENCE_DIGITS}d}"} if self.sequence else {}),
            **({"newestmodel": self.newest} if self.newest else {}),
            "data": self.data,
        }
        return json.dumps(attributes, ensure_ascii=False).encode()


def from_event(event: model_pb2.ModelEvent, source: str, newest: str = "") -> ModelCloudEvent:
    """Return an event of the outbox. newest: the newest model that was told of before.

    Errors: ClientSetupError, for a kind that this release does not know.
    """
    time = event.time.ToJsonString()
    match event.WhichOneof("kind"):
        case "published":
            return _of(event.published, source, event.sequence, time)
        case "changed":
            return ModelCloudEvent(
                source=source,
                subject=event.changed.model.name,
                sequence=event.sequence,
                time=time,
                data=json_format.MessageToDict(event.changed, preserving_proto_field_name=True),
                type=MODEL_CHANGED,
                newest=newest,
            )
        case _:
            raise ClientSetupError(
                f"event {event.sequence} is of a kind that this release does not know: install a newer one"
            )


def from_snapshot(model: model_pb2.FoundationModel, source: str, *, sequence: int = 0) -> ModelCloudEvent:
    """Return a model of a snapshot. sequence: where the snapshot was taken, for its last model."""
    return _of(model, source, sequence, model.create_time.ToJsonString())


def place_of(raw: bytes, source: str) -> tuple[str, int]:
    """Return the newest model that is told of up to an event that was written before, and the event's sequence.

    The sequence is 0 where it has none.

    Errors: ClientSetupError, when it is no event of this source.
    """
    try:
        event = json.loads(raw)
        if event["type"] not in (MODEL_PUBLISHED, MODEL_CHANGED) or event["source"] != source:
            raise ValueError(event["source"])
        newest = event["subject"] if event["type"] == MODEL_PUBLISHED else event.get("newestmodel", "")
        return str(newest), int(event.get("sequence", "0"))
    except (ValueError, KeyError, TypeError) as error:
        raise ClientSetupError(
            f"the last message is no {MODEL_PUBLISHED}, or change, of source {source}: give the stream of this source, "
            "or a new one"
        ) from error


def _of(model: model_pb2.FoundationModel, source: str, sequence: int, time: str) -> ModelCloudEvent:
    data = json_format.MessageToDict(model, preserving_proto_field_name=True)
    return ModelCloudEvent(source=source, subject=model.name, sequence=sequence, time=time, data=data)
