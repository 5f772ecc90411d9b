"""Every metric that agent training reports: its name, its unit and what it means. Defined here and nowhere else.

A metric that was not measured is absent from a progress event; none is ever estimated, carried over or filled in.
`STEPS` are told of training steps, `MEASURED` are measured on rows that are not trained on, `FLOORS` need no model.
"""

from __future__ import annotations

from collections.abc import Mapping

from training_common.metrics import Metric

STEPS: Mapping[str, Metric] = {
    "loss": Metric(
        unit="nats",
        definition="mean since the progress event before: cross-entropy of the right label over rows (classification), "
        "of the right tag over tokens (extraction), of trained tokens by their texts' weights (tasks that write), or "
        "the loss of direct preference optimization over pairs; with a KL term where the agent is held to its base",
    ),
    "train_accuracy": Metric(
        unit="1",
        definition="share of the rows trained on since the progress event before whose likeliest label was right",
    ),
    "train_token_accuracy": Metric(
        unit="1",
        definition="share of the tokens trained on since the progress event before whose right tag, or which itself, "
        "was the likeliest",
    ),
    "train_preference_accuracy": Metric(
        unit="1", definition="share of the pairs trained on since the progress event before that were preferred rightly"
    ),
    "kl_to_base": Metric(
        unit="nats",
        definition="KL divergence of the agent from its untrained self at trained tokens, by their texts' weights, "
        "over the 16 tokens that this held likeliest and all others as one: a lower bound of the whole divergence",
    ),
    "learning_rate": Metric(unit="1", definition="the optimizer's learning rate in this step"),
    "gradient_norm": Metric(unit="1", definition="norm of the gradient over the trained parameters, before clipping"),
    "samples_per_s": Metric(
        unit="rows/s", definition="trained rows over the time of their steps since the progress event before"
    ),
    "peak_memory_bytes": Metric(unit="bytes", definition="largest resident set of the worker process so far"),
    "seconds_left": Metric(unit="s", definition="optimizer steps left times the running mean of a step's time"),
    "cost_so_far": Metric(
        unit="currency of the server",
        definition="time that this and earlier attempts took, times the price of the job's workers; absent without one",
    ),
    "loss_slope": Metric(
        unit="loss per 100 steps",
        definition="slope of a straight line through the losses of the newest 20 steps, by least squares: convergence",
    ),
    "generalization_gap": Metric(
        unit="as the loss",
        definition="loss on validation rows less the loss of steps since the progress event before; larger is worse",
    ),
    "return": Metric(
        unit="reward",
        definition="sum of an episode's rewards, undiscounted, mean over the agents and over the episodes that ended "
        "in this rollout, in which actions are drawn; absent where none ended",
    ),
    "validation_return": Metric(
        unit="reward",
        definition="the same of whole episodes by the likeliest actions, begun by the same seeds each time",
    ),
    "policy_loss": Metric(
        unit="1", definition="clipped objective of policy optimization, negated, mean over the update's steps"
    ),
    "value_loss": Metric(
        unit="reward^2", definition="squared error of the critics against the estimated returns, mean over the update"
    ),
    "entropy": Metric(unit="nats", definition="entropy of the policies over their actions, mean over the update"),
    "clip_share": Metric(
        unit="1", definition="share of actions whose ratio of probabilities left the range that is not clipped"
    ),
    "policy_drift": Metric(
        unit="nats",
        definition="KL(old || new) of an update, estimated on its rollout; of several agents the largest",
    ),
    "explained_variance": Metric(
        unit="1",
        definition="1 - Var(target - value) / Var(target) of a rollout: what the critics had foreseen of the estimated "
        "returns; absent where these do not vary",
    ),
    "environment_steps": Metric(unit="steps", definition="steps taken in all environments together so far"),
    "environment_steps_per_s": Metric(
        unit="steps/s", definition="steps of a rollout over the time of rollout and update together"
    ),
}

MEASURED: Mapping[str, Metric] = {
    "accuracy": Metric(unit="1", definition="share of rows whose likeliest label is right"),
    "macro_f1": Metric(unit="1", definition="F1 of each label that occurs among the rows, their plain mean"),
    "loss": Metric(
        unit="nats",
        definition="mean cross-entropy for each trained token by the texts' weights, or for each token's tag; of "
        "preferences the mean loss of pairs",
    ),
    "perplexity": Metric(unit="1", definition="exponential of the loss for each trained token"),
    "turn_loss": Metric(
        unit="nats",
        definition="mean cross-entropy of the tokens of each of the agent's turns, its plain mean over turns",
    ),
    "exact_match": Metric(
        unit="1",
        definition="share of written answers that equal an accepted one without case, punctuation, articles and space",
    ),
    "token_f1": Metric(
        unit="1", definition="F1 of a written answer's words, best over the accepted ones, its mean over answers"
    ),
    "ast_match": Metric(
        unit="1",
        definition="share of written answers whose calls are accepted ones as syntax trees, or that call nothing where "
        "no tool fits",
    ),
    "action_kind_accuracy": Metric(
        unit="1", definition="share of written turns whose action is of the demonstrated kind"
    ),
    "action_exact_match": Metric(
        unit="1", definition="share of written turns whose action has the demonstrated kind and argument"
    ),
    "violation_share": Metric(
        unit="1", definition="share of written turns whose action is of no allowed kind, or cannot be read"
    ),
    "slot_precision": Metric(unit="1", definition="share of found spans whose borders and label are right"),
    "slot_recall": Metric(unit="1", definition="share of spans that were found with right borders and label"),
    "slot_f1": Metric(unit="1", definition="harmonic mean of slot_precision and slot_recall"),
    "preference_accuracy": Metric(
        unit="1",
        definition="share of pairs whose preferred answer has the larger implied reward, a tie counting half: 0.5 "
        "before the first step",
    ),
    "reward_margin": Metric(
        unit="nats",
        definition="mean of the preferred answer's implied reward less the other's; the reward is beta times the "
        "answer's log probability less the untrained model's",
    ),
    "likelihood_accuracy": Metric(
        unit="1",
        definition="share of pairs whose preferred answer the agent itself holds likelier, a tie counting half",
    ),
}

FLOORS: Mapping[str, Metric] = {
    "majority_share": Metric(
        unit="1",
        definition="share of the test rows' most frequent label or kind of action: the best constant answer's score",
    ),
    "unknown_label_share": Metric(
        unit="1",
        definition="share of the rows of another set whose label the agent does not know; they are in no other metric",
    ),
    "no_call_share": Metric(
        unit="1", definition="share of the test rows where no tool fits: what an agent scores that never calls one"
    ),
    "return_before": Metric(
        unit="reward",
        definition="sum of an episode's rewards, undiscounted, mean over the agents and over whole episodes, by the "
        "likeliest actions of the policy before its first step",
    ),
    "return_random": Metric(
        unit="reward", definition="the same, in the same episodes, by actions that are drawn without a look"
    ),
    "return_after": Metric(
        unit="reward", definition="the same, in the same episodes, by the likeliest actions after the last step"
    ),
    "coordination": Metric(
        unit="reward",
        definition="return_after less the same when each agent acts on what it saw in another episode, no two of them "
        "in the same one; absent of one agent, or of fewer episodes than agents + 1",
    ),
    "normalized_gain": Metric(
        unit="1",
        definition="share of what was left to gain that training gained, of scores whose best is 1: "
        "(after - before) / (1 - before); of a behavioural agent its adaptation",
    ),
    "deployment_readiness": Metric(
        unit="1",
        definition="share of the checks that pass, which the manifest names: the score is finite, improved, and beats "
        "its floor by more than chance, and no trouble was left unmended",
    ),
    "forgetting": Metric(
        unit="as the score",
        definition="how much worse the task's score is on the earlier set's test rows after training than before",
    ),
}

ON_REQUEST: Mapping[str, Metric] = {
    "unknown_label_share": Metric(
        unit="1",
        definition="share of the set's test rows whose label the agent does not know, or of their spans whose slot it "
        "does not know; these are left out of the others; absent where it knows all of them",
    ),
    "return": Metric(
        unit="reward",
        definition="sum of an episode's rewards, undiscounted, mean over the agents and over whole episodes, by the "
        "likeliest actions; the episodes begin by the seeds of those of training",
    ),
}

METRICS: Mapping[str, Metric] = {**STEPS} | {
    f"validation_{name}": Metric(
        unit=metric.unit, definition=f"{metric.definition}; on the same validation rows each time"
    )
    for name, metric in MEASURED.items()
}

_MOMENTS = {
    "{}_before": "on test rows before the first step",
    "{}_after": "on the same test rows after the last step",
    "validation_{}": "on validation rows after the last step",
    "earlier_{}_before": "on the earlier set's test rows before the first step",
    "earlier_{}_after": "on the same rows after the last step",
}
# What is measured around a run and published with the agent, by the names that the trainer records.
EVALUATIONS: Mapping[str, Metric] = {**FLOORS} | {
    moment.format(name): Metric(unit=metric.unit, definition=f"{metric.definition}; {when}")
    for moment, when in _MOMENTS.items()
    for name, metric in MEASURED.items()
}
