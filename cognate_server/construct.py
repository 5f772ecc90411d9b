"""Making a Cognate out of nothing: the only place of the project that fills a model with random values.

ConstructionError
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from training_common.models.cognate_v1 import CognateV1, CognateV1Config, count_parameters
from training_common.models.fingerprints import COGNATE_V1_25M_PARAMETERS

SPECIFICATION = CognateV1Config()
SPECIFIED_PARAMETERS = COGNATE_V1_25M_PARAMETERS

EMBEDDING_STD = 0.02
STEP_VECTOR_STD = 0.1
INITIAL_CONTENTS_STD = 0.1
INJECT_START = 0.5
# Half of the tokens near 0.5 halt in two steps and half go on, so that the first gradients see both sides.
HALTING_START = 0.45
HALTING_STD = 0.02
# Strengths start near exp(u / 2 - 6), so that they rise with the root of a token's rarity and rarely reach their most.
WRITE_BIAS_START = -6.0
SURPRISE_SCALE_START = 0.5
# The memory's part of a prediction: of 0.05 and 0.1, 0.1 was the better one for a cache of the same tokens.
HEAD_SHARE_START = 0.1
# Tokens never seen still need a finite bias; a tenth of a count keeps their mass small for a vocabulary larger than
# what a small data set uses.
UNIGRAM_SMOOTHING = 0.1
_RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight", "memory.read_output.weight")


class ConstructionError(ValueError):
    """The model asked for is not the specified one; the message names every deviation."""

    def __init__(self, deviations: list[str]) -> None:
        super().__init__("; ".join(deviations))
        self.deviations = tuple(deviations)


class CognateModelConstructor:
    """Builds the specified architecture with random values, and refuses to build any other.

    specification: Cognate-25M; tests hand in a small one.
    """

    def __init__(self, specification: CognateV1Config = SPECIFICATION) -> None:
        self.specification = specification

    def construct(self, config: CognateV1Config, *, seed: int, unigram_counts: Tensor) -> CognateV1:
        """Return a model whose values are a function of the seed and the counts alone.

        unigram_counts: how often each token occurs in the training data, (V,); the logit bias starts at the log
            frequency and the head's projection at zero, so that the first loss is that of the token frequencies alone.
        Errors: ConstructionError.
        """
        deviations = self._deviations(config, unigram_counts)
        if deviations:
            raise ConstructionError(deviations)
        model = CognateV1(config)
        _fill(model, torch.Generator().manual_seed(seed), log_frequency(unigram_counts))
        self._check(model)
        return model

    def _deviations(self, config: CognateV1Config, unigram_counts: Tensor) -> list[str]:
        wanted, given = dataclasses.asdict(self.specification), dataclasses.asdict(config)
        found = [f"{name} is {given[name]}, the specification says {wanted[name]}" for name in wanted]
        found = [text for name, text in zip(wanted, found, strict=True) if wanted[name] != given[name]]
        if self.specification == SPECIFICATION and count_parameters(SPECIFICATION) != SPECIFIED_PARAMETERS:
            found.append(f"the specification has {count_parameters(SPECIFICATION)} parameters, not 24998668")
        shape = tuple(unigram_counts.shape)
        if shape != (config.vocabulary_size,):
            found.append(f"unigram_counts has the shape {shape}, the vocabulary has {config.vocabulary_size} tokens")
        elif bool((unigram_counts < 0).any()) or float(unigram_counts.sum()) <= 0:
            found.append("unigram_counts must be counts of at least one token, none of them negative")
        return found

    def _check(self, model: CognateV1) -> None:
        """Count what was built, since a formula and a module can drift apart."""
        expected = count_parameters(self.specification)
        built = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        wrong = [f"built {built} trainable parameters, the specification has {expected}"] if built != expected else []
        wrong += [f"{name} is not finite" for name, value in model.named_parameters() if not value.isfinite().all()]
        if wrong:
            raise ConstructionError(wrong)


def log_frequency(counts: Tensor) -> Tensor:
    """Return the smoothed log unigram frequency, float32: its exponentials sum to 1."""
    smoothed = counts.double() + UNIGRAM_SMOOTHING
    return (smoothed / smoothed.sum()).log().float()


@torch.no_grad()
def _fill(model: CognateV1, generator: torch.Generator, log_frequency_V: Tensor) -> None:
    config = model.config
    applications = config.prelude_blocks + config.max_steps * config.core_blocks + config.coda_blocks
    # Two residual branches per application: the residual stream's variance stays that of its start.
    output_gain = 1 / math.sqrt(2 * applications)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2 and name.endswith(".weight"):
            gain = output_gain if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
            parameter.normal_(0, gain / math.sqrt(parameter.shape[1]), generator=generator)
    model.embedding.weight.normal_(0, EMBEDDING_STD, generator=generator)
    model.step_vectors_ND.normal_(0, STEP_VECTOR_STD, generator=generator)
    model.inject_D.fill_(INJECT_START)
    model.halting.weight.normal_(0, HALTING_STD, generator=generator)
    model.halting.bias.fill_(_logit(HALTING_START))
    memory = model.memory
    memory.addresses_MD.normal_(0, 1, generator=generator)
    memory.initial_MD.normal_(0, INITIAL_CONTENTS_STD, generator=generator)
    memory.write_gate.weight.zero_()
    memory.write_gate.bias.fill_(WRITE_BIAS_START)
    memory.head_gate.weight.zero_()
    memory.head_gate.bias.fill_(_logit(HEAD_SHARE_START))
    memory.surprise_scale.fill_(SURPRISE_SCALE_START)
    memory.read_gate.weight.zero_()
    model.head.weight.zero_()
    model.head_bias_V.copy_(log_frequency_V)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
