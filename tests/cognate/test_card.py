"""The card of a foundation model tells what was measured, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cognate_server.artifacts import TrainedModel
from cognate_server.card import model_card
from cognate_server.data.build import DataManifest
from cognate_server.evaluation import ReasoningScore
from cognate_server.metrics import METRICS
from cognate_server.trainer import PretrainResult
from cognate_server.worker import _results
from tests.cognate.test_gate import GOOD

DIGEST = f"sha256:{'d' * 64}"
MODEL = TrainedModel(
    folder=Path(),
    state="EXPERIMENTAL",
    architecture={
        "name": "cognate_v1",
        "fingerprint": f"sha256:{'a' * 64}",
        "parameter_count": 24_998_668,
        "act_version": 1,
        "ltm_version": 2,
    },
    tokenizer_digest=f"sha256:{'b' * 64}",
    sources=[{"name": "gsm8k", "kind": "folder", "rows": 7000, "digest": DIGEST}],
    checks=[
        {
            "name": "memory_gain_nats",
            "integrity": False,
            "value": -0.25,
            "threshold": 0.125,
            "passed": False,
            "detail": "must be > the threshold",
        }
    ],
    results=[{"metric": "validation_loss", "dataset": "gsm8k/validation", "value": 2.5, "rows": 16}],
    training={
        "steps": 400,
        "tokens": 1_638_400,
        "seed": 7,
        "batch_size": 8,
        "sequence_length": 512,
        "peak_learning_rate": 0.002,
        "warmup_steps": 20,
        "precision": "bfloat16",
    },
    grokfast={
        "alpha": 0.98,
        "lambda": 2.0,
        "departures": [{"step": 90, "before": 2.0, "after": 1.0, "reason": "lowered"}],
    },
    recovery=[{"step": 90, "detector": "loss_spike", "action": "lower_lambda"}],
)


def test_a_card_tells_every_number_of_the_run() -> None:
    """What it is, what it was made of, GrokFast's departures, recoveries, results, the verdict with its checks."""
    card = model_card("cognate-25m", MODEL)
    for text in (
        "# cognate-25m\n",
        f"Architecture: cognate_v1, sha256:{'a' * 64}",
        "Parameters: 24,998,668",
        "ACT version 1, LTM version 2",
        f"Training rows: 7000 of gsm8k (folder, {DIGEST})",
        "400 steps of 8 rows of 512 tokens, 1,638,400 tokens in all",
        "alpha 0.98, lambda 2 after its ramp. Where lambda left its plan:",
        "- step 90: 2 to 1 (lowered)",
        "- step 90: loss_spike, lower_lambda",
        "| validation_loss | gsm8k/validation | 2.5000 | 16 |",
        "EXPERIMENTAL: a quality check did not hold.",
        "| memory_gain_nats | quality | -0.25 | 0.125 | must be > the threshold | no |",
        "## Intended use and limits",
    ):
        assert text in card


def test_a_card_claims_nothing_that_was_not_measured() -> None:
    """Without results, departures and recoveries it says so."""
    quiet: dict[str, Any] = {**MODEL.grokfast, "departures": []}
    plain = dataclasses.replace(MODEL, state="READY", results=[], recovery=[], grokfast=quiet)
    card = model_card("cognate-25m", plain)
    for text in ("READY: every check held.", "Nothing was measured", "Lambda never left its plan", "Nothing had to be"):
        assert text in card
    assert "loss_spike" not in card


@pytest.mark.parametrize("accelerated", [False, True])
def test_results_stand_under_the_names_of_the_metrics(accelerated: bool) -> None:
    """Validation over all sets with held-out rows, reasoning over each; a control's factor only if measured."""

    class Named:
        """What is read of a set's manifest, of a run and of its control."""

        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    def source(name: str, held_out: int) -> Any:
        return Named(source=Named(dataset=Named(value=name)), documents={"train": 9, "validation": held_out})

    data: DataManifest = Named(sources=[source("gsm8k", 3), source("empty", 0), source("hotpotqa", 2)])  # type: ignore[assignment]
    run: PretrainResult = Named(validation=GOOD, acceleration=Named(factor=1.5) if accelerated else None)  # type: ignore[assignment]
    scores = [
        ReasoningScore(source="gsm8k", problems=8, exact_match=0.125, f1=None, floor=0.1),
        ReasoningScore(source="hotpotqa", problems=4, exact_match=0.25, f1=0.5, floor=0.1),
    ]
    found = {(one["metric"], one["dataset"]): (one["value"], one["rows"]) for one in _results(data, run, scores)}
    mixture = "gsm8k+hotpotqa/validation"
    assert (GOOD.loss, GOOD.rows) == found["validation_loss", mixture]
    assert (0.125, 8) == found["gsm8k_exact_match", "gsm8k/validation"]
    assert (0.5, 4) == found["hotpotqa_f1", "hotpotqa/validation"]
    assert accelerated == (("acceleration_factor", mixture) in found)
    assert {metric for metric, _ in found} <= METRICS.keys()
    assert 6 + accelerated == len(found)
