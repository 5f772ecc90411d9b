"""Fingerprints of the released architectures, for processes that must not import torch.

A test holds each of them against the one that is computed from the architecture itself.
"""

from __future__ import annotations

from typing import Final

# cognate_v1 at the sizes of Cognate-25M: architecture_fingerprint(CognateV1Config()).
COGNATE_V1_25M: Final = "sha256:5ac00c7b9216302edaa9fafda335154ff61c7825e6bf5df04fad976b0eb247bf"
