"""Runs the gate on a published model's stored files, in a process of its own: python -m cognate_server.validate FOLDER.

The data is prepared as the version's statement says that it was, with the version's own tokenizer, and must be the same
bytes. So the checks are those that decided about the version, unless files, machine or release differ in what counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import ParseDict, ParseError

from cognate_server.construct import SPECIFIED_PARAMETERS
from cognate_server.data.build import build_stream
from cognate_server.data.stream import CognateTokenStream
from cognate_server.data_plan import data_plan
from cognate_server.evaluation import evaluate_on
from cognate_server.gate import GateReport, judge
from cognate_server.plan import source_settings
from cognate_server.run import PretrainConfig
from cognate_server.settings import PretrainingSettings
from cognate_server.validation import first_rows, validate
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import ArtifactCorruptError, DataUnavailableError, IncompatibleError
from training_common.artifacts.blobs import StoredFile
from training_common.artifacts.files import unpack
from training_common.artifacts.open import open_store
from training_common.artifacts.statement import DATA_REPORT, statement_in
from training_common.models.cognate_v1 import CognateV1, config_from_json, load_state
from training_common.settings import ArtifactSettings, DataSettings
from training_common.side_process import answer_order


@dataclass(frozen=True, kw_only=True)
class Published:
    """A version's files in a folder, and its name."""

    name: str
    folder: Path

    def plan(self) -> pb.PretrainingPlan:
        """Return the plan that it was made by, as its statement tells it. Errors: IncompatibleError."""
        _, predicate = statement_in(self.folder)
        if not predicate:
            raise IncompatibleError(
                f"{self.name} has no statement of how it was made, so what it was judged on is unknown"
            )
        try:
            return ParseDict(predicate["plan"]["fields"], pb.PretrainingPlan())
        except ParseError as error:
            raise IncompatibleError(
                f"this release cannot read the plan of {self.name}: validate it with the release that made it"
            ) from error

    def model(self) -> CognateV1:
        """Return the model as its files say. Errors: ArtifactCorruptError."""
        try:
            config = config_from_json(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))
            model = CognateV1(config)
            load_state(model, self.folder / "model.safetensors")
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactCorruptError(f"{self.name}: its files cannot be loaded: {type(error).__name__}") from error
        return model.eval()

    def stream(self, plan: pb.PretrainingPlan, data: DataSettings) -> CognateTokenStream:
        """Return the data that it was trained and judged on. Errors: DataUnavailableError."""
        report: Mapping[str, Any] = json.loads((self.folder / DATA_REPORT).read_text(encoding="utf-8"))
        stream, found = build_stream(
            data_plan(plan),
            source_settings(data),
            tokenizer_file=self.folder / "tokenizer.json",
            folder=self.folder,
        )
        for source, was in zip(found.sources, report["sources"], strict=True):
            is_now = source.to_json()
            if (is_now["name"], is_now["digest"]) != (was["name"], was["digest"]):
                raise DataUnavailableError(
                    f"{self.name} was judged on {was['name']} with digest {was['digest']}, and this server's data "
                    f"gives {is_now['name']} with {is_now['digest']}: set data.folder to where that set is"
                )
        if found.stream_digest != report["stream_digest"]:
            raise IncompatibleError(
                f"this release makes other rows of the data of {self.name}: validate it with the release that made it"
            )
        return stream


def gate(
    version: Published, data: DataSettings, settings: PretrainingSettings, *, expected: int = SPECIFIED_PARAMETERS
) -> GateReport:
    """Run the gate on a version's files.

    settings: how much a score of reasoning asks for. expected: parameters of the architecture; tests have smaller ones.
    Errors: ArtifactCorruptError, DataUnavailableError, IncompatibleError.
    """
    plan, model = version.plan(), version.model()
    stream = version.stream(plan, data)
    rows = first_rows(stream.validation_batches(), PretrainConfig.validation_rows)
    return judge(
        version.folder / "model.safetensors",
        validate(model, rows, stream.unigram_counts()),
        evaluate_on(stream, plan.sequence_length, settings, model),
        max_steps=model.config.max_steps,
        expected_parameters=expected,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code. Whatever the version or the data lacks is told to the server."""
    folder = Path(arguments[0])

    def work(order: dict[str, Any]) -> list[dict[str, Any]]:
        torch.set_num_threads(order["threads"])
        blobs = open_store(ArtifactSettings.model_validate(order["artifacts"]), Path(order["files_dir"]))
        files = [StoredFile(**file) for file in json.loads(order["manifest"])["files"]]
        version = Published(name=order["name"], folder=folder / "model")
        unpack(files, blobs, version.folder)
        data = DataSettings.model_validate(order["data"])
        pretraining = PretrainingSettings.model_validate(order["pretraining"])
        return [check.told() for check in gate(version, data, pretraining).checks]

    return answer_order(folder, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
