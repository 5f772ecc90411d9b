"""Fingerprints of the released architectures, for processes that must not import torch.

A test holds each of them against the one that is computed from the architecture itself.
"""

from __future__ import annotations

from typing import Final

# cognate_v1 at the sizes of Cognate-25M: architecture_fingerprint(CognateV1Config()).
COGNATE_V1_25M: Final = "sha256:0860a00f90f35b4b7656298f1a5781772220f3dbd0b8e9a8c164fcedc6a016ab"
