"""The model card of a foundation model: what it is, what it was made of, what was measured, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training_common.artifacts.cards import results_table, source_text

if TYPE_CHECKING:
    from cognate_server.artifacts import TrainedModel

_VERDICTS = {
    "READY": "READY: every check held.",
    "EXPERIMENTAL": "EXPERIMENTAL: a quality check did not hold. Agents take it only where their request says so.",
}


def model_card(family: str, model: TrainedModel) -> str:
    """Return the card as Markdown. Every number in it was measured or counted in the run that made the model."""
    architecture, training = model.architecture, model.training
    return f"""# {family}

A small language model that pretraining made from random values. It takes as many core steps for a token as the token
needs (ACT), and reads what it wrote down of earlier text (LTM). It continues text; agents are made of it.

## What it is

- Architecture: {architecture["name"]}, {architecture["fingerprint"]}
- Parameters: {architecture["parameter_count"]:,}
- Semantics: ACT version {architecture["act_version"]}, LTM version {architecture["ltm_version"]}
- Tokenizer: {model.tokenizer_digest}

## Made of

{_sources(model.sources)}
- {training["steps"]} steps of {training["batch_size"]} rows of {training["sequence_length"]} tokens, \
{training["tokens"]:,} tokens in all
- Peak learning rate {training["peak_learning_rate"]:g} after {training["warmup_steps"]} steps of warm-up, \
{training["precision"]}, seed {training["seed"]}

data.json has what became of each set's rows.

## GrokFast and recoveries

{_grokfast(model.grokfast)}
{_recoveries(model.recovery)}

## Measured

{_measured(model.results)}

The manifest's `training` has all that validation measured, and the histogram of core steps.

## Quality gate

{_VERDICTS[model.state]}

{_checks(model.checks)}

## Intended use and limits

It is a base for agents that are trained further, and a model to study. By itself it answers nothing reliably: it writes
what is likely after its training texts, in their language and form, and that need not be true or harmless. The figures
are of the rows named above; on others it may be worse. Nobody has looked for bias in it: do so before anything that is
made of it decides about people.
"""


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- Training rows: {source['rows']} of {source_text(source)}" for source in sources)


def _grokfast(grokfast: Mapping[str, Any]) -> str:
    departures = grokfast["departures"]
    kept = f"alpha {grokfast['alpha']:g}, lambda {grokfast['lambda']:g} after its ramp"
    if not departures:
        return f"GrokFast was on throughout: {kept}. Lambda never left its plan."
    lines = [f"- step {d['step']}: {d['before']:g} to {d['after']:g} ({d['reason']})" for d in departures]
    return "\n".join([f"GrokFast was on throughout: {kept}. Where lambda left its plan:", "", *lines])


def _recoveries(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return "Nothing had to be recovered from."
    lines = [f"- step {e['step']}: {e['detector'] or 'stable again'}, {e['action']}" for e in events]
    head = "What the recovery manager did, with its evidence in the manifest:"
    return "\n".join([head, "", *lines])


def _measured(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Nothing was measured on rows that it was not trained on."
    return f"{results_table(results)}\n\ndocs/metrics.md of the project says how each is computed."


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| {c['name']} | {'integrity' if c['integrity'] else 'quality'} | {c['value']:.6g} | {c['threshold']:.6g} | "
        f"{c['detail']} | {'yes' if c['passed'] else 'no'} |"
        for c in checks
    ]
    head = ["| check | kind | value | threshold | rule | held |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *lines])
