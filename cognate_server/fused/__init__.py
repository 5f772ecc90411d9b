"""The operations between a Cognate's matrix products, each of them in one pass over memory."""

from cognate_server.fused.operations import Embedded, FusedOperations, choose, head_gradients, is_available

__all__ = ["Embedded", "FusedOperations", "choose", "head_gradients", "is_available"]
