"""The model card of a published agent: what it is, what it was made of, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from agent_server.adaptation import MERGE_TOLERANCE, ParameterCount
from agent_server.evaluation import Evaluation
from agent_server.train_config import AgentTrainConfig

_MEANINGS = {
    "accuracy_before": "accuracy with the untrained head",
    "accuracy_after": "accuracy",
    "macro_f1_before": "macro-F1 with the untrained head",
    "macro_f1_after": "macro-F1",
    "majority_share": "accuracy of always answering the most frequent label",
    "validation_accuracy": "accuracy on validation rows",
}
# More labels than this are counted, not listed.
_LISTED_LABELS = 40


def model_card(
    config: AgentTrainConfig,
    *,
    data: str,
    labels: Sequence[str],
    count: ParameterCount,
    change: float,
    evaluations: Sequence[Evaluation],
    training_rows: int,
) -> str:
    """Return the card as Markdown. Every number in it was measured or counted in this run."""
    measured = "\n".join(
        f"| {_MEANINGS.get(e.metric, e.metric)} | {e.dataset} | {e.value:.4f} | {e.rows} |" for e in evaluations
    )
    listed = ", ".join(labels) if len(labels) <= _LISTED_LABELS else "named in config.json"
    optimization = config.optimization
    return f"""# {config.agent}

Gives a short text one of {len(labels)} labels: {listed}.

## Made of

- Foundation: {config.foundation or "unnamed"} ({config.foundation_digest or "no digest"}), architecture {config.architecture}
- Training rows: {training_rows} of {data}
- Trained parameters: {count.trainable:,} of {count.total:,} ({_method(config)})
- {config.total_steps} steps of {config.batch_size} rows, {optimization.optimizer.value}, peak learning rate \
{optimization.lr:g}, schedule {optimization.schedule.value}, seed {config.seed}

## Measured

| what | rows from | value | rows |
| --- | --- | --- | --- |
{measured}

{_merge_line(config, change)}

## Limits

It always answers with one of its labels, also where none fits. Texts are cut off after {config.max_tokens} tokens. The
figures are of the rows named above; other texts may be answered worse.
"""  # noqa: E501 - one line of the card


def _method(config: AgentTrainConfig) -> str:
    lora = config.adaptation.lora
    method = "full" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.effective_alpha:g}"
    return f"{method}; ACT and LTM {'trained' if config.adaptation.unfreeze_act_ltm else 'frozen'}"


def _merge_line(config: AgentTrainConfig, change: float) -> str:
    if config.adaptation.lora is None:
        return "The files, read back, gave exactly the trained model's logits."
    return (
        f"Merging the low-rank updates moved no logit by more than {change:.1e} of the largest one (allowed: "
        f"{MERGE_TOLERANCE:.0e}). The files, read back, gave exactly the merged model's logits."
    )
