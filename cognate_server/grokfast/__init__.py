"""GrokFast over AdamW as one optimizer: the only one that the pretraining service can build.

optimizer: the class, what it promises and what it records.
update: the arithmetic of one step, and the choice of an implementation: native, kernels (CPU), foreach (anywhere, GPU).
"""

from cognate_server.grokfast.optimizer import (
    ALPHA,
    BETAS,
    EMA_RAMP_STEPS,
    EPSILON,
    LAMBDA,
    LAMBDA_FLOOR,
    MAX_GRADIENT_NORM,
    WEIGHT_DECAY,
    GrokFastAdamW,
    GrokFastDiverged,
    LambdaDeparture,
    StepReport,
    parameter_groups,
)

__all__ = [
    "ALPHA",
    "BETAS",
    "EMA_RAMP_STEPS",
    "EPSILON",
    "LAMBDA",
    "LAMBDA_FLOOR",
    "MAX_GRADIENT_NORM",
    "WEIGHT_DECAY",
    "GrokFastAdamW",
    "GrokFastDiverged",
    "LambdaDeparture",
    "StepReport",
    "parameter_groups",
]
