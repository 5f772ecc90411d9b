"""Fingerprints and sizes of the released architectures, for processes that must not import torch.

A test holds each of them against the one that is computed from the architecture itself.
"""

from __future__ import annotations

from typing import Final

# cognate_v1 at the sizes of Cognate-25M: architecture_fingerprint(CognateV1Config()).
COGNATE_V1_25M: Final = "sha256:5ac00c7b9216302edaa9fafda335154ff61c7825e6bf5df04fad976b0eb247bf"
# Its parameters in all; of these, of its adaptive parts; and of its language head, which agents leave unused.
COGNATE_V1_25M_PARAMETERS: Final = 24_998_668
COGNATE_V1_25M_ADAPTIVE: Final = 1_646_604
COGNATE_V1_25M_HEAD: Final = 277_760
# Parameters of each of its blocks, in order, and the width of what they give.
COGNATE_V1_25M_BLOCKS: Final = (3_015_680,) * 5
COGNATE_V1_25M_WIDTH: Final = 512
# Inputs and outputs of the linear layers of its blocks, summed up: what low-rank updates have parameters for.
COGNATE_V1_25M_LINEAR_INPUTS: Final = 14_080
COGNATE_V1_25M_LINEAR_OUTPUTS: Final = 25_600
